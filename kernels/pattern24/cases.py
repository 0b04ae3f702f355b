"""The sizes and options that reference and kernels are compared on.

Shapes: A agents, R rows, K columns of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """shape: of the weights; agents: that share them, 0: none, scores have the weights' shape."""

    shape: tuple[int, ...]
    agents: int = 0
    free: bool = False
    sample: bool = True
    dense_grad: bool = False
    kappa: float = 2.0
    tau: float = 0.75
    offset: int = 0


CASES = (
    Case((7, 20)),
    Case((5, 36), agents=3),
    Case((3, 5, 8), agents=2, sample=False),
    Case((9, 12), free=True),
    Case((9, 12), agents=2, free=True, sample=False),
    Case((6, 16), agents=2, dense_grad=True, tau=5.0),
    Case((11, 8), kappa=16.0, tau=0.125, offset=2**40 + 3),
    Case((4,)),
    Case((1, 4), agents=4, free=True),
    Case((65, 16), agents=1),
    Case((0, 8)),
    Case((5, 0), agents=2),
)
"""tau and kappa are exact in float32, so that float64 means the same function."""

SEED = 2**33 + 12345
"""Both words of the key are in use."""


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and scores (near 1, not negative) or six logits a group."""
    generator = torch.Generator().manual_seed(seed)
    lead = (case.agents,) if case.agents else ()
    weight = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    if case.free:
        shape = (*lead, *case.shape[:-1], case.shape[-1] // 4, 6)
        source = torch.randn(shape, generator=generator, dtype=torch.float64)
    else:
        shape = (*lead, *case.shape)
        source = torch.randn(shape, generator=generator, dtype=torch.float64).abs()
    return weight.to(dtype), source.to(dtype)


def run_case(
    run: Callable[..., tuple[Tensor, Tensor]],
    case: Case,
    weight: Tensor,
    source: Tensor,
    seed: int | Tensor = SEED,
) -> list[Tensor]:
    """Masked weights, patterns, and the gradients of weights and scores (or logits)."""
    weight, source = (t.detach().clone().requires_grad_() for t in (weight, source))
    options = {"offset": case.offset, "sample": case.sample, "dense_grad": case.dense_grad}
    out, pattern = run(weight, source, case.kappa, case.tau, seed, **options)
    generator = torch.Generator().manual_seed(9)
    pull = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(out, (weight, source), pull.to(out))
    return [out.detach(), pattern, *grads]
