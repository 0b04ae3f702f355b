import json

import pytest

from tiny_onn.errors import UserError


@pytest.fixture
def compare(experiment):
    return experiment("eavi", "compare")


@pytest.fixture
def commands(compare, monkeypatch):
    """What would be run, one list of words a command; its run is measured as nothing."""
    found = []

    def command(threads, *words):
        if "budget.steps=2" in words:
            warm_ups.append(words)
        else:
            found.append(words)

    warm_ups = []
    monkeypatch.setattr(compare, "command", command)
    monkeypatch.setattr(compare, "measured", lambda arm, seed, args, run: result(arm, seed))
    yield found
    # Of both stages, before anything is timed; once a call.
    stages = [words[-6] for words in warm_ups]
    assert stages == ["stage=pretrain", "stage=eavi"] * (len(stages) // 2) and bool(stages) == bool(
        found
    )


def result(arm, seed, name="sparse_10min_2t", **more):
    exposure = dict.fromkeys(
        ("exact_forced", "colors_forced", "colors_own", "gap", "nll_forced", "nll_own"), 0.5
    )
    return {
        "arm": arm,
        "name": name,
        "seed": seed,
        "exposure": exposure | {"recovery": 0.1 * seed, "recovery_cells": 0.25},
        "holdout": {"exact_match": 0.25},
        "seconds_per_step": None,
        "tokens": 1000 * (seed + 1),
        **more,
    }


def run(compare, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["compare.py", *words])
    return compare.main()


def test_every_second_half_begins_with_the_same_model_and_lasts_half_as_long(
    compare, commands, monkeypatch
):
    run(compare, monkeypatch, "--seeds", "1", "--arms", "teacher,soft", "--minutes", "6")
    first, teacher, again, soft = commands
    begin = "runs/eavi/pretrained_sparse_6min_2t_seed1"
    for words in (first, again):
        assert f"out={begin}" in words and "budget.minutes=6" in words
    for words, stage in ((teacher, "stage=pretrain"), (soft, "stage=eavi")):
        assert {stage, f"init_from={begin}", "budget.minutes=3", "seed=1"} < set(words)
        assert set(compare.OPTIMIZER) < set(words)
        assert "data.holdout=train_tests" in words
    assert "eavi.feed=soft" in soft


def test_tagged_arms_keep_their_own_results_and_the_same_beginning(compare, commands, monkeypatch):
    words = ("--seeds", "0", "--arms", "soft", "--tag", "few", "eavi.share_end=0.5")
    run(compare, monkeypatch, *words)
    assert "out=runs/eavi/pretrained_sparse_10min_2t_seed0" in commands[0]
    assert "out=runs/eavi/soft_sparse_10min_2t_few_seed0" in commands[1]
    assert commands[1][-1] == "eavi.share_end=0.5"
    assert (compare.RESULTS / "eavi_soft_sparse_10min_2t_few_seed0.json").is_file()


def test_what_has_a_result_is_skipped(compare, commands, monkeypatch):
    for _ in range(2):
        run(compare, monkeypatch, "--seeds", "0", "--arms", "teacher")
    assert len(commands) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--arms", "soft,hard"], "got arm 'hard'"), (["eavi.feed=soft"], "give --tag NAME")],
)
def test_wrong_arguments_are_one_line(compare, commands, monkeypatch, words, message):
    with pytest.raises(UserError, match=message):
        run(compare, monkeypatch, *words)
    assert not commands


def test_the_table_has_means_and_extremes_and_gaps_where_nothing_is(compare):
    for seed in (0, 1):
        path = compare.result_path("soft", "sparse_10min_2t", seed)
        path.write_text(json.dumps(result("soft", seed)))
    _, _, head, _, row, _ = compare.table().split("\n")
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["recovery"] == "0.050 (0.000..0.100)"
    assert cells["task mean pass@2"] == cells["s/step"] == ""
    assert cells["tokens |"] == "1,500 (1,000..2,000) |"
    assert compare.table("another") == ""


def test_seconds_a_step_are_the_median_between_lines_of_the_log(compare, tmp_path):
    log = tmp_path / "logs" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("step,seconds\n1,30.0\n11,35.0\n21,40.0\n31,99.0\n31,\n")
    assert compare.seconds_per_step(tmp_path) == 0.5
    log.write_text("step,seconds\n1,30.0\n")
    assert compare.seconds_per_step(tmp_path) is None
