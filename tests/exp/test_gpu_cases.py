"""A GPU benchmark's cases: checked before they are timed, within a budget, resumable."""

import json
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def test_times_are_medians_and_ratios_are_pairs(bench):
    ratios = {"b over a": ("b", "a")}
    case = bench.case("one", ratios=ratios, targets={"b over a": 2.5}, a=0.5, b=1.0)
    status, records, _ = bench([case])
    assert status == 0
    assert records["one"]["arms"]["a"]["ms"] == {
        "median": 500.0, "p5": 500.0, "p95": 500.0, "repeats": 3,
    }  # fmt: skip
    assert records["one"]["ratios"]["b over a"]["median"] == 2.0
    assert records["one"]["ratios"]["b over a"]["target"] == 2.5


def test_a_rerun_skips_what_is_finished_and_says_so(bench):
    bench([bench.case("one", a=1.0)])
    cases = [bench.case("one", a=2.0), bench.case("two", a=3.0)]
    status, records, out = bench(cases)
    assert status == 0
    assert [records[n]["arms"]["a"]["ms"]["median"] for n in ("one", "two")] == [1000.0, 3000.0]
    assert "1 of 2 cases are finished already" in out
    _, records, _ = bench(cases, "--again")
    assert records["one"]["arms"]["a"]["ms"]["median"] == 2000.0


def test_other_sources_finish_nothing(bench, tmp_path):
    bench([bench.case("one", a=1.0)])
    (tmp_path / "kernel.py").write_text("changed")
    _, records, _ = bench([bench.case("one", a=2.0)])
    assert records["one"]["arms"]["a"]["ms"]["median"] == 2000.0


def test_a_red_check_is_not_timed_and_makes_the_status_one(bench):
    def red():
        bench.cases.agree("output", torch.ones(2), torch.zeros(2), 1e-2)

    calls = []
    arm = bench.cases.Arm(lambda: calls.append)
    status, records, out = bench([bench.case("bad", red, a=arm), bench.case("good", a=1.0)])
    assert status == 1 and not calls
    assert records["bad"]["status"] == "failed" and "arms" not in records["bad"]
    assert records["bad"]["why"].startswith("Wrong: output: relative RMS error")
    assert records["good"]["status"] == "done"
    assert "FAILED bad" in out


def test_a_failed_case_is_tried_again(bench):
    def red():
        raise bench.cases.Wrong("no")

    assert bench([bench.case("one", red, a=1.0)])[0] == 1
    assert bench([bench.case("one", a=1.0)])[0] == 0


def test_nan_is_wrong(bench):
    with pytest.raises(bench.cases.Wrong):
        bench.cases.agree("output", torch.tensor([float("nan")]), torch.ones(1), 1e-2)
    with pytest.raises(bench.cases.Wrong, match="not finite"):
        bench.cases.same_bits("output", [torch.tensor(float("inf"))], [torch.zeros(())])


def test_what_the_budget_leaves_out_is_not_reached(bench):
    cases = [bench.case(name, a=7.0) for name in ("one", "two", "three")]
    status, records, out = bench(cases, "--minutes", "0.5")
    assert status == 0 and list(records) == ["one"]
    assert "not reached in the budget, a rerun goes on there: two, three" in out


def test_an_arm_out_of_memory_is_recorded_by_name_and_costs_no_other_arm(bench):
    error = torch.OutOfMemoryError("tried to allocate 999 GiB")
    status, records, out = bench([bench.case("one", big=error, small=1.0)])
    assert status == 0
    arms = records["one"]["arms"]
    assert arms["big"] == {"status": "out of memory", "why": "tried to allocate 999 GiB"}
    assert arms["small"]["status"] == "timed"
    assert "1 out of memory" in out


def test_a_rivals_error_is_recorded_and_ours_fails_the_case(bench):
    def broken():
        raise RuntimeError("no kernel")

    def missing():
        raise bench.cases.Unavailable("not installed")

    arms = {"theirs": bench.cases.Arm(broken), "other": bench.cases.Arm(missing)}
    status, records, out = bench([bench.case("one", ours=1.0, **arms)])
    assert status == 0
    states = {name: arm["status"] for name, arm in records["one"]["arms"].items()}
    assert states == {"ours": "timed", "theirs": "error", "other": "unavailable"}
    assert "other: unavailable: not installed" in out
    ours = bench.cases.Arm(broken, ours=True)
    status, records, _ = bench([bench.case("two", ours=ours)])
    assert status == 1 and records["two"]["why"] == "RuntimeError: no kernel"


def test_wrong_in_our_graph_fails_the_case_and_a_refused_recording_does_not(bench):
    def arm(error):
        def make():
            raise error

        return bench.cases.Arm(make, ours=True, wrapped=True)

    refused = bench.case("refused", eager=1.0, graph=arm(RuntimeError("cannot be captured")))
    red = bench.case("red", eager=1.0, graph=arm(bench.cases.Wrong("graph: off")))
    status, records, _ = bench([refused, red, bench.case("none", graph=arm(unavailable(bench)))])
    assert status == 1
    assert records["refused"]["status"] == records["none"]["status"] == "done"
    assert records["refused"]["arms"]["graph"] == {"status": "error", "why": "cannot be captured"}
    assert records["none"]["arms"]["graph"]["status"] == "unavailable"
    assert (records["red"]["status"], records["red"]["at"]) == ("failed", "graph")
    assert records["red"]["why"] == "Wrong: graph: off"


def unavailable(bench, at_hand=True):
    return (bench.cases.Unavailable if at_hand else bench.cases.NotAtHand)("not here")


def test_a_wrong_rival_is_recorded_as_wrong_and_not_timed(bench):
    def make():
        raise bench.cases.Wrong("out: off")

    status, records, _ = bench([bench.case("one", ours=1.0, theirs=bench.cases.Arm(make))])
    assert status == 0
    assert records["one"]["arms"]["theirs"] == {"status": "wrong", "why": "out: off"}


def test_a_replay_that_leaves_an_output_unwritten_is_wrong(bench):
    fresh, stale = torch.zeros(2), torch.zeros(2)

    def compare(got):
        for tensor in got:
            bench.cases.agree("graph", tensor, torch.ones(2), 1e-2)

    bench.cases.compare_replays(lambda: fresh.fill_(1), [fresh], compare)
    with pytest.raises(bench.cases.Wrong):
        bench.cases.compare_replays(lambda: fresh.fill_(1), [fresh, stale], compare)
    fresh.fill_(0)
    with pytest.raises(bench.cases.Wrong):  # adds to what the last replay left
        bench.cases.compare_replays(lambda: fresh.add_(1), [fresh], compare)


def test_our_own_out_of_memory_fails_the_case_which_is_tried_again(bench):
    def big():
        raise torch.OutOfMemoryError("tried to allocate 999 GiB")

    ours = bench.cases.Arm(big, ours=True)
    cases = [bench.case("arm", ours=ours), bench.case("check", big, ours=1.0)]
    status, records, _ = bench(cases)
    assert status == 1
    for name in ("arm", "check"):
        assert records[name]["status"] == "failed"
        assert "tried to allocate 999 GiB" in records[name]["why"]
    assert bench([bench.case(name, ours=1.0) for name in records])[0] == 0


def test_a_folder_of_public_programs_lets_a_case_without_them_run_again(bench):
    def case(make):
        return bench.case("one", ours=1.0, theirs=bench.cases.Arm(make))

    calls = []

    def missing():
        raise unavailable(bench, at_hand=False)

    def found():
        calls.append(1)
        return lambda: bench.clock.spend(1.0)

    bench([case(missing)])
    bench([case(found)])
    assert not calls  # finished, for a run without the folder
    _, records, _ = bench([case(found)], "--third-party", "clones")
    assert calls and records["one"]["arms"]["theirs"]["status"] == "timed"
    bench([case(missing)], "--third-party", "other", "--again")
    calls.clear()
    bench([case(found)], "--third-party", "other")
    assert not calls  # that folder had none


@pytest.mark.parametrize("name", ["timing.py", "gpu_cases.py"])
def test_what_times_and_checks_belongs_to_the_sources(bench, tmp_path, name):
    bench([bench.case("one", a=1.0)])
    (tmp_path / "exp" / "bench").mkdir()
    (tmp_path / "exp" / "bench" / name).write_text("changed")
    _, records, _ = bench([bench.case("one", a=2.0)])
    assert records["one"]["arms"]["a"]["ms"]["median"] == 2000.0


def test_results_are_in_out_after_every_case(bench, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []
    monkeypatch.setenv("OUT", str(out))
    bench([bench.case("zero", a=1.0)])  # no folder: nothing
    assert not out.exists()
    out.mkdir()

    def look():
        path = out / "bench_some.json"
        seen.append(list(json.loads(path.read_text())["cases"]) if path.exists() else None)
        return {}

    bench([bench.case("one", a=1.0), bench.case("two", look, a=1.0)])
    assert seen == [["zero", "one"]]


def test_only_and_list(bench):
    cases = [bench.case("one long", a=1.0), bench.case("two", a=1.0)]
    assert bench(cases, "--list") == (0, {}, "one long\ntwo\n")
    assert list(bench(cases, "--only", "long")[1]) == ["one long"]


def test_without_a_device_one_line_and_status_two(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.on, "_device", lambda quick: None)
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    run = bench.on.run
    assert run("some", "A.", lambda args: [], print, minutes=1, sources=()) == 2
    assert capsys.readouterr().err.count("\n") == 1
