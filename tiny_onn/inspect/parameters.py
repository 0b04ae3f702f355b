"""How many parameters a network has, and how many of them one token passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import nn

from tiny_onn.model.convert import packed_weights
from tiny_onn.model.deep_embed_store import FileRows
from tiny_onn.model.embedding import RowTable


def total_parameters(model: nn.Module) -> int:
    """All of them, those in DeepEmbed's files too, and packed weights as they were trained."""
    in_files = sum(rows * per_row for rows, per_row in _file_tables(model))
    return in_files + sum(math.prod(shape) for _, shape, _ in _shapes(model))


def _shapes(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and identity of every parameter, and of what once was one."""
    for name, p in model.named_parameters():
        yield name, tuple(p.shape), id(p)
    for name, packed in packed_weights(model).items():
        yield name, packed.trained_shape, id(packed)


def _file_tables(model: nn.Module) -> list[tuple[int, int]]:
    """Rows, and numbers in a row, of every table that lives in a file."""
    stores = [m for m in model.modules() if isinstance(m, FileRows)]
    return [(store.shape[0], store.shape[1] * store.shape[2]) for store in stores]


def active_parameters(model: nn.Module, active_experts: Mapping[int, float]) -> float:
    """Parameters that a token's forward reads, on average.

    All of them, but of every table (task, view, token, DeepEmbed) one row, and of each layer's
    experts as many as are active (one pair of matrices where they share it). Gates count whole:
    every token meets all prototypes. What chooses 2:4 masks is not read: once trained, they are
    fixed.

    Args:
        active_experts: mean number of experts that run for a token, by number of the block.
    """
    tables = [m for m in model.modules() if isinstance(m, RowTable | nn.Embedding)]
    table_ids = {id(table.weight) for table in tables}
    in_files = sum(per_row for _, per_row in _file_tables(model))
    return in_files + sum(
        math.prod(shape) * _share(name, shape, identity in table_ids, active_experts)
        for name, shape, identity in _shapes(model)
    )


def _share(
    name: str, shape: tuple[int, ...], is_table: bool, active_experts: Mapping[int, float]
) -> float:
    """Of the rows (first dimension) of one parameter, the share that a token reads."""
    if is_table or (name.startswith("deep_embed.") and name.endswith(".rows.weight")):
        return 1 / shape[0]
    if "pattern." in name:
        return 0.0
    if ".ffn.experts." in name and len(shape) == 3:  # one expert a row
        return active_experts[int(name.split(".")[1])] / shape[0]
    return 1.0
