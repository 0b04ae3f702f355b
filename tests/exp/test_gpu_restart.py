"""A GPU benchmark goes on behind a case that hangs or loses the device."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_lost_device_starts_the_script_again_behind_the_case(bench, monkeypatch, restarted):
    monkeypatch.setattr(bench.on, "_lost", lambda watch: True)
    arm = bench.cases.Arm(lambda: lambda: bench.clock.spend(1.0), ours=True)
    cases = [bench.case("one", a=arm), bench.case("two", a=arm)]
    with pytest.raises(SystemExit):
        bench(cases, "--after", "one", "--spent", "10", "--again")
    (words,) = restarted
    assert words[1:3] == ["bench.py", "--again"]
    assert words[3:5] == ["--after", "two"] and float(words[6]) > 10


def test_a_device_lost_with_rivals_is_tried_once_more_with_ours_only(bench, monkeypatch, restarted):
    def illegal():
        monkeypatch.setattr(sys.modules["gpu_stopwatch"].Stopwatch, "answers", lambda self: False)
        raise RuntimeError("an illegal memory access")

    arms = {"theirs": bench.cases.Arm(illegal)}
    arms["ours"] = bench.cases.Arm(lambda: lambda: bench.clock.spend(1.0), ours=True)
    cases = [bench.case("one", **arms), bench.case("two", a=1.0)]
    with pytest.raises(SystemExit):
        bench(cases)
    assert restarted[0][2:4] == ["--ours-only", "one"]
    monkeypatch.setattr(sys.modules["gpu_stopwatch"].Stopwatch, "answers", lambda self: True)
    status, records, out = bench(cases, *restarted[0][2:])
    assert status == 0 and records["two"]["status"] == "done"
    states = {name: arm["status"] for name, arm in records["one"]["arms"].items()}
    assert states == {"ours": "timed", "theirs": "left out"}
    why = "with rivals: DeviceLost: an illegal memory access (at theirs)"
    assert records["one"]["ours_only"] == why
    assert f"OURS ONLY one: {why}" in out


def test_a_second_loss_goes_on_behind_the_case(bench, monkeypatch, restarted):
    monkeypatch.setattr(bench.on, "_lost", lambda watch: True)
    arm = bench.cases.Arm(lambda: lambda: bench.clock.spend(1.0), ours=True)
    with pytest.raises(SystemExit):
        bench([bench.case("one", ours=arm, theirs=1.0)], "--ours-only", "one")
    assert restarted[0][2:4] == ["--after", "one"]


def test_a_hanging_case_is_written_down_and_the_script_starts_behind_it(
    bench, monkeypatch, tmp_path
):
    freed, seen = threading.Event(), []

    def replace(words):
        records = json.loads((tmp_path / "exp" / "results" / "bench_some.json").read_text())
        seen.append((words, records["cases"]["one"]))
        freed.set()

    monkeypatch.setattr(bench.on, "replace_process", replace)
    arm = bench.cases.Arm(lambda: lambda: freed.wait(10), ours=True)
    bench([bench.case("one", ours=arm)], "--case-limit", "0.05")
    ((words, record),) = seen
    assert words[-4:-1] == ["--after", "one", "--spent"]
    assert (record["status"], record["at"]) == ("failed", "ours")
    assert record["why"] == "hung: not finished in 0.05 s"


HANGING = """
import sys, time
sys.path.insert(0, {bench!r})
import timing, gpu_run, torch
from pathlib import Path
from gpu_cases import Arm, Case, Work

gpu_run.ROOT = Path({root!r})

def case(name, seconds):
    arm = Arm(lambda: lambda: time.sleep(seconds), ours=True)
    return Case(name, {{"tokens": 1}}, lambda device: Work({{"ours": arm}}, dict))

sys.exit(gpu_run.run("hanging", "A.", lambda args: [case("stuck", 60), case("next", 0.01)],
    lambda records: None, minutes=1, sources=()))
"""


def test_a_blocked_process_is_replaced_and_the_next_case_measured(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    script, out = tmp_path / "hanging.py", tmp_path / "out"
    out.mkdir()
    script.write_text(HANGING.format(bench=str(REPOSITORY / "exp/bench"), root=str(tmp_path)))
    ran = subprocess.run(
        [sys.executable, script, "--quick", "--case-limit", "1"],
        env=os.environ | {"OUT": str(out), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert ran.returncode == 1, ran.stderr
    records = json.loads((out / "bench_hanging.json").read_text())["cases"]
    assert records["stuck"]["why"] == "hung: not finished in 1 s"
    assert records["next"]["status"] == "done"
    assert "FAILED stuck" in ran.stdout


def test_a_failure_before_a_new_start_still_counts(bench):
    def red():
        raise bench.cases.Wrong("no")

    cases = [bench.case("one", red, a=1.0), bench.case("two", a=1.0)]
    bench(cases[:1])
    status, records, _ = bench(cases, "--after", "one")
    assert status == 1 and records["two"]["status"] == "done"
