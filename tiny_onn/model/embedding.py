"""Token, task and view vectors.

A learned vector per task, shared by all its views, carries what the task *is*; one per dihedral
view says how it is turned. Row -1 stands for an unknown task or no view and gives exactly zero.

Shapes: N tokens, B documents, C residual width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_DIHEDRAL = 8
TABLE_STD = 0.02


class RowTable(nn.Module):
    """Rows of learned vectors; index -1 gives zeros and receives no gradient."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_rows, width) * TABLE_STD)

    def forward(self, index_B: Tensor) -> Tensor:
        known_B1 = (index_B >= 0).unsqueeze(-1)
        return F.embedding(index_B.clamp(min=0), self.weight) * known_B1


class Embedding(nn.Module):
    """x_N = token + (task + view of the token's document); returns also the task vectors."""

    def __init__(self, vocab_size: int, width: int, num_tasks: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token.weight, std=1.0)
        self.task = RowTable(max(num_tasks, 1), width)
        self.view = RowTable(NUM_DIHEDRAL, width)

    def forward(
        self,
        tokens_N: Tensor,
        doc_N: Tensor,
        task_B: Tensor,
        view_B: Tensor,
        soft: Any | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (x_NC, task_BC). The tokens of ``soft`` (``rows_S``, ``probs_SV``) enter as the
        mean of the token vectors under their probabilities."""
        task_BC = self.task(task_B)
        document_BC = task_BC + self.view(view_B)
        x_NC = self.token(tokens_N)
        if soft is not None:
            x_NC = x_NC.index_copy(0, soft.rows_S, self._expected(soft.probs_SV))
        return x_NC + document_BC.index_select(0, doc_N), task_BC

    def _expected(self, probs_SV: Tensor) -> Tensor:
        with torch.autocast(probs_SV.device.type, enabled=False):
            return probs_SV.to(self.token.weight.dtype) @ self.token.weight
