"""How a model fares on what it wrote itself: the exposure gap and recovery from an error.

Teacher-forced, every output token is predicted after the true ones; free-running, after the
model's own. A model whose colours are right in the first way and not in the second is thrown off by
its own mistakes, which is what EAVI is for.

The gap is one of colours, not of whole outputs: a greedy output is right exactly where every token
is likeliest after the true ones, for until its first mistake its prefix is the true one. Exact
match on own prefixes and on true ones is the same number for every model.

Shapes: T tokens of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from tiny_onn.arc.task import NUM_COLORS
from tiny_onn.arc.tokens import Document
from tiny_onn.inference.excursion import Precision, autocast, excursion
from tiny_onn.losses.alignment import alignment_terms
from tiny_onn.model.tiny_onn import TinyONN
from tiny_onn.training.alignment_batch import align
from tiny_onn.training.excursions import Excursion, ExcursionSettings, make_excursions

BATCH_DOCUMENTS = 128


@dataclass(frozen=True)
class Exposure:
    """Shares from 0 to 1, NLLs in nats a token, over ``num_outputs`` documents.

    exact_forced: all colours likeliest on true prefixes; exact_free: on own ones, with the true
    geometry (the same number, up to rounding). colors_forced, colors_own: share of the colours
    that are right on true and on own prefixes; gap: their difference. nll_forced, nll_own: of the
    truth on true and on own (greedy) prefixes. recovery: after a wrong colour at a random cell of
    the first half, the share of outputs whose later colours are all right (over
    ``num_injected``); recovery_cells: the share of those colours.
    """

    exact_forced: float
    exact_free: float
    colors_forced: float
    colors_own: float
    gap: float
    nll_forced: float
    nll_own: float
    recovery: float
    recovery_cells: float
    num_outputs: int
    num_injected: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_exposure(
    model: TinyONN,
    documents: Sequence[Document],
    *,
    seed: int = 0,
    precision: Precision = "fp32",
) -> Exposure:
    """Of complete ``documents``, whose outputs are known. Leaves no trace in the model.

    The wrong colours are drawn by ``seed`` alone: equal for every model.
    """
    assert documents, "exposure needs a document"
    rng = np.random.default_rng(seed)
    injected = [_with_error(document, rng) for document in documents]
    greedy = ExcursionSettings(feed="greedy")
    forced_right = own_right = recovered = 0
    nll_forced = nll_own = 0.0
    num_colors = wrong_colors = own_colors = 0
    cells, num_targets, num_injected = [0, 0], 0, 0
    for begin in range(0, len(documents), BATCH_DOCUMENTS):
        batch = list(documents[begin : begin + BATCH_DOCUMENTS])
        own = make_excursions(model, batch, greedy, precision=precision)
        forced, wrong, sums = _aligned(model, batch, own, precision)
        forced_right += forced
        wrong_colors += wrong
        nll_forced, nll_own = nll_forced + sums[0], nll_own + sums[1]
        num_targets += sum(len(d.tokens) - d.prefix_len for d in batch)
        for document, (excursion_,) in zip(batch, own, strict=True):
            right, whole, total = _right(document, excursion_, 0)
            own_right, own_colors = own_right + whole, own_colors + right
            num_colors += total
        errors = injected[begin : begin + BATCH_DOCUMENTS]
        chosen = [n for n, error in enumerate(errors) if error is not None]
        if not chosen:
            continue
        redone = make_excursions(
            model,
            [batch[n] for n in chosen],
            greedy,
            precision=precision,
            begin_with=[errors[n] for n in chosen],
        )
        for n, (excursion_,) in zip(chosen, redone, strict=True):
            right, whole, total = _right(batch[n], excursion_, len(errors[n]))
            cells[0], cells[1] = cells[0] + right, cells[1] + total
            recovered += whole
            num_injected += 1
    count = len(documents)
    colors_forced = 1 - wrong_colors / num_colors
    colors_own = own_colors / num_colors
    return Exposure(
        exact_forced=forced_right / count,
        exact_free=own_right / count,
        colors_forced=colors_forced,
        colors_own=colors_own,
        gap=colors_forced - colors_own,
        nll_forced=nll_forced / num_targets,
        nll_own=nll_own / num_targets,
        recovery=recovered / num_injected if num_injected else float("nan"),
        recovery_cells=cells[0] / cells[1] if cells[1] else float("nan"),
        num_outputs=count,
        num_injected=num_injected,
    )


def _aligned(
    model: TinyONN,
    documents: Sequence[Document],
    own: Sequence[Sequence[Excursion]],
    precision: Precision,
) -> tuple[int, int, tuple[float, float]]:
    """Documents right in every colour on true prefixes; wrong colours on them; summed NLL on true
    and on own ones."""
    batch = align(documents, own)
    with excursion(model) as device, autocast(device, precision):
        packed, rows_M = batch.batch.to(device), batch.rows_M.to(device)
        logits_MV = model(packed, rows_M).logits_MV.double()
        targets_M, truth_M = packed.targets_N[rows_M], batch.truth_M.to(device)
        terms = alignment_terms(
            logits_MV, targets_M, truth_M, batch.weight_M.to(device), batch.twin_M.to(device)
        )
        likeliest_M = logits_MV[:, :NUM_COLORS].argmax(dim=-1)  # as excursions choose
        wrong_M = (likeliest_M != targets_M) & (targets_M < NUM_COLORS) & truth_M
        doc_M = packed.layout.doc_N[rows_M]
        wrong = torch.bincount(doc_M[wrong_M], minlength=len(packed.layout.lengths)) > 0
    true_documents = [slot for slot, n in enumerate(packed.order) if n < len(documents)]
    right = sum(not bool(wrong[slot]) for slot in true_documents)
    return right, int(wrong_M.sum()), (float(terms.truth), float(terms.excursion))


def _right(document: Document, own: Excursion, first: int) -> tuple[int, bool, int]:
    """Right colours from output token ``first`` on, whether all are, and how many there are."""
    truth = document.tokens[document.prefix_len : -1][first:]
    color = truth < NUM_COLORS
    right = int((own.tokens[first:] == truth)[color].sum())
    return right, right == int(color.sum()), int(color.sum())


def _with_error(document: Document, rng: np.random.Generator) -> np.ndarray | None:
    """Output tokens up to and including a wrong colour at a cell of the first half; None for an
    output of one cell, after which there is nothing to recover."""
    output = document.tokens[document.prefix_len : -1]
    cells = np.flatnonzero(output < NUM_COLORS)
    place = int(cells[rng.integers(max(1, len(cells) // 2))])
    shift = int(rng.integers(1, NUM_COLORS))
    if len(cells) < 2:
        return None
    begun = output[: place + 1].copy()
    begun[place] = (begun[place] + shift) % NUM_COLORS
    return begun
