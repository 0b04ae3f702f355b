"""Seconds and peak memory of single calls, on a GPU by events, and what repeats of them say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

FLUSH_BYTES = 2**28
"""More than any L2 cache."""

Call = Callable[[], Any]


def summary(values: Sequence[float], scale: float = 1.0) -> dict[str, Any]:
    """Median, 5th and 95th percentile (linear between neighbours) and number of ``values``."""
    ordered = sorted(scale * value for value in values)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    found = {"median": median(ordered), "p5": percentile(0.05), "p95": percentile(0.95)}
    return {name: round(value, 5) for name, value in found.items()} | {"repeats": len(ordered)}


class Stopwatch:
    """Seconds of single calls: by events on a GPU, by ``clock`` on a CPU."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.device, self.clock, self.cuda = device, clock, device.type == "cuda"
        if self.cuda:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def wall(self, call: Call) -> tuple[Any, float]:
        """What ``call`` gave and its seconds, launch and device together."""
        self.wait()
        began = self.clock()
        got = call()
        self.wait()
        return got, self.clock() - began

    def round(self, calls: Mapping[str, Call], backwards: bool) -> dict[str, float]:
        """Seconds of each call, one after the other, each alone on a device that waits for it: what
        a call's launches cost shows where they are longer than its work (CUDA graphs hide it)."""
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
