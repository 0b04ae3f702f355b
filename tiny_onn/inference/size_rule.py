"""The output size that the demonstrations dictate, where they dictate one. Never the answer's.

Three rules, each of which counts only if every demonstration obeys it: the output has the input's
size; it always has the same size; each axis is a constant integer multiple or fraction of the
input's. When several rules hold they are tried in this order. A single demonstration cannot tell
a constant from a ratio: there only "the input's size" counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from tiny_onn.arc.task import MAX_SIDE, Grid, Pair, Task
from tiny_onn.arc.view import View, swaps_sides

Size = tuple[int, int]
"""Height and width."""


def output_sizes(task: Task) -> list[Size | None]:
    """For every test input the size its output must have, or None where no rule holds."""
    return [output_size(task.demos, grid) for grid in task.test_inputs]


def output_size(demos: Sequence[Pair], test_input: Grid) -> Size | None:
    """The size of the output of ``test_input`` by the first rule that all ``demos`` obey."""
    height, width = test_input.shape
    ins, outs = [d.input.shape for d in demos], [d.output.shape for d in demos]
    if demos and ins == outs:
        return height, width
    if len(demos) < 2:
        return None
    if len(set(outs)) == 1:
        return outs[0][0], outs[0][1]
    rows = _scaled(height, [i[0] for i in ins], [o[0] for o in outs])
    columns = _scaled(width, [i[1] for i in ins], [o[1] for o in outs])
    if rows is None or columns is None:
        return None
    return rows, columns


def _scaled(side: int, ins: Sequence[int], outs: Sequence[int]) -> int | None:
    """``side`` times the one ratio out/in, if that ratio or its inverse is an integer.

    None if the ratio varies or is no such number, or if the result is no integer from 1 to 30.
    """
    ratios = {Fraction(o, i) for i, o in zip(ins, outs, strict=True)}
    if len(ratios) != 1:
        return None
    ratio = ratios.pop()
    scaled = side * ratio
    simple = ratio.numerator == 1 or ratio.denominator == 1
    if not simple or scaled.denominator != 1 or not 1 <= scaled <= MAX_SIDE:
        return None
    return int(scaled)


def size_under(view: View, size: Size | None) -> Size | None:
    """``size`` as ``view`` shows it: half of the dihedral transforms swap height and width."""
    if size is None or not swaps_sides(view.dihedral):
        return size
    return size[1], size[0]
