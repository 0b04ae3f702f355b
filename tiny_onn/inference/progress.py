"""How far prediction is, for people: one line in place on a terminal, else one every 10 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tiny_onn.clock import clock_text
from tiny_onn.inference.predict import Progress

TERMINAL_SECONDS, FILE_SECONDS = 0.5, 10.0


class ProgressPrinter:
    """A callable for ``predict_tasks(report=...)``."""

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream, self.clock = sys.stderr if stream is None else stream, clock
        self.terminal = self.stream.isatty()
        self.last: float | None = None
        self.width = 0

    def __call__(self, progress: Progress) -> None:
        """Print ``progress`` if enough time has gone by since the last line."""
        now = self.clock()
        interval = TERMINAL_SECONDS if self.terminal else FILE_SECONDS
        if self.last is not None and now - self.last < interval:
            return
        self.last = now
        line = (
            f"predicting: {progress.done}/{progress.total} outputs of this round, "
            f"{progress.views} views complete, {clock_text(progress.seconds)} gone, "
            f"ETA {clock_text(progress.seconds_left)}"
        )
        end = "" if self.terminal else "\n"
        start = "\r" if self.terminal else ""
        print(f"{start}{line.ljust(self.width)}", end=end, file=self.stream, flush=True)
        self.width = len(line) if self.terminal else 0

    def finish(self) -> None:
        """Leave the line, so that what follows starts on its own."""
        if self.terminal and self.last is not None:
            print(file=self.stream, flush=True)
