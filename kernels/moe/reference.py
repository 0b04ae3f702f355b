"""SwiGLU experts, run from a boolean mask: any number of experts per token, from none to all.

    y_t = sum over e with mask_te of  weight_te * down_e (silu(a_te) * b_te),
    [a_te; b_te] = gate_up_e x_t                             (Shazeer, arXiv 2002.05202, section 2)

Only active pairs (token, expert) are computed (and, in training on a CPU, a few of weight 0 beside
them: ROUNDING). Their rows are gathered expert by expert, run as one ragged matrix product,
weighted before the second product (which is linear), and summed token by token in the order of the
experts: no atomics, so the result is the same in every run.

Shapes: N tokens, E experts, C width, F hidden width of an expert, H = 2 F, P active pairs; K and O
are the columns that go into and come out of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_GROUPED_MM = hasattr(F, "grouped_mm")

ROUNDING = 64
"""In training on a CPU an expert's rows are rounded up to a multiple of this, because oneDNN
compiles code for every new shape. (Decoding has few rows, and few shapes.)"""

RaggedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


class Pairs(NamedTuple):
    """Where the active pairs of a mask stand. A pair's row: expert by expert, tokens ascending.

    token_P: int64, the token of every row. place_P: int64, its pair's place in the flat mask.
    row_P: int64, the rows token by token, experts ascending. begin_N: int64, each token's first
    place in row_P. ends_E: int32, one past an expert's last row.
    """

    token_P: Tensor
    place_P: Tensor
    row_P: Tensor
    begin_N: Tensor
    ends_E: Tensor


def dispatch(mask_NE: Tensor) -> Pairs:
    """Rows for the active pairs of a boolean mask.

    Waits for the device once, in ``nonzero``, to learn how many there are (``masked_select``
    would wait each time).
    """
    expert_P, token_P = mask_NE.T.nonzero().unbind(dim=1)
    place_P = token_P * mask_NE.shape[1] + expert_P
    rank_P = (mask_NE.reshape(-1).cumsum(dim=0) - 1).index_select(0, place_P)  # token by token
    row_P = torch.empty_like(rank_P)
    row_P.scatter_(0, rank_P, torch.arange(len(rank_P), device=rank_P.device))
    active_N = mask_NE.sum(dim=1)
    return Pairs(
        token_P=token_P,
        place_P=place_P,
        row_P=row_P,
        begin_N=active_N.cumsum(dim=0) - active_N,
        ends_E=mask_NE.sum(dim=0).cumsum(dim=0).int(),
    )


def rounded(mask_NE: Tensor) -> Tensor:
    """The mask with further tokens for every expert that has some, up to a multiple of ROUNDING,
    as far as there are any: the first ones that it does not run on."""
    idle_NE = ~mask_NE
    missing_E = -mask_NE.sum(dim=0) % ROUNDING
    return mask_NE | (idle_NE & (idle_NE.cumsum(dim=0) <= missing_E))


def _sum_by_token(rows_PC: Tensor, row_P: Tensor, begin_N: Tensor) -> Tensor:
    """(N, C): the sum of each token's rows; exactly zero for a token without rows."""
    if not len(row_P) or not len(begin_N):
        return rows_PC.new_zeros(len(begin_N), rows_PC.shape[1])
    return F.embedding_bag(row_P, rows_PC, begin_N, mode="sum")


class _Gather(torch.autograd.Function):
    """Rows of tokens; the gradient is summed in a fixed order (index_select's is not on CUDA)."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return x_NC.index_select(0, pairs.token_P)

    @staticmethod
    def backward(ctx: Any, grad_PC: Tensor) -> tuple[Tensor, None]:
        return _Combine.apply(grad_PC, ctx.pairs), None


class _Combine(torch.autograd.Function):
    """The sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, rows_PC: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return _sum_by_token(rows_PC, pairs.row_P, pairs.begin_N)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad_NC, ctx.pairs), None


def _run(
    x_NC: Tensor,
    mask_NE: Tensor,
    weight_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
    product: RaggedProduct,
) -> Tensor:
    if torch.is_grad_enabled() and mask_NE.device.type == "cpu":
        weight_NE = torch.where(mask_NE, weight_NE, 0)  # further pairs change nothing
        mask_NE = rounded(mask_NE)
    pairs = dispatch(mask_NE)
    rows_PC = _Gather.apply(x_NC, pairs)
    gate_PF, up_PF = product(rows_PC, gate_up_EHC, pairs.ends_E).chunk(2, dim=1)
    weight_P1 = weight_NE.reshape(-1).index_select(0, pairs.place_P).unsqueeze(1)
    hidden_PF = F.silu(gate_PF) * up_PF * weight_P1
    return _Combine.apply(product(hidden_PF, down_ECF, pairs.ends_E), pairs)


def _loop(rows_PK: Tensor, weight_EOK: Tensor, ends_E: Tensor) -> Tensor:
    """rows @ weight^T, one expert after the other; any dtype."""
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    parts = zip(rows_PK.split(sizes), weight_EOK.unbind(0), strict=True)
    return torch.cat([rows_RK @ weight_OK.mT for rows_RK, weight_OK in parts])


def _grouped(rows_PK: Tensor, weight_EOK: Tensor, ends_E: Tensor) -> Tensor:
    """rows @ weight^T as one call.

    torch leaves rows from ends_E[-1] on uninitialised, in the product and in its gradient; here
    the last end is always P, so there are none.
    """
    return F.grouped_mm(rows_PK, weight_EOK.mT, offs=ends_E)


def expert_ffn(
    x_NC: Tensor,
    mask_NE: Tensor,
    weight_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
) -> Tensor:
    """The experts' weighted sum for every token, by a plain loop over experts: any float dtype.

    Args:
        x_NC: (N, C) float; N may be 0.
        mask_NE: (N, E) bool, which expert runs on which token; rows and columns may be empty.
        weight_NE: (N, E) of x's dtype; read, and given a gradient, at active pairs only.
        gate_up_EHC: (E, 2 F, C) of x's dtype, the gate's F rows first.
        down_ECF: (E, C, F) of x's dtype.

    Returns:
        (N, C) of x's dtype; exactly 0 where no expert is active. Gradients of experts without a
        token are exactly 0.
    """
    return _run(x_NC, mask_NE, weight_NE, gate_up_EHC, down_ECF, _loop)


def expert_ffn_grouped(
    x_NC: Tensor,
    mask_NE: Tensor,
    weight_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
) -> Tensor:
    """:func:`expert_ffn` through ``torch.nn.functional.grouped_mm`` (see :func:`grouped_mm_needs`).

    float32, float16 or bfloat16.
    """
    return _run(x_NC, mask_NE, weight_NE, gate_up_EHC, down_ECF, _grouped)


def grouped_mm_needs(dtype: torch.dtype, width: int, hidden: int) -> str | None:
    """Why :func:`expert_ffn_grouped` cannot run with these sizes; None if it can."""
    if not HAS_GROUPED_MM:
        return f"torch.nn.functional.grouped_mm, which torch {torch.__version__} lacks"
    if dtype.itemsize > 4:
        return f"float32 or less, got {dtype}"
    multiple = 16 // dtype.itemsize
    if width % multiple or hidden % multiple:
        return f"widths that are multiples of {multiple} in {dtype}, got {width} and {hidden}"
    return None


class PairNorms(NamedTuple):
    """Lengths of what a pair's parameter gradients are made of; 0 where a pair is inactive.

    hidden_NE: |h|. grad_N: |g|, of the token's gradient. inner_NE: |(down^T g) o dh/da|, over both
    halves. In float32, or float64.
    """

    hidden_NE: Tensor
    grad_N: Tensor
    inner_NE: Tensor


@torch.no_grad()
def expert_pair_norms(
    x_NC: Tensor,
    mask_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
    grad_NC: Tensor,
) -> PairNorms:
    """What a pair would add to the gradients of its expert, in length, per unit of its weight.

    The gradient of ``down`` is g h^T and that of ``gate_up`` is ((down^T g) o dh/da) x^T, both of
    rank one, so their squared lengths are |h|^2 |g|^2 and |(down^T g) o dh/da|^2 |x|^2.

    Args:
        x_NC, mask_NE, gate_up_EHC, down_ECF: as in :func:`expert_ffn`.
        grad_NC: g, gradient of the experts' weighted sum.
    """
    pairs = dispatch(mask_NE)
    wide = torch.promote_types(x_NC.dtype, torch.float32)
    gate_PF, up_PF = _loop(x_NC[pairs.token_P], gate_up_EHC, pairs.ends_E).to(wide).chunk(2, dim=1)
    grad_PF = _loop(grad_NC[pairs.token_P], down_ECF.mT, pairs.ends_E).to(wide)
    sigmoid_PF = gate_PF.sigmoid()
    silu_PF = gate_PF * sigmoid_PF
    slope_PF = sigmoid_PF + silu_PF * (1 - sigmoid_PF)
    inner_PH = torch.cat([grad_PF * up_PF * slope_PF, grad_PF * silu_PF], dim=1)

    def spread(rows_PX: Tensor) -> Tensor:
        place = mask_NE.new_zeros(mask_NE.numel(), dtype=wide)
        return place.index_copy_(0, pairs.place_P, rows_PX.norm(dim=1)).view(mask_NE.shape)

    grad_N = torch.linalg.vector_norm(grad_NC, dim=1, dtype=wide)
    return PairNorms(spread(silu_PF * up_PF), grad_N, spread(inner_PH))
