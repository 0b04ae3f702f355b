"""Native Sparse Attention in pure PyTorch: any device, float16 to float64, packed documents.

Yuan et al., arXiv 2502.11089. The concepts stand in files of their own: layout (who sees whom),
compressed, select, selected, window, decode. Here is what a caller needs of them, and all three
branches in one call.

Shapes: N tokens, M compressed blocks, H query heads, K key/value heads, D head width, E value
width, n chosen blocks.
"""

from __future__ import annotations

from torch import Tensor

from tiny_onn_kernels.nsa.compressed import (
    compress,
    compress_packed,
    compressed_attention,
    take_blocks,
)
from tiny_onn_kernels.nsa.decode import decode_compressed, decode_selected, decode_window
from tiny_onn_kernels.nsa.layout import NsaLayout, lay_out, num_compressed
from tiny_onn_kernels.nsa.select import NUM_FORCED, block_scores, choose_blocks
from tiny_onn_kernels.nsa.selected import selected_attention
from tiny_onn_kernels.nsa.window import window_attention

__all__ = [
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


def combine(
    gate_NH3: Tensor, compressed_NHE: Tensor, selected_NHE: Tensor, window_NHE: Tensor
) -> Tensor:
    """Equation 5's sum: each branch times its gate (of the token and head), (N, H, E)."""
    compressed_N, selected_N, window_N = gate_NH3.unsqueeze(-2).unbind(dim=-1)
    return compressed_N * compressed_NHE + selected_N * selected_NHE + window_N * window_NHE


def select_blocks(share_NKC: Tensor, layout: NsaLayout, count: int) -> Tensor:
    """Chosen blocks (N, K, n) of every token, from p_cmp summed over each group's heads."""
    sizes = (layout.block, layout.stride, layout.select_block)
    score_NKJ = block_scores(share_NKC, *sizes, layout.most_select_blocks)
    return choose_blocks(score_NKJ, layout.time_N, layout.end_N, layout.select_block, count)


def attend_compressed_and_choose(
    q_NHD: Tensor, k_MKD: Tensor, v_MKE: Tensor, layout: NsaLayout, count: int
) -> tuple[Tensor, Tensor]:
    """:func:`compressed_attention` and the ``count`` blocks it chooses, (N, H, E) and (N, K, n):
    one call, so that a kernel need not hand out p_cmp."""
    out_NHE, share_NKC = compressed_attention(q_NHD, k_MKD, v_MKE, layout, want_share=True)
    return out_NHE, select_blocks(share_NKC, layout, count)


def choose_in_step(
    share_BKC: Tensor,
    time_B: Tensor,
    block: int,
    stride: int,
    select_block: int,
    num_blocks: int,
    count: int,
) -> Tensor:
    """Chosen blocks (B, K, n) of one step's tokens, from what :func:`decode_compressed` returns.

    time_B: int64 token numbers; num_blocks: selectable blocks of the longest row, at least.
    """
    score_BKJ = block_scores(share_BKC, block, stride, select_block, num_blocks)
    return choose_blocks(score_BKJ, time_B, time_B, select_block, count)


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
    """Gated sum of the three branches.

    Args:
        q_NHD: rotated queries, H a multiple of K.
        k_compressed_MKD, v_compressed_MKE: phi of every compressed block, keys rotated after it.
        k_selected_NKD ... v_window_NKE: rotated keys, and values; the same tensors twice where the
            branches share them.
        gate_NH3: gates of the compressed, selected and window branch, from 0 to 1.
        layout: of the packed documents; count: n, blocks chosen by each token and group.
        index_NKn: chosen blocks; None: the compressed branch chooses.

    Returns:
        (N, H, E) in the queries' dtype, and the chosen blocks, int64 (N, K, n), -1 for none.
    """
    compressed = (q_NHD, k_compressed_MKD, v_compressed_MKE, layout)
    if index_NKn is None:
        compressed_NHE, index_NKn = attend_compressed_and_choose(*compressed, count)
    else:
        compressed_NHE, _ = compressed_attention(*compressed)
    selected_NHE = selected_attention(q_NHD, k_selected_NKD, v_selected_NKE, index_NKn, layout)
    window_NHE = window_attention(q_NHD, k_window_NKD, v_window_NKE, layout)
    out_NHE = combine(gate_NH3, compressed_NHE, selected_NHE, window_NHE)
    return out_NHE.to(q_NHD.dtype), index_NKn
