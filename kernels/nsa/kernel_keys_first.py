"""The selected branch, keys first: a program holds a block and walks the pairs that chose it.

The inverse index names them: pairs sorted by block, stably, so that every sum has one order and no
atomics are needed. A block that many chose (a document's first is chosen by all its tokens) is cut
into parts of ``part`` pairs, whose gradients are added up afterwards, in order.

The gradients of keys and values go this way always. Mostly the output does too, and the gradient of
queries: rows of many pairs fill a product where one token's heads do not, and a block is read once
for all of them. What a pair gives is written beside its log-sum-exp, and merged at its token; for
that not to need room for all pairs at once, a long batch goes slice by slice of its tokens. The
pairs of a block stand in the order of their tokens, so those of a slice are a run: BOUND[0] to
BOUND[1].

Shapes: N tokens, H query heads in K groups of G, D head width, E value width, n chosen blocks, P =
N * K * n pairs (of a slice, where parts are stored), J selectable blocks of all documents, Z =
K * J blocks of all groups, L = l' tokens of one; R query rows (pairs times heads of the group), C
keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tiny_onn_kernels.nsa.kernel_softmax import (
    add_product,
    load_rows,
    settle,
    store_rows,
    take_in,
    weights_and_adjoint,
)

BATCH_SIZES = (
    "num_tokens", "num_rows", "num_runs", "num_blocks", "num_bounds",
    "parts", "part", "slice_pair", "slice_pairs", "steps",
)  # fmt: skip
"""Numbers that differ from batch to batch: nothing is compiled again for them."""


@triton.jit
def _block_keys(
    BLOCK_ROW, TIME, block, num_tokens, SELECT_BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Rows, token numbers and places in the block of a piece of its keys, and which are its own."""
    first = tl.load(BLOCK_ROW + block)
    first_time = tl.load(TIME + first)
    place_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_C = first + place_C
    inside_C = (place_C < SELECT_BLOCK) & (row_C < num_tokens)
    time_C = tl.load(TIME + row_C, mask=inside_C, other=-1)
    return row_C, time_C, place_C, inside_C & (time_C == first_time + place_C)


@triton.jit
def _pair_rows(PAIR, row_R, stop_row, group, pairs_per_token, G: tl.constexpr):
    """Pair, token and head of query rows, row r being head r % G of pair r // G."""
    real_R = row_R < stop_row
    pair_R = tl.load(PAIR + row_R // G, mask=real_R, other=0)
    return pair_R, pair_R // pairs_per_token, group * G + row_R % G, real_R


@triton.jit(do_not_specialize=BATCH_SIZES)
def find_slices(
    PAIR, OFFSET, BOUND, num_runs, num_bounds, slice_pairs, steps, BLOCK: tl.constexpr
):  # fmt: skip
    """BOUND (num_bounds, Z): the first of each block's pairs that is of slice s or later, by a
    binary search of ``steps`` steps among those of the block."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_runs * num_bounds
    z = place % num_runs
    edge = place // num_runs * slice_pairs
    low = tl.load(OFFSET + z, mask=inside, other=0)
    high = tl.load(OFFSET + z + 1, mask=inside, other=0)
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        before = open_ & (tl.load(PAIR + middle, mask=open_, other=0) < edge)
        high = tl.where(open_ & (before == 0), middle, high)
        low = tl.where(before, middle + 1, low)
    tl.store(BOUND + place, low, mask=inside)


@triton.jit(do_not_specialize=BATCH_SIZES)
def row_products(
    GRAD, OUT, DELTA, stride_gn, stride_gh, num_rows, num_heads,
    E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """DELTA (N, H) = sum(output * gradient) of every query."""
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_R = row_R < num_rows
    offset_R = row_R // num_heads * stride_gn + row_R % num_heads * stride_gh
    grad_RE = load_rows(GRAD, offset_R, real_R, E, BLOCK_E, SUM)
    out_RE = load_rows(OUT, row_R * E, real_R, E, BLOCK_E, SUM)
    tl.store(DELTA + row_R, tl.sum(grad_RE * out_RE, 1), mask=real_R)


@triton.jit(do_not_specialize=BATCH_SIZES)
def pairs_forward(
    Q, K, V, PAIR, BOUND, BLOCK_ROW, TIME, END, PART_OUT, PART_LSE,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    num_tokens, num_runs, num_blocks, pairs_per_token, parts, part, slice_pair,
    SELECT_BLOCK: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each pair's output (P, G, E) and log-sum-exp (P, G), over the keys of its block alone.
    slice_pair: the slice's first pair."""
    z = tl.program_id(0) // parts
    first_pair = tl.load(BOUND + z) + (tl.program_id(0) % parts) * part
    stop_pair = tl.minimum(first_pair + part, tl.load(BOUND + num_runs + z))
    if first_pair >= stop_pair:
        return
    group = (z // num_blocks).to(tl.int64)
    key_C, time_C, _, own_C = _block_keys(
        BLOCK_ROW, TIME, z % num_blocks, num_tokens, SELECT_BLOCK, BLOCK_C
    )
    k_CD = load_rows(K, key_C * stride_kn + group * stride_kh, own_C, D, BLOCK_D, DOT)
    v_CE = load_rows(V, key_C * stride_vn + group * stride_vh, own_C, E, BLOCK_E, DOT)
    for start in range(first_pair * G, stop_pair * G, BLOCK_R):
        row_R = start + tl.arange(0, BLOCK_R)
        pair_R, token_R, head_R, real_R = _pair_rows(
            PAIR, row_R, stop_pair * G, group, pairs_per_token, G
        )
        q_RD = load_rows(Q, token_R * stride_qn + head_R * stride_qh, real_R, D, BLOCK_D, DOT)
        end_R = tl.load(END + token_R, mask=real_R, other=-1)
        seen_RC = own_C[None, :] & (time_C[None, :] <= end_R[:, None])
        peak_R, total_R, sum_RE = take_in(
            q_RD, k_CD, v_CE, seen_RC,
            tl.full([BLOCK_R], float("-inf"), SUM), tl.zeros([BLOCK_R], SUM),
            tl.zeros([BLOCK_R, BLOCK_E], SUM), SCALE2, PRECISION,
        )  # fmt: skip
        out_RE, lse_R = settle(peak_R, total_R, sum_RE)
        slot_R = (pair_R - slice_pair) * G + row_R % G
        store_rows(PART_OUT, slot_R * E, real_R, out_RE, E, BLOCK_E)
        tl.store(PART_LSE + slot_R, lse_R, mask=real_R)


@triton.jit(do_not_specialize=BATCH_SIZES)
def merge_pairs(
    INDEX, PART_OUT, PART_LSE, OUT, LSE, num_rows,
    COUNT: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """What a token's pairs gave, by their log-sum-exps: (N, H, E) and (N, H) of a slice."""
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_R = row_R < num_rows
    peak_R = tl.full([BLOCK_R], float("-inf"), SUM)
    total_R = tl.zeros([BLOCK_R], SUM)
    sum_RE = tl.zeros([BLOCK_R, BLOCK_E], SUM)
    for step in range(COUNT):
        pair_R = row_R // G * COUNT + step
        valid_R = tl.load(INDEX + pair_R, mask=real_R, other=-1) >= 0
        slot_R = pair_R * G + row_R % G
        lse_R = tl.load(PART_LSE + slot_R, mask=valid_R, other=float("inf"))
        lse_R = tl.where(lse_R == float("inf"), float("-inf"), lse_R)  # a pair that sees no key
        out_RE = load_rows(PART_OUT, slot_R * E, valid_R, E, BLOCK_E, SUM)
        higher_R = tl.maximum(peak_R, lse_R)
        finite_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
        weight_R = tl.exp2(lse_R - finite_R)
        shrink_R = tl.exp2(peak_R - finite_R)
        total_R = total_R * shrink_R + weight_R
        sum_RE = sum_RE * shrink_R[:, None] + out_RE * weight_R[:, None]
        peak_R = higher_R
    out_RE, lse_R = settle(peak_R, total_R, sum_RE)
    store_rows(OUT, row_R * E, real_R, out_RE, E, BLOCK_E)
    tl.store(LSE + row_R, lse_R, mask=real_R)


@triton.jit(do_not_specialize=BATCH_SIZES)
def pairs_backward(
    Q, K, V, PAIR, BOUND, SLOT, BLOCK_ROW, TIME, END, LSE, GRAD, DELTA,
    GRAD_K, GRAD_V, SLOT_K, SLOT_V, PART_Q,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh,
    num_tokens, num_heads, num_runs, num_blocks, pairs_per_token, parts, part, slice_pair,
    SELECT_BLOCK: tl.constexpr, WITH_QUERIES: tl.constexpr, ADD: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block's keys and values from one part of its pairs: written where they belong
    (ADD: added to what earlier slices left there) if it is the only part, else to the part's slot
    (L, D) and (L, E). WITH_QUERIES: also what each pair gives the gradient of its query, (P, G, D).
    """
    z = tl.program_id(0) // parts
    part_number = tl.program_id(0) % parts
    begin, end = tl.load(BOUND + z), tl.load(BOUND + num_runs + z)
    first_pair = begin + part_number * part
    if ((part_number > 0) | ADD) & (first_pair >= end):
        return
    stop_pair = tl.minimum(first_pair + part, end)
    group = (z // num_blocks).to(tl.int64)
    key_C, time_C, place_C, own_C = _block_keys(
        BLOCK_ROW, TIME, z % num_blocks, num_tokens, SELECT_BLOCK, BLOCK_C
    )
    k_CD = load_rows(K, key_C * stride_kn + group * stride_kh, own_C, D, BLOCK_D, DOT)
    v_CE = load_rows(V, key_C * stride_vn + group * stride_vh, own_C, E, BLOCK_E, DOT)
    grad_k_CD = tl.zeros([BLOCK_C, BLOCK_D], SUM)
    grad_v_CE = tl.zeros([BLOCK_C, BLOCK_E], SUM)
    for start in range(first_pair * G, stop_pair * G, BLOCK_R):
        row_R = start + tl.arange(0, BLOCK_R)
        pair_R, token_R, head_R, real_R = _pair_rows(
            PAIR, row_R, stop_pair * G, group, pairs_per_token, G
        )
        query_R = token_R * num_heads + head_R
        q_RD = load_rows(Q, token_R * stride_qn + head_R * stride_qh, real_R, D, BLOCK_D, DOT)
        grad_RE = load_rows(GRAD, token_R * stride_gn + head_R * stride_gh, real_R, E, BLOCK_E, DOT)
        end_R = tl.load(END + token_R, mask=real_R, other=-1)
        lse_R = tl.load(LSE + query_R, mask=real_R, other=float("inf"))
        delta_R = tl.load(DELTA + query_R, mask=real_R, other=0.0)
        seen_CR = own_C[:, None] & (time_C[:, None] <= end_R[None, :])
        weight_CR, grad_s_CR = weights_and_adjoint(
            k_CD, q_RD, v_CE, grad_RE, seen_CR, lse_R[None, :], delta_R[None, :], SCALE2, PRECISION
        )
        grad_v_CE = add_product(weight_CR.to(DOT), grad_RE, grad_v_CE, PRECISION)
        grad_k_CD = add_product(grad_s_CR.to(DOT), q_RD, grad_k_CD, PRECISION)
        if WITH_QUERIES:
            grad_q_RD = tl.dot(tl.trans(grad_s_CR.to(DOT)), k_CD, input_precision=PRECISION)
            slot_R = (pair_R - slice_pair) * G + row_R % G
            store_rows(PART_Q, slot_R * D, real_R, grad_q_RD * SCALE, D, BLOCK_D)
    if end - begin <= part:
        out_C = key_C * (num_heads // G) + group
        grad_k_CD *= SCALE
        if ADD:
            grad_k_CD += load_rows(GRAD_K, out_C * D, own_C, D, BLOCK_D, SUM)
            grad_v_CE += load_rows(GRAD_V, out_C * E, own_C, E, BLOCK_E, SUM)
        store_rows(GRAD_K, out_C * D, own_C, grad_k_CD, D, BLOCK_D)
        store_rows(GRAD_V, out_C * E, own_C, grad_v_CE, E, BLOCK_E)
    else:
        out_C = (tl.load(SLOT + z) + part_number) * SELECT_BLOCK + place_C
        store_rows(SLOT_K, out_C * D, own_C, grad_k_CD * SCALE, D, BLOCK_D)
        store_rows(SLOT_V, out_C * E, own_C, grad_v_CE, E, BLOCK_E)


@triton.jit(do_not_specialize=BATCH_SIZES)
def add_parts(
    BOUND, SLOT, BLOCK_ROW, TIME, GRAD_K, GRAD_V, SLOT_K, SLOT_V,
    num_tokens, num_runs, num_blocks, num_groups, part,
    SELECT_BLOCK: tl.constexpr, ADD: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of blocks of several parts, in their order (ADD: added to
    what earlier slices left)."""
    z = tl.program_id(0)
    parts = tl.cdiv(tl.load(BOUND + num_runs + z) - tl.load(BOUND + z), part)
    if parts <= 1:
        return
    key_C, _, place_C, own_C = _block_keys(
        BLOCK_ROW, TIME, z % num_blocks, num_tokens, SELECT_BLOCK, BLOCK_C
    )
    grad_k_CD = tl.zeros([BLOCK_C, BLOCK_D], SUM)
    grad_v_CE = tl.zeros([BLOCK_C, BLOCK_E], SUM)
    slot = tl.load(SLOT + z)
    for number in range(slot, slot + parts):
        slot_C = number * SELECT_BLOCK + place_C
        grad_k_CD += load_rows(SLOT_K, slot_C * D, own_C, D, BLOCK_D, SUM)
        grad_v_CE += load_rows(SLOT_V, slot_C * E, own_C, E, BLOCK_E, SUM)
    out_C = key_C * num_groups + z // num_blocks
    if ADD:
        grad_k_CD += load_rows(GRAD_K, out_C * D, own_C, D, BLOCK_D, SUM)
        grad_v_CE += load_rows(GRAD_V, out_C * E, own_C, E, BLOCK_E, SUM)
    store_rows(GRAD_K, out_C * D, own_C, grad_k_CD, D, BLOCK_D)
    store_rows(GRAD_V, out_C * E, own_C, grad_v_CE, E, BLOCK_E)


@triton.jit(do_not_specialize=BATCH_SIZES)
def add_pairs(
    INDEX, PART_Q, GRAD_Q, num_rows,
    COUNT: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The queries' gradient (N, H, D), of a slice: the sum of what their pairs give."""
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    real_R = row_R < num_rows
    grad_q_RD = tl.zeros([BLOCK_R, BLOCK_D], SUM)
    for step in range(COUNT):
        pair_R = row_R // G * COUNT + step
        valid_R = tl.load(INDEX + pair_R, mask=real_R, other=-1) >= 0
        slot_R = pair_R * G + row_R % G
        grad_q_RD += load_rows(PART_Q, slot_R * D, valid_R, D, BLOCK_D, SUM)
    store_rows(GRAD_Q, row_R * D, real_R, grad_q_RD, D, BLOCK_D)
