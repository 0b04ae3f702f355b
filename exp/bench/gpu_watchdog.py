"""A limit of time for code that cannot be interrupted: a call that waits for a hanging kernel."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

GRACE_S = 30.0


class Watchdog:
    """Within it, after ``limit_s`` seconds, ``act`` is called by another thread.

    ``act`` should replace the process (:func:`replace_process`): what waits for the device waits on
    meanwhile. Code that hangs without giving other threads their turn is ended GRACE_S later, with
    exit status 1 and a traceback; what was written to files before is kept.
    """

    def __init__(self, limit_s: float, act: Callable[[], Any]) -> None:
        self.limit_s, self.act = limit_s, act
        self.lock, self.over = threading.Lock(), False

    def __enter__(self) -> Watchdog:
        self.timer = threading.Timer(self.limit_s, self._act)
        self.timer.daemon = True
        self.timer.start()
        faulthandler.dump_traceback_later(self.limit_s + GRACE_S, exit=True, file=sys.__stderr__)
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.over = True
        self.timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _act(self) -> None:
        with self.lock:
            if not self.over:
                self.act()


def replace_process(words: Sequence[str]) -> None:
    """Start the program ``words`` in this process, from any thread; nothing of it goes on.

    What it holds open is closed, the device too, whose context would live on otherwise.
    """
    for handle in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        if int(handle) > 2:
            with contextlib.suppress(OSError):  # the listing's own
                os.set_inheritable(int(handle), False)
    sys.stdout.flush()
    os.execv(words[0], list(words))
