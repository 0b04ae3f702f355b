"""Weights under 2:4 patterns drawn by Gumbel noise, in Triton: functions, gradient, operators.

The same functions as reference.py's. Two operators of ``torch.library``:

    pattern24_draw    weights, scores or logits -> masked weights and patterns
    pattern24_grads   their gradients; the noise is computed again from its counters

Both are in kernel_draw.py. Nothing is kept for the backward pass but the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import sum_dtype
from tiny_onn_kernels.kernel_operation import operation
from tiny_onn_kernels.pattern24.kernel_draw import run_differentiate, run_draw
from tiny_onn_kernels.pattern24.reference import Number, as_number, count_agents

NUMBERS = "Tensor kappa, Tensor tau, Tensor seed, Tensor offset"
FLAGS = "bool free, bool sample, bool dense_grad"


def _empty_result(weight: Tensor, source: Tensor, free: bool) -> tuple[Tensor, Tensor]:
    """Buffers for masked weights and patterns."""
    lead = source.shape[: -2 if free else -1]
    width = weight.shape[-1]
    return weight.new_empty((*lead, width)), weight.new_empty(
        (*lead, width // 4), dtype=torch.uint8
    )


@operation(
    "tiny_onn::pattern24_draw",
    schema=f"(Tensor weight, Tensor source, {NUMBERS}, {FLAGS}) -> (Tensor, Tensor)",
)
def pattern24_draw(weight, source, kappa, tau, seed, offset, free, sample, dense_grad):
    out, pattern = _empty_result(weight, source, free)
    tensors = (weight.contiguous(), source.contiguous(), kappa, seed, offset)
    run_draw(*tensors, out, pattern, free, sample)
    return out, pattern


@pattern24_draw.register_fake
def _(weight, source, kappa, tau, seed, offset, free, sample, dense_grad):
    return _empty_result(weight, source, free)


@operation(
    "tiny_onn::pattern24_grads",
    schema=f"(Tensor grad, Tensor weight, Tensor source, {NUMBERS}, {FLAGS}) -> (Tensor, Tensor)",
)
def pattern24_grads(grad, weight, source, kappa, tau, seed, offset, free, sample, dense_grad):
    tensors = (t.contiguous() for t in (grad, weight, source))
    return run_differentiate(*tensors, kappa, tau, seed, offset, free, sample, dense_grad)


@pattern24_grads.register_fake
def _(grad, weight, source, kappa, tau, seed, offset, free, sample, dense_grad):
    return weight.new_empty(weight.shape), source.new_empty(source.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, free, sample, dense_grad = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.flags = (free, sample, dense_grad)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    nothing = (None,) * 7
    if grad is None:
        return (None, None, *nothing)
    return (*pattern24_grads(grad, *ctx.saved_tensors, *ctx.flags), *nothing)


pattern24_draw.register_autograd(_differentiate, setup_context=_save_for_backward)


def _run(
    weight: Tensor,
    source: Tensor,
    numbers: tuple[Number, Number],
    counters: tuple[int | Tensor, int | Tensor],
    flags: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor]:
    device = weight.device
    kappa, tau = (as_number(t, sum_dtype(weight.dtype), device) for t in numbers)
    seed, offset = (as_number(t, torch.int64, device) for t in counters)
    return pattern24_draw(weight, source, kappa, tau, seed, offset, *flags)


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
    """As :func:`tiny_onn_kernels.pattern24.reference.pattern24`, on a CUDA device (or on a CPU
    where TRITON_INTERPRET=1 was set before this module was imported)."""
    count_agents(weight, score, weight.shape[-1:], "scores")
    return _run(weight, score, (kappa, tau), (seed, offset), (False, sample, dense_grad))


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
    """As :func:`tiny_onn_kernels.pattern24.reference.pattern24_free`, where pattern24 runs."""
    last = (weight.shape[-1] // 4, 6) if weight.ndim else ()
    count_agents(weight, logits, last, "logits")
    return _run(weight, logits, (kappa, tau), (seed, offset), (True, sample, dense_grad))
