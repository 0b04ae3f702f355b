"""The two products of the experts, over tiles of pairs.

hidden_rows: gather the tokens' rows, both halves of the up-projection, SwiGLU and the pair's weight
in its epilogue. expert_product: rows times their own expert's matrix; the down-projection here, and
in the backward pass the gradient of the gathered rows.

Every program takes every so-manieth tile. The tiles of one block of rows stand next to each other,
so that programs that run together read the same rows, and the same expert's matrices, from L2.

Shapes: N tokens, E experts, C width, F hidden width of an expert, H = 2 F, P rows of pairs; K and J
are the columns that go into and come out of a product.
"""

import triton
import triton.language as tl
from torch import Tensor

from tiny_onn_kernels.kernel_numbers import number_types
from tiny_onn_kernels.moe.kernel_launch import block_rows, num_programs, tiling
from tiny_onn_kernels.moe.kernel_pairs import PairLayout


@triton.jit
def find_rows(tile, begin_ptr, tile_ptr, BLOCK_P: tl.constexpr):
    """Expert of a tile, its rows, and which of them are the expert's own."""
    expert = tl.load(tile_ptr + 2 * tile)
    row_P = tl.load(tile_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_P)
    inside_P = row_P < tl.load(begin_ptr + expert + 1)
    return expert.to(tl.int64), row_P.to(tl.int64), inside_P


@triton.jit
def gate_and_up(
    x_ptr,
    gate_up_ptr,
    token_P,
    inside_P,
    expert,
    column_F,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both halves of the up-projection for a block of rows and of hidden columns."""
    gate_PF = tl.zeros((BLOCK_P, BLOCK_F), dtype=SUM)
    up_PF = tl.zeros((BLOCK_P, BLOCK_F), dtype=SUM)
    x_row_P = x_ptr + token_P * C
    matrix_F = gate_up_ptr + (expert * 2 * F + column_F) * C
    inside_F = column_F < F
    for start in range(0, C, BLOCK_C):
        inner_C = start + tl.arange(0, BLOCK_C)
        inside_C = inner_C < C
        inside_PC = inside_P[:, None] & inside_C[None, :]
        inside_CF = inside_C[:, None] & inside_F[None, :]
        place_CF = matrix_F[None, :] + inner_C[:, None]
        x_PC = tl.load(x_row_P[:, None] + inner_C[None, :], mask=inside_PC, other=0.0).to(DOT)
        gate_CF = tl.load(place_CF, mask=inside_CF, other=0.0).to(DOT)
        up_CF = tl.load(place_CF + F * C, mask=inside_CF, other=0.0).to(DOT)
        gate_PF = tl.dot(x_PC, gate_CF, gate_PF, input_precision=PRECISION, out_dtype=SUM)
        up_PF = tl.dot(x_PC, up_CF, up_PF, input_precision=PRECISION, out_dtype=SUM)
    return gate_PF, up_PF


@triton.jit
def hidden_rows(
    x_ptr,
    weight_ptr,
    gate_up_ptr,
    hidden_ptr,
    inner_ptr,
    token_ptr,
    begin_ptr,
    tile_ptr,
    tiles_ptr,
    E: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    SAVE: tl.constexpr,
):
    """hidden (P, F) = weight silu(gate) up, and if SAVE inner (P, H) = [gate, up]."""
    columns: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    work = tl.program_id(0)
    end = tl.load(tiles_ptr) * columns
    while work < end:
        expert, row_P, inside_P = find_rows(work // columns, begin_ptr, tile_ptr, BLOCK_P)
        token_P = tl.load(token_ptr + row_P, mask=inside_P, other=0).to(tl.int64)
        column_F = (work % columns) * BLOCK_F + tl.arange(0, BLOCK_F)
        gate_PF, up_PF = gate_and_up(
            x_ptr, gate_up_ptr, token_P, inside_P, expert, column_F,
            C, F, BLOCK_P, BLOCK_F, BLOCK_C, DOT, SUM, PRECISION,
        )  # fmt: skip
        weight_P = tl.load(weight_ptr + token_P * E + expert, mask=inside_P, other=0.0).to(SUM)
        hidden_PF = gate_PF * tl.sigmoid(gate_PF) * up_PF * weight_P[:, None]
        inside_PF = inside_P[:, None] & (column_F < F)[None, :]
        number = hidden_ptr.dtype.element_ty
        place_PF = row_P[:, None] * F + column_F[None, :]
        tl.store(hidden_ptr + place_PF, hidden_PF.to(number), mask=inside_PF)
        if SAVE:
            place_PH = inner_ptr + row_P[:, None] * (2 * F) + column_F[None, :]
            tl.store(place_PH, gate_PF.to(number), mask=inside_PF)
            tl.store(place_PH + F, up_PF.to(number), mask=inside_PF)
        work += tl.num_programs(0)


@triton.jit
def expert_product(
    rows_ptr,
    matrix_ptr,
    out_ptr,
    begin_ptr,
    tile_ptr,
    tiles_ptr,
    K: tl.constexpr,
    J: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (P, J) = rows (P, K) times the expert's matrix (K, J), which lies in memory as STRIDE_K
    and STRIDE_J say."""
    columns: tl.constexpr = (J + BLOCK_J - 1) // BLOCK_J
    work = tl.program_id(0)
    end = tl.load(tiles_ptr) * columns
    while work < end:
        expert, row_P, inside_P = find_rows(work // columns, begin_ptr, tile_ptr, BLOCK_P)
        column_J = (work % columns) * BLOCK_J + tl.arange(0, BLOCK_J)
        inside_J = column_J < J
        matrix_J = matrix_ptr + expert * K * J + column_J * STRIDE_J
        out_PJ = tl.zeros((BLOCK_P, BLOCK_J), dtype=SUM)
        for start in range(0, K, BLOCK_K):
            inner_K = start + tl.arange(0, BLOCK_K)
            inside_K = inner_K < K
            inside_PK = inside_P[:, None] & inside_K[None, :]
            inside_KJ = inside_K[:, None] & inside_J[None, :]
            place_PK = rows_ptr + row_P[:, None] * K + inner_K[None, :]
            place_KJ = matrix_J[None, :] + inner_K[:, None] * STRIDE_K
            rows_PK = tl.load(place_PK, mask=inside_PK, other=0.0).to(DOT)
            matrix_KJ = tl.load(place_KJ, mask=inside_KJ, other=0.0).to(DOT)
            out_PJ = tl.dot(rows_PK, matrix_KJ, out_PJ, input_precision=PRECISION, out_dtype=SUM)
        place_PJ = out_ptr + row_P[:, None] * J + column_J[None, :]
        inside_PJ = inside_P[:, None] & inside_J[None, :]
        tl.store(place_PJ, out_PJ.to(out_ptr.dtype.element_ty), mask=inside_PJ)
        work += tl.num_programs(0)


def most_work(layout: PairLayout, rows: int, columns: int) -> int:
    """Tiles that there can be at most, times the blocks of columns of each."""
    num_tokens, num_experts = len(layout.begin_N) - 1, len(layout.begin_E) - 1
    return num_experts * triton.cdiv(num_tokens, rows) * columns


def compute_hidden(
    x_NC: Tensor, weight_NE: Tensor, gate_up_EHC: Tensor, layout: PairLayout, save: bool
) -> tuple[Tensor, Tensor]:
    """hidden_PF, weighted, and the two halves before the activation (P, H), or nothing (0, H)."""
    num_experts, twice, width = gate_up_EHC.shape
    rows, num_rows = block_rows(len(x_NC)), len(layout.token_P)
    tile = tiling(rows, twice // 2, width, x_NC.dtype, accumulators=2)
    hidden_PF = x_NC.new_empty(num_rows, twice // 2)
    inner_PH = x_NC.new_empty(num_rows if save else 0, twice)
    work = most_work(layout, rows, triton.cdiv(twice // 2, tile.columns))
    hidden_rows[(num_programs(work, x_NC.device),)](
        x_NC, weight_NE, gate_up_EHC, hidden_PF, inner_PH,
        layout.token_P, layout.begin_E, layout.tile_T2, layout.tiles_1,
        E=num_experts, C=width, F=twice // 2, SAVE=save,
        BLOCK_P=rows, BLOCK_F=tile.columns, BLOCK_C=tile.inner,
        **number_types(x_NC.dtype), **tile.options,
    )  # fmt: skip
    return hidden_PF, inner_PH


def multiply_rows(rows_PK: Tensor, matrix_EKJ: Tensor, layout: PairLayout) -> Tensor:
    """(P, J): every row times its expert's (K, J) matrix: a contiguous stack or its transpose."""
    _, num_inner, num_columns = matrix_EKJ.shape
    num_tokens = len(layout.begin_N) - 1
    rows = block_rows(num_tokens)
    tile = tiling(rows, num_columns, num_inner, rows_PK.dtype)
    out_PJ = rows_PK.new_empty(len(rows_PK), num_columns)
    work = most_work(layout, rows, triton.cdiv(num_columns, tile.columns))
    expert_product[(num_programs(work, rows_PK.device),)](
        rows_PK, matrix_EKJ, out_PJ, layout.begin_E, layout.tile_T2, layout.tiles_1,
        K=num_inner, J=num_columns,
        STRIDE_K=matrix_EKJ.stride(1), STRIDE_J=matrix_EKJ.stride(2),
        BLOCK_P=rows, BLOCK_J=tile.columns, BLOCK_K=tile.inner,
        **number_types(rows_PK.dtype), **tile.options,
    )  # fmt: skip
    return out_PJ


def run_forward(
    x_NC: Tensor,
    weight_NE: Tensor,
    gate_up_EHC: Tensor,
    down_ECF: Tensor,
    layout: PairLayout,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Every pair's output (P, C), and inner_PH of :func:`compute_hidden`. All contiguous."""
    hidden_PF, inner_PH = compute_hidden(x_NC, weight_NE, gate_up_EHC, layout, save)
    return multiply_rows(hidden_PF, down_ECF.mT, layout), inner_PH
