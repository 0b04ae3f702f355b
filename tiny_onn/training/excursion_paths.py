"""Where an excursion's tokens stand and which may come next: by the true grid, or by its own.

Shapes: B excursions being written, T tokens of the longest true output, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.arc.task import NUM_COLORS
from tiny_onn.arc.tokens import END, NEWLINE, VOCAB, Document
from tiny_onn.inference.grammar import OutputState

FREE_GROWTH = 2
"""A path of its own is cut at so many times the tokens of the true output."""

ASK_EVERY = 16
"""Steps after which an accelerator is asked which free excursions have ended: an answer has to be
waited for."""


class TruePath:
    """NEWLINEs and the end are the true grid's; colours are free, but for those begun with.

    Args:
        written: the document of every excursion; begun: for each the output tokens that are fed
            first, or nothing for all.
    """

    def __init__(
        self, written: Sequence[Document], begun: Sequence[np.ndarray], device: torch.device
    ) -> None:
        self.limits = [len(d.tokens) - d.prefix_len - 1 for d in written]
        longest = max(self.limits) + 1
        tokens_BT = np.full((len(written), longest), END)
        places_BT2 = np.zeros((len(written), longest, 2), dtype=np.int64)
        begun_B = np.zeros(len(written), dtype=np.int64)
        for row, document in enumerate(written):
            output = document.tokens[document.prefix_len :]
            tokens_BT[row, : len(output)] = output
            places_BT2[row, : len(output)] = document.positions[document.prefix_len :, :2]
            # A token chosen instead of END would begin another row.
            places_BT2[row, len(output) - 1] = 0, np.count_nonzero(output == NEWLINE)
        for row, tokens in enumerate(begun):
            tokens_BT[row, : len(tokens)] = tokens
            begun_B[row] = len(tokens)
        self.tokens_BT = torch.from_numpy(tokens_BT).to(device)
        self.places_BT2 = torch.from_numpy(places_BT2).to(device)
        self.begun_B = torch.from_numpy(begun_B).to(device)
        self.step = 0

    def legal(self) -> Tensor:
        """bool (B, V): all colours where the truth is one, else the true token."""
        token_B = self.tokens_BT[:, self.step]
        legal_BV = F.one_hot(token_B, VOCAB).bool()
        free_B = (token_B < NUM_COLORS) & (self.begun_B <= self.step)
        legal_BV[:, :NUM_COLORS] |= free_B[:, None]
        return legal_BV

    def places(self) -> Tensor:
        """int64 (B, 2): (x, y) of the next token."""
        return self.places_BT2[:, self.step]

    def advance(self, tokens_B: Tensor) -> None:
        self.step += 1

    def going_on(self, open_B: Tensor) -> list[int]:
        """Rows that want another token: known without asking the device."""
        return [row for row, limit in enumerate(self.limits) if self.step < limit]

    def keep(self, rows: Sequence[int], index_B: Tensor) -> None:
        self.limits = [self.limits[row] for row in rows]
        for name in ("tokens_BT", "places_BT2", "begun_B"):
            setattr(self, name, getattr(self, name)[index_B])


class FreePath:
    """The model's own NEWLINEs and end, under the grammar.

    Args:
        written: the document of every excursion; max_tokens: of a document.
    """

    def __init__(self, written: Sequence[Document], max_tokens: int, device: torch.device) -> None:
        self.limits = [
            max(0, min(max_tokens - p, FREE_GROWTH * (n - p)) - 1)
            for n, p in ((len(d.tokens), d.prefix_len) for d in written)
        ]
        self.state = OutputState([None] * len(written), True, device)
        self.step = 0

    def legal(self) -> Tensor:
        """bool (B, V): what the grammar of grids allows."""
        return self.state.legal()

    def places(self) -> Tensor:
        """int64 (B, 2): (x, y) of the next token."""
        return self.state.positions()[:, :2]

    def advance(self, tokens_B: Tensor) -> None:
        self.state.advance(tokens_B)
        self.step += 1

    def going_on(self, open_B: Tensor) -> list[int] | None:
        """Rows that want another token; None where it is not worth waiting for the answer."""
        if open_B.device.type != "cpu" and self.step % ASK_EVERY:
            return None
        return torch.nonzero(open_B).squeeze(1).tolist()

    def keep(self, rows: Sequence[int], index_B: Tensor) -> None:
        self.limits = [self.limits[row] for row in rows]
        self.state.keep(index_B)
