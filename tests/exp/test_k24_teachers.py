"""Teachers that are masks of one matrix: what can be reached, recovery, runs, files and table."""

import json
from dataclasses import replace

import pytest
import torch

from tiny_onn.errors import UserError


@pytest.fixture
def task(script):
    return script("k24", "teachers_task")


@pytest.mark.parametrize("rare", [False, True])
def test_the_irreducible_error_is_that_of_least_squares(task, rare):
    teachers = task.make_teachers(3, outputs=5, inputs=8, rare=rare)
    x_ABI, y_ABO = teachers.draw(8_000, torch.Generator().manual_seed(0))
    x_NI, y_NO = x_ABI.flatten(0, 1).double(), y_ABO.flatten(0, 1).double()
    fitted_IO = torch.linalg.lstsq(x_NI, y_NO).solution
    torch.testing.assert_close(fitted_IO.T.float(), teachers.best_shared(), atol=0.03, rtol=0.0)
    residual = float((x_NI @ fitted_IO - y_NO).square().mean())
    assert residual == pytest.approx(teachers.irreducible(), rel=0.04)
    assert float(y_NO.square().mean()) == pytest.approx(teachers.power(), rel=0.04)
    worse = teachers.best_shared() + 0.01 * torch.randn(5, 8)
    assert teachers.loss(worse) > teachers.irreducible() > 0


def test_independent_masks_leave_three_eighths_of_the_power(task):
    teachers = task.make_teachers(0, outputs=256, inputs=256)
    assert teachers.irreducible() / teachers.power() == pytest.approx(3 / 8, rel=0.01)


def test_the_teachers_own_masks_recover_all_and_others_by_chance(task):
    teachers = task.make_teachers(0)
    own = teachers.mask_AOI
    assert task.recovery(own, own) == (1.0, 1.0)
    assert teachers.loss(teachers.weight_AOI) == 0.0
    assert (own.unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all()
    entries, groups = task.recovery(task.make_teachers(1).mask_AOI, own)
    assert entries == pytest.approx(1 / 2, abs=0.02) and groups == pytest.approx(1 / 6, abs=0.02)


def test_distinct_teachers_never_have_the_same_pattern(task):
    own = task.make_teachers(0, draw="distinct").mask_AOI.unflatten(-1, (-1, 4))
    for i in range(4):
        for j in range(i):
            assert not (own[i] == own[j]).all(dim=-1).any()


@pytest.fixture
def teachers(experiment, monkeypatch):
    run = experiment("k24", "teachers")
    monkeypatch.setitem(run.train.__globals__, "SIZE", 16)
    return run


def test_a_short_run_improves_on_its_start(teachers):
    found = teachers.train(teachers.ARMS["k24"], 0, 150)
    first, last = found["history"][0], found["history"][-1]
    assert last["loss"] < 0.7 * first["loss"] and last["step"] == 150
    assert last["groups"] > first["groups"] and 0 < last["agreement"] <= 1
    assert found["settings"]["k24"]["schedule_steps"] == 150
    json.dumps(found)


def test_one_dense_matrix_lands_at_the_irreducible_error_and_masks_at_zero(teachers):
    assert teachers.train(teachers.ARMS["shared"], 0, 500)["loss"] == pytest.approx(1, abs=0.05)
    found = teachers.train(teachers.ARMS["true"], 0, 500)
    assert found["loss"] < 0.01 and found["groups"] == 1.0


def test_agents_that_start_equal_stay_equal_but_for_their_data(teachers):
    found = teachers.train(teachers.ARMS["std0"], 0, 1)
    assert found["history"][0]["overlap"] == pytest.approx(1.0)


@pytest.mark.parametrize("arm", ["free", "soft-threshold", "rank8", "score", "given"])
def test_every_kind_of_student_trains(teachers, arm):
    found = teachers.train(teachers.ARMS[arm], 0, 4)
    assert found["loss"] > 0 and 0 <= found["groups"] <= 1


def test_resets_and_revival_run_as_in_a_product_run(teachers):
    options = {"reset_interval": 2, "revive_window": 2, "revive_share": 1.0, "kappa_start": 16.0}
    found = teachers.train(replace(teachers.ARMS["k24"], options=options), 0, 10)
    assert found["resets"] == 4 and found["revived"] > 0


def test_runs_are_written_once_and_other_steps_are_refused(teachers, monkeypatch, capsys):
    teachers.run_all(["shared", "k24"], [0, 1], 3)
    found = json.loads(teachers.result_path("k24", 1).read_text())
    assert found["seed"] == 1 and found["arm"] == "k24" and found["torch"] == torch.__version__
    monkeypatch.setattr(teachers, "train", None)  # nothing is trained twice
    teachers.run_all(["shared", "k24"], [0, 1], 3)
    assert "there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="got --steps 4, but .* has 3.*delete it"):
        teachers.run_all(["k24"], [0], 4)
    assert len(teachers.table(teachers.load_results()).splitlines()) == 4


def test_the_table_has_means_spreads_and_flips(teachers):
    def run(loss, groups, agreement):
        rows = [{"flips": None}] + [{"flips": f} for f in (0.5, 0.25, 0.01)]
        rows[-1]["agreement"] = agreement
        same = {"entries": 0.75, "overlap": 0.6, "teachers_overlap": 0.5, "seconds": 12.0}
        return {"loss": loss, "groups": groups, "history": rows, **same}

    text = teachers.table({"k24": [run(0.1, 0.5, 0.9), run(0.3, 0.7, 0.8)]})
    cells = [c.strip() for c in text.splitlines()[2].strip("|").split("|")]
    assert cells == [
        *("K-2:4, defaults", "2", "0.200 (0.100 to 0.300)", "75.0%", "60.0% (50.0% to 70.0%)"),
        *("50.0, 25.0, 1.0", "85%", "0.60 (0.50)", "12"),
    ]
