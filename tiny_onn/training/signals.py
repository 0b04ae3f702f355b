"""Ctrl-C and SIGTERM: during training a request to stop after the step, else an exception."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A stop signal came while there was nothing to save. ``status`` is the exit status."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.status = 128 + signum


class StopSignals:
    """Context manager that owns SIGINT and SIGTERM.

    Outside a ``deferred`` phase a signal raises Interrupted at once; inside, the first one is
    only noted in ``received`` and the second one raises. Off the main thread Python allows no
    handlers; then the signals keep their usual meaning.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.getsignal(s) for s in SIGNALS}
            self.install()
        return self

    def install(self) -> None:
        """Take the handlers (again: Lightning registers its own when a fit begins)."""
        if self._before:
            for s in SIGNALS:
                signal.signal(s, self._handle)

    def __exit__(self, *exception: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
        self._before = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = signum
        if again or not self.deferred:
            raise Interrupted(signum)
