import json
import sys

import pytest
import torch


class Clock:
    """Seconds that pass only where somebody says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


@pytest.fixture
def bench(script, monkeypatch, tmp_path, capsys):
    """``bench(cases, *options)``: exit status, the file's records and what was printed; ``on``: the
    module that runs cases, ``cases``: the one that makes them, ``clock``: the only one."""
    on = script("bench", "gpu_run")
    monkeypatch.setattr(on, "ROOT", tmp_path)
    monkeypatch.setattr(on, "_device", lambda quick: torch.device("cpu"))

    class Bench:
        clock, cases = Clock(), sys.modules["gpu_cases"]

        def __call__(self, cases, *options, minutes=1.0):
            monkeypatch.setattr(sys, "argv", ["bench.py", *options])
            status = on.run(
                *("some", "A benchmark.", lambda args: cases, lambda records: None),
                minutes=minutes,
                sources=("*.py",),
                clock=self.clock,
            )
            path = tmp_path / "exp" / "results" / "bench_some.json"
            records = json.loads(path.read_text())["cases"] if path.exists() else {}
            return status, records, capsys.readouterr().out

        def case(self, name, check=dict, ratios=None, targets=None, **arms):
            """Arms: seconds of a call, an error that it raises, or an Arm."""

            def arm(value):
                def call():
                    if isinstance(value, Exception):
                        raise value
                    self.clock.spend(value)

                return self.cases.Arm(lambda: call)

            made = {n: v if isinstance(v, self.cases.Arm) else arm(v) for n, v in arms.items()}
            work = self.cases.Work(made, check, ratios or {}, targets or {})
            return self.cases.Case(name, {"tokens": 1}, lambda device: work)

    made = Bench()
    made.on = on
    return made


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


def test_a_lost_device_starts_the_script_again_behind_the_case(bench, monkeypatch):
    def replace(program, words):
        raise SystemExit(words)

    monkeypatch.setattr(bench.on, "_lost", lambda device: True)
    monkeypatch.setattr(bench.on.os, "execv", replace)
    cases = [bench.case("one", a=1.0), bench.case("two", a=1.0)]
    with pytest.raises(SystemExit) as caught:
        bench(cases, "--after", "one", "--spent", "10", "--again")
    words = caught.value.code
    assert words[1:3] == ["bench.py", "--again"]
    assert words[3:5] == ["--after", "two"] and float(words[6]) > 10


def test_a_failure_before_a_new_start_still_counts(bench):
    def red():
        raise bench.cases.Wrong("no")

    cases = [bench.case("one", red, a=1.0), bench.case("two", a=1.0)]
    bench(cases[:1])
    status, records, _ = bench(cases, "--after", "one")
    assert status == 1 and records["two"]["status"] == "done"


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
