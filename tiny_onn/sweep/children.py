"""Trainings as child processes: started, waited for, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol


def thread_settings(threads: int) -> dict[str, str]:
    """Environment of a process of so many threads. Those that wait must not spin: they would take
    their neighbour's core. torch.compile's own workers are counted too."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
    }


class Planned(Protocol):
    """One training that somebody wants. name: of its folder and result; threads: of its process;
    jobs: how many run at once."""

    @property
    def name(self) -> str: ...

    @property
    def threads(self) -> int: ...

    @property
    def jobs(self) -> int: ...


@dataclass
class Training:
    """One of them under way. began: time.monotonic(); log: its output, None: the terminal's."""

    run: Planned
    words: list[str]
    changed: bool
    began: float
    log: Path | None
    process: subprocess.Popen[bytes]
    cache: tempfile.TemporaryDirectory[str]

    def status(self) -> int | None:
        """Exit status; None while it runs. What torch.compile made is removed at its end."""
        status = self.process.poll()
        if status is not None:
            self.cache.cleanup()
        return status


def start(
    run: Planned,
    words: list[str],
    root: Path,
    changed: bool = False,
    log: Path | None = None,
    script: str = "train.py",
) -> Training:
    """Begin ``script words`` in ``root``.

    It gets a session of its own: a terminal's Ctrl-C would reach it twice, and the second one
    would cut its saving short. What torch.compile makes is not kept, or only the first run of an
    arm would pay for it.
    """
    into = f">> {log.relative_to(root)}" if log else ""
    print("$ python", script, *words, into, flush=True)
    cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    own = {"TORCHINDUCTOR_CACHE_DIR": cache.name, **thread_settings(run.threads)}
    began = time.monotonic()
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with open(os.devnull if log is None else log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, script, *words],
            cwd=root,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=None if log is None else output,
            stderr=None if log is None else subprocess.STDOUT,
            start_new_session=True,
        )
    return Training(run, words, changed, began, log, process, cache)


def stop_all(trainings: Sequence[Training]) -> None:
    """Each is interrupted once, saves its place and ends; returns when all have."""
    for training in trainings:
        training.process.send_signal(signal.SIGINT)
    for training in trainings:
        training.process.wait()
        training.cache.cleanup()


class StopRequest:
    """Context manager: SIGINT and SIGTERM are noted, and reach the trainings by ``pass_on``.

    Noted only, so that none can fall between a child's start and its being known. ``signum`` is
    the first one (None: none came).
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._came = 0
        self._passed_on = 0

    def __enter__(self) -> StopRequest:
        taken = (signal.SIGINT, signal.SIGTERM)
        self._before = {s: signal.signal(s, self._handle) for s in taken}
        return self

    def __exit__(self, *exception: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        self._came += 1

    def pass_on(self, trainings: Sequence[Training]) -> None:
        """The first one lets every training save its place; a second one cuts that short."""
        if self._came == self._passed_on:
            return
        if self._passed_on == 0:
            print(f"\nstopping: {len(trainings)} under way, each saves its place", flush=True)
        self._passed_on = self._came
        for training in trainings:
            training.process.send_signal(signal.SIGINT)
