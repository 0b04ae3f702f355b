"""What ``make kernels-compile`` compiles of this folder: the presets' experts and a benchmark's.

Tensors on the meta device have shapes and no data, which is all that the host code reads.

Shapes: N tokens, E experts, C width, F hidden width of an expert.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from tiny_onn_kernels.moe.kernel_backward import differentiate_hidden, run_backward
from tiny_onn_kernels.moe.kernel_forward import run_forward
from tiny_onn_kernels.moe.kernel_pairs import lay_out_pairs, sum_by_token


class Workload(NamedTuple):
    """tokens: of a training batch on one device; saved: whether the forward pass keeps what
    precedes the activations; precision: of float32 products."""

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    dtype: torch.dtype
    saved: bool = True
    precision: str = "highest"


WORKLOADS = (
    Workload("nano", 4096, 160, 112, 8, torch.bfloat16),
    Workload("nano, decoding", 16, 160, 112, 8, torch.bfloat16),
    Workload("small", 8192, 256, 384, 8, torch.bfloat16),
    Workload("small, float32", 8192, 256, 384, 8, torch.float32),
    Workload("small, tf32", 8192, 256, 384, 8, torch.float32, precision="high"),
    Workload("base", 24576, 768, 1536, 8, torch.bfloat16, saved=False),
    Workload("base, short batch", 2048, 768, 1536, 8, torch.bfloat16),
    Workload("64 experts", 8192, 512, 128, 64, torch.bfloat16),
    Workload("64 experts, float16", 8192, 512, 128, 64, torch.float16),
)


def train(work: Workload) -> None:
    """Forward and backward pass, and the norms of pairs."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=work.dtype, device="meta")

    x_NC, weight_NE = empty(work.tokens, work.width), empty(work.tokens, work.experts)
    gate_up_EHC = empty(work.experts, 2 * work.hidden, work.width)
    down_ECF = empty(work.experts, work.width, work.hidden)
    tensors = (x_NC, weight_NE, gate_up_EHC, down_ECF)
    layout = lay_out_pairs(torch.empty(weight_NE.shape, dtype=torch.bool, device="meta"))
    rows_PC, inner_PH = run_forward(*tensors, layout, work.saved)
    sum_by_token(rows_PC, layout)
    run_backward(x_NC, *tensors, inner_PH, layout)
    differentiate_hidden(x_NC, *tensors, inner_PH[:0], layout, norms=True)


def run(work: Workload) -> None:
    """:func:`train` at the workload's precision."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(work.precision)
    try:
        train(work)
    finally:
        torch.set_float32_matmul_precision(precision)


def workloads() -> Iterator[tuple[str, Callable[[], None]]]:
    for work in WORKLOADS:
        yield f"moe: {work.name}", partial(run, work)
