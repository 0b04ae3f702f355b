"""What torch.profiler and Triton tell of a call: launches, waits, kernel times, compilations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from gpu_roofline import FLUSH_BYTES
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""cudaDeviceSynchronize is the benchmark's own (and the profiler's)."""

NOT_WORK = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")
"""Entries of the device's timeline that are no work."""

FLUSH_EVENT = "Memcpy DtoD"


def _events(call: Callable[[], Any], calls: int, before: Callable[[], Any]) -> list[Any]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            before()
            call()
        torch.cuda.synchronize()
    return sorted(found.events(), key=lambda event: event.time_range.start)


def _on_device(event: Any) -> bool:
    if event.device_type != DeviceType.CUDA or event.name in NOT_WORK:
        return False
    return not getattr(event, "is_user_annotation", False)


def count_launches(call: Callable[[], Any]) -> dict[str, int]:
    """launches: kernels, copies and fills of the device; waits: for it; to_host: copies from it."""
    events = _events(call, 1, lambda: None)
    device = [event.name for event in events if _on_device(event)]
    if not device:
        raise RuntimeError("the profiler saw nothing on the device")
    return {
        "launches": len(device),
        "waits": sum(event.name in WAITS for event in events),
        "to_host": sum("DtoH" in name for name in device),
    }


def time_kernels(
    call: Callable[[], Any], calls: int, places: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Microseconds of each kernel of ``call`` (:func:`by_place`); L2 flushed before every call, by
    a copy that reads and writes FLUSH_BYTES together."""
    source, target = torch.empty(2, FLUSH_BYTES // 2, dtype=torch.int8, device="cuda").unbind(0)
    call()
    events = _events(call, calls, lambda: target.copy_(source))
    device = [
        (event.name, event.time_range.elapsed_us())
        for event in events
        if _on_device(event) and FLUSH_EVENT not in event.name
    ]
    return by_place(device, calls, places)


def by_place(
    events: Sequence[tuple[str, float]], calls: int, places: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Median time of a kernel at each of its places in a call.

    Args:
        events: name and time of every kernel in the order in which they ran.
        calls: of the same function, one after the other.
        places: by a kernel's name, what each of its launches in one call is for, in order.

    Returns:
        By those words; "rest": all kernels without places, the mean of a call. A kernel launched
        another number of times than its places say is "NAME (all)", the mean of a call.
    """
    found = {}
    for kernel, words in places.items():
        times = [time for name, time in events if name == kernel]
        if len(times) == calls * len(words):
            for number, word in enumerate(words):
                found[word] = median(times[number :: len(words)])
        else:
            found[f"{kernel} (all)"] = sum(times) / calls
    found["rest"] = sum(time for name, time in events if name not in places) / calls
    return {name: round(value, 2) for name, value in found.items()}


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the Triton kernels that were compiled (or read from Triton's folder) within."""
    runtime = importlib.import_module("triton").knobs.runtime
    hook, names = runtime.jit_post_compile_hook, []

    def note(**about: Any) -> None:
        names.append(about["fn"].name)

    runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        runtime.jit_post_compile_hook = hook
