"""ReLU^2, token-wise 2:4 and packing, in Triton: functions, gradient, operators.

The same functions as reference.py's. Three operators of ``torch.library``, in kernel_pack.py:

    relu2_24_pack    x -> values, codes, bits, flags
    relu2_24_dense   x -> the dense tensor with zeros, bits (what its gradient needs)
    relu2_24_grads   dy, x, bits -> dx, and its values
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny_onn_kernels.kernel_operation import operation
from tiny_onn_kernels.relu2_24.kernel_pack import run_differentiate, run_square
from tiny_onn_kernels.relu2_24.reference import (
    Packed24,
    require_features,
    require_finite,
    require_same,
)


def _empty_bytes(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8)


@operation("tiny_onn::relu2_24_pack", schema="(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)")
def relu2_24_pack(x):
    return run_square(x.contiguous(), pack=True)[1:]


@relu2_24_pack.register_fake
def _(x):
    values = x.new_empty(x.shape[0], x.shape[1] // 2)
    return values, _empty_bytes(x), _empty_bytes(x), x.new_empty(2, dtype=torch.int32)


@operation("tiny_onn::relu2_24_dense", schema="(Tensor x) -> (Tensor, Tensor)")
def _relu2_24_dense(x):
    dense, _, _, bits, _ = run_square(x.contiguous(), pack=False)
    return dense, bits


@_relu2_24_dense.register_fake
def _(x):
    return x.new_empty(x.shape), _empty_bytes(x)


@operation(
    "tiny_onn::relu2_24_grads",
    schema="(Tensor grad, Tensor x, Tensor bits, bool pack) -> (Tensor, Tensor)",
)
def relu2_24_grads(grad, x, bits, pack):
    return run_differentiate(*(t.contiguous() for t in (grad, x, bits)), pack)


@relu2_24_grads.register_fake
def _(grad, x, bits, pack):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[1] // 2 if pack else 0)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> Tensor | None:
    return None if grad is None else relu2_24_grads(grad, *ctx.saved_tensors, False)[0]


_relu2_24_dense.register_autograd(_differentiate, setup_context=_save_for_backward)


def relu2_24(x_TF: Tensor, check: bool = False) -> Packed24:
    """As :func:`tiny_onn_kernels.relu2_24.reference.relu2_24`, on a CUDA device (or on a CPU where
    TRITON_INTERPRET=1 was set before this module was imported)."""
    require_features(x_TF)
    packed = Packed24(*relu2_24_pack(x_TF.detach()))
    if check:
        require_finite(packed.flags, x_TF.dtype)
    return packed


def relu2_24_gradient(
    grad_TF: Tensor, x_TF: Tensor, bits_TB: Tensor, pack: bool = False
) -> tuple[Tensor, Tensor]:
    """As :func:`tiny_onn_kernels.relu2_24.reference.relu2_24_gradient`, where relu2_24 runs."""
    require_same(grad_TF, x_TF, bits_TB)
    return relu2_24_grads(grad_TF, x_TF, bits_TB, pack)


def relu2_24_dense(x_TF: Tensor) -> Tensor:
    """As :func:`tiny_onn_kernels.relu2_24.reference.relu2_24_dense`, where relu2_24 runs."""
    return relu2_24_dense_bits(x_TF)[0]


def relu2_24_dense_bits(x_TF: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`tiny_onn_kernels.relu2_24.reference.relu2_24_dense_bits`, where relu2_24 runs."""
    require_features(x_TF)
    return _relu2_24_dense(x_TF)
