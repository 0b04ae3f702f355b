"""One tile of softmax attention inside a kernel: online softmax, and the adjoint from log-sum-exp.

Logarithms are to base 2 throughout: SCALE2 is log2(e) / sqrt(D), a log-sum-exp is that of the
scores times log2(e). A query that sees no key has log-sum-exp +inf, so that every weight computed
from it is exactly 0.

Shapes: R query rows (tokens times heads of a group), C keys, D head width, E value width; A, B
either R, C or C, R.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(X, offset_R, real_R, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """(R, BLOCK) numbers: WIDTH from each offset (int64), 0 beyond them and where not real."""
    column_D = tl.arange(0, BLOCK)
    mask_RD = real_R[:, None]
    if WIDTH != BLOCK:
        mask_RD = mask_RD & (column_D < WIDTH)[None, :]
    return tl.load(X + offset_R[:, None] + column_D[None, :], mask=mask_RD, other=0.0).to(DOT)


@triton.jit
def store_rows(X, offset_R, real_R, x_RD, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The opposite of :func:`load_rows`, in the dtype of X."""
    column_D = tl.arange(0, BLOCK)
    mask_RD = real_R[:, None] & (column_D < WIDTH)[None, :]
    tl.store(X + offset_R[:, None] + column_D[None, :], x_RD.to(X.dtype.element_ty), mask=mask_RD)


@triton.jit
def add_product(a_AB, b_BC, sum_AC, PRECISION: tl.constexpr):
    """a b added to a sum, in the dtype of the sum."""
    return tl.dot(a_AB, b_BC, sum_AC, input_precision=PRECISION, out_dtype=sum_AC.dtype)


@triton.jit
def take_in(
    q_RD,
    k_CD,
    v_CE,
    seen_RC,
    peak_R,
    total_R,
    sum_RE,
    SCALE2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a tile of keys to the running peak, sum of weights and weighted sum of values."""
    score_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision=PRECISION) * SCALE2
    score_RC = tl.where(seen_RC, score_RC, float("-inf"))
    higher_R = tl.maximum(peak_R, tl.max(score_RC, 1))
    # Rows that have seen nothing yet: -inf - 0, not -inf - -inf.
    finite_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
    weight_RC = tl.exp2(score_RC - finite_R[:, None])
    shrink_R = tl.exp2(peak_R - finite_R)
    total_R = total_R * shrink_R + tl.sum(weight_RC, 1)
    sum_RE = sum_RE * shrink_R[:, None]
    sum_RE = add_product(weight_RC.to(v_CE.dtype), v_CE, sum_RE, PRECISION)
    return higher_R, total_R, sum_RE


@triton.jit
def settle(peak_R, total_R, sum_RE):
    """Output and log-sum-exp of rows that have taken in all their keys."""
    empty_R = total_R == 0.0
    safe_R = tl.where(empty_R, 1.0, total_R)
    lse_R = tl.where(empty_R, float("inf"), peak_R + tl.log2(safe_R))
    return sum_RE / safe_R[:, None], lse_R


@triton.jit
def weights_and_adjoint(
    a_AD,
    b_BD,
    c_AE,
    d_BE,
    seen_AB,
    lse_AB,
    delta_AB,
    SCALE2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights and gradient of the scores (before 1 / sqrt(D)), queries first or keys first.

    Queries first: a, b, c, d = q, k, grad, v, and lse, delta (R, 1); keys first: k, q, v, grad and
    (1, R), so that each is a left operand of the product that follows.
    """
    score_AB = tl.dot(a_AD, tl.trans(b_BD), input_precision=PRECISION) * SCALE2
    weight_AB = tl.exp2(tl.where(seen_AB, score_AB, float("-inf")) - lse_AB)
    change_AB = tl.dot(c_AE, tl.trans(d_BE), input_precision=PRECISION)
    return weight_AB, weight_AB * (change_AB - delta_AB)
