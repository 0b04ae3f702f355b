"""The sizes and numbers that reference and kernels are compared on.

Shapes: T tokens, F features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """numbers: normal; ties: few distinct ones, so that groups have equals; sparse: mostly below
    zero; negative: all of them; tiny: squares that are 0 in half precision among such that are
    not."""

    tokens: int
    features: int
    numbers: Literal["normal", "ties", "sparse", "negative", "tiny"] = "normal"


CASES = (
    Case(13, 48),
    Case(37, 20),
    Case(8, 64, "ties"),
    Case(21, 28, "ties"),
    Case(16, 32, "sparse"),
    Case(5, 16, "negative"),
    Case(9, 24, "tiny"),
    Case(32, 64),
    Case(1, 4),
    Case(1, 8),
    Case(3, 12),
    Case(0, 16),
    Case(4, 0),
)


def make_input(case: Case, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(T, F)."""
    generator = torch.Generator().manual_seed(seed)
    x_TF = torch.randn(case.tokens, case.features, generator=generator, dtype=torch.float64)
    if case.numbers == "ties":
        x_TF = (2 * x_TF).round() / 2
    elif case.numbers == "sparse":
        x_TF = x_TF - 1.2
    elif case.numbers == "negative":
        x_TF = -x_TF.abs() - 0.1
    elif case.numbers == "tiny":
        x_TF = x_TF * 2e-4
    return x_TF.to(dtype)


def make_gradient(x_TF: Tensor, seed: int = 1) -> Tensor:
    """(T, F), of x's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x_TF.shape, generator=generator, dtype=torch.float64).to(x_TF)
