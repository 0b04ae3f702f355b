"""SwiGLU experts from a boolean mask, in Triton: the function, its gradient and its operators.

The same function as reference.py's, by kernels that never wait for the device: buffers have N * E
rows, the most pairs there can be, and only as many as are active are computed. Four operators of
``torch.library`` (``tiny_onn::moe_...``), so that torch.compile keeps one graph:

    moe_pairs     mask -> where each pair's row stands              kernel_pairs.py
    moe_forward   the two products and the sum of each token's rows   kernel_forward.py
    moe_backward  the gradients of x, weight, gate_up and down      kernel_backward.py
    moe_norms     what a loss on the surprise of pairs needs        kernel_backward.py

Shapes: N tokens, E experts, C width, F hidden width of an expert, H = 2 F, P = N * E rows of pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import sum_dtype
from tiny_onn_kernels.kernel_operation import operation
from tiny_onn_kernels.moe.kernel_backward import differentiate_hidden, run_backward
from tiny_onn_kernels.moe.kernel_forward import run_forward
from tiny_onn_kernels.moe.kernel_pairs import (
    PairLayout,
    empty_layout,
    lay_out_pairs,
    sum_by_token,
)
from tiny_onn_kernels.moe.reference import PairNorms

MOST_SAVED_BYTES = 2**29
"""A larger buffer of what precedes the activations is not kept for the backward pass, which then
computes it once more: 2 of 9 parts of the arithmetic instead of memory for N * E rows."""

TENSORS = "Tensor x, Tensor weight, Tensor gate_up, Tensor down"


def saves_inner(x_NC: Tensor, gate_up_EHC: Tensor) -> bool:
    num_experts, twice, _ = gate_up_EHC.shape
    return len(x_NC) * num_experts * twice * x_NC.element_size() <= MOST_SAVED_BYTES


@operation(
    "tiny_onn::moe_pairs",
    schema="(Tensor mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def moe_pairs(mask):
    return tuple(lay_out_pairs(mask))


@moe_pairs.register_fake
def _(mask):
    return tuple(empty_layout(mask))


@operation(
    "tiny_onn::moe_forward",
    schema=f"({TENSORS}, Tensor[] layout, bool save) -> (Tensor, Tensor)",
)
def moe_forward(x, weight, gate_up, down, layout, save):
    """The experts' weighted sum (N, C), and what ``save`` keeps for the backward pass."""
    x, weight, gate_up, down = (t.contiguous() for t in (x, weight, gate_up, down))
    pairs = PairLayout(*layout)
    rows_PC, inner_PH = run_forward(x, weight, gate_up, down, pairs, save)
    return sum_by_token(rows_PC, pairs), inner_PH


@moe_forward.register_fake
def _(x, weight, gate_up, down, layout, save):
    num_rows = x.shape[0] * gate_up.shape[0] if save else 0
    return x.new_empty(x.shape), x.new_empty(num_rows, gate_up.shape[1])


@operation(
    "tiny_onn::moe_backward",
    schema=f"(Tensor grad, {TENSORS}, Tensor inner, Tensor[] layout)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def moe_backward(grad, x, weight, gate_up, down, inner, layout):
    tensors = (t.contiguous() for t in (grad, x, weight, gate_up, down, inner))
    return run_backward(*tensors, PairLayout(*layout))


@moe_backward.register_fake
def _(grad, x, weight, gate_up, down, inner, layout):
    return tuple(t.new_empty(t.shape) for t in (x, weight, gate_up, down))


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, gate_up, down, layout, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, gate_up, down, output[1], *layout)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    *tensors, inner = ctx.saved_tensors[:5]
    layout = ctx.saved_tensors[5:]
    if grad is None:
        return (None, None, None, None, [None] * len(layout), None)
    grads = moe_backward(grad, *tensors, inner, layout)
    return (*grads, [None] * len(layout), None)


moe_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


@operation(
    "tiny_onn::moe_norms",
    schema="(Tensor x, Tensor gate_up, Tensor down, Tensor grad, Tensor[] layout) -> Tensor",
)
def moe_norms(x, gate_up, down, grad, layout):
    """(3, N, E): <dh, h>, |h|^2 and |dh o dh/da|^2 of each active pair, 0 elsewhere."""
    x, gate_up, down, grad = (t.contiguous() for t in (x, gate_up, down, grad))
    weight = x.new_ones(len(x), len(gate_up))
    nothing = x.new_empty(0, gate_up.shape[1])
    pairs = PairLayout(*layout)
    return differentiate_hidden(grad, x, weight, gate_up, down, nothing, pairs, norms=True)[2]


@moe_norms.register_fake
def _(x, gate_up, down, grad, layout):
    return x.new_empty((3, x.shape[0], gate_up.shape[0]), dtype=sum_dtype(x.dtype))


def _require_agreement(
    mask_NE: Tensor, x_NC: Tensor, weight_NE: Tensor, gate_up_EHC: Tensor, down_ECF: Tensor
) -> None:
    """Raises ValueError unless dtypes and sizes fit each other: kernels read by these sizes."""
    dtypes = sorted({str(t.dtype) for t in (x_NC, weight_NE, gate_up_EHC, down_ECF)})
    if len(dtypes) > 1 or mask_NE.dtype != torch.bool:
        raise ValueError(
            f"got {', '.join(dtypes)} and a mask of {mask_NE.dtype}; expected tokens, weights and "
            "both matrices of one dtype and a boolean mask; cast them"
        )
    (num_tokens, width), (num_experts, _, hidden) = x_NC.shape, down_ECF.shape
    wanted = {
        "mask": (mask_NE.shape, (num_tokens, num_experts)),
        "weight": (weight_NE.shape, (num_tokens, num_experts)),
        "gate_up": (gate_up_EHC.shape, (num_experts, 2 * hidden, width)),
        "down": (down_ECF.shape, (num_experts, width, hidden)),
    }
    for name, (got, expected) in wanted.items():
        if got != expected:
            raise ValueError(f"got {name} of {tuple(got)}, expected {expected}")


def expert_ffn(
    x_NC: Tensor,
    mask_NE: Tensor,
    weight_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
) -> Tensor:
    """The experts' weighted sum for every token.

    As :func:`tiny_onn_kernels.moe.reference.expert_ffn`, on a CUDA device (or, in float32, float16
    and float64, on a CPU where TRITON_INTERPRET=1 was set before this module was imported).
    """
    tensors = (x_NC, weight_NE, gate_up_EHC, down_ECF)
    _require_agreement(mask_NE, *tensors)
    layout = list(moe_pairs(mask_NE))
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return moe_forward(*tensors, layout, wants_grad and saves_inner(x_NC, gate_up_EHC))[0]


@torch.no_grad()
def expert_pair_norms(
    x_NC: Tensor,
    mask_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
    grad_NC: Tensor,
) -> PairNorms:
    """As :func:`tiny_onn_kernels.moe.reference.expert_pair_norms`."""
    _require_agreement(mask_NE, x_NC, mask_NE.to(x_NC.dtype), gate_up_EHC, down_ECF)
    layout = list(moe_pairs(mask_NE))
    _, hidden_NE, inner_NE = moe_norms(x_NC, gate_up_EHC, down_ECF, grad_NC, layout).unbind(0)
    wide = sum_dtype(grad_NC.dtype)
    grad_N = torch.linalg.vector_norm(grad_NC, dim=1, dtype=wide)
    return PairNorms(hidden_NE.sqrt(), grad_N, inner_NE.sqrt())
