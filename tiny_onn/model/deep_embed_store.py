"""Where a DeepEmbed table lives: in memory as a parameter, or in a file that is read by rows.

Both hold delta for every row and layer, (R, L, X) with a row's layers side by side, and start at
zero. ``fetch`` asks for the rows of a batch and returns at once; calling its result gives them,
so that a file is read by a thread while the first block's attention runs.

Shapes: R rows of the table, L layers, X numbers a row and layer, N indices, U different rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tiny_onn.model.row_file import RowFile


@dataclass(frozen=True)
class Rows:
    """layers: per layer (U, X) floating point; index_N: int64, which of the U rows each of the N
    takes, -1 for none."""

    layers: Sequence[Tensor]
    index_N: Tensor


Fetch = Callable[[], Rows]
"""Gives the rows asked for, the same ones at every call; the first may wait for the disk."""


class DenseRows(nn.Module):
    """A parameter (R, L, X), its optimizer's to update row by row."""

    def __init__(self, num_rows: int, layers: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_rows, layers, width))

    def fetch(self, index_N: Tensor) -> Fetch:
        """``index_N``: int64 (N,) rows, -1 for none."""
        rows = Rows(self.weight.unbind(1), index_N)
        return lambda: rows


@dataclass(frozen=True)
class PendingRows:
    """Rows that a forward with gradients took: ``leaf`` (U, L, X) has their gradient
    after backward, and their values were those of the file's rows ``ids_U`` (ascending)."""

    ids_U: Tensor
    leaf: Tensor


class FileRows(nn.Module):
    """A table in a file, of which memory holds only the rows of the current batch.

    Without a file every row is zero. With one open for writing, each forward with gradients
    gathers its rows as a leaf tensor and notes it in ``pending`` for the optimizer, which writes
    the stepped rows back. It holds no parameter: the file is not part of the state dict.

    Args:
        dtype: of the numbers on disk; in memory they have the model's, float32.
    """

    def __init__(self, num_rows: int, layers: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = (num_rows, layers, width), dtype
        self.file: RowFile | None = None
        self.prefetch = True
        self.pending: list[PendingRows] = []
        self._reader: ThreadPoolExecutor | None = None
        # Follows the model to other dtypes, as a parameter would.
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    def create(self, path: Path) -> None:
        """Start a new file of zeros at ``path``, open for training."""
        self.attach(RowFile.create(path, self.shape, self.dtype))

    def open(self, path: Path, writable: bool = False) -> None:
        """Use the file at ``path``.

        Raises:
            UserError: missing, cut short, or of another shape or dtype.
        """
        self.attach(RowFile(path, self.shape, self.dtype, writable))

    def attach(self, file: RowFile | None) -> None:
        """Use ``file`` from now on; None: all rows are zero."""
        if self.file is not None:
            self.file.close()
        self.file = file
        self.pending.clear()

    def copy_to(self, path: Path) -> None:
        """Write the table to ``path`` (zeros without a file)."""
        if self.file is None:
            RowFile.create(path, self.shape, self.dtype).close()
        else:
            self.file.copy_to(path)

    def take_pending(self) -> list[PendingRows]:
        """The rows to step, which are forgotten here."""
        pending, self.pending = self.pending, []
        return pending

    def fetch(self, index_N: Tensor) -> Fetch:
        """``index_N``: int64 (N,) rows, -1 for none; the file is read from now on."""
        ids_U, inverse_N = torch.unique(index_N.cpu(), return_inverse=True)
        if len(ids_U) and ids_U[0] < 0:
            ids_U, inverse_N = ids_U[1:], inverse_N - 1
        if not len(ids_U):  # a table of one row that nobody takes is still a table
            ids_U = torch.zeros(1, dtype=torch.int64)
        read = self._start_reading(ids_U)
        trained = torch.is_grad_enabled() and self.file is not None and self.file.writable

        def rows() -> Rows:
            leaf = read().to(index_N.device, self._like.dtype)
            if trained:
                self.pending.append(PendingRows(ids_U, leaf.requires_grad_()))
            return Rows(leaf.unbind(1), inverse_N.to(index_N.device))

        return cache(rows)

    def _start_reading(self, ids_U: Tensor) -> Callable[[], Tensor]:
        file = self.file
        if file is None:
            return lambda: torch.zeros(len(ids_U), *self.shape[1:])
        if not self.prefetch:
            return lambda: file.read(ids_U)
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="deep-embed")
        return self._reader.submit(file.read, ids_U).result
