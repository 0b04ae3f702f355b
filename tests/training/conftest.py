"""A corpus of eight small tasks in ARC's format and runs on it that take seconds."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest

from tiny_onn.config.schema import (
    BudgetConfig,
    Config,
    DataConfig,
    EaviConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ResetConfig,
    TrainerConfig,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory):
    """Eight tasks, three demonstrations and a test each; the output is the input turned over."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    for number in range(8):
        pairs = []
        for _ in range(4):
            grid = rng.integers(0, 10, (int(rng.integers(2, 5)), int(rng.integers(2, 5))))
            pairs.append({"input": grid.tolist(), "output": grid[::-1].tolist()})
        task = {"train": pairs[:3], "test": pairs[3:]}
        (folder / f"{number:08x}.json").write_text(json.dumps(task))
    return folder


@pytest.fixture
def tiny(task_dir, tmp_path):
    """Builds a configuration; keyword arguments replace whole sections' fields."""

    def build(
        data=None, model=None, moe=None, reset=None, optim=None, budget=None, trainer=None, **top
    ) -> Config:
        sections = {
            "data": DataConfig(
                **{
                    "sources": [],
                    "extra_dirs": [str(task_dir)],
                    "batch_tokens": 400,
                    "views": "dihedral",
                    **(data or {}),
                }
            ),
            "model": ModelConfig(
                **{
                    "width": 32,
                    "layers": 1,
                    "heads": 2,
                    "kv_heads": 2,
                    "head_width": 16,
                    "ffn_width": 48,
                    **(model or {}),
                }
            ),
            "moe": MoeConfig(**{"experts": 4, "expert_width": 16, **(moe or {})}),
            "reset": ResetConfig(**(reset or {})),
            "optim": OptimConfig(**(optim or {})),
            "budget": BudgetConfig(**(budget or {"steps": 6})),
            "trainer": TrainerConfig(
                **{
                    "accelerator": "cpu",
                    "precision": "fp32",
                    "progress": False,
                    "tensorboard": False,
                    "log_every_steps": 1,
                    "threads": 1,
                    **(trainer or {}),
                }
            ),
        }
        return replace(Config(), out=str(tmp_path / "run"), **sections, **top)

    return build


@pytest.fixture
def interrupt(monkeypatch):
    """``with interrupt(step, number):`` sends this process a signal as that step begins."""
    from tiny_onn.training.loop import RunLoop

    original = RunLoop.on_train_batch_start

    @contextmanager
    def at(step, number):
        def on_train_batch_start(self, trainer, module, batch, index):
            if batch.step == step:
                os.kill(os.getpid(), number)
            original(self, trainer, module, batch, index)

        with monkeypatch.context() as patch:
            patch.setattr(RunLoop, "on_train_batch_start", on_train_batch_start)
            yield

    return at


RUN = """
import json, sys
from tiny_onn.config.load import config_from_dict
from tiny_onn.errors import run_cli
from tiny_onn.training.run import run_training

run_cli(lambda: run_training(config_from_dict(json.loads(sys.argv[1]))))
"""

# Run in a forked process; given: source, environment, words, folder, output.
IN_A_FORK = """
import atexit, os, sys

out = os.open(output, os.O_WRONLY | os.O_APPEND)
os.dup2(out, 1)
os.dup2(out, 2)
os.environ.clear()
os.environ.update(environment)
os.chdir(folder)
sys.argv = words
try:
    exec(source, {"__name__": "__main__"})
finally:
    atexit._run_exitfuncs()
"""


class Forks:
    """The processes of a run as one Popen: those of its methods that tests use."""

    def __init__(self, processes: list, output: Path):
        self.processes, self.output = processes, output

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        return failed[0] if failed else None if None in codes else 0

    returncode = property(poll)

    def wait(self, timeout: float = 300) -> None:
        """Until all have ended; where one failed, the others are killed."""
        end = time.monotonic() + timeout
        while None in [process.exitcode for process in self.processes]:
            if self.poll() is not None:
                end = min(end, time.monotonic() + 20)  # as long as others may take to end too
            self.processes[0].join(0.01)
            self.processes[-1].join(0.01)
            if time.monotonic() > end:
                self.kill()

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        self.wait(timeout)
        return self.output.read_text(), None

    def send_signal(self, number: int) -> None:
        os.kill(self.processes[0].pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


@pytest.fixture(scope="session")
def own_environment():
    """() -> the environment of a process of its own: this one's, and one thread."""

    def make():
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": "1",
        }

    return make


@pytest.fixture(scope="session")
def fork(own_environment):
    """Forks a server that has imported training once: four CPU seconds less a process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_onn.training.run"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own_environment().items():
            patch.setenv(name, value)
        forkserver.ensure_running()

    def launch(**given):
        process = context.Process(target=exec, args=(IN_A_FORK, given), daemon=True)
        process.start()
        return process

    return launch


@pytest.fixture
def start(tmp_path, own_environment, request):
    """Starts ``run_training(config)`` in a process of its own; returns the Popen, or Forks.

    ``launcher`` are words after ``python``: () for Lightning's own way to start the processes of
    several devices. Without it one process a device is forked from a server that has imported
    training, with the variables that Lightning's launcher sets. ``prelude`` is code to run before.
    """
    started = []

    def launch(config, launcher=None, prelude=""):
        script, words = tmp_path / "run_config.py", [json.dumps(asdict(config))]
        script.write_text(prelude + RUN)
        if launcher is not None:
            process = subprocess.Popen(
                [sys.executable, *launcher, str(script), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path,
                env=own_environment(),
            )
            started.append(process)
            return process
        fork = request.getfixturevalue("fork")
        output = tmp_path / f"output{len(started)}.txt"
        output.touch()
        given = {
            "source": prelude + RUN,
            "words": [str(script), *words],
            "folder": str(tmp_path),
            "output": str(output),
        }
        ranks = [{}]
        if config.trainer.devices > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            ranks = [
                {**meeting, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
                for rank in range(config.trainer.devices)
            ]
        environment = own_environment()
        process = Forks([fork(environment=environment | r, **given) for r in ranks], output)
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def pretrained_runs(tmp_path_factory):
    """Runs that stage eavi begins with, by their settings: trained once."""
    return tmp_path_factory.mktemp("pretrained"), {}


@pytest.fixture
def pretrained(tiny, tmp_path, pretrained_runs):
    """A run of a few steps, by settings; -> (its configuration, one of stage eavi from it)."""
    from tiny_onn.training.run import run_training

    folder, runs = pretrained_runs

    def make(steps=6, eavi=None, budget=None, **settings):
        name = f"{steps} {settings}"
        if name not in runs:
            first = tiny(budget={"steps": steps}, **settings)
            runs[name] = replace(first, out=str(folder / str(len(runs))))
            assert run_training(runs[name]) == 0
        second = replace(
            tiny(budget=budget or {"steps": 6}, **settings),
            stage="eavi",
            init_from=runs[name].out,
            eavi=EaviConfig(**({"share_start": 1.0, "share_end": 1.0} | (eavi or {}))),
            out=str(tmp_path / "eavi"),
        )
        # As configs/stage/eavi.yaml has them: masks go on where they settled.
        settled = replace(second.k24, kappa_start=16.0, tau_start=0.1, tau_middle=0.1)
        return runs[name], replace(second, k24=settled)

    return make
