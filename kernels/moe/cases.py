"""The sizes and masks that every implementation of the experts is compared on.

Shapes: N tokens, E experts, C width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MaskKind = Literal["random", "every_k", "none", "all", "dead", "one_expert"]


class Case(NamedTuple):
    """Sizes, and which pairs are active.

    random: a quarter of all pairs; every_k: token t has t mod (E + 1) experts, so all counts from
    0 to E; dead: random, but the first and the last expert get no token; one_expert: all tokens go
    to expert 0.
    """

    tokens: int
    experts: int
    width: int
    hidden: int
    mask: MaskKind


CASES = (
    Case(37, 5, 16, 24, "random"),
    Case(23, 6, 24, 8, "every_k"),
    Case(64, 4, 8, 40, "dead"),
    Case(19, 3, 16, 16, "all"),
    Case(11, 3, 16, 16, "none"),
    Case(17, 4, 8, 8, "one_expert"),
    Case(1, 1, 8, 8, "all"),
    Case(1, 4, 8, 8, "random"),
    Case(0, 4, 8, 8, "random"),
)
"""Widths are multiples of 8: what the grouped product takes in float32 and in bfloat16."""

ODD_CASES = (Case(29, 3, 7, 5, "every_k"), Case(13, 7, 9, 3, "random"))
"""Widths that only the plain loop takes."""


def make_mask(case: Case, seed: int = 0) -> Tensor:
    """(N, E) bool."""
    generator = torch.Generator().manual_seed(seed)
    random_NE = torch.rand(case.tokens, case.experts, generator=generator)
    if case.mask == "every_k":
        rank_NE = random_NE.argsort(dim=1).argsort(dim=1)
        return rank_NE < (torch.arange(case.tokens) % (case.experts + 1)).unsqueeze(1)
    if case.mask == "all":
        return torch.ones_like(random_NE, dtype=torch.bool)
    mask_NE = random_NE < 0.25
    if case.mask == "none":
        mask_NE.zero_()
    elif case.mask == "dead":
        mask_NE[:, 0] = mask_NE[:, -1] = False
    elif case.mask == "one_expert":
        mask_NE.zero_()
        mask_NE[:, 0] = True
    return mask_NE


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """x_NC, mask_NE, weight_NE, gate_up_EHC, down_ECF: the arguments of the experts, in order.

    Weights are the mean over a token's active experts, shaken a little.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask_NE = make_mask(case, seed)
    size_EHC = (case.experts, 2 * case.hidden, case.width)
    weight_NE = mask_NE / mask_NE.sum(dim=1, keepdim=True).clamp(min=1)
    weight_NE = weight_NE + 0.1 * normal(*mask_NE.shape)
    gate_up_EHC = normal(*size_EHC) / case.width**0.5
    down_ECF = normal(case.experts, case.width, case.hidden) / case.hidden**0.5
    floats = (normal(case.tokens, case.width), weight_NE, gate_up_EHC, down_ECF)
    x_NC, weight_NE, gate_up_EHC, down_ECF = (t.to(dtype) for t in floats)
    return x_NC, mask_NE, weight_NE, gate_up_EHC, down_ECF


def run_case(
    run: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Output and the gradients of x, weight, gate_up and down; zeros where there is none."""
    x_NC, mask_NE, *floats = (t.to(device) for t in make_inputs(case, dtype))
    leaves = [t.requires_grad_() for t in (x_NC, *floats)]
    out_NC = run(x_NC, mask_NE, *floats)
    generator = torch.Generator().manual_seed(9)
    pull_NC = torch.randn(out_NC.shape, generator=generator, dtype=torch.float64)
    gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if out_NC.requires_grad:
        pull_NC = pull_NC.to(out_NC)
        gradients = torch.autograd.grad(out_NC, leaves, pull_NC, allow_unused=True)
    found = zip(gradients, leaves, strict=True)
    return [out_NC.detach(), *(torch.zeros_like(p) if g is None else g for g, p in found)]
