import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from tiny_onn.config.load import load_config
from tiny_onn.errors import UserError


@pytest.fixture
def ablation(script, tmp_path, monkeypatch):
    module = script("ablation", "sparse_parts")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "exp" / "results")
    (tmp_path / "exp" / "results").mkdir(parents=True)
    return module


def done(minutes_command, arm="dense", budget="10min", tag=""):
    return {"arm": arm, "tag": tag, "budget": budget, "minutes_command": minutes_command}


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
    one = 600 + ablation.OVERHEAD_S
    assert ablation.eta_seconds(runs, []) == 4 * one
    assert ablation.eta_seconds(runs, [done(11.0)]) == pytest.approx(2 * 660 + 2 * one)
    assert ablation.eta_seconds(runs, [done(11.0, budget="1min")]) == 4 * one


def test_the_eta_of_a_token_budget_is_unknown_until_a_run_was_timed(ablation):
    runs = ablation.plan(["dense", "nsa"], [0], ablation.Budget(tokens=1_000_000), "")
    assert ablation.eta_seconds(runs, []) is None
    timed = [done(2.0, budget="1Mtok"), done(4.0, budget="1Mtok")]
    assert ablation.eta_seconds(runs, timed) == pytest.approx(2 * 180)


def test_the_progress_line_says_what_is_left_and_how_long_it_takes(ablation, runs):
    line = ablation.progress(2, runs, [done(10.0), done(10.0, "nsa")])
    assert line == "run 3 of 4: dense, 10min, seed 1; 2 left, ETA 20:00"


@pytest.fixture
def settings(ablation, monkeypatch):
    """Any settings load, with batches of 100 tokens."""
    config = SimpleNamespace(data=SimpleNamespace(batch_tokens=100))
    monkeypatch.setattr(ablation, "load_config", lambda words: config)


def test_a_failed_run_is_told_and_the_others_go_on(ablation, runs, settings, monkeypatch, capsys):
    statuses = {runs[1].name: 2}
    seen = []

    def run_one(run, extra, batch_tokens, again):
        seen.append((run.name, batch_tokens))
        return statuses.get(run.name, 0)

    monkeypatch.setattr(ablation, "run_one", run_one)
    assert ablation.run_all(runs, [], again=False) == 1
    assert seen == [(run.name, 100) for run in runs]
    said = capsys.readouterr()
    assert "failed: nsa_10min_seed0 (train.py ended with status 2)" in said.out
    assert "1 of 4 runs failed" in said.err


def test_stopping_says_what_is_kept(ablation, runs, settings, monkeypatch, capsys):
    def run_one(run, *rest):
        if run is runs[2]:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(ablation, "run_one", run_one)
    with pytest.raises(KeyboardInterrupt):
        ablation.run_all(runs, [], again=False)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "stopped in run 3 of 4; finished results are kept; the same command goes on"


def test_impossible_settings_end_it_before_any_run(ablation, runs, monkeypatch):
    def refuse(words):
        raise UserError("unknown key 'modle.width'")

    monkeypatch.setattr(ablation, "load_config", refuse)
    monkeypatch.setattr(ablation, "run_one", lambda *given: pytest.fail("a run was begun"))
    with pytest.raises(UserError, match="modle.width"):
        ablation.run_all(runs, ["modle.width=3"], again=False)


def test_every_arm_is_a_configuration_that_training_takes(ablation):
    arms = ablation.choose_arms(",".join(ablation.ARMS))
    for run in ablation.plan(arms, [0], ablation.Budget(tokens=10**6), ""):
        config = load_config(run.words([], 4096))
        assert config.data.holdout == "train_tests" and config.budget.steps == 245


def fake_training(folder, body):
    (folder / "train.py").write_text("import pathlib, signal, sys, time\n" + body, encoding="utf-8")


def test_training_gets_its_words_and_its_status_comes_back(ablation, tmp_path):
    fake_training(tmp_path, "pathlib.Path('words').write_text(' '.join(sys.argv[1:]))\nsys.exit(7)")
    assert ablation.train(["a=1", "b=2"]) == 7
    assert (tmp_path / "words").read_text() == "a=1 b=2"


def test_compiled_code_is_not_shared_between_runs(ablation, tmp_path):
    fake_training(
        tmp_path,
        "import os\n"
        "with open('caches', 'a') as f: print(os.environ['TORCHINDUCTOR_CACHE_DIR'], file=f)",
    )
    assert ablation.train([]) == ablation.train([]) == 0
    caches = (tmp_path / "caches").read_text().split()
    assert len(set(caches)) == 2 and not any(os.path.exists(cache) for cache in caches)


def test_an_interruption_reaches_training_once_and_waits_until_it_has_saved(ablation, tmp_path):
    fake_training(
        tmp_path,
        """
def save(*_):
    with open('signals', 'a') as f: print('one', file=f)
    time.sleep(0.3)
    pathlib.Path('saved').touch()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
pathlib.Path('ready').touch()
time.sleep(60)
""",
    )

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    def when_ready():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Thread(target=when_ready, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            ablation.train([])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "signals").read_text().split() == ["one"]


def test_a_finished_run_leaves_its_result_and_again_begins_in_an_empty_folder(
    ablation, runs, tmp_path, monkeypatch
):
    folder = tmp_path / "runs" / "ablation" / runs[0].name
    folder.mkdir(parents=True)
    (folder / "old").touch()
    monkeypatch.setattr(ablation, "train", lambda words: int((folder / "old").exists()))
    monkeypatch.setitem(
        sys.modules, "measure", SimpleNamespace(result_of=lambda *given: {"nll": 0.5})
    )
    path = runs[0].result_path(ablation.RESULTS)
    assert ablation.run_one(runs[0], [], 100, again=False) == 1 and not path.exists()
    assert ablation.run_one(runs[0], [], 100, again=True) == 0
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
