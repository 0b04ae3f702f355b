"""A table of rows on disk: one safetensors file, read and written row by row.

The file holds one tensor, ``rows``, of shape (R, ...). A new file is all zeros and *sparse*: it
takes no space on disk until rows are written.

Rows are read with pread and written with pwrite. A memory mapping would make the pages around
each row resident too (Linux maps 64 KiB at a fault), so peak memory would grow with the table;
this way it is that of the rows asked for, and a file that is cut short is an error, not a signal.

Shapes: R rows of the table, U rows asked for.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tiny_onn.errors import UserError

TENSOR = "rows"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FORMAT_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}

PAGE = 4096
"""Data begin at a multiple of this (the header is padded with spaces, as the format allows)."""

COPY_BYTES = 1 << 16
"""Files are copied in pieces of this size, and pieces of zeros are left out."""

_HEADER_LIMIT = 1 << 20


class RowFile:
    """An open table. Use :meth:`create` for a new one.

    Args:
        path: file to open.
        shape: what it must hold, (R, ...); dtype: float32 or bfloat16.
        writable: whether :meth:`write` may be used.

    Raises:
        UserError: missing, cut short, no safetensors file, or of another shape or dtype.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, writable: bool = False
    ) -> None:
        self.path, self.shape, self.dtype, self.writable = path, shape, dtype, writable
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        try:
            self._fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"DeepEmbed table '{path}' cannot be opened ({error.strerror}); expected the file "
                "that train.py wrote there; train again or choose another folder"
            ) from error
        self._close = weakref.finalize(self, os.close, self._fd)
        try:
            self._begin = self._check()
        except UserError:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> RowFile:
        """A new table of zeros at ``path``, open for writing.

        Raises:
            OSError: the folder cannot be written.
        """
        size = math.prod(shape) * dtype.itemsize
        entry = {"dtype": _FORMAT_NAMES[dtype], "shape": shape, "data_offsets": [0, size]}
        header = json.dumps({TENSOR: entry}).encode()
        header += b" " * (-(8 + len(header)) % PAGE)
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        return cls(path, shape, dtype, writable=True)

    def _check(self) -> int:
        """Where the data begin, once header and size are right."""
        begin, header = self._header()
        entry = header.get(TENSOR)
        if not isinstance(entry, dict) or len(header.keys() - {"__metadata__"}) != 1:
            raise self._wrong(f"holds {sorted(header)}", f"one tensor '{TENSOR}'")
        expected = {"dtype": _FORMAT_NAMES[self.dtype], "shape": list(self.shape)}
        got = {name: entry.get(name) for name in expected}
        if got != expected:
            raise self._wrong(
                f"has {got['dtype']} rows of shape {got['shape']}",
                f"{expected['dtype']} of shape {expected['shape']} by model.deep_embed, "
                "model.layers and the model's widths",
            )
        size = begin + self.shape[0] * self._row_bytes
        found = os.fstat(self._fd).st_size
        if found != size:
            raise self._wrong(f"is cut short or torn: {found} bytes", f"{size} bytes")
        return begin

    def _header(self) -> tuple[int, dict[str, object]]:
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if length <= _HEADER_LIMIT:
            try:
                header = json.loads(os.pread(self._fd, length, 8))
            except (json.JSONDecodeError, UnicodeDecodeError):
                header = None
            if isinstance(header, dict):
                return 8 + length, header
        raise self._wrong("is cut short or no safetensors file", "a whole one")

    def _wrong(self, got: str, expected: str) -> UserError:
        return UserError(
            f"DeepEmbed table '{self.path}' {got}; expected {expected}; "
            "choose the folder that train.py wrote, or train again"
        )

    def read(self, ids_U: Tensor) -> Tensor:
        """Rows (U, ...) on the CPU in the file's dtype. ``ids_U``: int64, strictly ascending."""
        rows = torch.empty(len(ids_U), *self.shape[1:], dtype=self.dtype)
        self._transfer(ids_U, rows, lambda part, at: os.preadv(self._fd, [part], at))
        return rows

    def write(self, ids_U: Tensor, rows: Tensor) -> None:
        """Overwrite rows with (U, ...) in the file's dtype. ``ids_U`` as in :meth:`read`.

        Raises:
            OSError: no space left.
        """
        assert self.writable and rows.dtype == self.dtype, (self.path, rows.dtype)
        self._transfer(
            ids_U,
            rows.contiguous(),
            lambda part, at: os.pwritev(self._fd, [part], at),
        )

    def _transfer(
        self, ids_U: Tensor, rows: Tensor, move: Callable[[memoryview, int], int]
    ) -> None:
        """Move bytes between ``rows`` and the file; rows next to each other in one call."""
        assert rows.shape == (len(ids_U), *self.shape[1:]), (rows.shape, self.shape)
        data = memoryview(rows.flatten().view(torch.uint8).numpy())
        for first, row, count in _runs(ids_U.tolist()):
            assert row >= 0 and row + count <= self.shape[0], (row, count, self.shape)
            part = data[first * self._row_bytes : (first + count) * self._row_bytes]
            at = self._begin + row * self._row_bytes
            while part:
                moved = move(part, at)
                if not moved:
                    raise self._wrong("became shorter while it was open", "it to be left alone")
                part, at = part[moved:], at + moved

    def copy_to(self, path: Path) -> None:
        """A sparse copy of the file: runs of zeros take no space.

        Raises:
            OSError: no space left.
        """
        copy_sparse(self.path, path)

    def close(self) -> None:
        self._close()


def _runs(ids: list[int]) -> Iterator[tuple[int, int, int]]:
    """(place in ``ids``, row, number of rows) of every run of consecutive rows."""
    first = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[place - 1] + 1:
            yield first, ids[first], place - first
            first = place


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file, leaving out pieces that are all zeros."""
    zeros = bytes(COPY_BYTES)
    with open(source, "rb", buffering=0) as old, open(target, "wb", buffering=0) as new:
        size = os.fstat(old.fileno()).st_size
        os.truncate(new.fileno(), size)
        for at in range(0, size, COPY_BYTES):
            piece = os.pread(old.fileno(), COPY_BYTES, at)
            if piece != zeros[: len(piece)]:
                while piece:
                    moved = os.pwrite(new.fileno(), piece, at)
                    piece, at = piece[moved:], at + moved
