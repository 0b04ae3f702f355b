import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


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
    monkeypatch.delenv("OUT", raising=False)
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
                add_options=lambda made: made.add_argument("--third-party"),
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


@pytest.fixture
def restarted(bench, monkeypatch):
    """Words with which a script was started again, instead of doing so."""
    found = []

    def replace(words):
        found.append(words)
        raise SystemExit

    monkeypatch.setattr(bench.on, "replace_process", replace)
    return found


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


@pytest.mark.slow
def test_both_scripts_run_a_tiny_case(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    cases = {"nsa_gpu": "decode paper B=1 48", "moe_gpu": "tiny, exactly 2"}
    env = os.environ | {"OUT": str(tmp_path), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    running = {
        name: subprocess.Popen(
            [sys.executable, REPOSITORY / f"exp/bench/{name}.py", "--quick", "--only", case],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, case in cases.items()
    }
    for name, case in cases.items():
        printed, _ = running[name].communicate(timeout=120)
        assert running[name].returncode == 0, printed
        records = json.loads((tmp_path / f"bench_{name}.json").read_text())["cases"]
        assert records[case]["status"] == "done", printed


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


def test_packages_come_from_this_checkout_or_the_script_refuses(script, monkeypatch, tmp_path):
    tree = script("bench", "source_tree")
    assert Path(sys.modules["tiny_onn_kernels"].__file__).resolve().is_relative_to(tree.ROOT)
    other = type(sys)("tiny_onn")
    other.__file__ = str(tmp_path / "tiny_onn" / "__init__.py")
    monkeypatch.setitem(sys.modules, "tiny_onn", other)
    with pytest.raises(SystemExit, match="refused: tiny_onn was imported from"):
        tree.take_from_here()


@pytest.fixture
def nsa(script):
    """The script nsa_gpu.py; docs: a tiny document on a CPU."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'triton>=3.6'")
    module = script("bench", "nsa_gpu")
    torch.manual_seed(0)
    module.docs = module.Documents(module.TINY_ARC, (12,), torch.device("cpu"))
    return module


def test_dense_rivals_must_agree_with_the_first(nsa):
    peers = nsa.Peers(1e-2)
    peers.join("flash", ("out",), [torch.ones(3)])
    peers.join("cudnn", ("out",), [torch.full((3,), 1.001)])
    assert peers.errors == {"cudnn against flash, out": pytest.approx(1e-3, rel=1e-2)}
    with pytest.raises(Exception, match="varlen against flash, out"):
        peers.join("varlen", ("out",), [torch.full((3,), 1.1)])


def test_repeated_heads_give_the_gradients_of_the_heads_that_were_repeated(nsa):
    from nsa_gpu_rivals import packed_results
    from torch.nn.attention import SDPBackend

    docs = nsa.docs
    grouped = nsa.sdpa(docs, SDPBackend.MATH, {})
    groups = docs.setting.heads // docs.setting.kv_heads
    repeated = [t.detach().repeat_interleave(groups, 1) for t in docs.leaves[1:3]]
    leaves = [docs.leaves[0], *(t.requires_grad_() for t in repeated)]

    def forward():
        q, k, v = (t.unflatten(0, (1, 12)).transpose(1, 2) for t in leaves)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    others = packed_results(nsa.Ready(forward, leaves, grouped.grad, grouped.packed), docs)
    for a, b, leaf in zip(packed_results(grouped, docs), others, docs.leaves, strict=False):
        assert a.shape == b.shape and a.shape[0] == len(leaf)
        torch.testing.assert_close(a, b)


def test_both_ways_round_are_compared_and_a_difference_is_wrong(nsa, monkeypatch):
    import nsa_gpu_checks as checks

    index_NKn = nsa.docs.attend()[1]
    found = checks.compare_ways(nsa.docs, index_NKn)
    assert set(found) == {f"keys first, {name}" for name in ("out", "q", "k", "v", "slices")}
    ways = []

    def wrong(q_NHD, k_NKD, v_NKD, *_):
        ways.append(checks.kernel_selected_plan.KEYS_FIRST_SHARE)
        return q_NHD * len(ways) + k_NKD.sum() + v_NKD.sum()

    monkeypatch.setattr(checks.kernel, "selected_attention", wrong)
    with pytest.raises(checks.Wrong, match="keys first against queries first, out"):
        checks.compare_ways(nsa.docs, index_NKn)
    assert ways == [0.0, float("inf")]


def test_what_is_compiled_is_held_against_the_kernels_on_its_own_choice(nsa):
    import nsa_gpu_checks as checks

    docs = nsa.docs
    assert max(nsa.compare_compiled(docs, docs.attend).values()) == 0

    def off():
        out_NHD, index_NKn = docs.attend()
        return 1.1 * out_NHD, index_NKn

    with pytest.raises(checks.Wrong, match="compiled, out"):
        nsa.compare_compiled(docs, off)
