"""Attention of tiles of queries on tiles of keys: what all three branches are made of.

Inside a tile every query has its own visible keys; a query without any gets output exactly 0
and gradient 0. Softmax and sums are float32 at least. Nothing of the size of the
scores is kept for the backward pass, which computes the weights again (Dao et al., arXiv
2205.14135, algorithm 4).

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


def masked_scores(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """(..., C, R, G) products of keys and scaled queries, HIDDEN_SCORE where hidden.

    Keys come first, so that a softmax over few of them still runs along whole vectors of queries
    (ten times as fast on a CPU for 11 keys). The mask is added, not filled in: faster too.
    """
    scores = (k @ q.flatten(-3, -2).mT).unflatten(-1, q.shape[-3:-1])
    bias = visible.to(q.dtype).sub_(1).mul_(-HIDDEN_SCORE)
    return scores.add_(bias.unsqueeze(-1))


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
    """Gradients of scaled queries, keys and values.

    grad_out: (..., R, G, E); weights: (..., C, R, G); delta: (..., R, G), sum of the output times
    its gradient.
    """
    grad_flat = grad_out.flatten(-3, -2)
    grad_v = weights.flatten(-2) @ grad_flat
    grad_scores = (v @ grad_flat.mT).unflatten(-1, delta.shape[-2:]).sub_(delta.unsqueeze(-3))
    grad_scores.mul_(weights)
    return weigh(grad_scores, k), grad_scores.flatten(-2) @ q.flatten(-3, -2), grad_v


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, want_share: bool):
        weights = _weights(q, k, visible)
        out = weigh(weights, v)
        share = group_share(weights) if want_share else out.new_empty(0)
        ctx.save_for_backward(q, k, v, visible, out)
        ctx.mark_non_differentiable(share)
        return out, share

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor):
        q, k, v, visible, out = ctx.saved_tensors
        grad_out = grad_out.contiguous()  # or every product below copies it
        delta = (grad_out * out).sum(dim=-1)
        with full_precision(q):
            weights = _weights(q, k, visible)
            return *attention_adjoint(grad_out, q, k, v, weights, delta), None, None


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, want_share: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v over each query's visible keys.

    Args:
        q, k, v: (..., R, G, D), (..., C, D), (..., C, E) of one dtype, float32 or float64, the
            queries divided by sqrt(D); at least one key. Hidden keys and values must be finite.
        visible: bool, broadcast to (..., C, R).
        want_share: also return the weights, summed over the group.

    Returns:
        output (..., R, G, E), and the group's weights (..., C, R), without gradient (empty if not
        wanted).
    """
    return _TileAttention.apply(q, k, v, visible, want_share)


def scaled(q: Tensor) -> Tensor:
    """Queries divided by sqrt(D), in the dtype that the references compute in."""
    return q.to(wide_dtype(q.dtype)) * q.shape[-1] ** -0.5


def attend_in_tiles(
    q_NHD: Tensor,
    k_XKD: Tensor,
    v_XKE: Tensor,
    tiles: Cover,
    key_SC: Tensor,
    visible_SCR: Tensor,
    want_share: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Packed scaled queries, cut into ``tiles``, on the keys ``key_SC`` of each tile.

    k_XKD and v_XKE hold X keys of any kind. Returns (N, H, E), and (N, K, C) the group's weights
    on its tile's keys if wanted.
    """
    (num_tiles, rows), num_keys = tiles.blocks.row_ML.shape, key_SC.shape[1]
    num_heads, kv_heads = q_NHD.shape[1], k_XKD.shape[1]
    q = Take.apply(q_NHD, tiles.blocks.row_ML.flatten(), tiles.slot_N)
    q = q.view(num_tiles, rows, kv_heads, num_heads // kv_heads, -1).transpose(1, 2)
    q = q.contiguous()  # once, or every product copies it
    k, v = (
        t.index_select(0, key_SC.flatten()).unflatten(0, (num_tiles, num_keys)).transpose(1, 2)
        for t in (k_XKD, v_XKE)
    )
    k, v = k.contiguous(), v.contiguous()
    out, share = tile_attention(q, k, v, visible_SCR[:, None], want_share)
    out = out.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    out_NHE = Take.apply(out, tiles.slot_N, tiles.token_X)
    if not want_share:
        return out_NHE, None
    share_XKC = share.permute(0, 3, 1, 2).flatten(0, 1)  # from (S, K, C, R)
    return out_NHE, share_XKC.index_select(0, tiles.slot_N)
