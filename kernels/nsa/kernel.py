"""Native Sparse Attention by Triton kernels: what :mod:`reference` gathers, with its signatures.

Needs a CUDA device of compute capability 8.0 or newer, or Triton's interpreter. What is no kernel
of its own (phi, layouts, gates) is the reference's.

Shapes: N tokens, M compressed blocks, H query heads, K key/value heads, D head width, E value
width, n chosen blocks, C most compressed blocks of a document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import INTERPRETED
from tiny_onn_kernels.nsa.kernel_band import band
from tiny_onn_kernels.nsa.kernel_decode import decode_compressed, decode_selected, decode_window
from tiny_onn_kernels.nsa.kernel_launch import same_dtype
from tiny_onn_kernels.nsa.kernel_select import choose, choose_from_share, share
from tiny_onn_kernels.nsa.kernel_selected import selected
from tiny_onn_kernels.nsa.kernel_selected_plan import goes_keys_first
from tiny_onn_kernels.nsa.layout import TILE
from tiny_onn_kernels.nsa.reference import (
    NUM_FORCED,
    NsaLayout,
    block_scores,
    choose_blocks,
    combine,
    compress,
    compress_packed,
    lay_out,
    num_compressed,
    select_blocks,
    take_blocks,
)
from tiny_onn_kernels.nsa.selected import invert_index

__all__ = [
    "INTERPRETED",
    "NUM_FORCED",
    "NsaLayout",
    "attend_compressed_and_choose",
    "block_scores",
    "choose_blocks",
    "choose_in_step",
    "combine",
    "compress",
    "compress_packed",
    "compressed_attention",
    "decode_compressed",
    "decode_selected",
    "decode_window",
    "lay_out",
    "nsa_attention",
    "num_compressed",
    "select_blocks",
    "selected_attention",
    "take_blocks",
    "window_attention",
]


def compressed_attention(
    q_NHD: Tensor, k_MKD: Tensor, v_MKE: Tensor, layout: NsaLayout, want_share: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention to the compressed blocks that lie before the query; without p_cmp, (N, K, C), which
    is for inspection, memory grows as N * H. See :func:`reference.compressed_attention`."""
    same_dtype(q_NHD, k_MKD, v_MKE)
    out_NHE, lse_NH = band(q_NHD, k_MKD, v_MKE, *layout.compressed_range)
    if not want_share:
        return out_NHE, None
    room = max(1, layout.compressed.most)
    tiles = layout.tiles.blocks.first_row_M
    tensors = (q_NHD.detach(), k_MKD.detach(), lse_NH.detach(), tiles, layout.time_N)
    return out_NHE, share(*tensors, *layout.compressed_range, layout.tile, room)


def attend_compressed_and_choose(
    q_NHD: Tensor, k_MKD: Tensor, v_MKE: Tensor, layout: NsaLayout, count: int
) -> tuple[Tensor, Tensor]:
    """:func:`compressed_attention` and the ``count`` blocks it chooses, (N, H, E) and int64
    (N, K, n): p_cmp stays in registers. See :func:`reference.attend_compressed_and_choose`."""
    assert count >= NUM_FORCED, f"{count} blocks hold no {NUM_FORCED} forced ones"
    same_dtype(q_NHD, k_MKD, v_MKE)
    out_NHE, lse_NH = band(q_NHD, k_MKD, v_MKE, *layout.compressed_range)
    tensors = (q_NHD.detach(), k_MKD.detach(), lse_NH.detach(), layout.tiles.blocks.first_row_M)
    sizes = (layout.tile, layout.block, layout.stride, layout.select_block)
    times = (layout.time_N, layout.end_N, *layout.compressed_range)
    return out_NHE, choose(*tensors, *times, *sizes, layout.most_select_blocks, count)


def choose_in_step(
    share_BKC: Tensor,
    time_B: Tensor,
    block: int,
    stride: int,
    select_block: int,
    num_blocks: int,
    count: int,
) -> Tensor:
    """Chosen blocks (B, K, n) of one step's tokens, in one launch whose shapes do not depend on
    ``num_blocks``; see :func:`reference.choose_in_step`."""
    assert count >= NUM_FORCED, f"{count} blocks hold no {NUM_FORCED} forced ones"
    return choose_from_share(share_BKC, time_B, block, stride, select_block, count)


def selected_attention(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKE: Tensor,
    index_NKn: Tensor,
    layout: NsaLayout,
    tile: int = TILE,
) -> Tensor:
    """Attention to the visible tokens of the chosen blocks; see
    :func:`reference.selected_attention`. Waits for nothing."""
    same_dtype(q_NHD, k_NKD, v_NKE)
    blocks = layout.selectable.blocks
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q_NHD, k_NKD, v_NKE))
    inverse = (None, None)
    if wants_grad or goes_keys_first(q_NHD, k_NKD, v_NKE, layout.select_block):
        found = invert_index(index_NKn, layout)
        inverse = (found.pair_P, found.offset_Z1)
    times = (layout.time_N, layout.end_N, blocks.first_row_M)
    sizes = (layout.select_block, layout.longest, tile)
    return selected(q_NHD, k_NKD, v_NKE, index_NKn, *inverse, *times, *sizes)[0]


def window_attention(q_NHD: Tensor, k_NKD: Tensor, v_NKE: Tensor, layout: NsaLayout) -> Tensor:
    """Attention within ``layout.window`` keys; see :func:`reference.window_attention`."""
    same_dtype(q_NHD, k_NKD, v_NKE)
    return band(q_NHD, k_NKD, v_NKE, *layout.window_range)[0]


def nsa_attention(
    q_NHD: Tensor,
    k_compressed_MKD: Tensor,
    v_compressed_MKE: Tensor,
    k_selected_NKD: Tensor,
    v_selected_NKE: Tensor,
    k_window_NKD: Tensor,
    v_window_NKE: Tensor,
    gate_NH3: Tensor,
    layout: NsaLayout,
    count: int,
    index_NKn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated sum of the three branches, and the chosen blocks; see
    :func:`reference.nsa_attention`."""
    compressed = (q_NHD, k_compressed_MKD, v_compressed_MKE, layout)
    if index_NKn is None:
        compressed_NHE, index_NKn = attend_compressed_and_choose(*compressed, count)
    else:
        compressed_NHE, _ = compressed_attention(*compressed)
    selected_NHE = selected_attention(q_NHD, k_selected_NKD, v_selected_NKE, index_NKn, layout)
    window_NHE = window_attention(q_NHD, k_window_NKD, v_window_NKE, layout)
    out_NHE = combine(gate_NH3, compressed_NHE, selected_NHE, window_NHE)
    return out_NHE.to(q_NHD.dtype), index_NKn
