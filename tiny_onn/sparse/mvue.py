"""Minimum-variance unbiased n:m estimates: keep entry i with probability p_i, as x_i / p_i.

The variance of a group, sum_i x_i^2 (1/p_i - 1) subject to sum_i p_i = n and p_i <= 1, is least
where p is proportional to a = |x| up to a ceiling (water-filling): the k entries that stand above
the level, (n - k) a_i > R with R the sum of all others, are kept for certain, the others have
p_j = (n - k) a_j / R. The entries are drawn by systematic sampling, which has these marginals and
draws exactly n. Unbiased 2:4 gradients: Chmiel et al., arXiv 2203.10991.

``approximate`` draws one entry proportional to a, then another proportional to a among the rest
(the probability that either is i has a closed form): unbiased, with a slightly larger variance.
It exists for n = 2.

Sums of other entries are summed, never got by subtraction, and groups with at most n nonzeros are
returned as they are: no input divides by zero.

Shapes: m entries of a group in front, (m, ...), where sums over them are fast.
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
    """(m, ..., G) |x| in float32 or float64, scaled so that no sum of a group overflows."""
    pattern.check(x)
    if not x.is_floating_point():
        raise UserError(f"got {x.dtype} to estimate; expected floating-point numbers; convert them")
    if check:
        refuse_nonfinite(x, pattern, "the tensor to estimate")
    size = magnitude(x)
    size = size if size.dtype == torch.float64 else size.float()
    entries = pattern.group(size).movedim(-1, 0).contiguous()
    share = 0.5 ** pattern.m.bit_length()
    return torch.where(entries.amax(0) > 1, entries * share, entries)


def _as_before(entries: Tensor, pattern: NMPattern) -> Tensor:
    return pattern.ungroup(entries.movedim(0, -1))


def _method_is_known(method: str, pattern: NMPattern) -> None:
    if method not in METHODS:
        raise UserError(f"unknown MVUE method {method!r}; choose one of {', '.join(METHODS)}")
    if method == "approximate" and pattern.n != 2:
        raise UserError(f"the approximate MVUE draws two, got pattern {pattern}; use method exact")


class _WaterLevel(NamedTuple):
    """certain (m, ...): bool, p = 1; left (...): how many are drawn from the rest; share (m, ...)
    of each entry in the rest's sum; ends (m + 1, ...): share of the rest that lies before each
    entry, 0 first, 1 last."""

    certain: Tensor
    left: Tensor
    share: Tensor
    ends: Tensor


def _water_level(amounts: Tensor, n: int) -> _WaterLevel:
    certain = (amounts > 0) & ((amounts > 0).sum(0) <= n)
    for _ in range(n - 1):  # each pass lowers the level below the entries that stood out of it
        rest = torch.where(certain, 0.0, amounts)
        certain = certain | (rest * (n - certain.sum(0)) > rest.sum(0))
    rest = torch.where(certain, 0.0, amounts)
    after = rest.flip(0).cumsum(0).flip(0)  # whole sum first; never a difference
    whole = torch.where(after[0] > 0, after[0], 1.0)
    ends = torch.cat([1 - after / whole, torch.ones_like(whole)[None]])
    return _WaterLevel(certain, n - certain.sum(0), rest / whole, ends)


def _exact(amounts: Tensor, n: int) -> tuple[Tensor, _WaterLevel]:
    level = _water_level(amounts, n)
    return torch.where(level.certain, 1.0, (level.left * level.share).clamp(max=1.0)), level


def _approximate(amounts: Tensor) -> Tensor:
    """(m, ...): p_j = t_j + sum_{i != j} t_i a_j / (sum of a without a_i), t = a / sum of a."""
    whole = amounts.sum(0)
    t = amounts / torch.where(whole > 0, whole, 1.0)
    p = t.clone()
    for i in range(len(amounts)):
        others = amounts.clone()
        others[i] = 0
        rest = others.sum(0)
        p += t[i] * (others / torch.where(rest > 0, rest, 1.0))
    few = (amounts > 0).sum(0) <= 2
    return torch.where(amounts > 0, torch.where(few, 1.0, p.clamp(max=1.0)), 0.0)


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
    return _as_before(p, pattern)


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
        drawn = torch.rand(p.shape[1:], generator=generator, dtype=p.dtype, device=p.device)
        # An entry of the rest is drawn where its interval of length p, all laid end to end,
        # holds one of the points drawn, drawn + 1, ...: as many as are left to draw.
        points = (level.left * level.ends - drawn).ceil()
        mask = level.certain | ((points[1:] > points[:-1]) & (level.share > 0))
    else:
        p = _approximate(amounts)
        # The largest of a_i / E_i, E exponential, is drawn proportional to a; the next one
        # proportional to a among the rest.
        waits = torch.empty_like(amounts).exponential_(generator=generator)
        order = (amounts.log() - waits.log()).movedim(0, -1)
        mask = largest(order, 2).movedim(-1, 0) & (amounts > 0)
    return Sample(_as_before(mask, pattern), _as_before(p, pattern))


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
