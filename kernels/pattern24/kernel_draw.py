"""Patterns drawn and applied, and their gradients: the noise is computed again from its counters.

A program takes a block of groups of the weights and goes through the agents that share them, so
that weights are read once and their gradient is summed in registers, in the order of the agents.

Shapes: A agents, G groups of four, 6 patterns; B groups of a program's block.
"""

import triton
import triton.language as tl
from torch import Tensor

from tiny_onn_kernels.kernel_groups import keep_two, load_fours, store_fours
from tiny_onn_kernels.kernel_numbers import number_types

BLOCK_GROUPS = 256
"""Two a thread: what a group needs at a time, six logits, probabilities and Philox, is about 40
registers."""


@triton.jit
def _gumbel(n_B, SUM: tl.constexpr):
    """-log(-log u), u of 21 bits as noise.py has it."""
    u_B = (n_B.to(tl.int32).to(SUM) + 0.5) * (1.0 / 2097152.0)
    return -tl.log(-tl.log(u_B))


@triton.jit
def _noise(seed, offset, pair_B, SUM: tl.constexpr):
    """Of the six patterns of a group: six numbers of 21 bits from the block of its counter."""
    w0_B, w1_B, w2_B, w3_B = tl.randint4x(seed, offset + pair_B)
    w0_B, w1_B = w0_B.to(tl.uint32, bitcast=True), w1_B.to(tl.uint32, bitcast=True)
    w2_B, w3_B = w2_B.to(tl.uint32, bitcast=True), w3_B.to(tl.uint32, bitcast=True)
    return (
        _gumbel(w0_B >> 11, SUM),
        _gumbel(w1_B >> 11, SUM),
        _gumbel(w2_B >> 11, SUM),
        _gumbel(w3_B >> 11, SUM),
        _gumbel(((w0_B & 0x7FF) << 10) | (w1_B & 0x3FF), SUM),
        _gumbel(((w2_B & 0x7FF) << 10) | (w3_B & 0x3FF), SUM),
    )


@triton.jit
def _sums(s0_B, s1_B, s2_B, s3_B):
    """Of the two that each pattern keeps."""
    return s0_B + s1_B, s0_B + s2_B, s0_B + s3_B, s1_B + s2_B, s1_B + s3_B, s2_B + s3_B


@triton.jit
def _kept(p0_B, p1_B, p2_B, p3_B, p4_B, p5_B):
    """Of the three patterns that keep each weight."""
    return p0_B + p1_B + p2_B, p0_B + p3_B + p4_B, p1_B + p3_B + p5_B, p2_B + p4_B + p5_B


@triton.jit
def _better(best_B, index_B, z_B, number: tl.constexpr):
    """The running maximum and where it stands; equals stay."""
    wins_B = z_B > best_B
    return tl.where(wins_B, z_B, best_B), tl.where(wins_B, number, index_B)


@triton.jit
def _largest(z0_B, z1_B, z2_B, z3_B, z4_B, z5_B):
    """(B,) which of six is the largest, the first of equals; 6, none, beside a NaN."""
    index_B = tl.zeros_like(z0_B).to(tl.int32)
    best_B, index_B = _better(z0_B, index_B, z1_B, 1)
    best_B, index_B = _better(best_B, index_B, z2_B, 2)
    best_B, index_B = _better(best_B, index_B, z3_B, 3)
    best_B, index_B = _better(best_B, index_B, z4_B, 4)
    best_B, index_B = _better(best_B, index_B, z5_B, 5)
    wild_B = (z0_B != z0_B) | (z1_B != z1_B) | (z2_B != z2_B)
    wild_B = wild_B | (z3_B != z3_B) | (z4_B != z4_B) | (z5_B != z5_B)
    return tl.where(wild_B, 6, index_B)


@triton.jit
def _draw(
    source_ptr,
    seed,
    offset,
    kappa,
    pair_B,
    inside_B,
    FREE: tl.constexpr,
    SAMPLE: tl.constexpr,
    B: tl.constexpr,
    SUM: tl.constexpr,
):
    """Six logits with their noise, and the chosen pattern."""
    if FREE:
        place_B = source_ptr + pair_B * 6
        l0_B = tl.load(place_B, mask=inside_B, other=0.0).to(SUM)
        l1_B = tl.load(place_B + 1, mask=inside_B, other=0.0).to(SUM)
        l2_B = tl.load(place_B + 2, mask=inside_B, other=0.0).to(SUM)
        l3_B = tl.load(place_B + 3, mask=inside_B, other=0.0).to(SUM)
        l4_B = tl.load(place_B + 4, mask=inside_B, other=0.0).to(SUM)
        l5_B = tl.load(place_B + 5, mask=inside_B, other=0.0).to(SUM)
    else:
        s0_B, s1_B, s2_B, s3_B = load_fours(source_ptr, pair_B, inside_B, B, SUM)
        l0_B, l1_B, l2_B, l3_B, l4_B, l5_B = _sums(s0_B, s1_B, s2_B, s3_B)
    z0_B, z1_B, z2_B = kappa * l0_B, kappa * l1_B, kappa * l2_B
    z3_B, z4_B, z5_B = kappa * l3_B, kappa * l4_B, kappa * l5_B
    if SAMPLE:
        g0_B, g1_B, g2_B, g3_B, g4_B, g5_B = _noise(seed, offset, pair_B, SUM)
        z0_B, z1_B, z2_B = z0_B + g0_B, z1_B + g1_B, z2_B + g2_B
        z3_B, z4_B, z5_B = z3_B + g3_B, z4_B + g4_B, z5_B + g5_B
    if SAMPLE or FREE:
        index_B = _largest(z0_B, z1_B, z2_B, z3_B, z4_B, z5_B)
    else:
        k0_B, k1_B, k2_B, _ = keep_two(s0_B, s1_B, s2_B, s3_B)
        from_zero_B = tl.where(k1_B, 0, tl.where(k2_B, 1, 2))
        index_B = tl.where(k0_B, from_zero_B, tl.where(k1_B, tl.where(k2_B, 3, 4), 5))
    return z0_B, z1_B, z2_B, z3_B, z4_B, z5_B, index_B


@triton.jit
def _keeps(index_B, SUM: tl.constexpr):
    """The four columns of the mask of a pattern, 0 or 1; of none zeros."""
    k0_B = index_B < 3
    k1_B = (index_B == 0) | (index_B == 3) | (index_B == 4)
    k2_B = (index_B == 1) | (index_B == 3) | (index_B == 5)
    k3_B = (index_B == 2) | (index_B == 4) | (index_B == 5)
    return k0_B.to(SUM), k1_B.to(SUM), k2_B.to(SUM), k3_B.to(SUM)


@triton.jit(do_not_specialize=["A", "G"])
def draw_patterns(
    weight_ptr,
    source_ptr,
    kappa_ptr,
    seed_ptr,
    offset_ptr,
    out_ptr,
    pattern_ptr,
    A,
    G,
    FREE: tl.constexpr,
    SAMPLE: tl.constexpr,
    B: tl.constexpr,
    SUM: tl.constexpr,
):
    """out (A, G, 4) and pattern (A, G) of a block of groups, for every agent."""
    group_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside_B = group_B < G
    kappa, seed, offset = tl.load(kappa_ptr), tl.load(seed_ptr), tl.load(offset_ptr)
    w0_B, w1_B, w2_B, w3_B = load_fours(weight_ptr, group_B, inside_B, B, SUM)
    agent = 0
    while agent < A:
        pair_B = group_B + G.to(tl.int64) * agent
        _, _, _, _, _, _, index_B = _draw(
            source_ptr, seed, offset, kappa, pair_B, inside_B, FREE, SAMPLE, B, SUM
        )
        k0_B, k1_B, k2_B, k3_B = _keeps(index_B, SUM)
        o0_B, o1_B, o2_B, o3_B = w0_B * k0_B, w1_B * k1_B, w2_B * k2_B, w3_B * k3_B
        store_fours(out_ptr, pair_B, inside_B, o0_B, o1_B, o2_B, o3_B, B)
        tl.store(pattern_ptr + pair_B, index_B.to(tl.uint8), mask=inside_B)
        agent += 1


@triton.jit(do_not_specialize=["A", "G"])
def differentiate_patterns(
    weight_ptr,
    source_ptr,
    kappa_ptr,
    tau_ptr,
    seed_ptr,
    offset_ptr,
    grad_ptr,
    weight_grad_ptr,
    source_grad_ptr,
    A,
    G,
    FREE: tl.constexpr,
    SAMPLE: tl.constexpr,
    DENSE_GRAD: tl.constexpr,
    B: tl.constexpr,
    SUM: tl.constexpr,
):
    """Gradients of weights (G, 4), summed over agents, and of scores (A, G, 4) or logits (A, G, 6).

    With d_i = dout_i w_i, e_k = sum of d_i over pattern k and y = softmax(z / tau):
    dlogit_k = y_k (e_k - <y, e>) / tau; a score has kappa times the sum over the patterns that
    keep it.
    """
    group_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside_B = group_B < G
    kappa, seed, offset = tl.load(kappa_ptr), tl.load(seed_ptr), tl.load(offset_ptr)
    cold = 1.0 / tl.load(tau_ptr)
    w0_B, w1_B, w2_B, w3_B = load_fours(weight_ptr, group_B, inside_B, B, SUM)
    t0_B, t1_B = tl.zeros((B,), dtype=SUM), tl.zeros((B,), dtype=SUM)
    t2_B, t3_B = tl.zeros((B,), dtype=SUM), tl.zeros((B,), dtype=SUM)
    agent = 0
    while agent < A:
        pair_B = group_B + G.to(tl.int64) * agent
        z0_B, z1_B, z2_B, z3_B, z4_B, z5_B, index_B = _draw(
            source_ptr, seed, offset, kappa, pair_B, inside_B, FREE, SAMPLE, B, SUM
        )
        d0_B, d1_B, d2_B, d3_B = load_fours(grad_ptr, pair_B, inside_B, B, SUM)
        if DENSE_GRAD:
            t0_B, t1_B, t2_B, t3_B = t0_B + d0_B, t1_B + d1_B, t2_B + d2_B, t3_B + d3_B
        else:
            k0_B, k1_B, k2_B, k3_B = _keeps(index_B, SUM)
            t0_B, t1_B = t0_B + d0_B * k0_B, t1_B + d1_B * k1_B
            t2_B, t3_B = t2_B + d2_B * k2_B, t3_B + d3_B * k3_B

        most_B = tl.maximum(tl.maximum(z0_B, z1_B), tl.maximum(z2_B, z3_B))
        most_B = tl.maximum(most_B, tl.maximum(z4_B, z5_B))
        y0_B, y1_B = tl.exp((z0_B - most_B) * cold), tl.exp((z1_B - most_B) * cold)
        y2_B, y3_B = tl.exp((z2_B - most_B) * cold), tl.exp((z3_B - most_B) * cold)
        y4_B, y5_B = tl.exp((z4_B - most_B) * cold), tl.exp((z5_B - most_B) * cold)
        scale_B = 1.0 / (y0_B + y1_B + y2_B + y3_B + y4_B + y5_B)
        e0_B, e1_B, e2_B, e3_B, e4_B, e5_B = _sums(
            d0_B * w0_B, d1_B * w1_B, d2_B * w2_B, d3_B * w3_B
        )
        mean_B = y0_B * e0_B + y1_B * e1_B + y2_B * e2_B + y3_B * e3_B + y4_B * e4_B + y5_B * e5_B
        mean_B = mean_B * scale_B
        scale_B = scale_B * (kappa * cold)
        p0_B, p1_B = y0_B * scale_B * (e0_B - mean_B), y1_B * scale_B * (e1_B - mean_B)
        p2_B, p3_B = y2_B * scale_B * (e2_B - mean_B), y3_B * scale_B * (e3_B - mean_B)
        p4_B, p5_B = y4_B * scale_B * (e4_B - mean_B), y5_B * scale_B * (e5_B - mean_B)
        if FREE:
            number = source_grad_ptr.dtype.element_ty
            place_B = source_grad_ptr + pair_B * 6
            tl.store(place_B, p0_B.to(number), mask=inside_B)
            tl.store(place_B + 1, p1_B.to(number), mask=inside_B)
            tl.store(place_B + 2, p2_B.to(number), mask=inside_B)
            tl.store(place_B + 3, p3_B.to(number), mask=inside_B)
            tl.store(place_B + 4, p4_B.to(number), mask=inside_B)
            tl.store(place_B + 5, p5_B.to(number), mask=inside_B)
        else:
            s0_B, s1_B, s2_B, s3_B = _kept(p0_B, p1_B, p2_B, p3_B, p4_B, p5_B)
            store_fours(source_grad_ptr, pair_B, inside_B, s0_B, s1_B, s2_B, s3_B, B)
        agent += 1
    store_fours(weight_grad_ptr, group_B, inside_B, t0_B, t1_B, t2_B, t3_B, B)


def run_draw(
    weight: Tensor,
    source: Tensor,
    kappa: Tensor,
    seed: Tensor,
    offset: Tensor,
    out: Tensor,
    pattern: Tensor,
    free: bool,
    sample: bool,
) -> None:
    """Fills ``out`` (A, ..., K) and ``pattern`` (A, ..., K / 4); everything contiguous."""
    num_groups = weight.numel() // 4
    if out.numel() == 0:
        return
    draw_patterns[(triton.cdiv(num_groups, BLOCK_GROUPS),)](
        weight, source, kappa, seed, offset, out, pattern,
        pattern.numel() // num_groups, num_groups, FREE=free, SAMPLE=sample,
        B=BLOCK_GROUPS, SUM=number_types(weight.dtype)["SUM"], num_warps=4,
    )  # fmt: skip


def run_differentiate(
    grad: Tensor,
    weight: Tensor,
    source: Tensor,
    kappa: Tensor,
    tau: Tensor,
    seed: Tensor,
    offset: Tensor,
    free: bool,
    sample: bool,
    dense_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights and of the scores or logits; everything contiguous."""
    weight_grad, source_grad = weight.new_empty(weight.shape), source.new_empty(source.shape)
    num_groups = weight.numel() // 4
    if num_groups == 0:
        return weight_grad, source_grad
    differentiate_patterns[(triton.cdiv(num_groups, BLOCK_GROUPS),)](
        weight, source, kappa, tau, seed, offset, grad, weight_grad, source_grad,
        grad.numel() // weight.numel(), num_groups, FREE=free, SAMPLE=sample,
        DENSE_GRAD=dense_grad, B=BLOCK_GROUPS, SUM=number_types(weight.dtype)["SUM"], num_warps=4,
    )  # fmt: skip
    return weight_grad, source_grad
