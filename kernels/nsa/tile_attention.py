"""Attention of tiles of queries on tiles of keys: what all three branches are made of.

Inside a tile every query has its own visible keys; a query without any gets output exactly 0
and gradient 0. Matrix products are in the dtype of their inputs, softmax and sums in float32 at
least. Nothing of the size of the scores is kept for the backward pass, which computes the weights
again (Dao et al., arXiv 2205.14135, algorithm 4).

Shapes: ``...`` any leading sizes, R queries, G query heads of a key/value head, C keys, D head
width, E value width; for packed tensors N tokens, H query heads, K key/value heads, S tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny_onn_kernels.nsa.layout import Cover

HIDDEN_SCORE = -1e30
"""Added to the score of a hidden key: its weight is exactly 0 beside a visible one. (Finite: CPU
libraries take ten times as long over infinities.)"""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the references compute in: float32 for half precision, else the dtype itself."""
    return dtype if dtype.itemsize > 4 else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which autocast leaves matrix products in the dtype of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def group_share(weights: Tensor) -> Tensor:
    """Equation 10: the weights of a group's heads summed, (..., C, R, G) -> (..., C, R)."""
    return weights.sum(dim=-1)


def gather_sum(rows: Tensor, place: Tensor) -> Tensor:
    """rows[place] summed over the last dimension of ``place``, (A, copies), in its order."""
    return rows.index_select(0, place.flatten()).unflatten(0, place.shape).sum(dim=1)


class Take(torch.autograd.Function):
    """rows[index], where ``inverse`` says at which place each row stands, so that the adjoint is a
    gather too, not an index_add.

    rows: (A, ...); index: int64 (I,); inverse: int64 (A,) into index, -1 for none. A place of
    ``index`` that ``inverse`` does not name gives no gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        picked = grad.index_select(0, inverse.clamp(min=0))
        present = (inverse >= 0).view(-1, *(1,) * (grad.dim() - 1))
        return picked.mul_(present), None, None


class Spread(torch.autograd.Function):
    """rows[index] with any repetitions; the gradient is summed in float32 at least.

    rows: (A, D); index: int64, any shape; returns (*index.shape, D).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = len(rows)
        return rows.index_select(0, index.flatten()).unflatten(0, index.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        dtype, width = wide_dtype(grad.dtype), grad.shape[-1]
        total = grad.new_zeros(ctx.num_rows, width, dtype=dtype)
        total.index_add_(0, index.flatten(), grad.reshape(-1, width).to(dtype))
        return total.to(grad.dtype), None


def masked_scores(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """(..., C, R, G) products of keys and queries over sqrt(D), HIDDEN_SCORE where hidden; float32
    or float64.

    Keys come first, so that a softmax over few of them still runs along whole vectors of queries
    (ten times as fast on a CPU for 11 keys). The mask is added, not filled in: faster too.
    """
    scores = (k @ q.flatten(-3, -2).mT).unflatten(-1, q.shape[-3:-1])
    bias = visible.to(wide_dtype(q.dtype)).sub_(1).mul_(-HIDDEN_SCORE)
    return torch.add(bias.unsqueeze(-1), scores, alpha=q.shape[-1] ** -0.5)


def any_visible(visible: Tensor) -> Tensor:
    """bool (..., 1, R, 1): queries with a key, beside (..., C, R, G)."""
    return visible.any(dim=-2, keepdim=True).unsqueeze(-1)


def weigh(weights: Tensor, values: Tensor) -> Tensor:
    """(..., C, R, G) weights and (..., C, E) values -> (..., R, G, E)."""
    return (weights.flatten(-2).mT @ values).unflatten(-2, weights.shape[-2:])


def _weights(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """(..., C, R, G) softmax over visible keys; zeros for queries without any."""
    return masked_scores(q, k, visible).softmax(dim=-3).mul_(any_visible(visible))


def attention_adjoint(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, in their dtype.

    grad_out: (..., R, G, E) of their dtype; weights: (..., C, R, G), and delta: (..., R, G), the
    sum of the output times its gradient, both float32 or float64.
    """
    grad_flat, scale = grad_out.flatten(-3, -2), q.shape[-1] ** -0.5
    grad_v = weights.flatten(-2).to(v.dtype) @ grad_flat
    grad_scores = (v @ grad_flat.mT).unflatten(-1, delta.shape[-2:]) - delta.unsqueeze(-3)
    grad_scores = grad_scores.mul_(weights).to(q.dtype)
    grad_k = (grad_scores.flatten(-2) @ q.flatten(-3, -2)).mul_(scale)
    return weigh(grad_scores, k).mul_(scale), grad_k, grad_v


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, want_share: bool):
        weights = _weights(q, k, visible)
        out = weigh(weights.to(v.dtype), v)
        share = group_share(weights) if want_share else weights.new_empty(0)
        ctx.save_for_backward(q, k, v, visible, out)
        ctx.mark_non_differentiable(share)
        return out, share

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor):
        q, k, v, visible, out = ctx.saved_tensors
        grad_out = grad_out.contiguous()  # or every product below copies it
        wide = wide_dtype(out.dtype)
        delta = (grad_out.to(wide) * out.to(wide)).sum(dim=-1)
        with full_precision(q):
            weights = _weights(q, k, visible)
            return *attention_adjoint(grad_out, q, k, v, weights, delta), None, None


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, want_share: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v over each query's visible keys.

    Args:
        q, k, v: (..., R, G, D), (..., C, D), (..., C, E) of one dtype, best contiguous; at least
            one key. Hidden keys and values must be finite.
        visible: bool, broadcast to (..., C, R).
        want_share: also return the weights, summed over the group.

    Returns:
        output (..., R, G, E) in the dtype of v, and the group's weights (..., C, R), float32 or
        float64, without gradient (empty if not wanted).
    """
    return _TileAttention.apply(q, k, v, visible, want_share)


def attend_in_tiles(
    q_NHD: Tensor,
    k_XKD: Tensor,
    v_XKE: Tensor,
    tiles: Cover,
    key_SC: Tensor,
    visible_SCR: Tensor,
    want_share: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Packed queries, cut into ``tiles``, on the keys ``key_SC`` of each tile.

    k_XKD and v_XKE hold X keys of any kind. Returns (N, H, E), and (N, K, C) the group's weights
    on its tile's keys if wanted.
    """
    (num_tokens, num_heads), kv_heads = q_NHD.shape[:2], k_XKD.shape[1]
    num_tiles, rows = tiles.blocks.row_ML.shape
    head_K = torch.arange(kv_heads, device=q_NHD.device)
    # Rows of one head each, so that tiles are made, and taken apart, in one pass.
    row_SKR = tiles.blocks.row_ML[:, None] * kv_heads + head_K[:, None]
    tile_N, place_N = tiles.slot_N // rows, tiles.slot_N % rows
    slot_NK = (tile_N[:, None] * kv_heads + head_K) * rows + place_N[:, None]
    q = Take.apply(
        q_NHD.reshape(num_tokens * kv_heads, -1), row_SKR.flatten(), slot_NK.flatten()
    ).view(num_tiles, kv_heads, rows, num_heads // kv_heads, -1)
    key_SKC = key_SC[:, None] * kv_heads + head_K[:, None]
    k, v = (Spread.apply(t.reshape(-1, t.shape[-1]), key_SKC) for t in (k_XKD, v_XKE))
    out, share = tile_attention(q, k, v, visible_SCR[:, None], want_share)
    token_SKR = tiles.token_X.view(num_tiles, 1, rows)
    token_SKR = torch.where(token_SKR < 0, -1, token_SKR * kv_heads + head_K[:, None])
    out = Take.apply(out.flatten(3).flatten(0, 2), slot_NK.flatten(), token_SKR.flatten())
    out_NHE = out.view(num_tokens, num_heads, -1)
    if not want_share:
        return out_NHE, None
    share_XKC = share.permute(0, 3, 1, 2).flatten(0, 1)  # from (S, K, C, R)
    return out_NHE, share_XKC.index_select(0, tiles.slot_N)
