"""What NSA's gates and its choice of blocks do in a trained network.

Attention modules with a ``watch`` attribute call it in every packed forward with their gates
(N, H, 3) of the compressed, selected and window branch, and the chosen blocks (N, K, n), -1 for
none, or None where no document needed a choice.

Shapes: A attention calls (block by block, a looped block again in every round), N packed tokens,
T tokens of one document, H heads, K key/value heads, n chosen blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from tiny_onn.arc.packing import pack
from tiny_onn.arc.tokens import Document
from tiny_onn.inference.excursion import excursion
from tiny_onn.inspect.experts import BATCH_TOKENS, batches
from tiny_onn.inspect.kinds import OUTPUT_PLANE

BRANCHES = ("compressed", "selected", "window")
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Watched:
    """One attention call: its block's number, gates (N, H, 3), chosen blocks (N, K, n) or None."""

    layer: int
    gate_NH3: np.ndarray
    index_NKn: np.ndarray | None


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Watched]]:
    """Collects the attention calls of the forwards inside, in their order."""
    seen: list[Watched] = []
    watched = [
        (number, block.attention)
        for number, block in enumerate(model.blocks)
        if hasattr(block.attention, "watch")
    ]
    before = [attention.watch for _, attention in watched]

    def note(layer: int, gate_NH3: Tensor, index_NKn: Tensor | None) -> None:
        index = None if index_NKn is None else index_NKn.cpu().numpy()
        seen.append(Watched(layer, gate_NH3.float().cpu().numpy(), index))

    try:
        for layer, attention in watched:
            attention.watch = lambda gate, index, layer=layer: note(layer, gate, index)
        yield seen
    finally:
        for (_, attention), function in zip(watched, before, strict=True):
            attention.watch = function


@dataclass(frozen=True)
class GateStats:
    """quantiles: (2, A, 3, 3), over tokens and heads: input or output tokens, attention call,
    branch, QUANTILES; nan where there are no such tokens. layers: the block of each call."""

    layers: tuple[int, ...]
    quantiles: np.ndarray


def gate_stats(
    model: nn.Module, documents: Sequence[Document], batch_tokens: int = BATCH_TOKENS
) -> GateStats | None:
    """Gates over ``documents``; None for a network without NSA."""
    gates: list[list[np.ndarray]] = []
    layers: tuple[int, ...] = ()
    in_output: list[np.ndarray] = []
    for chosen in batches(documents, batch_tokens):
        with watching(model) as seen, excursion(model) as device:
            batch = pack(chosen).to(device)
            model(batch)
        if not seen:
            return None
        layers = tuple(call.layer for call in seen)
        gates.append([call.gate_NH3 for call in seen])
        in_output.append((batch.positions_N3[:, 2] == OUTPUT_PLANE).cpu().numpy())
    is_output_N = np.concatenate(in_output)
    quantiles = np.full((2, len(layers), 3, 3), np.nan)
    for call in range(len(layers)):
        gate_NH3 = np.concatenate([part[call] for part in gates])
        for side, rows_N in enumerate((~is_output_N, is_output_N)):
            if rows_N.any():
                found = np.quantile(gate_NH3[rows_N].reshape(-1, 3), QUANTILES, axis=0)
                quantiles[side, call] = found.T
    return GateStats(layers, quantiles)


@dataclass(frozen=True)
class Choice:
    """What one document's tokens read in full.

    layers: the block of each attention call; share_ATT: how many of a query's groups read a token
    through the selected branch, from 0 to 1, by call, query, token; tokens_T, positions_T3: of the
    packed document (its END is not in it).
    """

    layers: tuple[int, ...]
    share_ATT: np.ndarray
    tokens_T: np.ndarray
    positions_T3: np.ndarray


def chosen_blocks(
    model: nn.Module, document: Document, select_block: int, causal: bool
) -> Choice | None:
    """Of one document; None where no block is chosen: without NSA, or if n blocks cover it.

    Args:
        select_block: l', tokens of a block.
        causal: whether the prefix is causal too (model.mask), so that it hides later tokens.
    """
    with watching(model) as seen, excursion(model) as device:
        batch = pack([document]).to(device)
        model(batch)
    if not seen or any(call.index_NKn is None for call in seen):
        return None
    length = batch.num_tokens
    prefix = 0 if causal else batch.layout.prefixes[0]
    time_T = np.arange(length)
    end_T = np.maximum(time_T, prefix - 1)
    visible_TT = time_T[None, :] <= end_T[:, None]
    share = np.stack([_share(call.index_NKn, length, select_block) for call in seen])
    return Choice(
        tuple(call.layer for call in seen),
        share * visible_TT,
        batch.tokens_N.cpu().numpy(),
        batch.positions_N3.cpu().numpy(),
    )


def _share(index_TKn: np.ndarray, length: int, select_block: int) -> np.ndarray:
    """(T, T) share of a query's groups that chose the block of a token."""
    num_blocks = -(-length // select_block)
    block_T = np.arange(length) // select_block
    taken_TKJ = (index_TKn[..., None] == np.arange(num_blocks)).any(axis=2)
    return taken_TKJ.mean(axis=1)[:, block_T]
