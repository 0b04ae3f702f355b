"""The selected branch: each token reads n blocks in full, its group's heads the same ones.

Pairs (token, chosen block) are sorted by block and cut into tiles, so that a block meets many of
the queries that chose it in one product and only queries are gathered, not n l' keys for each.
Every pair's partial output is then merged at its token by the real log-sum-exp.

Shapes: N tokens, H query heads in K groups of G, n chosen blocks, D head width, E value width,
J selectable blocks of all documents, L = l' tokens of one, P = N * K * n pairs, Z = K * J blocks
of all heads, S tiles of R tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_onn_kernels.nsa.layout import TILE, Cover, NsaLayout, token_visible
from tiny_onn_kernels.nsa.tile_attention import (
    Take,
    full_precision,
    tile_attention,
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
    count_Z = key_P.bincount(minlength=kv_heads * num_blocks + 1)[:-1]
    offset_Z1 = torch.cat([count_Z.new_zeros(1), count_Z.cumsum(0)])
    return InverseIndex(key_P.argsort(stable=True), offset_Z1)


@dataclass(frozen=True)
class _PairTiles:
    """block_S: int64 (S,) block (of all heads) of each tile; pair_X: (S * R,) pair at each place,
    -1 for none; place_P: (P,) place of each pair, -1 for an invalid one."""

    block_S: Tensor
    pair_X: Tensor
    place_P: Tensor


def _cut(inverse: InverseIndex, rows: int) -> _PairTiles:
    """Tiles of ``rows`` pairs of one block each; a block's last tile may have places to spare."""
    offset_Z, count_Z = inverse.offset_Z1[:-1], inverse.offset_Z1.diff()
    tiles_Z = (count_Z + rows - 1) // rows
    first_Z = tiles_Z.cumsum(0) - tiles_Z
    num_tiles, num_valid = torch.stack([tiles_Z.sum(), inverse.offset_Z1[-1]]).tolist()
    device = offset_Z.device
    blocks_Z = torch.arange(len(count_Z), device=device)
    block_S = blocks_Z.repeat_interleave(tiles_Z, output_size=num_tiles)
    block_V = blocks_Z.repeat_interleave(count_Z, output_size=num_valid)
    if not num_tiles:  # nobody chose anything: one empty tile keeps the shapes going
        num_tiles, block_S = 1, blocks_Z[:1]
    rank_V = torch.arange(num_valid, device=device) - offset_Z[block_V]
    place_V = first_Z[block_V] * rows + rank_V
    pair_V = inverse.pair_P[:num_valid]
    pair_X = place_V.new_full((num_tiles * rows,), -1)
    place_P = place_V.new_full((len(inverse.pair_P),), -1)
    pair_X[place_V], place_P[pair_V] = pair_V, place_V
    return _PairTiles(block_S, pair_X, place_P)


def _head_blocks(x_NKD: Tensor, cover: Cover) -> Tensor:
    """Keys or values by head and block: (Z, L, D)."""
    x_XKD = Take.apply(x_NKD, cover.blocks.row_ML.flatten(), cover.slot_N[:, None])
    x_JLKD = x_XKD.unflatten(0, cover.blocks.row_ML.shape)
    return x_JLKD.permute(2, 0, 1, 3).flatten(0, 1)


def merge(out_AnGE: Tensor, lse_AnG: Tensor) -> Tensor:
    """Softmax attention over the union of n disjoint sets of keys, from each set's own (A, G, E).

    Sets without keys have log-sum-exp -inf; a row of nothing else becomes 0.
    """
    peak_A1G = lse_AnG.detach().amax(dim=1, keepdim=True)
    peak_A1G = peak_A1G.masked_fill(peak_A1G == -torch.inf, 0)
    weight_AnG = (lse_AnG - peak_A1G).exp()
    total_AG = weight_AnG.sum(dim=1).clamp(min=1)  # at least 1 wherever there is a key
    return (weight_AnG.unsqueeze(-1) * out_AnGE).sum(dim=1) / total_AG.unsqueeze(-1)


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
    tiles = _cut(invert_index(index_NKn, layout), max(1, tile // groups))
    num_tiles = len(tiles.block_S)

    chooser_X = tiles.pair_X.clamp(min=0) // count  # row of (N * K)
    place_An = tiles.place_P.view(num_tokens * kv_heads, count)
    q_AGD = q_NHD.to(dtype).reshape(num_tokens * kv_heads, groups, -1)
    q_SRGD = Take.apply(q_AGD, chooser_X, place_An).unflatten(0, (num_tiles, -1))
    k_SLD, v_SLE = (
        _head_blocks(t.to(dtype), cover).index_select(0, tiles.block_S) for t in (k_NKD, v_NKE)
    )
    time_SL = cover.blocks.time_ML[tiles.block_S % len(cover.blocks.doc_M)]
    end_X = layout.end_N[chooser_X // kv_heads].masked_fill(tiles.pair_X < 0, -1)
    visible_SRL = token_visible(end_X.view(num_tiles, -1, 1), time_SL[:, None, :])

    with full_precision(q_NHD):
        out_SRGE, lse_SRG, _ = tile_attention(q_SRGD, k_SLD, v_SLE, visible_SRL)
    back = (place_An.clamp(min=0).flatten(), tiles.pair_X[:, None])
    out_AnGE = Take.apply(out_SRGE.flatten(0, 1), *back).unflatten(0, (-1, count))
    lse_AnG = Take.apply(lse_SRG.flatten(0, 1), *back).unflatten(0, (-1, count))
    lse_AnG = lse_AnG.masked_fill((place_An < 0).unsqueeze(-1), -torch.inf)
    return merge(out_AnGE, lse_AnG).reshape(num_tokens, num_heads, -1).to(q_NHD.dtype)
