"""A list of trainings worked off, so many at once, whatever becomes of one."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable

from tiny_onn.sweep.children import StopRequest, Training, stop_all

POLL_S = 0.1
"""Between looks at the children."""


def work_through(
    number: int,
    jobs: int,
    begin: Callable[[int], Training],
    finish: Callable[[Training, int], str],
) -> tuple[int | None, list[str]]:
    """Begin trainings 0 to ``number`` - 1 in this order, ``jobs`` at once, and wait for them.

    Ctrl-C and SIGTERM let those under way save their place and begin no more; so does an error of
    ``begin`` or ``finish``, which then goes on its way.

    Args:
        begin: starts one, by its number.
        finish: told of one that ended and its exit status, unless it was stopped; returns why it
            failed, "" if it did not.

    Returns:
        The signal that stopped it (None: none did), and why runs failed.
    """
    waiting = deque(range(number))
    active: list[Training] = []
    failed: list[str] = []
    with StopRequest() as stop:
        try:
            while active or (waiting and stop.signum is None):
                while waiting and len(active) < jobs and stop.signum is None:
                    active.append(begin(waiting.popleft()))
                stop.pass_on(active)
                for training in list(active):
                    status = training.status()
                    if status is None:
                        continue
                    active.remove(training)
                    if status != 0 and stop.signum is not None:
                        print(f"stopped: {training.run.name}", flush=True)
                    elif why := finish(training, status):
                        failed.append(why)
                        print(f"failed: {why}; going on with the others", flush=True)
                time.sleep(POLL_S)
        finally:
            stop_all(active)
    return stop.signum, failed


def report(signum: int | None, failed: list[str], number: int, again: bool) -> int:
    """The last words.

    Returns:
        Exit status: 0, 1 if a run failed, 130 and 143 after Ctrl-C and SIGTERM.
    """
    if failed:
        print(
            f"error: {len(failed)} of {number} runs failed: {', '.join(failed)}; see above for "
            "each one's reason; where its folder holds a run of other settings, give --again",
            file=sys.stderr,
        )
    if signum is not None:
        command = "command without --again" if again else "command"
        print(
            f"stopped; finished results are kept; the same {command} goes on"
            + " with what was begun" * again
        )
        return 128 + signum
    return 1 if failed else 0
