"""Two processes (gloo) repeat one process with the same global batch."""

import csv
import json
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
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


def curve(config, version=0):
    path = Path(config.out) / "logs" / f"version_{version}" / "metrics.csv"
    with open(path) as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(("strategy", "by_torchrun"), [("ddp", True), ("fsdp", False)])
def test_two_processes_repeat_the_loss_curve_of_one(tiny, start, tmp_path, strategy, by_torchrun):
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
    output = finish(start(two, torchrun(free_port()) if by_torchrun else None))
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


def test_two_processes_go_on_after_a_stop_of_the_first_with_the_curve_of_one(tiny, start, tmp_path):
    settings = {"optim": {"ema_decay": 0.5}, "budget": {"steps": 16}}
    one = replace(tiny(**settings), out=str(tmp_path / "one"))
    sharded = {"devices": 2, "strategy": "fsdp", "checkpoint_steps": 2}
    two = replace(tiny(**settings, trainer=sharded), out=str(tmp_path / "two"))
    run_training(one)
    process = start(two, launcher=())
    while not (tmp_path / "two" / "resume.prev.ckpt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert "going on from step" in finish(start(two))
    assert curve(two) + curve(two, version=1) == pytest.approx(curve(one), rel=1e-3)
