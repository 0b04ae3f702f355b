"""Which experts of a trained network fire for which tokens. Nothing in it is drawn or printed.

Shapes: L layers with experts, E experts, Q kinds of tokens, N packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiny_onn.arc.packing import pack
from tiny_onn.arc.tokens import Document
from tiny_onn.inference.excursion import excursion
from tiny_onn.inspect.kinds import KIND_NAMES, token_kinds

BATCH_TOKENS = 16384


@dataclass(frozen=True)
class ExpertStats:
    """What fired before any fallback; a looped block counts all its rounds.

    layers: numbers of the blocks; fired_LQE: int64, tokens of a kind for which an expert fired;
    tokens_LQ: int64, tokens of a kind that the layer saw; none_L: int64, tokens for which nothing
    fired; ran_L: int64, pairs of token and expert that were executed, those of a fallback too;
    thresholds_LE: float64.
    """

    layers: tuple[int, ...]
    fired_LQE: np.ndarray
    tokens_LQ: np.ndarray
    none_L: np.ndarray
    ran_L: np.ndarray
    thresholds_LE: np.ndarray

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return self.thresholds_LE.size

    @property
    def dead_LE(self) -> np.ndarray:
        """bool: fired for no token."""
        return self.fired_LQE.sum(axis=1) == 0

    @property
    def num_dead(self) -> int:
        return int(self.dead_LE.sum())

    def load_LE(self) -> np.ndarray:
        """Share of the tokens for which each expert fired."""
        return self.fired_LQE.sum(axis=1) / self.tokens_LQ.sum(axis=1)[:, None]

    def load_LQE(self) -> np.ndarray:
        """Share of a kind's tokens for which each expert fired; nan where there are none."""
        tokens_LQ1 = self.tokens_LQ[..., None]
        return np.where(tokens_LQ1 > 0, self.fired_LQE / np.maximum(tokens_LQ1, 1), np.nan)

    def mean_active(self) -> dict[int, float]:
        """Mean number of experts that fire for a token, by layer."""
        return dict(zip(self.layers, self.load_LE().sum(axis=1).tolist(), strict=True))

    def mean_run(self) -> dict[int, float]:
        """Mean number of experts that run for a token, by layer: what it costs."""
        means_L = self.ran_L / self.tokens_LQ.sum(axis=1)
        return dict(zip(self.layers, means_L.tolist(), strict=True))

    def none_share_L(self) -> np.ndarray:
        """Share of the tokens for which nothing fired, by layer."""
        return self.none_L / self.tokens_LQ.sum(axis=1)

    def none_share(self) -> float:
        """The same over all layers."""
        return float(self.none_L.sum() / self.tokens_LQ.sum())


def expert_stats(
    model: nn.Module, documents: Sequence[Document], batch_tokens: int = BATCH_TOKENS
) -> ExpertStats | None:
    """Statistics of ``documents``; None for a network without experts.

    The model leaves its routing in ``ModelOutput.routing``: for every layer of experts, in the
    order in which they ran, an object with ``layer``, ``fires_NE``, ``runs_NE`` and
    ``thresholds_E``.
    """
    counts: dict[int, list[np.ndarray]] = {}
    thresholds: dict[int, np.ndarray] = {}
    for chosen in batches(documents, batch_tokens):
        with excursion(model) as device:
            batch = pack(chosen).to(device)
            routing = model(batch).routing
        if not routing:
            return None
        kind_N = token_kinds(batch.tokens_N, batch.positions_N3)
        for entry in routing:
            new = _count(entry, kind_N)
            old = counts.setdefault(entry.layer, [np.zeros_like(part) for part in new])
            counts[entry.layer] = [a + b for a, b in zip(old, new, strict=True)]
            thresholds[entry.layer] = entry.thresholds_E.double().cpu().numpy()
    layers = tuple(sorted(counts))
    parts = (np.stack([counts[n][part] for n in layers]) for part in range(4))
    return ExpertStats(layers, *parts, np.stack([thresholds[n] for n in layers]))


def _count(entry: Any, kind_N: Tensor) -> list[np.ndarray]:
    """fired (Q, E), tokens (Q,), tokens for which nothing fired, and pairs that ran, of one
    layer's forward."""
    fires_NE = entry.fires_NE > 0
    fired_QE = torch.zeros(
        len(KIND_NAMES), fires_NE.shape[1], dtype=torch.int64, device=fires_NE.device
    )
    fired_QE.index_add_(0, kind_N, fires_NE.long())
    tokens_Q = kind_N.bincount(minlength=len(KIND_NAMES))
    none = (~fires_NE.any(dim=1)).sum()
    return [t.cpu().numpy() for t in (fired_QE, tokens_Q, none, entry.runs_NE.sum())]


def batches(documents: Sequence[Document], batch_tokens: int) -> Iterator[list[Document]]:
    """Runs of documents, in their order, of at most ``batch_tokens`` (or of one)."""
    run: list[Document] = []
    used = 0
    for document in documents:
        if run and used + len(document.tokens) > batch_tokens:
            yield run
            run, used = [], 0
        run.append(document)
        used += len(document.tokens)
    if run:
        yield run
