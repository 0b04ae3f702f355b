"""What ``make kernels-compile`` compiles of this folder: the presets' attention and a benchmark's.

Shapes: N tokens, H query heads, K key/value heads, D head width, M compressed blocks, n chosen
blocks, B rows of a decoding step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from tiny_onn_kernels.nsa import kernel as nsa
from tiny_onn_kernels.nsa import kernel_selected_plan

TOKENS = 640
"""Of one document: long enough that its first block is cut into parts, and for several slices."""


class Workload(NamedTuple):
    """sizes: l, d, l', n, w, as the paper calls them; precision: of float32 products; sliced: as a
    batch that is too long to leave its parts in memory at once."""

    name: str
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    sizes: tuple[int, int, int, int, int]
    precision: str = "highest"
    sliced: bool = False


SHORT, LONG = (32, 16, 32, 8, 128), (32, 16, 64, 16, 512)

WORKLOADS = (
    Workload("nano", 5, 5, 32, torch.bfloat16, SHORT),
    Workload("nano, float32", 5, 5, 32, torch.float32, SHORT),
    Workload("base, float32", 12, 12, 64, torch.float32, LONG),
    Workload("base, tf32", 12, 12, 64, torch.float32, LONG, "high"),
    Workload("base", 12, 12, 64, torch.bfloat16, SHORT),
    Workload("base, sparse_long", 12, 12, 64, torch.bfloat16, LONG),
    Workload("ARC 16/2", 16, 2, 64, torch.bfloat16, SHORT),
    Workload("paper 64/4", 64, 4, 128, torch.bfloat16, LONG),
    Workload("paper 64/4, sliced", 64, 4, 128, torch.bfloat16, LONG, sliced=True),
    Workload("paper 64/4, float32", 64, 4, 128, torch.float32, LONG),
    Workload("one group 64/1", 64, 1, 128, torch.bfloat16, LONG),
    Workload("widest head, float16", 8, 1, 256, torch.float16, LONG),
)


def train_and_decode(work: Workload) -> None:
    """All launches of a training step's attention and of a decoding step."""
    block, stride, select_block, count, window = work.sizes
    layout = nsa.lay_out(
        torch.tensor([0, TOKENS]),
        block=block,
        stride=stride,
        select_block=select_block,
        window=window,
    )

    def leaf(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=work.dtype, requires_grad=True)

    q_NHD = leaf(TOKENS, work.heads, work.width)
    k_NKD, v_NKD = (leaf(TOKENS, work.kv_heads, work.width) for _ in range(2))
    rows = len(layout.compressed_rows_ML)
    compressed = [leaf(rows, work.kv_heads, work.width) for _ in range(2)]
    index_NKn = torch.arange(count).expand(TOKENS, work.kv_heads, count)
    out_NHD, _ = nsa.attend_compressed_and_choose(q_NHD, *compressed, layout, count)
    out_NHD = out_NHD + nsa.selected_attention(q_NHD, k_NKD, v_NKD, index_NKn, layout)
    out_NHD = out_NHD + nsa.window_attention(q_NHD, k_NKD, v_NKD, layout)
    leaves = (q_NHD, k_NKD, v_NKD, *compressed)
    torch.autograd.grad(out_NHD, leaves, torch.zeros_like(out_NHD))
    with torch.no_grad():
        caches = [torch.zeros(2, work.kv_heads, TOKENS, work.width, dtype=work.dtype)] * 2
        time_B = torch.tensor([TOKENS - 1, 7])
        _, share_BKC = nsa.decode_compressed(q_NHD[:2], *caches, time_B)
        blocks = (block, stride, select_block, TOKENS // select_block + 1, count)
        nsa.choose_in_step(share_BKC, time_B, *blocks)
        nsa.decode_selected(q_NHD[:2], *caches, index_NKn[:2], time_B, select_block)
        nsa.decode_window(q_NHD[:2], *caches, time_B, window)


def run(work: Workload) -> None:
    """:func:`train_and_decode` under the settings of the workload."""
    precision, most = torch.get_float32_matmul_precision(), kernel_selected_plan.MOST_PART_BYTES
    torch.set_float32_matmul_precision(work.precision)
    kernel_selected_plan.MOST_PART_BYTES = 1 if work.sliced else most
    try:
        train_and_decode(work)
    finally:
        torch.set_float32_matmul_precision(precision)
        kernel_selected_plan.MOST_PART_BYTES = most


def workloads() -> Iterator[tuple[str, Callable[[], None]]]:
    for work in WORKLOADS:
        yield f"nsa: {work.name}", partial(run, work)
