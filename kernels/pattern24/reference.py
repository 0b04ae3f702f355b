"""Weights under 2:4 patterns drawn by Gumbel noise, in PyTorch: the definition.

For a group of four weights along the last dimension, with the six patterns M (6, 4),

    logits = kappa M S            (scores S >= 0; or kappa times six free logits)
    k      = argmax (logits + g)      out = W o M_k
    soft   = softmax ((logits + g) / tau)

and backward as if out were W o (soft M) (straight through). Without noise g = 0 and the pattern of
scores is their top two, found by comparing them; there a NaN ranks below zero. A group with a NaN
among its logits gets no pattern, and a NaN gradient for all of them; W o M_k is a product, so that
a NaN or infinite weight is NaN where it is dropped. Six free logits: MaskLLM (Fang et al., arXiv
2409.17481). The noise comes from counters: noise.py.

Shapes: A agents, G groups of four, 6 patterns, K the last dimension of weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nn_functional
from torch import Tensor

from tiny_onn_kernels.pattern24.noise import gumbel

PATTERNS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""The positions that each pattern keeps, in lexicographic order."""

NONE = len(PATTERNS)
"""Instead of a pattern, where a logit is NaN: nothing is kept."""

FIRST, SECOND = ([pair[i] for pair in PATTERNS] for i in (0, 1))

Number = float | Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def patterns(dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """(6, 4): one where a pattern keeps a weight."""
    kept_64 = torch.zeros(len(PATTERNS), 4, dtype=dtype, device=device)
    return kept_64.scatter_(1, torch.tensor(PATTERNS, device=device), 1)


def top_two(score_G4: Tensor) -> Tensor:
    """(G,) the pattern of the two largest; equals go to the lower position, NaN is below zero."""
    score_G4 = score_G4.masked_fill(score_G4.isnan(), -1.0)
    best_G2 = score_G4.sort(dim=1, descending=True, stable=True).indices[:, :2].sort(dim=1).values
    first_G, second_G = best_G2.unbind(1)
    return second_G - 1 + 2 * first_G.clamp(max=1) + (first_G == 2)


def as_number(value: Number | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor () of this dtype; one that is so already is not copied."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def count_agents(weight: Tensor, source: Tensor, last: tuple[int, ...], name: str) -> int:
    """How many agents share the weights, each with its own scores (or logits).

    Raises ValueError unless shapes, dtypes and devices fit each other.
    """
    if weight.ndim == 0 or weight.shape[-1] % 4:
        raise ValueError(
            f"got weights of {tuple(weight.shape)}, expected a last dimension that is a multiple "
            "of 4; pad it or leave this matrix dense"
        )
    expected = (*weight.shape[:-1], *last)
    if source.shape != expected and source.shape[1:] != expected:
        raise ValueError(
            f"got {name} of {tuple(source.shape)}, expected {expected}, or that behind a first "
            "dimension of agents that share the weights"
        )
    if not (weight.is_floating_point() and source.is_floating_point()):
        raise ValueError(
            f"got weights of {weight.dtype} and {name} of {source.dtype}, expected floating point"
        )
    if weight.device != source.device:
        raise ValueError(
            f"got weights on {weight.device} and {name} on {source.device}, expected one device"
        )
    return 1 if source.shape == expected else len(source)


def _draw(
    weight: Tensor, logits_AG6: Tensor, tau: Tensor, seed: Tensor, offset: Tensor, sample: bool
) -> tuple[Tensor, Tensor]:
    """Pattern (A, G) and the soft mask's (A, G, 4) of these logits."""
    size = logits_AG6.shape
    if sample:
        noise_XA = gumbel(size[0] * size[1], seed, offset, logits_AG6.dtype)
        logits_AG6 = logits_AG6 + noise_XA.reshape(size)
    soft_AG6 = torch.softmax(logits_AG6 / tau, dim=-1)
    y0, y1, y2, y3, y4, y5 = soft_AG6.unbind(-1)
    soft_AG4 = torch.stack([y0 + y1 + y2, y0 + y3 + y4, y1 + y3 + y5, y2 + y4 + y5], dim=-1)
    pattern_AG = logits_AG6.detach().argmax(dim=-1)
    return pattern_AG.masked_fill(logits_AG6.isnan().any(dim=-1), NONE), soft_AG4


class _AsIf(torch.autograd.Function):
    """The first argument forward; backward as if the result were the sum of all."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.num_inputs = 1 + len(others)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad,) * ctx.num_inputs


def _apply(
    weight: Tensor, pattern_AG: Tensor, soft_AG4: Tensor, shape: torch.Size, dense_grad: bool
) -> tuple[Tensor, Tensor]:
    """Weights under the hard mask, differentiable as if it were the soft one."""
    wide = soft_AG4.dtype
    hard_74 = nn_functional.pad(patterns(wide, weight.device), (0, 0, 0, 1))
    hard_AG4 = hard_74[pattern_AG]
    weight_G4 = weight.reshape(1, -1, 4).to(wide)
    others = [weight_G4.detach() * soft_AG4]
    if dense_grad:
        others.append(weight_G4.expand_as(soft_AG4))
        weight_G4 = weight_G4.detach()
    kept_AG4 = _AsIf.apply(weight_G4 * hard_AG4, *others)
    pattern = pattern_AG.to(torch.uint8).reshape(*shape[:-1], shape[-1] // 4)
    return kept_AG4.to(weight.dtype).reshape(shape), pattern


def pattern24(
    weight: Tensor,
    score: Tensor,
    kappa: Number,
    tau: Number,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    sample: bool = True,
    dense_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights under 2:4 patterns that follow scores.

    Args:
        weight: (..., K), K a multiple of 4; float16, bfloat16, float32 or float64.
        score: of the same shape, or (A, ..., K): A agents share the weights. Not negative,
            normalised by whoever made it; computed on in float32 (float64 if weight has that).
        kappa, tau: scale of the logits and temperature of the gradient, both > 0; numbers or
            tensors (). No gradient.
        seed, offset: of the noise: 64-bit, numbers or int64 tensors (). Two calls share noise where
            seeds are equal and ranges of counters, A G from the offset on, overlap.
        sample: with noise; without, the pattern is the top two.
        dense_grad: weights that a pattern drops get the gradient of what they would have been.

    Returns:
        The weights, with zeros, of score's shape and weight's dtype; and the patterns (..., K / 4)
        uint8, an index into PATTERNS or NONE.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    num_agents = count_agents(weight, score, weight.shape[-1:], "scores")
    wide = sum_dtype(weight.dtype)
    kappa, tau = (as_number(t, wide, weight.device) for t in (kappa, tau))
    seed, offset = (as_number(t, torch.int64, weight.device) for t in (seed, offset))
    score_AG4 = score.to(wide).reshape(num_agents, weight.numel() // 4, 4)
    # Sums, no product with the patterns: zero times infinity is NaN.
    logits_AG6 = kappa * (score_AG4[..., FIRST] + score_AG4[..., SECOND])
    pattern_AG, soft_AG4 = _draw(weight, logits_AG6, tau, seed, offset, sample)
    if not sample:
        pattern_AG = top_two(score_AG4.detach().reshape(-1, 4)).reshape(pattern_AG.shape)
    return _apply(weight, pattern_AG, soft_AG4, score.shape, dense_grad)


def pattern24_free(
    weight: Tensor,
    logits: Tensor,
    kappa: Number,
    tau: Number,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    sample: bool = True,
    dense_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """As :func:`pattern24`, from six free logits a group: (..., K / 4, 6), or (A, ..., K / 4, 6).

    Without noise the pattern is that of the largest logit (of equals the first).
    """
    last = (weight.shape[-1] // 4, 6) if weight.ndim else ()
    num_agents = count_agents(weight, logits, last, "logits")
    wide = sum_dtype(weight.dtype)
    kappa, tau = (as_number(t, wide, weight.device) for t in (kappa, tau))
    seed, offset = (as_number(t, torch.int64, weight.device) for t in (seed, offset))
    logits_AG6 = kappa * logits.to(wide).reshape(num_agents, weight.numel() // 4, 6)
    pattern_AG, soft_AG4 = _draw(weight, logits_AG6, tau, seed, offset, sample)
    shape = torch.Size((*logits.shape[:-2], weight.shape[-1]))
    return _apply(weight, pattern_AG, soft_AG4, shape, dense_grad)
