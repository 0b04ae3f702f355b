import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tiny_onn.config.load import load_config
from tiny_onn.errors import UserError
from tiny_onn.sweep import eta


@pytest.fixture
def ablation(experiment):
    return experiment("ablation", "sparse_parts")


def done(minutes_command, arm="dense", budget="10min", threads=2, jobs=1):
    return {
        "arm": arm,
        "tag": "",
        "budget": budget,
        "threads": threads,
        "jobs": jobs,
        "minutes_command": minutes_command,
    }


@pytest.fixture
def runs(ablation):
    return ablation.plan(["dense", "nsa"], [0, 1], ablation.Budget(minutes=10.0), "")


def test_runs_go_seed_by_seed(runs):
    assert [(run.seed, run.arm) for run in runs] == [
        (0, "dense"),
        (0, "nsa"),
        (1, "dense"),
        (1, "nsa"),
    ]


def test_runs_with_a_result_are_skipped_unless_asked_for_again(ablation, runs):
    runs[1].result_path(ablation.RESULTS).write_text("{}")
    assert ablation.to_do(runs, ablation.RESULTS, again=False) == [runs[0], *runs[2:]]
    assert ablation.to_do(runs, ablation.RESULTS, again=True) == runs


def test_the_eta_follows_from_the_minutes_until_a_run_was_timed(ablation, runs):
    one = 600 + eta.OVERHEAD_S
    assert eta.eta_seconds(runs, []) == 4 * one
    assert eta.eta_seconds(runs, [done(11.0)]) == pytest.approx(2 * 660 + 2 * one)
    assert eta.eta_seconds(runs, [done(11.0, budget="1min")]) == 4 * one
    assert eta.eta_seconds(runs, [done(11.0, threads=1, jobs=2)]) == 4 * one


def test_two_runs_at_once_take_half_the_time(ablation):
    budget = ablation.Budget(minutes=10.0)
    runs = ablation.plan(["dense", "nsa", "all"], [0], budget, "", threads=1, jobs=2)
    assert eta.eta_seconds(runs, []) == 2 * (600 + eta.OVERHEAD_S)
    assert eta.eta_seconds([], []) == 0


def test_the_eta_of_a_token_budget_is_unknown_until_a_run_was_timed(ablation):
    runs = ablation.plan(["dense", "nsa"], [0], ablation.Budget(tokens=1_000_000), "")
    assert eta.eta_seconds(runs, []) is None
    timed = [done(2.0, budget="1Mtok"), done(4.0, budget="1Mtok")]
    assert eta.eta_seconds(runs, timed) == pytest.approx(2 * 180)


def test_the_progress_line_says_what_is_left_and_how_long_it_takes(ablation, runs):
    line = eta.progress(2, runs, [done(10.0), done(10.0, "nsa")])
    assert line == "run 3 of 4: dense, 10min, seed 1; 2 left, ETA 20:00"


@pytest.fixture
def settings(ablation, monkeypatch):
    """Any settings load, with batches of 100 tokens."""
    config = SimpleNamespace(data=SimpleNamespace(batch_tokens=100))
    monkeypatch.setattr(ablation, "load_config", lambda words: config)


@pytest.fixture
def no_measuring(monkeypatch):
    result = SimpleNamespace(result_of=lambda *given: {"nll": 0.5})
    monkeypatch.setitem(sys.modules, "measure", result)


def fake_training(folder, body):
    (folder / "train.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "out = sys.argv[-1].removeprefix('out=runs/ablation/')\n" + body,
        encoding="utf-8",
    )


def started(ablation, tmp_path, words=("a=1",), **changes):
    run = ablation.Run("dense", ablation.Budget(minutes=10.0), 0, **changes)
    return ablation.start(run, list(words), tmp_path)


def test_a_failed_run_is_told_and_the_others_go_on(
    ablation, runs, settings, no_measuring, tmp_path, capsys
):
    fake_training(tmp_path, "print(out)\nsys.exit(2 * (out == 'nsa_10min_2x1_seed0'))")
    assert ablation.run_all(runs, [], again=False) == 1
    kept = [run for run in runs if run.result_path(ablation.RESULTS).exists()]
    assert kept == [runs[0], *runs[2:]]
    said = capsys.readouterr()
    assert "failed: nsa_10min_2x1_seed0 (train.py ended with status 2)" in said.out
    assert "1 of 4 runs failed" in said.err


def test_jobs_run_at_once_and_no_more_each_into_its_own_log(
    ablation, settings, no_measuring, tmp_path
):
    fake_training(
        tmp_path,
        """
print('I am', out)
here = pathlib.Path('under_way'); here.mkdir(exist_ok=True)
(here / out).touch()
time.sleep(0.5)
with open('counts', 'a') as f: print(len(list(here.iterdir())), file=f)
(here / out).unlink()
""",
    )
    budget = ablation.Budget(minutes=10.0)
    runs = ablation.plan(["dense", "nsa", "all"], [0, 1], budget, "", threads=1, jobs=2)
    assert ablation.run_all(runs, [], again=False) == 0
    counts = [int(line) for line in (tmp_path / "counts").read_text().split()]
    assert len(counts) == 6 and max(counts) == 2
    for run in runs:
        assert run.result_path(ablation.RESULTS).exists()
        log = tmp_path / "runs" / "ablation" / f"{run.name}.log"
        assert log.read_text() == f"I am {run.name}\n"


SAVES = """
def save(*_):
    with open('signals', 'a') as f: print(out, file=f)
    time.sleep(0.3)
    pathlib.Path('saved-' + out).touch()
    sys.exit(130)
if not os.path.exists('saved-' + out):
    signal.signal(signal.SIGINT, save)
    pathlib.Path('ready-' + out).touch()
    time.sleep(60)
"""


def when(ready, then):
    """``then()`` from another thread, once ``ready()``."""

    def wait():
        while not ready():
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stop_reaches_every_child_once_and_the_same_command_goes_on(
    ablation, runs, settings, no_measuring, tmp_path, capfd, jobs, signum, status
):
    fake_training(tmp_path, SAVES)
    runs = [replace(run, threads=1, jobs=jobs) for run in runs]
    begun = [run.name for run in runs[:jobs]]
    main = threading.main_thread().ident
    when(
        lambda: all((tmp_path / f"ready-{name}").exists() for name in begun),
        lambda: signal.pthread_kill(main, signum),
    )
    assert ablation.run_all(runs, [], again=False) == status
    assert sorted((tmp_path / "signals").read_text().split()) == sorted(begun)
    assert all((tmp_path / f"saved-{name}").exists() for name in begun)
    assert not list(ablation.RESULTS.iterdir()), "nothing unfinished has a result"
    said = capfd.readouterr().out
    assert f"stopping: {jobs} under way" in said
    assert said.splitlines()[-1] == ("stopped; finished results are kept; the same command goes on")
    assert ablation.run_all(runs[:jobs], [], again=False) == 0
    assert all(run.result_path(ablation.RESULTS).exists() for run in runs[:jobs])


def test_a_run_that_ends_while_its_neighbour_is_stopped_keeps_its_result(
    ablation, settings, no_measuring, tmp_path
):
    fake_training(
        tmp_path,
        "if out.startswith('dense'):\n"
        "    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))\n"
        "    pathlib.Path('ready').touch(); time.sleep(60)\n" + SAVES,
    )
    budget = ablation.Budget(minutes=10.0)
    runs = ablation.plan(["dense", "nsa"], [0], budget, "", threads=1, jobs=2)
    main = threading.main_thread().ident
    when(
        lambda: (tmp_path / "ready").exists() and (tmp_path / f"ready-{runs[1].name}").exists(),
        lambda: signal.pthread_kill(main, signal.SIGINT),
    )
    assert ablation.run_all(runs, [], again=False) == 130
    assert [run.result_path(ablation.RESULTS).exists() for run in runs] == [True, False]


def test_an_error_of_its_own_leaves_no_child_behind(
    ablation, settings, no_measuring, tmp_path, monkeypatch
):
    fake_training(tmp_path, "if out.startswith('dense'): sys.exit(0)\n" + SAVES)
    budget = ablation.Budget(minutes=10.0)
    runs = ablation.plan(["dense", "nsa"], [0], budget, "", threads=1, jobs=2)

    def fail(*given):
        while not (tmp_path / f"ready-{runs[1].name}").exists():
            time.sleep(0.02)
        raise OSError("disk full")

    monkeypatch.setattr(ablation, "finish", fail)
    with pytest.raises(OSError, match="disk full"):
        ablation.run_all(runs, [], again=False)
    assert (tmp_path / f"saved-{runs[1].name}").exists()


def test_impossible_settings_end_it_before_any_run(ablation, runs, monkeypatch):
    def refuse(words):
        raise UserError("unknown key 'modle.width'")

    monkeypatch.setattr(ablation, "load_config", refuse)
    monkeypatch.setattr(ablation, "begin", lambda *given: pytest.fail("a run was begun"))
    with pytest.raises(UserError, match="modle.width"):
        ablation.run_all(runs, ["modle.width=3"], again=False)


def test_every_arm_is_a_configuration_that_training_takes(ablation):
    arms = ablation.choose_arms(",".join(ablation.ARMS), ablation.ARMS)
    for run in ablation.plan(arms, [0], ablation.Budget(tokens=10**6), ""):
        config = load_config(run.words([], 4096))
        assert config.data.holdout == "train_tests" and config.budget.steps == 245


def test_training_gets_its_words_and_threads_and_its_status_comes_back(ablation, tmp_path):
    names = "OMP_NUM_THREADS OMP_WAIT_POLICY TORCHINDUCTOR_COMPILE_THREADS"
    fake_training(
        tmp_path,
        "pathlib.Path('words').write_text(' '.join(sys.argv[1:]))\n"
        f"own = [os.environ[name] for name in '{names}'.split()]\n"
        "pathlib.Path('own').write_text(' '.join(own))\nsys.exit(7)",
    )
    training = started(ablation, tmp_path, ["a=1", "b=2"], threads=1)
    assert training.process.wait() == training.status() == 7
    assert (tmp_path / "words").read_text() == "a=1 b=2"
    assert (tmp_path / "own").read_text() == "1 PASSIVE 1"


def test_compiled_code_is_not_shared_between_runs(ablation, tmp_path):
    fake_training(
        tmp_path,
        "with open('caches', 'a') as f: print(os.environ['TORCHINDUCTOR_CACHE_DIR'], file=f)",
    )
    for _ in range(2):
        training = started(ablation, tmp_path)
        training.process.wait()
        assert training.status() == 0
    caches = (tmp_path / "caches").read_text().split()
    assert len(set(caches)) == 2 and not any(os.path.exists(cache) for cache in caches)


def test_again_begins_in_an_empty_folder_without_the_old_result(
    ablation, runs, settings, no_measuring, tmp_path
):
    folder = tmp_path / "runs" / "ablation" / runs[0].name
    folder.mkdir(parents=True)
    (folder / "old").touch()
    path = runs[0].result_path(ablation.RESULTS)
    path.write_text("{}")
    fake_training(
        tmp_path,
        f"sys.exit(pathlib.Path('{folder}', 'old').exists() or pathlib.Path('{path}').exists())",
    )
    assert ablation.run_all(runs[:1], [], again=False) == 1
    assert ablation.run_all(runs[:1], [], again=True) == 0
    assert json.loads(path.read_text()) == {"nll": 0.5}


def test_the_table_alone_runs_nothing(ablation, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "run_all", lambda *given: pytest.fail("runs were begun"))
    assert ablation.main(["--table"]) == 0
    assert capsys.readouterr().out == "no results yet\n"


def test_minutes_and_tokens_exclude_each_other(ablation, capsys):
    with pytest.raises(SystemExit) as stop:
        ablation.parse(["--minutes", "3", "--tokens", "1e6"])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
