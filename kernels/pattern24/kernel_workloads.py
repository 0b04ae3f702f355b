"""What ``make kernels-compile`` compiles of this folder: the presets' FFN matrices and experts.

Tensors on the meta device have shapes and no data, which is all that the host code reads. No size
is a constant of these kernels: what differs between workloads are dtypes and options.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from tiny_onn_kernels.pattern24.kernel_draw import run_differentiate, run_draw


class Workload(NamedTuple):
    """shape: of the weights; agents: that share them, each with float32 scores or logits."""

    name: str
    shape: tuple[int, ...]
    agents: int
    dtype: torch.dtype
    free: bool = False
    sample: bool = True
    dense_grad: bool = False


WORKLOADS = (
    Workload("nano", (896, 160), 1, torch.float32),
    Workload("nano, top two", (896, 160), 1, torch.float32, sample=False),
    Workload("small, shared", (768, 256), 8, torch.float32),
    Workload("base", (6144, 768), 1, torch.float32),
    Workload("base, bfloat16", (6144, 768), 1, torch.bfloat16),
    Workload("base, dense gradient", (6144, 768), 1, torch.float32, dense_grad=True),
    Workload("base, shared", (3072, 768), 8, torch.bfloat16),
    Workload("base, free", (6144, 768), 1, torch.float32, free=True),
    Workload("base, free, float16", (6144, 768), 1, torch.float16, free=True),
    Workload("base, free, largest", (6144, 768), 1, torch.float32, free=True, sample=False),
)


def train(work: Workload) -> None:
    """Forward and backward pass."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    *rows, width = work.shape
    groups = (width // 4, 6) if work.free else (width,)
    weight = empty(*work.shape, dtype=work.dtype)
    source = empty(work.agents, *rows, *groups)
    kappa, tau = empty(), empty()
    seed, offset = (empty(dtype=torch.int64) for _ in range(2))
    out = empty(work.agents, *work.shape, dtype=work.dtype)
    pattern = empty(work.agents, *rows, width // 4, dtype=torch.uint8)
    flags = (work.free, work.sample)
    run_draw(weight, source, kappa, seed, offset, out, pattern, *flags)
    numbers = (kappa, tau, seed, offset)
    run_differentiate(out, weight, source, *numbers, *flags, work.dense_grad)


def workloads() -> Iterator[tuple[str, Callable[[], None]]]:
    for work in WORKLOADS:
        yield f"pattern24: {work.name}", partial(train, work)
