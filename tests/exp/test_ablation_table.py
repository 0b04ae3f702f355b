import json

import pytest

from tiny_onn.errors import UserError


@pytest.fixture
def table(script):
    return script("ablation", "table")


def result(arm="dense", seed=0, nll=0.5, budget="10min", **changes):
    minutes = float(budget.removesuffix("min")) if budget.endswith("min") else None
    tokens = None if minutes is not None else int(budget.removesuffix("Mtok")) * 10**6
    return {
        "experiment": "sparse_parts",
        "arm": arm,
        "tag": "",
        "budget": budget,
        "budget_minutes": minutes,
        "budget_tokens": tokens,
        "seed": seed,
        "threads": 2,
        "jobs": 1,
        "commit": "abc",
        "device": "2 x CPU",
        "torch": "2.13.0",
        "nll_per_output_token": nll,
        "exact_match": 0.25,
        "num_outputs": 159,
        "num_decoded": 159,
        "tokens": 6_000_000,
        "minutes": 10.0,
        "minutes_command": 10.5,
        "tokens_per_s": 12000.0,
        "parameters": 1_300_000,
        "active_parameters": 1_200_000,
        "experts": None,
        "mean_active_experts": None,
        "dead_experts": None,
    } | changes


def cells(table, results):
    return [dict(zip(table.HEAD, row, strict=True)) for row in table.rows(results)]


def test_means_and_spread_over_seeds(table):
    (row,) = cells(table, [result(seed=0, nll=0.5), result(seed=1, nll=0.6)])
    assert row["seeds"] == "0, 1"
    assert row["hold-out NLL"] == "0.550 (0.500..0.600)"
    assert row["exact match"] == "25.0% (25.0%..25.0%)"
    assert row["against dense"] == row["mean experts"] == row["dead experts"] == ""


def test_one_seed_has_no_spread(table):
    (row,) = cells(table, [result()])
    assert row["hold-out NLL"] == "0.500"
    assert row["tokens/s"] == "12,000" and row["Mtokens"] == "6.00"
    assert row["parameters"] == "1.300M" and row["active"] == "1.200M"


def test_the_distance_from_dense_is_paired_by_seed_and_budget(table):
    results = [
        result(seed=0, nll=0.5),
        result(seed=1, nll=0.7),
        result("nsa", seed=0, nll=0.4),
        result("nsa", seed=1, nll=0.8),
        result("nsa", seed=2, nll=9.0),
        result("dense", nll=3.0, budget="6Mtok"),
        result("nsa", nll=2.0, budget="6Mtok"),
    ]
    rows = cells(table, results)
    assert [row["budget"] for row in rows] == ["10min", "10min", "6Mtok", "6Mtok"]
    assert rows[1]["against dense"] == "+0.000 (-0.100..+0.100)"
    assert rows[3]["against dense"] == "-1.000"


def test_runs_that_share_the_machine_otherwise_are_rows_of_their_own(table):
    results = [
        result(nll=0.5),
        result("nsa", nll=0.4),
        result(nll=0.7, threads=1, jobs=2),
        result("nsa", nll=0.8, threads=1, jobs=2),
        result("nsa", nll=0.9, threads=1),
    ]
    rows = [(row["threads x jobs"], row["against dense"]) for row in cells(table, results)]
    assert rows == [
        ("1 x 1", ""),
        ("1 x 2", ""),
        ("1 x 2", "+0.100"),
        ("2 x 1", ""),
        ("2 x 1", "-0.100"),
    ]
    assert "threads of a run x runs at once" in table.render(results)


def test_a_tagged_arm_is_compared_with_dense_of_its_tag_if_there_is_one(table):
    results = [
        result(nll=0.5),
        result(nll=0.7, tag="wide"),
        result("nsa", nll=0.8, tag="wide"),
        result("nsa", nll=0.8, tag="w16"),
    ]
    rows = {row["arm"]: row["against dense"] for row in cells(table, results)}
    assert rows == {
        "dense": "",
        "dense (wide)": "+0.200",
        "+NSA (wide)": "+0.100",
        "+NSA (w16)": "+0.300",
    }


def test_without_dense_there_is_no_distance(table):
    (row,) = cells(table, [result("nsa")])
    assert row["against dense"] == ""


def test_experts_are_counted_where_there_are_some(table):
    experts = {"experts": 32, "mean_active_experts": 2.5, "dead_experts": 3}
    (row,) = cells(table, [result("dynmoe", **experts)])
    assert row["mean experts"] == "2.50" and row["dead experts"] == "3 of 32"


def test_a_row_is_an_arm_and_tag_in_the_order_of_the_arms(table):
    results = [
        result("all", tag="e16"),
        result("gone"),
        result("all"),
        result("dense"),
        result("all", tag="e16", seed=1),
    ]
    assert [row["arm"] for row in cells(table, results)] == ["dense", "all", "all (e16)", "gone"]


def test_the_table_is_markdown_of_equal_columns_with_its_circumstances_below(table):
    text = table.render([result(), result("nsa", commit="def", num_decoded=64)])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert set(lines[1]) <= set("|- ")
    assert "commit abc; def" in text
    assert "64 of 159; 159 of 159" in text
    assert table.render([]) == "no results yet"


def test_results_are_read_from_their_files_and_others_are_left_alone(table, tmp_path):
    (tmp_path / "ablation_b.json").write_text(json.dumps(result(seed=1)))
    (tmp_path / "ablation_a.json").write_text(json.dumps(result(seed=0)))
    (tmp_path / "ablation_c.json").write_text(json.dumps({"experiment": "another"}))
    (tmp_path / "race.json").write_text("{")
    assert [found["seed"] for found in table.read_results(tmp_path)] == [0, 1]


def test_a_torn_result_is_named_in_one_line_with_the_remedy(table, tmp_path):
    path = tmp_path / "ablation_x.json"
    path.write_text("{")
    with pytest.raises(UserError) as error:
        table.read_results(tmp_path)
    text = str(error.value)
    assert str(path) in text and "delete it" in text and "\n" not in text
