"""The compressed branch: overlapping blocks pooled to one key and value each (equation 7).

Shapes: N tokens, M compressed blocks, L = l tokens of a block, H query heads, K key/value heads,
D head width, E value width, F hidden width of phi, C most compressed blocks of a document, or
chunks of d tokens, P = l / d of a block.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tiny_onn_kernels.nsa.layout import NsaLayout
from tiny_onn_kernels.nsa.tile_attention import (
    Take,
    attend_in_tiles,
    full_precision,
)


def compress(
    blocks_MLKD: Tensor, position_L1D: Tensor, inner_FX: Tensor, outer_DF: Tensor
) -> Tensor:
    """phi(block): (M, K, D).

    phi(X) = mean(Z) + W_outer gelu(W_inner vec(Z)), Z = X + PE: a two-layer perceptron beside the
    mean, so that with W_outer = 0 it starts as mean pooling (and is the identity for l = 1,
    PE = 0). The paper asks for a learnable MLP with intra-block position encoding and says no
    more. Heads share it.

    Args:
        blocks_MLKD: un-rotated keys, or values, of every block; any dtype.
        position_L1D, inner_FX, outer_DF: PE, W_inner (F, L * D), W_outer (D, F).
    """
    # PE enters through linear maps only: as a constant, it spares a pass over all blocks.
    shift_F = F.linear(position_L1D.flatten(), inner_FX)
    hidden_MKF = F.gelu(F.linear(blocks_MLKD.transpose(1, 2).flatten(2), inner_FX) + shift_F)
    return blocks_MLKD.mean(dim=1) + position_L1D.mean(dim=0) + F.linear(hidden_MKF, outer_DF)


def take_blocks(x_NKD: Tensor, layout: NsaLayout) -> Tensor:
    """What :func:`compress` pools: (M, L, K, D), M at least 1 (see ``compressed_rows_ML``)."""
    rows_ML = layout.compressed_rows_ML
    return x_NKD.index_select(0, rows_ML.flatten()).unflatten(0, rows_ML.shape)


def compress_packed(
    x_NKD: Tensor, layout: NsaLayout, position_L1D: Tensor, inner_FX: Tensor, outer_DF: Tensor
) -> Tensor:
    """``compress(take_blocks(x_NKD, layout), ...)``, (M, K, D), without copying the overlaps.

    A block is l / d chunks of d tokens, and phi is linear up to its activation: every chunk passes
    the l / d slices of W_inner once, and blocks add up what their chunks gave.
    """
    if not len(layout.compressed.row_ML):
        return compress(take_blocks(x_NKD, layout), position_L1D, inner_FX, outer_DF)
    cover, parts = layout.chunks, layout.block // layout.stride
    chunk_CdKD = Take.apply(x_NKD, cover.token_X, cover.slot_N).unflatten(
        0, cover.blocks.row_ML.shape
    )
    slices_YX = inner_FX.unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 1)
    hidden_CKPF = F.linear(chunk_CdKD.transpose(1, 2).flatten(2), slices_YX)
    hidden_CKPF = hidden_CKPF.unflatten(-1, (parts, -1))
    mean_CKD = chunk_CdKD.mean(dim=1)
    first_M = cover.blocks.first_B[layout.compressed.doc_M] + layout.compressed.number_M
    hidden_MKF = F.linear(position_L1D.flatten(), inner_FX)
    mean_MKD = parts * position_L1D.mean(dim=0)
    for part in range(parts):
        hidden_MKF = hidden_MKF + hidden_CKPF[:, :, part].index_select(0, first_M + part)
        mean_MKD = mean_MKD + mean_CKD.index_select(0, first_M + part)
    return mean_MKD / parts + F.linear(F.gelu(hidden_MKF), outer_DF)


def compressed_attention(
    q_NHD: Tensor, k_MKD: Tensor, v_MKE: Tensor, layout: NsaLayout, want_share: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention to the compressed blocks that lie before the query (equations 5, 8 and 10).

    Args:
        q_NHD: (N, H, D) queries; k_MKD, v_MKE: one key and value for each of
            ``layout.compressed_rows_ML``, rotated; float16 to float64.
        want_share: also return p_cmp summed over each group's heads.

    Returns:
        (N, H, E) in the queries' dtype, exactly 0 for a token that no whole block precedes, and
        float32 or float64 (N, K, C) without gradient, or None. Peak memory grows as N * C * H.
    """
    key_SC, visible_SCR = layout.compressed_keys
    with full_precision(q_NHD):
        out_NHE, share_NKC = attend_in_tiles(
            q_NHD,
            k_MKD,
            v_MKE,
            layout.compressed_tiles,
            key_SC,
            visible_SCR,
            want_share,
        )
    return out_NHE, share_NKC
