"""ReLU^2, the two largest of every group, packing and bits in one pass; the gradient in another.

A program takes a block of bytes, each of eight features: a code's and a mask's. A thread has whole
bytes, so nothing moves between threads.

Shapes: T tokens, F features, B bytes of a program's block; columns without a letter are (B,).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_onn_kernels.kernel_groups import keep_two, put_together
from tiny_onn_kernels.kernel_numbers import number_types

BLOCK_BYTES = 128
"""1024 features: a byte a thread, whose features are 16 bytes in half precision. With more of them
layouts differ between loads of bytes and of features, and numbers move through shared memory."""


@triton.jit
def _places(T, F: tl.constexpr, B: tl.constexpr):
    """Of a block of bytes: number, whether it is there, how many features of its row, the first
    feature and the first packed value.

    Rows of whole bytes lie behind one another, so that the block is one run of memory.
    """
    byte_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    WIDTH: tl.constexpr = (F + 7) // 8
    is_there_B = byte_B < T.to(tl.int64) * WIDTH
    if F % 8 == 0:
        return byte_B, is_there_B, tl.full((B,), 8, tl.int32), byte_B * 8, byte_B * 4
    row_B = byte_B // WIDTH
    column_B = byte_B - row_B * WIDTH
    count_B = tl.minimum(F - column_B * 8, 8).to(tl.int32)
    return byte_B, is_there_B, count_B, row_B * F + column_B * 8, row_B * (F // 2) + column_B * 4


@triton.jit
def _load_bytes(ptr, first_B, is_there_B, count_B, B: tl.constexpr, SUM: tl.constexpr):
    """The columns of a byte's eight features, first those of its even group; 0 outside."""
    step_8 = tl.arange(0, 8)
    inside_B8 = is_there_B[:, None] & (step_8[None, :] < count_B[:, None])
    x_B8 = tl.load(ptr + first_B[:, None] + step_8[None, :], mask=inside_B8, other=0.0).to(SUM)
    even_B22, odd_B22 = tl.split(tl.reshape(x_B8, (B, 2, 2, 2)))
    x04_B2, x26_B2 = tl.split(even_B22)
    x15_B2, x37_B2 = tl.split(odd_B22)
    x0_B, x4_B = tl.split(x04_B2)
    x1_B, x5_B = tl.split(x15_B2)
    x2_B, x6_B = tl.split(x26_B2)
    x3_B, x7_B = tl.split(x37_B2)
    return x0_B, x1_B, x2_B, x3_B, x4_B, x5_B, x6_B, x7_B


@triton.jit
def _store_bytes(
    ptr, first_B, is_there_B, count_B, x0, x1, x2, x3, x4, x5, x6, x7, B: tl.constexpr
):
    """What :func:`_load_bytes` reads, in the dtype of its place."""
    step_8 = tl.arange(0, 8)
    inside_B8 = is_there_B[:, None] & (step_8[None, :] < count_B[:, None])
    even_B22 = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd_B22 = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    x_B8 = tl.reshape(tl.join(even_B22, odd_B22), (B, 8)).to(ptr.dtype.element_ty)
    tl.store(ptr + first_B[:, None] + step_8[None, :], x_B8, mask=inside_B8)


@triton.jit
def _store_values(ptr, value_B, is_there_B, count_B, v0, v1, v2, v3, B: tl.constexpr):
    """The values of a byte's two groups, half as many as features."""
    step_4 = tl.arange(0, 4)
    inside_B4 = is_there_B[:, None] & (step_4[None, :] < (count_B // 2)[:, None])
    values_B4 = put_together(v0, v1, v2, v3, B).to(ptr.dtype.element_ty)
    tl.store(ptr + value_B[:, None] + step_4[None, :], values_B4, mask=inside_B4)


@triton.jit
def _relu(x):
    return tl.where(x <= 0.0, 0.0, x)  # NaN stays


@triton.jit
def _square(x, number: tl.constexpr, SUM: tl.constexpr):
    """Of ReLU, as ``number`` has it."""
    r = _relu(x)
    return (r * r).to(number).to(SUM)


@triton.jit
def _group(x0, x1, x2, x3, number: tl.constexpr, SUM: tl.constexpr):
    """Squares with zeros where they are dropped, and the four bits."""
    k0, k1, k2, k3 = keep_two(_relu(x0), _relu(x1), _relu(x2), _relu(x3))
    y0, y1 = _square(x0, number, SUM), _square(x1, number, SUM)
    y2, y3 = _square(x2, number, SUM), _square(x3, number, SUM)
    k0, k1, k2, k3 = k0 & (y0 != 0.0), k1 & (y1 != 0.0), k2 & (y2 != 0.0), k3 & (y3 != 0.0)
    low = k0.to(tl.int32) | (k1.to(tl.int32) << 1)
    bits = low | (k2.to(tl.int32) << 2) | (k3.to(tl.int32) << 3)
    y0, y1 = tl.where(k0, y0, 0.0), tl.where(k1, y1, 0.0)
    return y0, y1, tl.where(k2, y2, 0.0), tl.where(k3, y3, 0.0), bits


@triton.jit
def _pick(bits, v0, v1, v2, v3):
    """A group's two values and the code of where they stand, as torch's conversion has it."""
    first = tl.where((bits & 1) != 0, 0, tl.where((bits & 2) != 0, 1, 2))
    second = tl.where(((bits & 8) != 0) | (first == 2), 3, 2)
    second = tl.where((bits & 3) == 3, 1, second)
    a = tl.where(first == 0, v0, tl.where(first == 1, v1, v2))
    b = tl.where(second == 1, v1, tl.where(second == 2, v2, v3))
    return a, b, first | (second << 2)


@triton.jit
def _is_wild(x0, x1, x2, x3):
    """Whether one is infinite or no number."""
    inf = float("inf")
    tame = (tl.abs(x0) < inf) & (tl.abs(x1) < inf) & (tl.abs(x2) < inf) & (tl.abs(x3) < inf)
    return tame == 0


@triton.jit
def _overflows(x0, x1, x2, x3, y0, y1, y2, y3):
    """Whether a square that is kept is infinite, but not what was squared."""
    inf = float("inf")
    low = ((y0 == inf) & (x0 < inf)) | ((y1 == inf) & (x1 < inf))
    return low | ((y2 == inf) & (x2 < inf)) | ((y3 == inf) & (x3 < inf))


@triton.jit
def _raise_flag(ptr, is_raised_B):
    """Several threads may store the same 1; where none is raised, nothing is stored."""
    one_B = is_raised_B.to(tl.int32)
    tl.store(ptr + one_B * 0, one_B, mask=is_raised_B)


@triton.jit(do_not_specialize=["T"])
def square_and_pack(
    x_ptr,
    dense_ptr,
    values_ptr,
    codes_ptr,
    bits_ptr,
    flags_ptr,
    T,
    F: tl.constexpr,
    PACK: tl.constexpr,
    B: tl.constexpr,
    SUM: tl.constexpr,
):
    """bits (T, ceil(F / 8)), flags (2,), and values and codes, or with PACK off dense (T, F)."""
    number: tl.constexpr = x_ptr.dtype.element_ty
    byte_B, is_there_B, count_B, first_B, value_B = _places(T, F, B)
    x0, x1, x2, x3, x4, x5, x6, x7 = _load_bytes(x_ptr, first_B, is_there_B, count_B, B, SUM)
    y0, y1, y2, y3, even_B = _group(x0, x1, x2, x3, number, SUM)
    y4, y5, y6, y7, odd_B = _group(x4, x5, x6, x7, number, SUM)
    tl.store(bits_ptr + byte_B, (even_B | (odd_B << 4)).to(tl.uint8), mask=is_there_B)
    if PACK:
        a_B, b_B, even_B = _pick(even_B, y0, y1, y2, y3)
        c_B, d_B, odd_B = _pick(odd_B, y4, y5, y6, y7)
        odd_B = tl.where(count_B == 8, odd_B, 0)
        tl.store(codes_ptr + byte_B, (even_B | (odd_B << 4)).to(tl.uint8), mask=is_there_B)
        _store_values(values_ptr, value_B, is_there_B, count_B, a_B, b_B, c_B, d_B, B)
    else:
        _store_bytes(dense_ptr, first_B, is_there_B, count_B, y0, y1, y2, y3, y4, y5, y6, y7, B)
    wild_B = _is_wild(x0, x1, x2, x3) | _is_wild(x4, x5, x6, x7)
    over_B = _overflows(x0, x1, x2, x3, y0, y1, y2, y3)
    over_B = over_B | _overflows(x4, x5, x6, x7, y4, y5, y6, y7)
    _raise_flag(flags_ptr, over_B)
    _raise_flag(flags_ptr + 1, wild_B)


@triton.jit
def _slope(bits, g0, g1, g2, g3, x0, x1, x2, x3):
    """2 dy ReLU(x) where a bit is set, else 0."""
    d0 = tl.where((bits & 1) != 0, 2.0 * g0 * _relu(x0), 0.0)
    d1 = tl.where((bits & 2) != 0, 2.0 * g1 * _relu(x1), 0.0)
    d2 = tl.where((bits & 4) != 0, 2.0 * g2 * _relu(x2), 0.0)
    d3 = tl.where((bits & 8) != 0, 2.0 * g3 * _relu(x3), 0.0)
    return d0, d1, d2, d3


@triton.jit(do_not_specialize=["T"])
def differentiate_kept(
    grad_ptr,
    x_ptr,
    bits_ptr,
    dx_ptr,
    values_ptr,
    T,
    F: tl.constexpr,
    PACK: tl.constexpr,
    B: tl.constexpr,
    SUM: tl.constexpr,
):
    """dx (T, F) = 2 dy ReLU(x) where a bit is set, else 0; with PACK its values (T, F / 2) too."""
    byte_B, is_there_B, count_B, first_B, value_B = _places(T, F, B)
    x0, x1, x2, x3, x4, x5, x6, x7 = _load_bytes(x_ptr, first_B, is_there_B, count_B, B, SUM)
    g0, g1, g2, g3, g4, g5, g6, g7 = _load_bytes(grad_ptr, first_B, is_there_B, count_B, B, SUM)
    bits_B = tl.load(bits_ptr + byte_B, mask=is_there_B, other=0).to(tl.int32)
    even_B, odd_B = bits_B & 15, bits_B >> 4
    d0, d1, d2, d3 = _slope(even_B, g0, g1, g2, g3, x0, x1, x2, x3)
    d4, d5, d6, d7 = _slope(odd_B, g4, g5, g6, g7, x4, x5, x6, x7)
    _store_bytes(dx_ptr, first_B, is_there_B, count_B, d0, d1, d2, d3, d4, d5, d6, d7, B)
    if PACK:
        a_B, b_B, _ = _pick(even_B, d0, d1, d2, d3)
        c_B, d_B, _ = _pick(odd_B, d4, d5, d6, d7)
        _store_values(values_ptr, value_B, is_there_B, count_B, a_B, b_B, c_B, d_B, B)


def run_square(x_TF: Tensor, pack: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dense, values, codes, bits and flags of contiguous activations; without ``pack`` values and
    codes have no columns, with it dense has none."""
    num_tokens, width = x_TF.shape
    num_bytes = triton.cdiv(width, 8)
    dense_TF = x_TF.new_empty(num_tokens, 0 if pack else width)
    values_TV = x_TF.new_empty(num_tokens, width // 2 if pack else 0)
    codes_TB = x_TF.new_empty((num_tokens, num_bytes if pack else 0), dtype=torch.uint8)
    bits_TB = x_TF.new_empty((num_tokens, num_bytes), dtype=torch.uint8)
    flags = x_TF.new_zeros(2, dtype=torch.int32)
    if x_TF.numel() > 0:
        square_and_pack[(triton.cdiv(num_tokens * num_bytes, BLOCK_BYTES),)](
            x_TF, dense_TF, values_TV, codes_TB, bits_TB, flags, num_tokens, F=width,
            PACK=pack, B=BLOCK_BYTES, SUM=number_types(x_TF.dtype)["SUM"], num_warps=4,
        )  # fmt: skip
    return dense_TF, values_TV, codes_TB, bits_TB, flags


def run_differentiate(
    grad_TF: Tensor, x_TF: Tensor, bits_TB: Tensor, pack: bool
) -> tuple[Tensor, Tensor]:
    """dx and, with ``pack``, its values; everything contiguous."""
    num_tokens, width = x_TF.shape
    dx_TF = x_TF.new_empty(x_TF.shape)
    values_TV = x_TF.new_empty(num_tokens, width // 2 if pack else 0)
    if x_TF.numel() > 0:
        differentiate_kept[(triton.cdiv(num_tokens * bits_TB.shape[1], BLOCK_BYTES),)](
            grad_TF, x_TF, bits_TB, dx_TF, values_TV, num_tokens, F=width,
            PACK=pack, B=BLOCK_BYTES, SUM=number_types(x_TF.dtype)["SUM"], num_warps=4,
        )  # fmt: skip
    return dx_TF, values_TV
