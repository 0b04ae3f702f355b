"""The super-batch of EAVI: every document once as it is, and once for each of its excursions.

An excursion that wrote the truth itself is not packed a second time: its rows are the truth's, bit
for bit, which count for it too.

Shapes: N packed tokens, M rows with a target, T tokens of an excursion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tiny_onn.arc.packing import Batch, SoftTokens, pack
from tiny_onn.arc.tokens import END, IGNORE, NEWLINE, Document
from tiny_onn.training.excursions import Excursion


@dataclass(frozen=True)
class AlignmentBatch:
    """batch: its targets are the truth's, for excursions by place. rows_M: int64, rows with a
    target, ascending. truth_M: bool, rows of true prefixes. weight_M: float64, how much a row
    counts in the excursions' terms: one of an excursion 1, or T_true / T_own if that is less, so
    that no long one drowns the others; one of the truth the number of excursions that wrote the
    truth. twin_M: int64, for a row of an excursion the index in M of the true prefix's row for the
    same place; IGNORE where there is none, and for rows of the truth."""

    batch: Batch
    rows_M: Tensor
    truth_M: Tensor
    weight_M: Tensor
    twin_M: Tensor


def align(
    documents: Sequence[Document], excursions: Sequence[Sequence[Excursion]]
) -> AlignmentBatch:
    """Pack complete ``documents`` and the excursions of each (there may be none)."""
    copies = [0] * len(documents)
    owners: list[int] = []
    written: list[Excursion] = []
    for i, own in enumerate(excursions):
        for excursion in own:
            if _is_truth(excursion, documents[i]):
                copies[i] += 1
            else:
                owners.append(i)
                written.append(excursion)
    own_documents = [e.document(documents[i]) for i, e in zip(owners, written, strict=True)]
    batch = pack([*documents, *own_documents])
    targets_N = batch.targets_N.numpy().copy()
    place_N = np.full(len(targets_N), IGNORE)  # of a target: its place in the true output
    owner_N = np.zeros(len(targets_N), dtype=np.int64)
    truth_N = np.zeros(len(targets_N), dtype=bool)
    weight_N = np.zeros(len(targets_N))
    rows_S: list[np.ndarray] = []
    probs_SV: list[np.ndarray] = []
    begin = 0
    for number, length in zip(batch.order, batch.layout.lengths, strict=True):
        own = number >= len(documents)
        owner = owners[number - len(documents)] if own else number
        truth = documents[owner]
        first = begin + truth.prefix_len
        rows = slice(first - 1, begin + length)  # those that predict an output token
        output = len(truth.tokens) - truth.prefix_len
        owner_N[rows], truth_N[rows] = owner, not own
        weight_N[rows] = min(1.0, output / (rows.stop - rows.start)) if own else copies[owner]
        if own:
            excursion = written[number - len(documents)]
            targets_N[rows], place_N[rows] = labels(excursion, truth)
            if excursion.probs is not None:
                mixed = np.flatnonzero(excursion.probs.any(axis=1))
                rows_S.append(first + mixed)
                probs_SV.append(excursion.probs[mixed])
        else:
            place_N[rows] = np.arange(output)
        begin += length
    rows_M = np.flatnonzero(targets_N != IGNORE)
    soft = None
    if rows_S:
        soft = SoftTokens(
            torch.from_numpy(np.concatenate(rows_S)), torch.from_numpy(np.concatenate(probs_SV))
        )
    return AlignmentBatch(
        replace(batch, targets_N=torch.from_numpy(targets_N), soft=soft),
        torch.from_numpy(rows_M),
        torch.from_numpy(truth_N[rows_M]),
        torch.from_numpy(weight_N[rows_M]),
        torch.from_numpy(_twins(owner_N[rows_M], place_N[rows_M], truth_N[rows_M])),
    )


def _is_truth(excursion: Excursion, truth: Document) -> bool:
    """Whether it fed itself the true output, token by token, and ended."""
    output = truth.tokens[truth.prefix_len : -1]
    return excursion.probs is None and excursion.ended and np.array_equal(excursion.tokens, output)


def labels(excursion: Excursion, truth: Document) -> tuple[np.ndarray, np.ndarray]:
    """What the truth wants at each place that the excursion came to, and which of its output
    tokens that is: int64 (T + 1,) twice.

    Beside a true row NEWLINE is wanted, below the last one END; the output token of such a surplus
    place is IGNORE, but for the place where each stands in the truth.
    """
    output = truth.tokens[truth.prefix_len :]
    width = int(np.flatnonzero(output == NEWLINE)[0])
    height = (len(output) - 1) // (width + 1)
    x, y = excursion.places.T
    inside = (x <= width) & (y < height) | (x == 0) & (y == height)
    place = np.where(inside, y * (width + 1) + x, IGNORE)
    surplus = np.where(y < height, NEWLINE, END)
    return np.where(inside, output[place], surplus), place


def _twins(owner_M: np.ndarray, place_M: np.ndarray, truth_M: np.ndarray) -> np.ndarray:
    """For every row of an excursion, the row of its truth that predicts the same place."""
    span = int(place_M.max()) + 1
    key_M = owner_M * span + place_M
    row_of = np.full((int(owner_M.max()) + 1) * span, IGNORE)
    true_M = np.flatnonzero(truth_M)
    row_of[key_M[true_M]] = true_M
    return np.where(~truth_M & (place_M != IGNORE), row_of[key_M.clip(min=0)], IGNORE)
