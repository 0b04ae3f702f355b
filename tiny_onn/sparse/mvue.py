"""Minimum-variance unbiased n:m estimates: keep entry i with probability p_i, as x_i / p_i.

The variance of a group, sum_i x_i^2 (1/p_i - 1) subject to sum_i p_i = n and p_i <= 1, is least
where p is proportional to a = |x| up to a ceiling (water-filling): with a sorted descending and
R_k = sum_{j>=k} a_j, the first k with (n - k) a_k <= R_k entries are kept for certain and the
others have p_j = (n - k) a_j / R_k. The entries are drawn by systematic sampling, which has these
marginals and draws exactly n. Unbiased 2:4 gradients: Chmiel et al., arXiv 2203.10991.

``approximate`` draws one entry proportional to a, then another proportional to a among the rest
(its inclusion probabilities have a closed form): unbiased, with a slightly larger variance, and
without a sort. It exists for n = 2.

Sums of the other entries are summed, never got by subtraction, and groups with at most n nonzeros
are returned as they are: no input divides by zero.

Shapes: G groups, m entries a group.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tiny_onn.errors import UserError
from tiny_onn.sparse.mask import TWO_FOUR, largest, magnitude
from tiny_onn.sparse.pattern import NMPattern, place, refuse_nonfinite

Method = Literal["exact", "approximate"]
METHODS: tuple[Method, ...] = ("exact", "approximate")


class Sample(NamedTuple):
    """mask: bool, entries drawn; probability: float32 (float64 for float64) of each entry being
    drawn, zero where x is zero. Both of x's shape."""

    mask: Tensor
    probability: Tensor


def _amounts(x: Tensor, pattern: NMPattern, check: bool) -> Tensor:
    """(..., G, m) |x| in float32 or float64, scaled so that no sum of a group overflows."""
    pattern.check(x)
    if not x.is_floating_point():
        raise UserError(f"an unbiased estimate takes floating-point numbers, got {x.dtype}")
    if check:
        refuse_nonfinite(x, pattern, "the tensor to estimate")
    size = magnitude(x)
    size = pattern.group(size if size.dtype == torch.float64 else size.float())
    share = 0.5 ** pattern.m.bit_length()
    return torch.where(size.amax(-1, keepdim=True) > 1, size * share, size)


def _method_is_known(method: str, pattern: NMPattern) -> None:
    if method not in METHODS:
        raise UserError(f"unknown MVUE method {method!r}; choose one of {', '.join(METHODS)}")
    if method == "approximate" and pattern.n != 2:
        raise UserError(f"the approximate MVUE draws two, got pattern {pattern}; use method exact")


class _WaterLevel(NamedTuple):
    """Of groups sorted descending: order (..., m) of indices; certain (..., m) bool, p = 1;
    remaining (..., 1), how many are drawn from the rest; tail (..., m + 1), sums of the rest from
    each place on, divided by its whole sum (1 until the rest begins, 0 at the end); share
    (..., m) of each entry in that sum."""

    order: Tensor
    certain: Tensor
    remaining: Tensor
    tail: Tensor
    share: Tensor


def _water_level(amounts: Tensor, n: int) -> _WaterLevel:
    a, order = amounts.sort(dim=-1, descending=True, stable=True)
    m = a.shape[-1]
    sums = a.flip(-1).cumsum(-1).flip(-1)  # from the smallest upwards
    left = torch.arange(n, 0, -1, device=a.device)  # n - k for k = 0 .. n - 1
    fits = a[..., :n] * left <= sums[..., :n]
    fits[..., -1] = True  # one entry of a sum never exceeds it
    k = fits.to(torch.int8).argmax(dim=-1, keepdim=True)
    few = (a[..., n:] > 0).sum(-1, keepdim=True) == 0  # at most n nonzeros: all are certain
    certain = (torch.arange(m, device=a.device) < k) | few
    whole = sums.gather(-1, k)
    whole = torch.where(few | (whole <= 0), 1.0, whole)
    share = torch.where(certain, 0.0, a / whole)
    tail = torch.where(certain, 1.0, sums / whole).clamp(max=1.0)
    tail = torch.cat([tail, torch.zeros_like(tail[..., :1])], dim=-1)
    return _WaterLevel(order, certain, n - k, tail, share)


def _unsort(values: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(values).scatter_(-1, order, values)


def _exact(amounts: Tensor, n: int) -> tuple[Tensor, _WaterLevel]:
    level = _water_level(amounts, n)
    p = torch.where(level.certain, 1.0, (level.remaining * level.share).clamp(max=1.0))
    p = torch.where(amounts > 0, _unsort(p, level.order), 0.0)
    return p, level


def _approximate(amounts: Tensor) -> Tensor:
    """(..., m): p_j = t_j + sum_{i != j} t_i a_j / (sum of a without a_i), t = a / sum of a."""
    whole = amounts.sum(-1, keepdim=True)
    t = amounts / torch.where(whole > 0, whole, 1.0)
    p = t
    for i in range(amounts.shape[-1]):
        others = amounts.clone()
        others[..., i] = 0
        rest = others.sum(-1, keepdim=True)
        p = p + t[..., i : i + 1] * (others / torch.where(rest > 0, rest, 1.0))
    few = (amounts > 0).sum(-1, keepdim=True) <= 2
    p = torch.where(few, 1.0, p.clamp(max=1.0))
    return torch.where(amounts > 0, p, 0.0)


@torch.no_grad()
def inclusion_probability(
    x: Tensor, pattern: NMPattern = TWO_FOUR, method: Method = "exact", check: bool = True
) -> Tensor:
    """Probability that :func:`mvue` keeps each entry; of x's shape, float32 (float64 for float64).

    Every group sums to min(n, its nonzeros); zero where x is zero.

    Raises:
        UserError: as :func:`mvue`.
    """
    _method_is_known(method, pattern)
    amounts = _amounts(x, pattern, check)
    p = _exact(amounts, pattern.n)[0] if method == "exact" else _approximate(amounts)
    return pattern.ungroup(p)


@torch.no_grad()
def mvue_sample(
    x: Tensor,
    pattern: NMPattern = TWO_FOUR,
    generator: torch.Generator | None = None,
    method: Method = "exact",
    check: bool = True,
) -> Sample:
    """Which entries :func:`mvue` keeps, and with which probability it would.

    Args:
        generator: of x's device; None draws from the default one.

    Raises:
        UserError: as :func:`mvue`.
    """
    _method_is_known(method, pattern)
    amounts = _amounts(x, pattern, check)
    if method == "exact":
        p, level = _exact(amounts, pattern.n)
        drawn = torch.rand(
            amounts[..., :1].shape, generator=generator, dtype=p.dtype, device=p.device
        )
        # Of the rest, n - k are drawn: place j where a multiple of one, shifted by the draw, lies
        # between the shares before it and after it.
        reached = (level.remaining * (1 - level.tail) - drawn).ceil()
        crossed = reached[..., 1:] > reached[..., :-1]
        mask = _unsort(level.certain | crossed, level.order) & (amounts > 0)
    else:
        p = _approximate(amounts)
        # The largest of a_i / E_i, E exponential, is drawn proportional to a; the next one
        # proportional to a among the rest.
        waits = torch.empty_like(amounts).exponential_(generator=generator)
        mask = largest(amounts.log() - waits.log(), 2) & (amounts > 0)
    return Sample(pattern.ungroup(mask), pattern.ungroup(p))


@torch.no_grad()
def mvue(
    x: Tensor,
    pattern: NMPattern = TWO_FOUR,
    generator: torch.Generator | None = None,
    method: Method = "exact",
    check: bool = True,
) -> Tensor:
    """Random tensor of x's shape and type with at most n nonzeros a group and mean x.

    Computed in float32, or float64 if x is; finite for every finite x, but where the result does
    not fit x's type: up to m/n times the largest entry of its group. No gradient passes.

    Args:
        x: floating point of any shape; meant for gradients.
        pattern: groups along pattern.dim; ``approximate`` needs n = 2.
        generator: of x's device; None draws from the default one.
        method: "exact" (least variance) or "approximate".
        check: refuse NaN, infinities and results that overflow x's type; waits for the device.

    Raises:
        UserError: an unknown method, a size that m does not divide, integers, NaN, overflow.
    """
    mask, p = mvue_sample(x, pattern, generator, method, check)
    kept = torch.where(mask, x.to(p.dtype) / torch.where(mask, p, 1.0), 0.0).to(x.dtype)
    if check:
        bad = kept.isinf() & x.isfinite()
        if bad.any():
            raise UserError(
                f"an unbiased estimate overflows {x.dtype} (largest {torch.finfo(x.dtype).max:g}) "
                f"at {place(bad, pattern)}; scale the tensor down or use bfloat16"
            )
    return kept
