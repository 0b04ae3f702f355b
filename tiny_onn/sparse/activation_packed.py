"""The squared-ReLU FFN of activation.py by our Triton kernels (kernels/relu2_24).

    H = X U^T                       dense
    S = 2:4 of relu(H)^2, packed    one kernel: values, codes of their places, a bit a feature
    Y = S D^T                       CUTLASS on what is packed
    dH = 2 relu(H) m dS             one kernel; m: the bits

and dX, dU and dD as there. Method naive, the forward mask kept, nothing scales the hidden layer.
H and a bit a feature are kept for the backward pass; S is computed again. Where CUTLASS cannot run
(torch's takes compute capability 8 alone) the same kernel writes S with zeros, and Y is dense.

Shapes: T tokens, C width, F hidden width.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as nn_functional
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from tiny_onn.ops import relu2_24, relu2_24_kernels
from tiny_onn.sparse.activation import (
    ActSparse24,
    DropTally,
    feature_wise,
    inverse_order,
    refuse_operands,
)
from tiny_onn.sparse.semi_structured import TILES, refusal

log = logging.getLogger("tiny_onn")

HALF = (torch.float16, torch.bfloat16)


def takes_packed(hidden: int, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether CUTLASS multiplies a packed hidden layer on ``device``; the log says why not."""
    reason = f"takes 16-bit numbers, got {dtype}"
    if dtype in HALF:
        tile = torch.zeros(TILES["cutlass"][dtype][0], hidden, dtype=dtype, device=device)
        reason = refusal(tile, "cutlass")
    how = "packed, by CUTLASS" if reason is None else f"with zeros (CUTLASS {reason})"
    log.info("ops: relu2_24's product: %s", how)
    return reason is None


def _product(packed: relu2_24.Packed24, down_CF: Tensor) -> Tensor:
    """(T, C); T a multiple of 32."""
    sparse_TF = SparseSemiStructuredTensorCUTLASS(
        torch.Size((len(packed.values), down_CF.shape[1])),
        packed=packed.values,
        meta=relu2_24.cutlass_metadata(packed.codes),
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )
    return sparse_TF @ down_CF.T


class _PackedFFN(torch.autograd.Function):
    """Tokens come in the order in which they are grouped."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        up_FC: Tensor,
        down_CF: Tensor,
        options: ActSparse24,
        takes_packed: bool,
        tally: DropTally | None,
    ) -> Tensor:
        num_tokens = len(x_TC)
        filler = -num_tokens % TILES["cutlass"][x_TC.dtype][0] if takes_packed else 0
        h_TF = nn_functional.linear(nn_functional.pad(x_TC, (0, 0, 0, filler)), up_FC)
        if takes_packed:
            packed = relu2_24_kernels().relu2_24(h_TF)
            kept, bits_TB = packed.values, packed.bits
            y_TC = _product(packed, down_CF)
        else:
            kept, bits_TB = relu2_24_kernels().relu2_24_dense_bits(h_TF)
            y_TC = nn_functional.linear(kept, down_CF)
        if tally is not None:
            tally.add_tokens(h_TF[:num_tokens].relu().square(), kept[:num_tokens])
        ctx.save_for_backward(x_TC, up_FC, down_CF, h_TF[:num_tokens], bits_TB[:num_tokens])
        ctx.options, ctx.tally = options, tally
        return y_TC[:num_tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TC: Tensor) -> tuple[Tensor | None, ...]:
        x_TC, up_FC, down_CF, h_TF, bits_TB = ctx.saved_tensors
        kernels, options, tally = relu2_24_kernels(), ctx.options, ctx.tally
        d_TF, _ = kernels.relu2_24_gradient(dy_TC @ down_CF, h_TF, bits_TB)
        thin_TF = feature_wise(d_TF, options)
        dx_TC = dup_FC = ddown_CF = None
        if ctx.needs_input_grad[0]:
            dx_TC = (d_TF if options.dx_direct_sparse else thin_TF) @ up_FC
        if ctx.needs_input_grad[1]:
            dup_FC = thin_TF.T @ x_TC
        if ctx.needs_input_grad[2]:
            sparse_TF = kernels.relu2_24_dense(h_TF)
            kept_TF = feature_wise(sparse_TF, options)
            ddown_CF = dy_TC.T @ kept_TF
            if tally is not None:
                tally.add_features(sparse_TF, kept_TF)
        if tally is not None and ctx.needs_input_grad[1]:
            tally.add_features(d_TF, thin_TF)
        return dx_TC, dup_FC, ddown_CF, None, None, None


def squared_relu_24_packed(
    x_TC: Tensor,
    up_FC: Tensor,
    down_CF: Tensor,
    options: ActSparse24,
    takes_packed: bool,
    order_T: Tensor | None = None,
    tally: DropTally | None = None,
) -> Tensor:
    """(T, C): as :func:`tiny_onn.sparse.activation.squared_relu_24`, with the options of the head
    of this file.

    Args:
        takes_packed: what the function of that name said.

    Raises:
        UserError: as there.
    """
    refuse_operands(x_TC, up_FC)
    assert options.method == "naive" and options.keep_forward_mask, options
    fixed = (up_FC, down_CF, options, takes_packed, tally)
    if order_T is None:
        return _PackedFFN.apply(x_TC, *fixed)
    y_TC = _PackedFFN.apply(x_TC.index_select(0, order_T), *fixed)
    return y_TC.index_select(0, inverse_order(order_T))
