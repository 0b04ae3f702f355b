"""Seconds and peak memory of single calls: on a GPU by events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from gpu_roofline import FLUSH_BYTES

Call = Callable[[], Any]


class Stopwatch:
    """Seconds of single calls: by events on a GPU, by ``clock`` on a CPU."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.device, self.clock, self.cuda = device, clock, device.type == "cuda"
        if self.cuda:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def answers(self) -> bool:
        """Whether the device still works for this process: not after an illegal access.

        Asked twice: an error that passes, as of a recording that failed, shows once.
        """
        for _ in range(2):
            try:
                self.wait()
            except RuntimeError:
                continue
            return True
        return False

    def wall(self, call: Call) -> tuple[Any, float]:
        """What ``call`` gave and its seconds, launch and device together."""
        self.wait()
        began = self.clock()
        got = call()
        self.wait()
        return got, self.clock() - began

    def round(self, calls: Mapping[str, Call], backwards: bool) -> dict[str, float]:
        """Device seconds of each call, one after the other, the L2 cache flushed before.

        The flush (about 60 us) runs while the host prepares the call, so host work before the first
        launch is hidden, up to that long; the clock starts when the flush ends. What launches cost
        beyond it shows where they are slower than the device's work: then the device waits between
        kernels (CUDA graphs hide that). ``wall`` and calls back to back show the host's share.
        """
        order = list(calls)[::-1] if backwards else list(calls)
        if not self.cuda:
            return {name: self.wall(calls[name])[1] for name in order}
        events = {}
        for name in order:
            self.wait()
            self.flush.zero_()
            events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[name][0].record()
            calls[name]()
            events[name][1].record()
        self.wait()
        return {name: start.elapsed_time(stop) / 1e3 for name, (start, stop) in events.items()}

    def peak_mib(self, call: Call) -> float | None:
        """What ``call`` needs above what is held; None on a CPU."""
        if not self.cuda:
            call()
            return None
        self.wait()
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return round((torch.cuda.max_memory_allocated(self.device) - held) / 2**20, 2)
