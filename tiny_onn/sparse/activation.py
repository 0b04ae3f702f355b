"""A squared-ReLU FFN with 2:4 activations (Haziza et al., arXiv 2503.16672), forward and backward.

    H = X U^T            dense
    A = relu(H)^2 * e    e: a factor of the caller's (DeepEmbed), or 1
    S = 2:4 of A         token-wise: along the hidden width, which the next product contracts
    Y = S D^T            sparse
    dS = dY D            dense
    dH = 2 relu(H) e c dS        c = dS/dA: zero where S is zero, so dH is token-wise 2:4 already
    dX = dH U            sparse, and exact
    dD = dY^T S, dU = dH^T X     sparse: feature-wise 2:4, along the tokens, which they contract

c is the mask itself (naive), mask / p (mvue: an unbiased estimate is a random factor of A), or
beta times the mask (soft_threshold: theta and beta are constants to the derivative, or the third
entry of a group would have one too and dH would not be 2:4).

Only dD and dU are approximate. The features with the fewest nonzeros lose the least to 2:4, so
the sparsest ``split_ratio`` of them are taken sparse and the others dense. Neighbouring tokens are
alike and have their nonzeros in the same features: a fixed random order of the tokens spreads
them over the groups. It changes nothing else.

What is sparse is computed here with zeros in dense matrices, on any device and in any precision.

Shapes: T tokens, C width, F hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiny_onn.errors import UserError
from tiny_onn.sparse.mask import apply_mask, topk_mask
from tiny_onn.sparse.mvue import mvue
from tiny_onn.sparse.pattern import NMPattern
from tiny_onn.sparse.soft_threshold import soft_threshold

Method = Literal["naive", "mvue", "soft_threshold"]
SplitBy = Literal["nonzeros", "dropped", "random"]

ALONG_FEATURES, ALONG_TOKENS = NMPattern(2, 4, -1), NMPattern(2, 4, 0)

SPLIT_ALIGNMENT = 32
"""Rows of a sparse operand come in these multiples (CUTLASS, 16-bit; cuSPARSELt: 16)."""

NUM_KEYS = 1 << 14
"""Tokens whose places in the order are drawn one by one; later ones repeat the draws."""


@dataclass(frozen=True)
class ActSparse24:
    """How activations and gradients are made 2:4; the config's ActSparse24Config explains each.

    Raises:
        UserError: an unknown method, a ratio outside 0 to 1.
    """

    method: Method = "naive"
    gradient_method: Literal["naive", "mvue"] = "naive"
    split_ratio: float = 0.95
    split_by: SplitBy = "nonzeros"
    keep_forward_mask: bool = True
    dx_direct_sparse: bool = True

    def __post_init__(self) -> None:
        for value, known in (
            (self.method, get_args(Method)),
            (self.gradient_method, ("naive", "mvue")),
            (self.split_by, get_args(SplitBy)),
        ):
            if value not in known:
                raise UserError(f"got {value!r}; expected one of {', '.join(known)}; choose one")
        if not 0 <= self.split_ratio <= 1:
            raise UserError(
                f"got split_ratio={self.split_ratio}; expected a number from 0 to 1; change it"
            )


class DropTally:
    """Nonzeros and what 2:4 dropped of them, summed since they were last taken.

    Counts stay on their device until then. token: of activations, along the features; feature: of
    the operands of dU and dD, along the tokens, dense features included.

    ``active``: whether who owns it should have it count: two to four passes over the hidden layer.
    """

    NAMES = ("numbers", "token_nonzeros", "token_dropped", "feature_nonzeros", "feature_dropped")

    def __init__(self) -> None:
        self.active = True
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add_tokens(self, before: Tensor, after: Tensor | None) -> None:
        """Activations before and after; without ``after``, what the 2 largest of 4 would drop."""
        nonzeros = _nonzeros(before)
        if after is None:
            lost = _overfull(before, ALONG_FEATURES).sum()
        else:
            lost = nonzeros - _nonzeros(after)
        numbers = torch.full_like(nonzeros, before.numel())
        none = torch.zeros_like(nonzeros)
        self._add(torch.stack([numbers, nonzeros, lost, none, none]))

    @torch.no_grad()
    def add_features(self, before: Tensor, after: Tensor) -> None:
        """An operand along the tokens before and after."""
        nonzeros = _nonzeros(before)
        none = torch.zeros_like(nonzeros)
        lost = nonzeros - _nonzeros(after)
        self._add(torch.stack([none, none, none, nonzeros, lost]))

    def _add(self, counts: Tensor) -> None:
        counts = counts.double().nan_to_num()
        self._sums = counts if self._sums is None else self._sums + counts

    def take(self) -> list[int]:
        """Counts in the order of NAMES since the last call. Waits for the device."""
        sums = [0.0] * len(self.NAMES) if self._sums is None else self._sums.tolist()
        self._sums = None
        return [round(count) for count in sums]


def token_keys(seed: int) -> Tensor:
    """int32 (NUM_KEYS,) distinct numbers in a random order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(NUM_KEYS, generator=generator, dtype=torch.int32)


def token_order(keys: Tensor, num_tokens: int) -> Tensor:
    """int64 (T,): a permutation of the flattened tokens, the same for every call with this T.

    Tokens NUM_KEYS apart share a key and follow each other.
    """
    if num_tokens > len(keys):
        keys = keys.repeat(-(-num_tokens // len(keys)))
    return keys[:num_tokens].argsort(stable=True)


def inverse_order(order_T: Tensor) -> Tensor:
    """int64 (T,): where each place of ``order_T`` came to, so that x[order][inverse] = x."""
    inverse_T = torch.empty_like(order_T)
    return inverse_T.scatter_(0, order_T, torch.arange(len(order_T), device=order_T.device))


def num_sparse_features(num_features: int, split_ratio: float) -> int:
    """Features that are taken feature-wise sparse: the ratio, rounded down to SPLIT_ALIGNMENT.

    A ratio of 1 is all of them, whatever their number.
    """
    if split_ratio == 1:
        return num_features
    return int(split_ratio * num_features) // SPLIT_ALIGNMENT * SPLIT_ALIGNMENT


def token_wise(values_TF: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """2:4 along the features: the sparse (T, F), and its derivative c, which is zero elsewhere.

    soft_threshold is scaled by beta = <a, S> / <S, S> of each token (1 where S is zero), which
    makes up for its shrinking without a state: that of S-STE is a constant of the weights.

    Returns:
        sparse: values' dtype; slope: bool (naive), else values' dtype.

    Raises:
        UserError: F is not divisible by 4.
    """
    if method == "naive":
        mask = topk_mask(values_TF, ALONG_FEATURES, check=False)
        mask = mask & (values_TF != 0)
        return apply_mask(values_TF, mask), mask
    if method == "mvue":
        sparse_TF = mvue(values_TF, ALONG_FEATURES, check=False)
        whole = torch.where(sparse_TF != 0, values_TF, torch.ones_like(values_TF))
        return sparse_TF, sparse_TF / whole
    assert method == "soft_threshold", method
    shrunk_TF = soft_threshold(values_TF, ALONG_FEATURES, check=False)
    wide = torch.promote_types(values_TF.dtype, torch.float32)
    most_T1 = shrunk_TF.abs().amax(dim=1, keepdim=True).to(wide)
    most_T1 = torch.where(most_T1 > 0, most_T1, 1.0)  # beta is that of any multiple
    unit_TF = shrunk_TF.to(wide) / most_T1
    energy_T1 = unit_TF.square().sum(dim=1, keepdim=True)
    product_T1 = (unit_TF * (values_TF.to(wide) / most_T1)).sum(dim=1, keepdim=True)
    beta_T1 = torch.where(energy_T1 > 0, product_T1 / energy_T1, 1.0).to(values_TF.dtype)
    return shrunk_TF * beta_T1, (shrunk_TF != 0) * beta_T1


def feature_wise(values_TF: Tensor, options: ActSparse24) -> Tensor:
    """2:4 along the tokens in the sparsest features, the others as they are: (T, F).

    The last group of tokens is filled up with zeros.
    """
    num_tokens, num_features = values_TF.shape
    num_sparse = num_sparse_features(num_features, options.split_ratio)
    if num_sparse == 0:
        return values_TF
    padded_TF = F.pad(values_TF, (0, 0, 0, -num_tokens % 4))
    if options.gradient_method == "naive":
        thin_TF = apply_mask(padded_TF, topk_mask(padded_TF, ALONG_TOKENS, check=False))
    else:
        thin_TF = mvue(padded_TF, ALONG_TOKENS, check=False)
    thin_TF = thin_TF[:num_tokens]
    if num_sparse == num_features:
        return thin_TF
    crowd_F = _crowd(padded_TF, options.split_by)
    dense_F = torch.zeros(num_features, dtype=torch.bool, device=values_TF.device)
    dense_F[crowd_F.topk(num_features - num_sparse, sorted=False).indices] = True
    return torch.where(dense_F, values_TF, thin_TF)


def _crowd(padded_TF: Tensor, split_by: SplitBy) -> Tensor:
    """(F,) by which features are split: the largest stay dense."""
    if split_by == "nonzeros":
        return _nonzeros(padded_TF, dim=0)
    if split_by == "dropped":
        return _overfull(padded_TF, ALONG_TOKENS).sum(dim=0)
    return torch.arange(padded_TF.shape[1], device=padded_TF.device) * 0x9E3779B1 % (1 << 32)


def _nonzeros(values: Tensor, dim: int | None = None) -> Tensor:
    """How many, as a float: twenty times as fast as count_nonzero on a CPU (NaN gives NaN)."""
    ones = values.sign().abs_()
    wide = torch.promote_types(values.dtype, torch.float32)
    return ones.sum(dtype=wide) if dim is None else ones.sum(dim=dim, dtype=wide)


def _overfull(values: Tensor, pattern: NMPattern) -> Tensor:
    """Of every group, the nonzeros beyond two; dim is a quarter as long."""
    a, b, c, d = (pattern.group(values) != 0).to(torch.int8).unbind(-1)
    return (a + b + c + d - 2).clamp(min=0).movedim(-1, pattern.dim)


class _SquaredReluFFN(torch.autograd.Function):
    """Tokens come in the order in which they are grouped."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        up_FC: Tensor,
        down_CF: Tensor,
        factor_TF: Tensor | None,
        options: ActSparse24,
        tally: DropTally | None,
    ) -> Tensor:
        relu_TF = F.linear(x_TC, up_FC).relu()
        active_TF = relu_TF * relu_TF
        if factor_TF is not None:
            active_TF = (active_TF * factor_TF).to(relu_TF.dtype)
        sparse_TF, slope_TF = token_wise(active_TF, options.method)
        if tally is not None:
            tally.add_tokens(active_TF, sparse_TF)
        ctx.save_for_backward(x_TC, up_FC, down_CF, factor_TF, relu_TF, sparse_TF, slope_TF)
        ctx.options, ctx.tally = options, tally
        return F.linear(sparse_TF, down_CF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TC: Tensor) -> tuple[Tensor | None, ...]:
        x_TC, up_FC, down_CF, factor_TF, relu_TF, sparse_TF, slope_TF = ctx.saved_tensors
        options: ActSparse24 = ctx.options
        needs = ctx.needs_input_grad
        d_TF = dy_TC @ down_CF
        if options.keep_forward_mask and slope_TF.dtype == torch.bool:
            # Where nothing was kept nothing passes, be it NaN or infinite.
            d_TF, relu_TF = apply_mask(d_TF, slope_TF), apply_mask(relu_TF, slope_TF)
        elif options.keep_forward_mask:
            d_TF = d_TF * slope_TF
        d_factor_TF = None
        if factor_TF is not None:
            if needs[3]:
                d_factor_TF = (d_TF * (relu_TF * relu_TF)).to(factor_TF.dtype)
            d_TF = (d_TF * factor_TF).to(d_TF.dtype)
        d_TF = d_TF * relu_TF * 2
        thin_TF = feature_wise(d_TF, options)
        dx_TC = dup_FC = ddown_CF = None
        if needs[0]:
            if not options.dx_direct_sparse:
                dx_TC = thin_TF @ up_FC
            elif options.keep_forward_mask:
                dx_TC = d_TF @ up_FC
            else:  # not 2:4 yet
                dx_TC = apply_mask(d_TF, topk_mask(d_TF, ALONG_FEATURES, check=False)) @ up_FC
        if needs[1]:
            dup_FC = thin_TF.T @ x_TC
        if needs[2]:
            if not options.keep_forward_mask:
                sparse_TF = relu_TF * relu_TF
                if factor_TF is not None:
                    sparse_TF = (sparse_TF * factor_TF).to(relu_TF.dtype)
            kept_TF = feature_wise(sparse_TF, options)
            ddown_CF = dy_TC.T @ kept_TF
            if ctx.tally is not None:
                ctx.tally.add_features(sparse_TF, kept_TF)
        if ctx.tally is not None and needs[1]:
            ctx.tally.add_features(d_TF, thin_TF)
        return dx_TC, dup_FC, ddown_CF, d_factor_TF, None, None


def refuse_operands(x_TC: Tensor, up_FC: Tensor) -> None:
    """Raises UserError for what :func:`squared_relu_24` cannot compute."""
    if x_TC.dtype == torch.float16:
        raise UserError(
            "got float16 activations, whose squares overflow above 255; expected bfloat16 or "
            "float32; change the precision"
        )
    if up_FC.shape[0] % 4:
        raise UserError(
            f"got a hidden width of {up_FC.shape[0]}; expected a multiple of 4 for 2:4; use "
            f"{-(-up_FC.shape[0] // 4) * 4}"
        )


def squared_relu_24(
    x_TC: Tensor,
    up_FC: Tensor,
    down_CF: Tensor,
    options: ActSparse24,
    order_T: Tensor | None = None,
    factor_TF: Tensor | None = None,
    tally: DropTally | None = None,
) -> Tensor:
    """(T, C) in x's dtype: the FFN of this file, with its own backward (once differentiable).

    Args:
        x_TC, up_FC, down_CF: float32, float64 or bfloat16, all alike; matrices laid out as
            nn.Linear's.
        options: methods, split, masks.
        order_T: int64 permutation in which tokens are grouped for dU and dD; None: as they are.
        factor_TF: float (T, F) that scales the hidden layer before it is made sparse.
        tally: counts dropped nonzeros, those of the backward too.

    Draws from torch's default random generator of the device where a method is mvue.

    Raises:
        UserError: a hidden width not divisible by 4, or float16, whose squares overflow.
    """
    refuse_operands(x_TC, up_FC)
    if order_T is None:
        return _SquaredReluFFN.apply(x_TC, up_FC, down_CF, factor_TF, options, tally)
    if factor_TF is not None:
        factor_TF = factor_TF.index_select(0, order_T)
    y_TC = _SquaredReluFFN.apply(
        x_TC.index_select(0, order_T), up_FC, down_CF, factor_TF, options, tally
    )
    return y_TC.index_select(0, inverse_order(order_T))


def squared_relu_24_frozen(
    x_TC: Tensor,
    up_FC: Tensor,
    down_CF: Tensor,
    method: Method,
    factor_TF: Tensor | None = None,
) -> Tensor:
    """The same for evaluation: nothing is drawn (mvue becomes naive), no token sees another.

    Raises:
        UserError: as there.
    """
    refuse_operands(x_TC, up_FC)
    relu_TF = F.linear(x_TC, up_FC).relu()
    active_TF = relu_TF * relu_TF
    if factor_TF is not None:
        active_TF = (active_TF * factor_TF).to(relu_TF.dtype)
    deterministic: Method = "naive" if method == "mvue" else method
    return F.linear(token_wise(active_TF, deterministic)[0], down_CF)
