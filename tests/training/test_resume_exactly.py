"""Killed and stopped runs, as real processes, end with the weights of an undisturbed one."""

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tiny_onn.training.run import run_training

SETTINGS = {
    "model": {"dropout": 0.1, "layers": 2},
    "optim": {"ema_decay": 0.9},
    "trainer": {"checkpoint_steps": 5, "precision": "bf16"},
}


def weights(config):
    path = Path(config.out) / "checkpoint" / "weights.safetensors"
    return {k: v.numpy().tobytes() for k, v in load_file(path).items()}


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(tiny, start, tmp_path):
    whole = replace(tiny(**SETTINGS, budget={"epochs": 20.5}), out=str(tmp_path / "whole"))
    killed = replace(whole, out=str(tmp_path / "killed"))
    run_training(whole)
    process = start(killed)
    wait_for(tmp_path / "killed" / "resume.prev.ckpt", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoint").exists()
    assert "going on from step" in finish(start(killed))
    assert weights(whole) == weights(killed)


def test_a_stopped_run_says_how_to_go_on_and_does(tiny, start, tmp_path):
    settings = SETTINGS | {"trainer": {"checkpoint_steps": 0}}
    whole = replace(tiny(**settings, budget={"steps": 60}), out=str(tmp_path / "whole"))
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    run_training(whole)
    process = start(stopped)
    wait_for(tmp_path / "stopped" / "logs" / "version_0" / "metrics.csv", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert "go on with: python" in output and "Traceback" not in output
    run_training(stopped)
    assert weights(whole) == weights(stopped)


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole(tiny, whole_folder):
    """Twenty steps without a stop: trained once, as a finished run is left as it is."""
    config = replace(tiny(**SETTINGS, budget={"steps": 20}), out=str(whole_folder))
    assert run_training(config) == 0
    return config


@pytest.mark.parametrize("step", [0, 7, 19])
def test_ctrl_c_checkpoints_after_the_step_it_meets(whole, tmp_path, interrupt, capsys, step):
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    with interrupt(step, signal.SIGINT):
        status = run_training(stopped)
    assert status == (130 if step < 19 else 0)  # after its last step a run is done, not stopped
    if step < 19:
        assert f"stopped at step {step + 1}" in capsys.readouterr().out
        assert run_training(stopped) == 0
    assert weights(whole) == weights(stopped)


def test_a_torn_newest_checkpoint_goes_on_from_the_one_before(whole, tmp_path, interrupt, capsys):
    torn = replace(whole, out=str(tmp_path / "torn"))
    with interrupt(12, signal.SIGTERM):
        assert run_training(torn) == 143
    newest = tmp_path / "torn" / "resume.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert run_training(torn) == 0
    out = capsys.readouterr().out
    assert "torn" in out and "going on from step 10 " in out
    assert weights(whole) == weights(torn)
