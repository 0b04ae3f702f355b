"""How long the experts must take: arithmetic and traffic of each kernel, and of the function.

Every tensor is read or written once, at the rates of gpu_roofline.py; reads of the same row by
many pairs come from L2. Indices and weights, of a few bytes a pair, are left out of the kernels.
The tables of kernels/moe/README.md are these numbers.

Shapes: N tokens, E experts, C width, F hidden width of an expert, P active pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gpu_roofline import BYTES_PER_S, FLOPS_PER_S


class Sizes(NamedTuple):
    """pairs: active. live: experts with one, whose matrices are read. itemsize: of a number."""

    tokens: int
    width: int
    hidden: int
    experts: int
    pairs: int
    live: int
    itemsize: int = 2


class Work(NamedTuple):
    flops: float
    bytes: float

    @property
    def bound_us(self) -> float:
        return 1e6 * max(self.flops / FLOPS_PER_S, self.bytes / BYTES_PER_S)


def useful_flops(sizes: Sizes, backward: bool) -> int:
    """Of the active pairs' three products, and of the two adjoints of each."""
    return (18 if backward else 6) * sizes.width * sizes.hidden * sizes.pairs


def least_work(sizes: Sizes, backward: bool) -> Work:
    """Of the function: every argument read once, every result written once, nothing between.

    An idle expert's matrices are not read, but their gradients are written (zeros).
    """
    num_numbers = 2 * sizes.tokens * sizes.width + sizes.pairs
    matrices = 3 * sizes.width * sizes.hidden
    num_numbers += sizes.live * matrices
    if backward:  # dy too; dx, dweight and the matrices' gradients
        num_numbers += 2 * sizes.tokens * sizes.width + sizes.tokens * sizes.experts
        num_numbers += sizes.experts * matrices
    mask = sizes.tokens * sizes.experts
    return Work(useful_flops(sizes, backward), sizes.itemsize * num_numbers + mask)


def kernel_work(sizes: Sizes, saved: bool, backward: bool = True) -> dict[str, Work]:
    """Of our kernels, as they run one after the other.

    Args:
        saved: gate and up are kept for the backward pass; else computed again there.
    """
    N, C, F, P, item = sizes.tokens, sizes.width, sizes.hidden, sizes.pairs, sizes.itemsize
    matrix = C * F  # one third of an expert

    def work(products: int, *num_numbers: int) -> Work:
        """``products`` of a pair's row and one such matrix."""
        return Work(2 * products * P * matrix, item * sum(num_numbers))

    read, written = sizes.live * matrix, sizes.experts * matrix
    inner = 2 * P * F
    kernels = {
        "hidden_rows": work(2, N * C, 2 * read, P * F, inner if saved and backward else 0),
        "expert_product (down)": work(1, P * F, read, P * C),
        "sum_rows (y)": work(0, P * C, N * C),
    }
    if not backward:
        return kernels
    up = (inner,) if saved else (N * C, 2 * read)
    return kernels | {
        "hidden_gradient": work(1 if saved else 3, N * C, read, *up, inner, P * F),
        "matrix_gradient (down)": work(1, N * C, P * F, written),
        "matrix_gradient (gate_up)": work(2, inner, N * C, 2 * written),
        "expert_product (dx)": work(2, inner, 2 * read, P * C),
        "sum_rows (dx)": work(0, P * C, N * C),
    }


def total_us(work: Iterable[Work]) -> float:
    """Of kernels one after the other."""
    return sum(one.bound_us for one in work)
