"""What ``make kernels-compile`` compiles of this folder: the presets' FFN, 1.5 times as wide.

Tensors on the meta device have shapes and no data, which is all that the host code reads.

Shapes: T tokens, F features, B bytes of bits.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from tiny_onn_kernels.relu2_24.kernel_pack import run_differentiate, run_square


class Workload(NamedTuple):
    """tokens: of a training batch on one device."""

    name: str
    tokens: int
    features: int
    dtype: torch.dtype


WORKLOADS = (
    Workload("nano", 4096, 768, torch.bfloat16),
    Workload("nano, float32", 4096, 768, torch.float32),
    Workload("small", 8192, 1152, torch.bfloat16),
    Workload("base", 24576, 4608, torch.bfloat16),
    Workload("base, float16", 24576, 4608, torch.float16),
    Workload("odd", 4096, 676, torch.bfloat16),
)


def train(work: Workload) -> None:
    """Both ways forward and back."""
    x_TF = torch.empty(work.tokens, work.features, dtype=work.dtype, device="meta")
    for pack in (True, False):
        bits_TB = run_square(x_TF, pack)[3]
        run_differentiate(x_TF, x_TF, bits_TB, pack)


def workloads() -> Iterator[tuple[str, Callable[[], None]]]:
    for work in WORKLOADS:
        yield f"relu2_24: {work.name}", partial(train, work)
