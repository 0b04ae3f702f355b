"""N:M patterns: at most n of every m consecutive entries along one dimension are not zero.

Shapes: C = binomial(m, n) patterns, G groups along the dimension, m entries a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from tiny_onn.errors import UserError

MOST_PATTERNS = 1 << 16


@dataclass(frozen=True)
class NMPattern:
    """At most ``n`` nonzeros in every group of ``m`` consecutive entries along ``dim``.

    The hardware's pattern is 2:4 along the dimension that a product contracts: the last one of
    a Linear's weight (out, in).

    Raises:
        UserError: unless 1 <= n < m, all three whole numbers.
    """

    n: int = 2
    m: int = 4
    dim: int = -1

    def __post_init__(self) -> None:
        numbers = (self.n, self.m, self.dim)
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            raise UserError(
                f"got n, m, dim = {numbers}; expected whole numbers; use NMPattern(2, 4)"
            )
        if not 1 <= self.n < self.m:
            raise UserError(
                f"pattern {self.n}:{self.m} is none: n must be at least 1 and below m; "
                "the hardware's is 2:4"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def check(self, x: Tensor) -> None:
        """Refuse a tensor that has no dimension ``dim``, or one that m does not divide.

        Raises:
            UserError: with the shape and the nearest sizes that would do.
        """
        shape = tuple(x.shape)
        if not -x.dim() <= self.dim < x.dim():
            raise UserError(
                f"got a tensor of {shape} for pattern {self} along dimension {self.dim}; expected "
                "one that has it; choose another dim"
            )
        size = shape[self.dim]
        if size % self.m:
            below = size // self.m * self.m
            instead = f"{below} or {below + self.m}" if below else f"{self.m}"
            raise UserError(
                f"pattern {self} needs a size divisible by {self.m} along dimension {self.dim}, "
                f"got {size} in {shape}; use {instead}"
            )

    def group(self, x: Tensor) -> Tensor:
        """Groups as the last dimension: (..., size, ...) -> (..., G, m), ``dim`` moved to the end.

        A view where x's strides allow it. Differentiable.

        Raises:
            UserError: as ``check``.
        """
        self.check(x)
        return x.movedim(self.dim, -1).unflatten(-1, (-1, self.m))

    def ungroup(self, groups: Tensor) -> Tensor:
        """Inverse of ``group``: (..., G, m) -> (..., size, ...)."""
        return groups.flatten(-2).movedim(-1, self.dim)

    def patterns(self, device: torch.device | str | None = None) -> Tensor:
        """bool (C, m): see :func:`patterns`."""
        return patterns(self.n, self.m, device)


def patterns(n: int, m: int, device: torch.device | str | None = None) -> Tensor:
    """bool (C, m): all binary rows with n ones, by the kept places in lexicographic order.

    For 2:4: 1100, 1010, 1001, 0110, 0101, 0011.

    Raises:
        UserError: n:m is no pattern, or has more than MOST_PATTERNS of them.
    """
    NMPattern(n, m)
    if math.comb(m, n) > MOST_PATTERNS:
        raise UserError(
            f"{n}:{m} has {math.comb(m, n)} patterns, more than the {MOST_PATTERNS} of a table; "
            "use a smaller m"
        )
    rows = [[i in kept for i in range(m)] for kept in combinations(range(m), n)]
    return torch.tensor(rows, dtype=torch.bool, device=device)


def place(bad: Tensor, pattern: NMPattern) -> str:
    """Words for the first True of a mask of x's shape: its index and its group along ``dim``."""
    first = [int(i) for i in bad.nonzero()[0]]
    return f"index {tuple(first)}, group {first[pattern.dim] // pattern.m}"


def refuse_nan(x: Tensor, pattern: NMPattern, what: str) -> None:
    """Waits for the device.

    Raises:
        UserError: x holds a NaN; its number and the first place.
    """
    bad = x.isnan()
    if bad.any():
        raise UserError(
            f"{what} holds {int(bad.sum())} NaN, the first at {place(bad, pattern)}; "
            "no order exists among them: find where they arise"
        )


def refuse_nonfinite(x: Tensor, pattern: NMPattern, what: str) -> None:
    """As :func:`refuse_nan`, infinities too."""
    refuse_nan(x, pattern, what)
    bad = ~x.isfinite()
    if bad.any():
        raise UserError(
            f"{what} holds {int(bad.sum())} infinities, the first at {place(bad, pattern)}; "
            f"{str(x.dtype).removeprefix('torch.')} ends at {torch.finfo(x.dtype).max:g}: "
            "scale it down or use bfloat16 or float32"
        )
