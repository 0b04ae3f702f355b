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
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.parametrize("budget", [{"steps": 60}, {"epochs": 20.5}])
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(tiny, start, tmp_path, budget):
    whole = replace(tiny(**SETTINGS, budget=budget), out=str(tmp_path / "whole"))
    killed = replace(whole, out=str(tmp_path / "killed"))
    run_training(whole)
    process = start(killed)
    wait_for(tmp_path / "killed" / "resume.prev.ckpt", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoint").exists()
    assert "going on from step" in finish(start(killed))
    assert weights(whole) == weights(killed)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_does(tiny, start, tmp_path, number, status):
    settings = SETTINGS | {"trainer": {"checkpoint_steps": 0}}
    whole = replace(tiny(**settings, budget={"steps": 60}), out=str(tmp_path / "whole"))
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    run_training(whole)
    process = start(stopped)
    wait_for(tmp_path / "stopped" / "logs" / "version_0" / "metrics.csv", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert "go on with: python" in output and "Traceback" not in output
    finish(start(stopped))
    assert weights(whole) == weights(stopped)
