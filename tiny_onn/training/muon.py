"""Muon with batched Newton-Schulz: same-shaped matrices are orthogonalised in one bmm.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum-averaged
gradient of a matrix by its nearest semi-orthogonal matrix, approximated by a quintic iteration

    X <- a X + b (X X^T) X + c (X X^T)^2 X,        X_0 = G / ||G||_F .

torch.optim.Muon does this matrix by matrix; small matrices leave a CPU mostly idle, and
stacking those of one shape is 1.2 to 6 times faster (measured at widths 128 to 256).

A parameter with three dimensions is a stack of matrices (the experts of a block). A matrix of a
stack that had no gradient in a step is left alone: its stale momentum would be orthogonalised to a
full step, again and again, and an expert without tokens would drift away.

Shapes: K stacked matrices, R rows <= C columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from tiny_onn.training.distributed import sharded_like, whole

COEFFICIENTS = (3.4445, -4.775, 2.0315)
EPS = 1e-7

AdjustLr = Literal["original", "match_rms_adamw"]


def orthogonalize(matrices_KRC: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on a stack of matrices, in the stack's dtype.

    Args:
        matrices_KRC: (K, R, C) floating point, R <= C for speed (any order is right).

    Returns:
        (K, R, C); singular values lie in about [0.7, 1.2] for well-conditioned input.
    """
    a, b, c = COEFFICIENTS
    norm_K11 = torch.linalg.vector_norm(matrices_KRC, dim=(-2, -1), keepdim=True)
    x_KRC = matrices_KRC / norm_K11.clamp(min=EPS)
    for _ in range(steps):
        gram = x_KRC @ x_KRC.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x_KRC = torch.baddbmm(x_KRC, poly, x_KRC, beta=a)
    return x_KRC


def lr_adjustment(rows: int, columns: int, adjust: AdjustLr) -> float:
    """Factor on the learning rate that makes matrices of all shapes move alike.

    original: sqrt(max(1, rows / columns)) (Jordan); match_rms_adamw: 0.2 sqrt(max(rows,
    columns)) (Liu et al., arXiv 2502.16982: the update's RMS is that of AdamW).
    """
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _matrices(update: Tensor) -> Tensor:
    """(R, C) or (E, R, C) as a stack."""
    return update.reshape(-1, *update.shape[-2:])


def _used(gradient: Tensor) -> Tensor | None:
    """(E, 1, 1) bool for a stack, which of its matrices have a gradient; None for a matrix."""
    if gradient.dim() == 2:
        return None
    return whole(gradient.abs().amax(dim=(-2, -1), keepdim=True)) != 0


def _decay(parameters: list[Tensor], used: list[Tensor | None], amount: float) -> None:
    """Multiply by 1 - amount, except for unused matrices of stacks."""
    single = [p for p, u in zip(parameters, used, strict=True) if u is None]
    if single:
        torch._foreach_mul_(single, 1 - amount)
    for p, u in zip(parameters, used, strict=True):
        if u is not None:
            p.mul_(sharded_like(1 - amount * u.to(p.dtype), p))


@torch.no_grad()
def muon_update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    ns_steps: int,
    ns_dtype: str,
    adjust: AdjustLr,
) -> None:
    """One Nesterov-momentum Muon step in place on matrices and stacks (FSDP2 shards too)."""
    dtype = getattr(torch, ns_dtype)
    used = [_used(g) for g in gradients]
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    updates = torch._foreach_lerp(gradients, momenta, momentum)
    if weight_decay:
        _decay(parameters, used, lr * weight_decay)
    stacks: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, parameter in enumerate(parameters):
        rows, columns = parameter.shape[-2:]
        stacks[min(rows, columns), max(rows, columns)].append(i)
    for indices in stacks.values():
        tall = [parameters[i].shape[-2] > parameters[i].shape[-1] for i in indices]
        full = [_matrices(whole(updates[i])) for i in indices]
        stack_KRC = torch.cat(
            [u.mT.to(dtype) if t else u.to(dtype) for u, t in zip(full, tall, strict=True)]
        )
        parts = orthogonalize(stack_KRC, ns_steps).split([len(u) for u in full])
        for i, transpose, ortho in zip(indices, tall, parts, strict=True):
            parameter = parameters[i]
            step = lr * lr_adjustment(*parameter.shape[-2:], adjust)
            ortho = (ortho.mT if transpose else ortho).to(parameter.dtype).reshape(parameter.shape)
            if used[i] is not None:
                ortho = torch.where(used[i], ortho, 0.0)
            parameter.add_(sharded_like(ortho, parameter), alpha=-step)


def muon_group_step(group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
    """Step those parameters of a Muon group that have a gradient."""
    parameters = [p for p in group["params"] if p.grad is not None]
    if not parameters:
        return
    for p in parameters:
        if "momentum_buffer" not in state[p]:
            state[p]["momentum_buffer"] = torch.zeros_like(p)
    muon_update(
        parameters,
        [p.grad for p in parameters],
        [state[p]["momentum_buffer"] for p in parameters],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        ns_steps=group["ns_steps"],
        ns_dtype=group["ns_dtype"],
        adjust=group["adjust"],
    )


def muon_defaults(
    lr: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    ns_steps: int = 5,
    ns_dtype: str = "bfloat16",
    adjust: AdjustLr = "original",
) -> dict[str, Any]:
    """The keys of a Muon parameter group."""
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "ns_steps": ns_steps,
        "ns_dtype": ns_dtype,
        "adjust": adjust,
    }


class BatchedMuon(torch.optim.Optimizer):
    """torch.optim.Muon's rule (Nesterov momentum, decoupled decay), batched by shape.

    Args:
        params: 2-D parameters, or 3-D stacks of them.
        lr, weight_decay, momentum, ns_steps, adjust: as in torch.optim.Muon, whose
            ``adjust_lr_fn`` is called ``adjust`` here.
        ns_dtype: name of the iteration's dtype; bfloat16 as in the paper, float64 for checks
            (a name, since checkpoint tools accept only plain values in groups).
    """

    def __init__(self, params: Iterable[Any], lr: float, **options: Any) -> None:
        super().__init__(params, muon_defaults(lr, **options))
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() not in (2, 3):
                    shape = tuple(p.shape)
                    raise ValueError(f"Muon takes 2-D parameters or stacks of them, got {shape}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            muon_group_step(group, self.state)
        return loss
