"""Two processes (gloo) repeat one process with the same global batch."""

import csv
import json
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_onn.training.run import run_training


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(port):
    return (
        "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
        f"--master-port={port}",
    )  # fmt: skip


def curve(config):
    path = Path(config.out) / "logs" / "version_0" / "metrics.csv"
    with open(path) as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(("strategy", "launch"), [("ddp", "torchrun"), ("fsdp", "lightning")])
def test_two_processes_repeat_the_loss_curve_of_one(tiny, start, tmp_path, strategy, launch):
    settings = {
        "data": {"holdout": "demos"},
        "optim": {"ema_decay": 0.5},
        "budget": {"steps": 8},
    }
    one = replace(tiny(**settings), out=str(tmp_path / "one"))
    two = replace(
        tiny(**settings, trainer={"devices": 2, "strategy": strategy}),
        out=str(tmp_path / "two"),
    )
    run_training(one)
    output = finish(start(two, torchrun(free_port()) if launch == "torchrun" else ()))
    assert output.count("trained 8 steps") == 1, output
    assert curve(two) == pytest.approx(curve(one), rel=1e-5)
    measured = [json.loads((Path(c.out) / "metrics.json").read_text()) for c in (one, two)]
    nll = [facts["holdout"]["nll_per_token"] for facts in measured]
    assert nll[1] == pytest.approx(nll[0], rel=1e-3)
    for key in ("tokens", "target_tokens", "train_flops"):
        assert measured[0][key] == measured[1][key]
    a, b = (load_file(Path(c.out) / "checkpoint" / "weights.safetensors") for c in (one, two))
    assert a.keys() == b.keys()
    for name in a:  # Newton-Schulz in bfloat16 magnifies the last bits of the gradients
        assert (a[name] - b[name]).norm() < 0.01 * a[name].norm(), name


@pytest.mark.parametrize("strategy", ["fsdp"])
def test_two_processes_go_on_after_a_stop_with_the_same_curve(tiny, start, tmp_path, strategy):
    settings = {
        "optim": {"ema_decay": 0.5},
        "budget": {"steps": 24},
        "trainer": {"devices": 2, "strategy": strategy, "checkpoint_steps": 4},
    }
    whole = replace(tiny(**settings), out=str(tmp_path / "whole"))
    cut = replace(whole, out=str(tmp_path / "cut"))
    finish(start(whole))
    process = start(cut)
    while not (tmp_path / "cut" / "resume.prev.ckpt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    finish(start(cut))
    a, b = (load_file(Path(c.out) / "checkpoint" / "weights.safetensors") for c in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
