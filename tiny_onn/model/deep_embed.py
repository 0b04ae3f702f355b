"""DeepEmbed: tables of vectors that scale every block's FFN channel by channel.

RWKV-8's DeepEmbed (B. Peng, RWKV-LM, RWKV-v7/rwkv_v8_rc00_demo.py) multiplies the FFN by a row
E[id] of a table per layer. Every row here is kept as its difference from the identity,
E = 1 + delta, with delta = 0 at the start, and weight decay pulls delta to 0, so E to 1:

    1x    y = FFN(x) * E                      delta as wide as the residual stream
    4x    y = W_down (h * E)                  delta as wide as the hidden layer, h
    v7a   y = W_down (h * (((x A) M) B + b))  M = I + a row of r x r numbers (rwkv_v7a_demo.py);
                                              B = 0 and b = 1 at the start

With several keys the deltas of their rows add up. A token without a row in a table (a task that
is not known, a structure token that has no patch) gets delta = 0 from it. A table of rank r keeps
r numbers a row and layer (``codes``) and a basis (r, X) a layer: delta = code @ basis.

Shapes: N tokens, M of them, B documents, L layers, R rows, r rank, X width of delta.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.config.check_network import deep_embed_width
from tiny_onn.config.schema import DeepEmbedConfig, ModelConfig
from tiny_onn.model.deep_embed_keys import NgramKey, PatchKey, TokenKey
from tiny_onn.model.deep_embed_store import DenseRows, Fetch, FileRows, Rows
from tiny_onn.model.row_file import DTYPES
from tiny_onn.model.token_context import Context

DeltaOf = Callable[[Tensor | None], Tensor]
"""rows_M (None: all N) -> delta (M, X) of one block; the first call may wait for the disk."""


def scale(values_NX: Tensor, delta_NX: Tensor) -> Tensor:
    """values * (1 + delta), at least in float32, in the dtype of the values."""
    return (values_NX * delta_factor(delta_NX)).to(values_NX.dtype)


def delta_factor(delta_NX: Tensor) -> Tensor:
    """1 + delta, at least in float32."""
    return 1 + (delta_NX.float() if delta_NX.dtype.itemsize < 4 else delta_NX)


class InputMix(nn.Module):
    """Form v7a: delta_NF = ((x A)(I + M)) B + b - 1, of rows M and the FFN's own input x.

    B = 0 and b = 1 at the start. b - 1 is what the bias holds.
    """

    def __init__(self, width: int, rank: int, hidden: int) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, hidden)
        nn.init.normal_(self.down.weight, std=width**-0.5)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x_NC: Tensor, mix_NX: Tensor) -> Tensor:
        """(N, C) and rows (N, r * r) -> (N, hidden)."""
        z_N1r = self.down(x_NC).unsqueeze(-2)
        mix_Nrr = mix_NX.unflatten(-1, (self.rank, self.rank)).to(z_N1r.dtype)
        return self.up((z_N1r + z_N1r @ mix_Nrr).squeeze(-2))


class DeepTable(nn.Module):
    """One key's delta for all layers: rows, and a basis where they are codes of rank ``rank``.

    Args:
        always: every index is a row, so that nothing has to be masked.
        rank: 0 for rows of the full width.
        file_dtype: None keeps the rows in memory, else the dtype of their file.
    """

    def __init__(
        self,
        num_rows: int,
        layers: int,
        width: int,
        *,
        always: bool,
        rank: int = 0,
        file_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.always = always
        if file_dtype is None:
            self.rows: DenseRows | FileRows = DenseRows(num_rows, layers, rank or width)
        else:
            self.rows = FileRows(num_rows, layers, rank or width, file_dtype)
        self.basis: nn.Parameter | None = None
        if rank:
            self.basis = nn.Parameter(torch.randn(layers, rank, width) * rank**-0.5)

    def delta(self, rows: Rows, layer: int, rows_M: Tensor | None) -> Tensor:
        """(N, X), or (M, X) at ``rows_M``, of one layer."""
        index_N = rows.index_N if rows_M is None else rows.index_N.index_select(0, rows_M)
        known_N = None if self.always else index_N >= 0
        if known_N is not None:
            index_N = index_N.clamp(min=0)
        delta_NX = F.embedding(index_N, rows.layers[layer])
        if known_N is not None:
            delta_NX = delta_NX * known_N.unsqueeze(-1)
        return delta_NX if self.basis is None else delta_NX @ self.basis[layer]


class _Lookup:
    """The rows of one batch under every key, shared by its blocks."""

    def __init__(self, parts: list[tuple[DeepTable, Fetch, Tensor | None]]) -> None:
        self._parts = parts

    def delta(self, layer: int, rows_M: Tensor | None) -> Tensor:
        """Sum over the keys; those with documents (doc_N) are looked up once a document."""
        total_NX: Tensor | None = None
        for table, fetch, doc_N in self._parts:
            rows = fetch()
            if doc_N is None:
                delta_NX = table.delta(rows, layer, rows_M)
            else:
                doc_M = doc_N if rows_M is None else doc_N.index_select(0, rows_M)
                delta_NX = F.embedding(doc_M, table.delta(rows, layer, None))
            total_NX = delta_NX if total_NX is None else total_NX + delta_NX
        assert total_NX is not None
        return total_NX


class DeepEmbed(nn.Module):
    """All tables of a model. Rows of ``token``, ``ngram`` and ``patch`` may live in files.

    Args:
        model: widths, layers and ``deep_embed``, which names at least one key.
        num_tasks: rows of the task table.
    """

    def __init__(self, model: ModelConfig, num_tasks: int) -> None:
        super().__init__()
        config, width = model.deep_embed, deep_embed_width(model)
        self.layers = model.layers
        self.keys = nn.ModuleDict()
        self.tables = nn.ModuleDict()
        file_dtype = DTYPES[config.dtype] if config.store == "memmap" else None
        for name in config.keys:
            if name == "task":
                table = DeepTable(
                    max(num_tasks, 1), model.layers, width, always=False, rank=config.task_rank
                )
            else:
                self.keys[name] = key = _key(name, model.vocab_size, config)
                table = DeepTable(
                    key.num_rows,
                    model.layers,
                    width,
                    always=key.always,
                    rank=config.rank,
                    file_dtype=file_dtype,
                )
            self.tables[name] = table

    def forward(self, context: Context, task_B: Tensor, doc_N: Tensor) -> list[DeltaOf]:
        """One function a block that gives its delta; reading from disk begins now.

        Args:
            context: the tokens asked about; task_B: int64 (B,) rows of tasks, -1 for unknown;
            doc_N: int64 (N,) document of each token.
        """
        parts: list[tuple[DeepTable, Fetch, Tensor | None]] = []
        for name, table in self.tables.items():
            if name == "task":
                parts.append((table, table.rows.fetch(task_B), doc_N))
            else:
                parts.append((table, table.rows.fetch(self.keys[name](context)), None))
        lookup = _Lookup(parts)
        return [partial(lookup.delta, layer) for layer in range(self.layers)]

    @property
    def files(self) -> dict[str, FileRows]:
        """Key -> its store, of the keys whose rows live in files."""
        return {n: t.rows for n, t in self.tables.items() if isinstance(t.rows, FileRows)}

    def create_files(self, folder: Path) -> None:
        """New tables of zeros in ``folder``, open for training."""
        for name, store in self.files.items():
            store.create(folder / file_name(name))

    def open_files(self, folder: Path, writable: bool = False) -> None:
        """Use the tables in ``folder``.

        Raises:
            UserError: one is missing, cut short, or of another shape or dtype.
        """
        for name, store in self.files.items():
            store.open(folder / file_name(name), writable)

    def copy_files(self, folder: Path) -> None:
        """Copy every table's file into ``folder``.

        Raises:
            OSError: no space left.
        """
        for name, store in self.files.items():
            store.copy_to(folder / file_name(name))

    def num_parameters(self) -> int:
        """Numbers in all tables and bases, on disk or in memory."""
        on_disk = sum(torch.Size(store.shape).numel() for store in self.files.values())
        return on_disk + sum(p.numel() for p in self.parameters())


def _key(name: str, vocab_size: int, config: DeepEmbedConfig) -> TokenKey | NgramKey | PatchKey:
    if name == "token":
        return TokenKey(vocab_size)
    if name == "ngram":
        return NgramKey(vocab_size, config.ngram)
    assert name == "patch", name
    return PatchKey(prefix=config.patch == "prefix")


def file_name(key: str) -> str:
    """Name of a key's table in a checkpoint or run folder."""
    return f"deep_embed.{key}.safetensors"


def fold(codes_RLr: Tensor, basis_LrX: Tensor) -> Tensor:
    """The full rows (R, L, X) that a table of some rank stands for."""
    return torch.einsum("Rlr,lrX->RlX", codes_RLr, basis_LrX)


def factor(rows_RLX: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Codes (R, L, r) and basis (L, r, X) that come nearest to full rows (in squared error).

    By singular value decomposition of every layer; exact if no layer's rank exceeds ``rank``.

    Raises:
        ValueError: ``rank`` above what (R, X) can have.
    """
    num_rows, _, width = rows_RLX.shape
    if not 1 <= rank <= min(num_rows, width):
        raise ValueError(
            f"got rank={rank}; expected 1 to {min(num_rows, width)} for {num_rows} rows of "
            f"{width} numbers; lower it"
        )
    u_LRk, s_Lk, v_LkX = torch.linalg.svd(rows_RLX.transpose(0, 1), full_matrices=False)
    codes_LRr = u_LRk[..., :rank] * s_Lk[:, None, :rank]
    return codes_LRr.transpose(0, 1).contiguous(), v_LkX[:, :rank].contiguous()
