"""What stands before and beside each token: of a whole packed batch, or of a decoding step.

Both answer the same two questions from tokens and positions alone: which token came ``steps``
earlier in the document, and which colour stands at a place of the same grid. Every START, SEP and
END begins a new grid, and so does a document; within a grid, tokens come row by row (x, then y).

A token's *code* is its grid's number, its row and its column in one integer. Codes ascend along a
document, so a neighbour is found by binary search, whatever the grid's width.

Shapes: N packed tokens, B documents, T tokens of room of a decoding cache.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

NUM_COLORS, NEWLINE = 10, 11
"""The tokens' own constants (the model imports no data; a test holds them together)."""

ROW_BITS, GRID_BITS = 10, 20
"""A code is grid << 20 | y << 10 | x + 1: even an output written without the grammar (at most
931 tokens, so x and y below 1023) has no neighbour outside its own grid."""

NOTHING = -1
"""No such token: before the document, outside the grid, or no colour."""


def begins_grid(tokens: Tensor) -> Tensor:
    """bool: START, SEP and END, of any shape."""
    return (tokens >= NUM_COLORS) & (tokens != NEWLINE)


def place_codes(tokens: Tensor, positions: Tensor, grid: Tensor) -> Tensor:
    """int64 codes of tokens (...,) at positions (..., 3) in grids number ``grid`` (...,)."""
    place = (positions[..., 1] << ROW_BITS) + positions[..., 0] + 1
    return (grid << GRID_BITS) + torch.where(begins_grid(tokens), 0, place)


class PackedTokens:
    """All tokens of a packed batch.

    Args:
        tokens_N: int64 (N,); positions_N3: int64 (N, 3) as (x, y, plane).
        column_N: int64 (N,) place of each token in its document, from 0.
        whole_N: bool (N,) tokens whose grid is seen whole (the prefix of prefix-LM attention);
            None: none is.
    """

    def __init__(
        self,
        tokens_N: Tensor,
        positions_N3: Tensor,
        column_N: Tensor,
        whole_N: Tensor | None = None,
    ) -> None:
        self.tokens = tokens_N
        self.whole = whole_N
        self.column_N = column_N
        self._positions_N3 = positions_N3

    @cached_property
    def code_N(self) -> Tensor:
        """int64 (N,), ascending."""
        begins_N = begins_grid(self.tokens) | (self.column_N == 0)
        return place_codes(self.tokens, self._positions_N3, begins_N.cumsum(0))

    def previous(self, steps: int) -> Tensor:
        """int64 (N,) token ``steps`` earlier in the same document, NOTHING before its start."""
        index_N = torch.arange(len(self.tokens), device=self.tokens.device) - steps
        earlier_N = self.tokens[index_N.clamp(min=0)]
        return torch.where(self.column_N >= steps, earlier_N, NOTHING)

    def neighbour(self, dx: int, dy: int) -> Tensor:
        """int64 (N,) colour at (x + dx, y + dy) of each cell's grid, else NOTHING.

        Meaningless for START, SEP and END, which stand at no place of a grid.
        """
        wanted_N = self.code_N + (dy << ROW_BITS) + dx
        at_N = torch.searchsorted(self.code_N, wanted_N).clamp(max=len(wanted_N) - 1)
        found_N = self.tokens[at_N]
        there_N = (self.code_N[at_N] == wanted_N) & (found_N < NUM_COLORS)
        return torch.where(there_N, found_N, NOTHING)


class TokenHistory:
    """The tokens that decoding has seen so far, one row a document; ``tokens`` are the newest.

    Args:
        packed: the prompts, packed.
        doc_N: int64 (N,) document of every prompt token.
        lengths_B: int64 (B,) tokens of each prompt.
        capacity: most tokens a row may ever hold.
    """

    whole: Tensor | None = None
    """What decoding writes is causal: no grid of it is seen whole."""

    def __init__(
        self, packed: PackedTokens, doc_N: Tensor, lengths_B: Tensor, capacity: int
    ) -> None:
        room = (len(lengths_B), capacity)
        self.tokens_BT = packed.tokens.new_full(room, NOTHING)
        self.code_BT = packed.tokens.new_full(room, torch.iinfo(torch.int64).max)
        self.tokens_BT[doc_N, packed.column_N] = packed.tokens
        self.code_BT[doc_N, packed.column_N] = packed.code_N
        self._newest_B = lengths_B - 1

    @property
    def tokens(self) -> Tensor:
        return self.previous(0)

    def append(self, tokens_B: Tensor, positions_B3: Tensor) -> None:
        """Write one more token to every row."""
        last_B = self.code_BT.gather(1, self._newest_B[:, None]).squeeze(1)
        grid_B = (last_B >> GRID_BITS) + begins_grid(tokens_B)
        code_B = place_codes(tokens_B, positions_B3, grid_B)
        self._newest_B = self._newest_B + 1
        self.tokens_BT.scatter_(1, self._newest_B[:, None], tokens_B[:, None])
        self.code_BT.scatter_(1, self._newest_B[:, None], code_B[:, None])

    def keep(self, index_B: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.tokens_BT, self.code_BT = self.tokens_BT[index_B], self.code_BT[index_B]
        self._newest_B = self._newest_B[index_B]

    def previous(self, steps: int) -> Tensor:
        """int64 (B,): as :meth:`PackedTokens.previous`, of each row's newest token."""
        index_B = self._newest_B - steps
        earlier_B = self.tokens_BT.gather(1, index_B.clamp(min=0)[:, None]).squeeze(1)
        return torch.where(index_B >= 0, earlier_B, NOTHING)

    def neighbour(self, dx: int, dy: int) -> Tensor:
        """int64 (B,): as :meth:`PackedTokens.neighbour`, of each row's newest token."""
        code_B1 = self.code_BT.gather(1, self._newest_B[:, None])
        wanted_B1 = code_B1 + (dy << ROW_BITS) + dx
        at_B1 = torch.searchsorted(self.code_BT, wanted_B1)
        at_B1 = at_B1.clamp(max=self.code_BT.shape[1] - 1)
        found_B1 = self.tokens_BT.gather(1, at_B1)
        there_B1 = (self.code_BT.gather(1, at_B1) == wanted_B1) & (found_B1 < NUM_COLORS)
        return torch.where(there_B1, found_B1, NOTHING).squeeze(1)


Context = PackedTokens | TokenHistory
"""Anything with ``tokens``, ``whole``, ``previous`` and ``neighbour``."""
