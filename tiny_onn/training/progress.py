"""The progress line: rewritten in place on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tiny_onn.clock import clock_text

BAR_WIDTH = 20


class ProgressLine:
    """Writes at most one line per ``interval`` seconds (0.5 on a terminal, else 10)."""

    def __init__(
        self,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._tty = self._stream.isatty()
        self._clock = clock
        self._interval = 0.5 if self._tty else 10.0
        self._next = clock()
        self._width = 0

    def due(self) -> bool:
        return self._enabled and self._clock() >= self._next

    def show(
        self,
        share: float,
        step: int,
        loss: float | None,
        tokens_per_s: float,
        lr: float,
        elapsed: float,
        left: float | None,
    ) -> None:
        """Write the line now. ``share`` in [0, 1]; times in seconds."""
        if not self._enabled:
            return
        self._next = self._clock() + self._interval
        filled = int(share * BAR_WIDTH)
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        text = (
            f"[{bar}] {100 * share:5.1f}%  step {step}  "
            f"loss {'-' if loss is None else f'{loss:.4f}'}  {tokens_per_s:,.0f} tok/s  "
            f"lr {lr:.2e}  {clock_text(elapsed)} < {clock_text(left)}"
        )
        if self._tty:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def line(self, text: str) -> None:
        """A line of its own, above the progress line."""
        if self._tty and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the terminal on a fresh line."""
        if self._tty and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0
