"""The selected branch: each token reads n blocks in full, its group's heads the same ones.

Pairs (token, chosen block) are sorted by block and cut into tiles, so that a block meets many of
the queries that chose it in one product and only queries are gathered, not n l' keys for each.
A pair's partial output is weighted by the log-sum-exp of all its token's pairs, and summed there.

Shapes: N tokens, H query heads in K groups of G, n chosen blocks, D head width, E value width,
J selectable blocks of all documents, L = l' tokens of one, P = N * K * n pairs, Z = K * J blocks
of all heads, S tiles of R tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiny_onn_kernels.nsa.layout import TILE, Cover, NsaLayout, token_visible
from tiny_onn_kernels.nsa.tile_attention import (
    Take,
    any_visible,
    attention_adjoint,
    full_precision,
    gather_sum,
    masked_scores,
    weigh,
    wide_dtype,
)


@dataclass(frozen=True)
class InverseIndex:
    """Who chose each block (compressed sparse rows).

    pair_P: int64 (P,) pairs, numbered as in the flattened index, by (head, block), tokens
    ascending, invalid ones last; offset_Z1: int64 (Z + 1,) where each block's pairs begin.
    """

    pair_P: Tensor
    offset_Z1: Tensor


def invert_index(index_NKn: Tensor, layout: NsaLayout) -> InverseIndex:
    """The inverse of ``index_NKn`` (block numbers within the documents, -1 for none)."""
    num_blocks, kv_heads = len(layout.selectable.blocks.doc_M), index_NKn.shape[1]
    head_K1 = torch.arange(kv_heads, device=index_NKn.device)[:, None]
    first_N11 = layout.selectable.blocks.first_B[layout.doc_N][:, None, None]
    key_NKn = index_NKn + first_N11 + head_K1 * num_blocks
    key_P = torch.where(index_NKn < 0, kv_heads * num_blocks, key_NKn).flatten()
    key_P, pair_P = key_P.int().sort(stable=True)
    block_Z1 = torch.arange(kv_heads * num_blocks + 1, device=key_P.device, dtype=torch.int32)
    return InverseIndex(pair_P, torch.searchsorted(key_P, block_Z1))  # bincount would wait


@dataclass(frozen=True)
class PairTiles:
    """block_S: int64 (S,) block (of all heads) of each tile; pair_X: (S * R,) pair at each place,
    -1 for none; place_P: (P,) place of each pair. The last tile is empty: there stand the invalid
    pairs, which see nothing."""

    block_S: Tensor
    pair_X: Tensor
    place_P: Tensor


def cut(inverse: InverseIndex, rows: int) -> PairTiles:
    """Tiles of ``rows`` pairs of one block each; a block's last tile may have places to spare."""
    offset_Z, count_Z = inverse.offset_Z1[:-1], inverse.offset_Z1.diff()
    tiles_Z = (count_Z + rows - 1) // rows
    first_Z = tiles_Z.cumsum(0) - tiles_Z
    num_tiles, num_valid = torch.stack([tiles_Z.sum(), inverse.offset_Z1[-1]]).tolist()
    device = offset_Z.device
    blocks_Z = torch.arange(len(count_Z), device=device)
    block_S = blocks_Z.repeat_interleave(tiles_Z, output_size=num_tiles)
    block_V = blocks_Z.repeat_interleave(count_Z, output_size=num_valid)
    rank_V = torch.arange(num_valid, device=device) - offset_Z[block_V]
    place_V = first_Z[block_V] * rows + rank_V
    pair_V = inverse.pair_P[:num_valid]
    pair_X = place_V.new_full(((num_tiles + 1) * rows,), -1)
    place_P = place_V.new_full((len(inverse.pair_P),), num_tiles * rows)
    pair_X[place_V], place_P[pair_V] = pair_V, place_V
    return PairTiles(torch.cat([block_S, blocks_Z[:1]]), pair_X, place_P)


def _head_blocks(x_NKD: Tensor, cover: Cover) -> Tensor:
    """Keys or values by head and block: (Z, L, D)."""
    x_XKD = Take.apply(x_NKD, cover.blocks.row_ML.flatten(), cover.slot_N)
    x_JLKD = x_XKD.unflatten(0, cover.blocks.row_ML.shape)
    return x_JLKD.permute(2, 0, 1, 3).flatten(0, 1)


def total_lse(lse_AnG: Tensor) -> Tensor:
    """Log-sum-exp over a token's n blocks, (A, G); -inf where none has a visible key."""
    return lse_AnG.logsumexp(dim=1)


def share_of(lse_XG: Tensor, total_XG: Tensor) -> Tensor:
    """Weight of a pair among its token's: exp(lse - total), 0 where there is no key at all."""
    return (lse_XG - total_XG.masked_fill(total_XG == -torch.inf, torch.inf)).exp()


class _PairAttention(torch.autograd.Function):
    """Attention of A = N * K queries (A, G, D), each to the blocks it chose.

    k, v: blocks of all heads, (Z, L, D) and (Z, L, E); visible: bool (S, L, R); block_S: block of
    each tile; chooser_X: query at each place; place_An: places of each query's pairs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_AGD: Tensor,
        k_ZLD: Tensor,
        v_ZLE: Tensor,
        visible_SLR: Tensor,
        block_S: Tensor,
        chooser_X: Tensor,
        place_An: Tensor,
    ) -> Tensor:
        q = q_AGD.index_select(0, chooser_X).unflatten(0, visible_SLR.shape[::2])
        k, v = k_ZLD.index_select(0, block_S), v_ZLE.index_select(0, block_S)
        scores = masked_scores(q, k, visible_SLR)
        peak_SRG, weights = scores.amax(dim=1), scores.softmax(dim=1)
        lse_SRG = peak_SRG - weights.amax(dim=1).log()  # e^(peak - lse) is the largest weight
        lse_SRG = torch.where(any_visible(visible_SLR).squeeze(1), lse_SRG, -torch.inf)
        lse_XG = lse_SRG.flatten(0, 1)
        lse_AnG = lse_XG.index_select(0, place_An.flatten()).unflatten(0, place_An.shape)
        share_XG1 = share_of(lse_XG, total_lse(lse_AnG).index_select(0, chooser_X)).unsqueeze(-1)
        part_XGE = weigh(weights, v).flatten(0, 1)
        out_AGE = gather_sum(part_XGE.mul_(share_XG1), place_An)
        ctx.save_for_backward(
            q_AGD, k_ZLD, v_ZLE, visible_SLR, block_S, chooser_X, place_An, out_AGE, share_XG1
        )
        return out_AGE

    @staticmethod
    def backward(ctx: Any, grad_AGE: Tensor):
        q_AGD, k_ZLD, v_ZLE, visible_SLR, block_S, chooser_X, place_An, *results = ctx.saved_tensors
        out_AGE, share_XG1 = results
        delta_AG = (grad_AGE * out_AGE).sum(dim=-1)
        q, grad_out, delta = (
            t.index_select(0, chooser_X).unflatten(0, visible_SLR.shape[::2])
            for t in (q_AGD, grad_AGE, delta_AG)
        )
        k, v = k_ZLD.index_select(0, block_S), v_ZLE.index_select(0, block_S)
        with full_precision(q):
            weights = masked_scores(q, k, visible_SLR).softmax(dim=1)
            weights.mul_(share_XG1.view(len(block_S), 1, *q.shape[1:3]))
            grad_q, grad_k, grad_v = attention_adjoint(grad_out, q, k, v, weights, delta)
        return (
            gather_sum(grad_q.flatten(0, 1), place_An),
            torch.zeros_like(k_ZLD).index_add_(0, block_S, grad_k),
            torch.zeros_like(v_ZLE).index_add_(0, block_S, grad_v),
            *(None,) * 4,
        )


def selected_attention(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKE: Tensor,
    index_NKn: Tensor,
    layout: NsaLayout,
    tile: int = TILE,
) -> Tensor:
    """Attention to the visible tokens of the chosen blocks (equations 11 and 12).

    Args:
        q_NHD, k_NKD, v_NKE: packed queries, rotated keys, values; float16 to float64.
        index_NKn: int64, block numbers within each token's document, no block twice, -1 for none.
        tile: query rows (tokens times heads of a group) that meet a block at once.

    Returns:
        (N, H, E) in the queries' dtype; exactly 0 where no block is chosen. Peak memory grows as
        N * n * H * (l' + D + E). Waits for the device once, to learn the number of tiles.
    """
    num_tokens, num_heads = q_NHD.shape[:2]
    kv_heads, count = index_NKn.shape[1:]
    groups = num_heads // kv_heads
    dtype, cover = wide_dtype(q_NHD.dtype), layout.selectable
    tiles = cut(invert_index(index_NKn, layout), max(1, tile // groups))
    chooser_X = tiles.pair_X.clamp(min=0) // count  # token and head: row of (N * K)
    time_SL = cover.blocks.time_ML[tiles.block_S % len(cover.blocks.doc_M)]
    end_X = layout.end_N[chooser_X // kv_heads]
    visible_SLR = token_visible(end_X.view(len(time_SL), 1, -1), time_SL[:, :, None])
    visible_SLR = visible_SLR & (tiles.pair_X >= 0).view(len(time_SL), 1, -1)
    with full_precision(q_NHD):
        out_AGE = _PairAttention.apply(
            q_NHD.to(dtype).reshape(num_tokens * kv_heads, groups, -1),
            _head_blocks(k_NKD.to(dtype), cover),
            _head_blocks(v_NKE.to(dtype), cover),
            visible_SLR,
            tiles.block_S,
            chooser_X,
            tiles.place_P.view(num_tokens * kv_heads, count),
        )
    return out_AGE.reshape(num_tokens, num_heads, -1).to(q_NHD.dtype)
