"""DeepEmbed keys: which row of its table each token takes. Exact, without hashing.

``token``: the token itself. ``ngram``: the token and the n - 1 before it. ``patch``: the cells
around a cell with colours renamed by first occurrence, so that a permutation of the colours
changes no key. (``task`` is the row of the document's task and needs no class here.)

What a key may look at: the tokens so far and their positions, never a later token. The one
exception is ``patch=prefix``: a token of the prefix, which prefix-LM attention sees whole anyway
and which carries no loss, is keyed by all nine cells around it; a token after the prefix still by
the causal five. The default ``patch=causal`` uses the causal five everywhere.

Shapes: N tokens asked about (of a packed batch, or one a document in a decoding step), K cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor, nn

from tiny_onn.model.token_context import NOTHING, NUM_COLORS, Context

Offset = tuple[int, int]
"""(dx, dy) of a cell around another."""

CAUSAL_CELLS: tuple[Offset, ...] = ((-1, -1), (0, -1), (1, -1), (-1, 0), (0, 0))
ALL_CELLS: tuple[Offset, ...] = tuple((dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1))


class TokenKey(nn.Module):
    """The token: one row each."""

    always = True
    """Every token has a row."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.num_rows = vocab_size

    def forward(self, context: Context) -> Tensor:
        """int64 (N,) rows."""
        return context.tokens


class NgramKey(nn.Module):
    """The last ``size`` tokens of the document, the token included.

    Row t_0 + V * sum_k (t_k + 1) (V + 1)^(k-1), where t_k stood k tokens earlier and is -1 before
    the document: V (V + 1)^(size - 1) rows, one for every n-gram and every shorter beginning.
    """

    always = True

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.vocab_size, self.size = vocab_size, size
        self.num_rows = vocab_size * (vocab_size + 1) ** (size - 1)

    def forward(self, context: Context) -> Tensor:
        """int64 (N,) rows."""
        row_N, weight = context.tokens, self.vocab_size
        for steps in range(1, self.size):
            row_N = row_N + weight * (context.previous(steps) + 1)
            weight *= self.vocab_size + 1
        return row_N


class PatchKey(nn.Module):
    """The cells around a cell, colour-canonical: one row for every pattern a grid can show.

    The causal cells {NW, N, NE, W, self} have 77 patterns (52 away from the border), which are
    the first rows. With ``prefix`` the 22,038 patterns of all nine cells follow (21,147 = Bell(9)
    away from the border), for the tokens that the context calls ``whole``. Tokens that are no
    cells have no row.
    """

    always = False

    def __init__(self, prefix: bool) -> None:
        super().__init__()
        self.prefix = prefix
        causal = torch.tensor(pattern_codes(CAUSAL_CELLS))
        whole = torch.tensor(pattern_codes(ALL_CELLS) if prefix else (), dtype=torch.int64)
        self.num_rows = len(causal) + len(whole)
        self.register_buffer("causal_codes", causal, persistent=False)
        self.register_buffer("whole_codes", whole, persistent=False)

    def forward(self, context: Context) -> Tensor:
        """int64 (N,) rows, NOTHING for tokens without one."""
        row_N = _row(context, CAUSAL_CELLS, self.causal_codes)
        if self.prefix and context.whole is not None:
            whole_N = _row(context, ALL_CELLS, self.whole_codes)
            whole_N = torch.where(whole_N >= 0, whole_N + len(self.causal_codes), NOTHING)
            row_N = torch.where(context.whole, whole_N, row_N)
        return torch.where(context.tokens < NUM_COLORS, row_N, NOTHING)


def _row(context: Context, cells: Sequence[Offset], codes: Tensor) -> Tensor:
    """Number of each token's pattern among ``codes``; NOTHING for one that no grid shows (an
    output written without the grammar may be ragged)."""
    code_N = canonical_codes([context.neighbour(dx, dy) for dx, dy in cells])
    row_N = torch.searchsorted(codes, code_N).clamp(max=len(codes) - 1)
    return torch.where(codes[row_N] == code_N, row_N, NOTHING)


def canonical_codes(colors_KN: Sequence[Tensor]) -> Tensor:
    """int64 (N,): colours renamed 1, 2, ... by first occurrence, NOTHING 0, read as decimals."""
    count_N = code_N = torch.zeros_like(colors_KN[0])
    labels_KN: list[Tensor] = []
    for k, color_N in enumerate(colors_KN):
        label_N = torch.zeros_like(color_N)
        for earlier_N, earlier_label_N in zip(colors_KN[:k], labels_KN, strict=True):
            label_N = torch.where(earlier_N == color_N, earlier_label_N, label_N)
        new_N = (label_N == 0) & (color_N != NOTHING)
        count_N = count_N + new_N
        label_N = torch.where(new_N, count_N, label_N)
        labels_KN.append(label_N)
        code_N = code_N * 10 + label_N
    return code_N


@lru_cache
def pattern_codes(cells: tuple[Offset, ...]) -> tuple[int, ...]:
    """Every value of :func:`canonical_codes` that these cells of a grid can show, ascending.

    A border hides the cells beyond it: 16 configurations, some of them alike. Under each, the
    visible cells show every partition into equal colours (restricted growth strings).
    """
    found: set[int] = set()
    for west, north, east, south in product((False, True), repeat=4):
        partial = [(0, 0)]  # code so far, colours so far
        for dx, dy in cells:
            inside = (dx >= 0 or west) and (dx <= 0 or east) and (dy >= 0 or north)
            inside = inside and (dy <= 0 or south)
            partial = [
                (code * 10 + label, max(colors, label))
                for code, colors in partial
                for label in (range(1, colors + 2) if inside else (0,))
            ]
        found.update(code for code, _ in partial)
    return tuple(sorted(found))
