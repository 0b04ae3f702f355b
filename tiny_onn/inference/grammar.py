"""What may come next in an output grid, for a whole batch at once.

An output is rows of colours, each closed by NEWLINE, then END. The first row's width is free (1
to 30) and binds the others; at 30 rows END must follow. With a fixed size every structure token
is forced and only the colours are free. Whatever the logits, the constrained tokens spell a grid.

Shapes: B outputs being written, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiny_onn.arc.task import MAX_SIDE, NUM_COLORS
from tiny_onn.arc.tokens import END, NEWLINE, SEP, START, VOCAB, grid_length
from tiny_onn.inference.size_rule import Size

MAX_NEW_TOKENS = grid_length(MAX_SIDE, MAX_SIDE) + 1
"""Tokens of the largest output with its END: 931."""

OUTPUT_PLANE = 3


def output_length(size: Size) -> int:
    """Tokens of an output of this size, NEWLINEs and END included."""
    return grid_length(*size) + 1


class OutputState:
    """How far each output is written: column and row of the next token, and when it is done.

    Args:
        sizes: per output its fixed (height, width), or None.
        grammar: False leaves every token legal; an output then also ends at START or SEP, which
            no grid holds.
        device: where the state lives.
    """

    def __init__(
        self, sizes: Sequence[Size | None], grammar: bool, device: torch.device | str = "cpu"
    ) -> None:
        self.grammar = grammar
        known = [size or (0, 0) for size in sizes]
        self.fixed_height_B = torch.tensor([size[0] for size in known], device=device)
        self.width_B = torch.tensor([size[1] for size in known], device=device)
        self.column_B = torch.zeros_like(self.width_B)
        self.row_B = torch.zeros_like(self.width_B)
        self.done_B = torch.zeros_like(self.width_B, dtype=torch.bool)

    def legal(self) -> Tensor:
        """bool (B, V): the tokens that may come next (END alone once an output is done)."""
        column, row, width, height = self.column_B, self.row_B, self.width_B, self.fixed_height_B
        max_rows = torch.where(height > 0, height, MAX_SIDE)
        max_cells = torch.where(width > 0, width, MAX_SIDE)
        color = (row < max_rows) & (column < max_cells) & ~self.done_B
        newline = (column > 0) & ((width == 0) | (column == width)) & ~self.done_B
        end = (column == 0) & (row > 0) & ((height == 0) | (row == height)) | self.done_B
        legal_BV = torch.zeros(len(column), VOCAB, dtype=torch.bool, device=column.device)
        legal_BV[:, :NUM_COLORS] = color[:, None]
        legal_BV[:, NEWLINE] = newline
        legal_BV[:, END] = end
        return legal_BV

    def choose(self, logits_BV: Tensor) -> Tensor:
        """Greedy: int64 (B,), the likeliest legal token (the smallest one of equals)."""
        if not self.grammar:
            return logits_BV.argmax(dim=-1)
        finite = torch.finfo(logits_BV.dtype)
        scores_BV = logits_BV.nan_to_num(nan=finite.min, posinf=finite.max, neginf=finite.min)
        return scores_BV.masked_fill(~self.legal(), -torch.inf).argmax(dim=-1)

    def positions(self) -> Tensor:
        """int64 (B, 3): where the next token stands, exactly as ``encode_pair`` places it."""
        plane_B = torch.full_like(self.column_B, OUTPUT_PLANE)
        return torch.stack([self.column_B, self.row_B, plane_B], dim=-1)

    def advance(self, tokens_B: Tensor) -> None:
        """Write one token to every output."""
        newline_B = tokens_B == NEWLINE
        if self.grammar:
            self.width_B = torch.where(newline_B & (self.row_B == 0), self.column_B, self.width_B)
        self.row_B = self.row_B + newline_B
        self.column_B = torch.where(newline_B, 0, self.column_B + 1)
        self.done_B = self.done_B | (tokens_B == END)
        if not self.grammar:
            self.done_B = self.done_B | (tokens_B == START) | (tokens_B == SEP)

    def keep(self, index_B: Tensor) -> None:
        """Keep only these outputs, in this order."""
        for name in ("fixed_height_B", "width_B", "column_B", "row_B", "done_B"):
            setattr(self, name, getattr(self, name)[index_B])
