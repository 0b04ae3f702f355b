"""Groups of four neighbours in Triton: read, written, and their two largest.

Shapes: G groups of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def take_apart(x_G4, G: tl.constexpr):
    """The four columns; a thread holds whole groups, so nothing moves between threads."""
    even_G2, odd_G2 = tl.split(tl.reshape(x_G4, (G, 2, 2)))
    x0_G, x2_G = tl.split(even_G2)
    x1_G, x3_G = tl.split(odd_G2)
    return x0_G, x1_G, x2_G, x3_G


@triton.jit
def put_together(x0_G, x1_G, x2_G, x3_G, G: tl.constexpr):
    """(G, 4), the inverse of :func:`take_apart`."""
    return tl.reshape(tl.join(tl.join(x0_G, x2_G), tl.join(x1_G, x3_G)), (G, 4))


@triton.jit
def load_fours(ptr, group_G, inside_G, G: tl.constexpr, SUM: tl.constexpr):
    """The four columns of groups, each four neighbours in memory; 0 outside."""
    place_G4 = group_G[:, None] * 4 + tl.arange(0, 4)[None, :]
    x_G4 = tl.load(ptr + place_G4, mask=inside_G[:, None], other=0.0)
    return take_apart(x_G4.to(SUM), G)


@triton.jit
def store_fours(ptr, group_G, inside_G, x0_G, x1_G, x2_G, x3_G, G: tl.constexpr):
    """What :func:`load_fours` reads, in the dtype of its place."""
    place_G4 = group_G[:, None] * 4 + tl.arange(0, 4)[None, :]
    x_G4 = put_together(x0_G, x1_G, x2_G, x3_G, G).to(ptr.dtype.element_ty)
    tl.store(ptr + place_G4, x_G4, mask=inside_G[:, None])


@triton.jit
def _beats(a_G, b_G):
    """1 where a, which stands before b, ranks before it: equals do, and NaN is below zero."""
    a_G = tl.where(a_G != a_G, -1.0, a_G)
    b_G = tl.where(b_G != b_G, -1.0, b_G)
    return (a_G >= b_G).to(tl.int32)


@triton.jit
def keep_two(a0_G, a1_G, a2_G, a3_G):
    """Which are among the two largest: four boolean columns, exactly two of each group true.

    Numbers are not negative; equals go to the lower position; NaN ranks below zero.
    """
    b01, b02, b03 = _beats(a0_G, a1_G), _beats(a0_G, a2_G), _beats(a0_G, a3_G)
    b12, b13, b23 = _beats(a1_G, a2_G), _beats(a1_G, a3_G), _beats(a2_G, a3_G)
    return (
        b01 + b02 + b03 >= 2,
        (1 - b01) + b12 + b13 >= 2,
        (1 - b02) + (1 - b12) + b23 >= 2,
        (1 - b03) + (1 - b13) + (1 - b23) >= 2,
    )
