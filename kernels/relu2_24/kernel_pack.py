"""ReLU^2, the two largest of every group, packing and bits in one pass; the gradient in another.

A program takes a block of bytes, each of eight features: a code's and a mask's. Rows whose width
is a multiple of 8 lie behind one another, so that the block is one run of memory.

Shapes: T tokens, F features, B bytes of a program's block, G = 2 B groups in it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_onn_kernels.kernel_groups import keep_two, load_fours, store_fours
from tiny_onn_kernels.kernel_numbers import number_types

BLOCK_BYTES = 256
"""2048 features: four groups a thread."""


@triton.jit
def _places(T, F: tl.constexpr, B: tl.constexpr):
    """Of a block: byte and whether it is there; first feature of each group and whether it is."""
    byte_B = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    group_G = tl.program_id(0).to(tl.int64) * (2 * B) + tl.arange(0, 2 * B)
    WIDTH: tl.constexpr = (F + 7) // 8
    has_byte_B = byte_B < T.to(tl.int64) * WIDTH
    has_group_G = group_G < T.to(tl.int64) * (2 * WIDTH)
    if F % 8 != 0:  # the last byte of a row has one group
        row_G = group_G // (2 * WIDTH)
        column_G = group_G - row_G * (2 * WIDTH)
        has_group_G = has_group_G & (column_G < F // 4)
        group_G = row_G * (F // 4) + column_G
    return byte_B, has_byte_B, group_G, has_group_G


@triton.jit
def _overflows(x_G, y_G):
    """Whether the square of a finite number is not."""
    return (y_G == float("inf")) & (x_G < float("inf"))


@triton.jit
def _is_wild(x_G):
    """Whether it is infinite or no number."""
    return (tl.abs(x_G) < float("inf")) == 0


@triton.jit
def _relu(x):
    return tl.where(x <= 0.0, 0.0, x)  # NaN stays


@triton.jit
def _in_bytes(half_G, B: tl.constexpr):
    """Four bits of each group, the even group in the low half."""
    low_B, high_B = tl.split(tl.reshape(half_G, (B, 2)))
    return (low_B | (high_B << 4)).to(tl.uint8)


@triton.jit
def _positions(k0_G, k1_G, k3_G):
    """Of the first and the second value of a group, as torch's conversion has them."""
    first_G = tl.where(k0_G, 0, tl.where(k1_G, 1, 2))
    second_G = tl.where(k3_G | (first_G == 2), 3, 2)
    return first_G, tl.where(k0_G & k1_G, 1, second_G)


@triton.jit
def _store_values(ptr, group_G, has_group_G, first_G, second_G, v0_G, v1_G, v2_G, v3_G):
    """The two values of each group."""
    a_G = tl.where(first_G == 0, v0_G, tl.where(first_G == 1, v1_G, v2_G))
    b_G = tl.where(second_G == 1, v1_G, tl.where(second_G == 2, v2_G, v3_G))
    place_G2 = group_G[:, None] * 2 + tl.arange(0, 2)[None, :]
    values_G2 = tl.join(a_G, b_G).to(ptr.dtype.element_ty)
    tl.store(ptr + place_G2, values_G2, mask=has_group_G[:, None])


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
    G: tl.constexpr = 2 * B
    number = x_ptr.dtype.element_ty
    byte_B, has_byte_B, group_G, has_group_G = _places(T, F, B)
    x0_G, x1_G, x2_G, x3_G = load_fours(x_ptr, group_G, has_group_G, G, SUM)
    r0_G, r1_G, r2_G, r3_G = _relu(x0_G), _relu(x1_G), _relu(x2_G), _relu(x3_G)
    k0_G, k1_G, k2_G, k3_G = keep_two(r0_G, r1_G, r2_G, r3_G)
    y0_G, y1_G = (r0_G * r0_G).to(number).to(SUM), (r1_G * r1_G).to(number).to(SUM)
    y2_G, y3_G = (r2_G * r2_G).to(number).to(SUM), (r3_G * r3_G).to(number).to(SUM)
    k0_G, k1_G = k0_G & (y0_G != 0.0), k1_G & (y1_G != 0.0)
    k2_G, k3_G = k2_G & (y2_G != 0.0), k3_G & (y3_G != 0.0)

    overflows_G = (_overflows(x0_G, y0_G) | _overflows(x1_G, y1_G)) | (
        _overflows(x2_G, y2_G) | _overflows(x3_G, y3_G)
    )
    wild_G = (_is_wild(x0_G) | _is_wild(x1_G)) | (_is_wild(x2_G) | _is_wild(x3_G))
    tl.store(flags_ptr, 1, mask=tl.max(overflows_G.to(tl.int32), axis=0) > 0)
    tl.store(flags_ptr + 1, 1, mask=tl.max(wild_G.to(tl.int32), axis=0) > 0)

    bits_G = k0_G.to(tl.int32) | (k1_G.to(tl.int32) << 1)
    bits_G = bits_G | (k2_G.to(tl.int32) << 2) | (k3_G.to(tl.int32) << 3)
    tl.store(bits_ptr + byte_B, _in_bytes(bits_G, B), mask=has_byte_B)
    y0_G, y1_G = tl.where(k0_G, y0_G, 0.0), tl.where(k1_G, y1_G, 0.0)
    y2_G, y3_G = tl.where(k2_G, y2_G, 0.0), tl.where(k3_G, y3_G, 0.0)
    if PACK:
        first_G, second_G = _positions(k0_G, k1_G, k3_G)
        code_G = tl.where(has_group_G, first_G | (second_G << 2), 0)
        tl.store(codes_ptr + byte_B, _in_bytes(code_G, B), mask=has_byte_B)
        _store_values(values_ptr, group_G, has_group_G, first_G, second_G, y0_G, y1_G, y2_G, y3_G)
    else:
        store_fours(dense_ptr, group_G, has_group_G, y0_G, y1_G, y2_G, y3_G, G)


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
    G: tl.constexpr = 2 * B
    byte_B, has_byte_B, group_G, has_group_G = _places(T, F, B)
    x0_G, x1_G, x2_G, x3_G = load_fours(x_ptr, group_G, has_group_G, G, SUM)
    g0_G, g1_G, g2_G, g3_G = load_fours(grad_ptr, group_G, has_group_G, G, SUM)
    bits_B = tl.load(bits_ptr + byte_B, mask=has_byte_B, other=0).to(tl.int32)
    bits_G = tl.reshape(tl.join(bits_B & 15, bits_B >> 4), (G,))
    k0_G, k1_G = (bits_G & 1) != 0, (bits_G & 2) != 0
    k2_G, k3_G = (bits_G & 4) != 0, (bits_G & 8) != 0
    d0_G = tl.where(k0_G, 2.0 * g0_G * _relu(x0_G), 0.0)
    d1_G = tl.where(k1_G, 2.0 * g1_G * _relu(x1_G), 0.0)
    d2_G = tl.where(k2_G, 2.0 * g2_G * _relu(x2_G), 0.0)
    d3_G = tl.where(k3_G, 2.0 * g3_G * _relu(x3_G), 0.0)
    store_fours(dx_ptr, group_G, has_group_G, d0_G, d1_G, d2_G, d3_G, G)
    if PACK:
        first_G, second_G = _positions(k0_G, k1_G, k3_G)
        _store_values(values_ptr, group_G, has_group_G, first_G, second_G, d0_G, d1_G, d2_G, d3_G)


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
