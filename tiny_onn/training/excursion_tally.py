"""What excursions and alignments of many steps were like, for the log."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiny_onn.arc.tokens import Document
from tiny_onn.losses.alignment import AlignmentTerms
from tiny_onn.training.alignment_batch import AlignmentBatch, labels
from tiny_onn.training.distributed import StepChannel
from tiny_onn.training.excursions import Excursion


class ExcursionTally:
    """Sums since they were last taken. Loss terms stay on their device until then."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._documents = self._excursions = self._perfect = self._cut = 0
        self._fed = self._right = self._true_rows = self._own_rows = self._twins = 0
        self._seconds = 0.0
        self._terms: Tensor | None = None

    def excursions(
        self,
        documents: Sequence[Document],
        excursions: Sequence[Sequence[Excursion]],
        aligned: AlignmentBatch,
        seconds: float,
    ) -> None:
        """One step's; ``seconds``: what it took to make and pack them."""
        for document, own in zip(documents, excursions, strict=True):
            for excursion in own:
                wanted = labels(excursion, document)[0][: len(excursion.tokens)]
                right = int((excursion.tokens == wanted).sum())
                self._excursions += 1
                self._fed += len(wanted)
                self._right += right
                whole = len(wanted) == len(document.tokens) - document.prefix_len - 1
                self._perfect += whole and right == len(wanted)
                self._cut += not excursion.ended
        self._documents += len(documents)
        own_rows = int(aligned.excursion_M.sum())
        self._own_rows += own_rows
        self._true_rows += len(aligned.excursion_M) - own_rows
        self._twins += int((aligned.twin_M >= 0).sum())
        self._seconds += seconds

    def terms(self, terms: AlignmentTerms) -> None:
        """One step's sums."""
        sums = torch.stack([terms.excursion, terms.truth, terms.divergence]).detach().double()
        self._terms = sums if self._terms is None else self._terms + sums

    def take(self, channel: StepChannel) -> dict[str, float]:
        """Means of all processes since the last call, under ``eavi/``; collective. What there was
        nothing of is left out."""
        terms = [0.0, 0.0, 0.0] if self._terms is None else self._terms.tolist()
        rows = channel.gather(
            *terms, self._own_rows, self._true_rows, self._twins, self._excursions, self._documents,
            self._fed, self._right, self._perfect, self._cut, self._seconds,
        )  # fmt: skip
        (excursion, truth, divergence, own_rows, true_rows, twins, excursions, documents,
         fed, right, perfect, cut, seconds) = rows.sum(dim=0).tolist()  # fmt: skip
        self._begin()
        quotients = {
            "excursion_nll": (excursion, own_rows),
            "truth_nll": (truth, true_rows),
            "divergence": (divergence, twins),
            "share": (excursions, documents),
            "own_accuracy": (right, fed),
            "perfect": (perfect, excursions),
            "cut": (cut, excursions),
            "excursion_tokens_per_s": (fed * channel.world, seconds),
        }
        metrics = {f"eavi/{k}": a / b for k, (a, b) in quotients.items() if b}
        return metrics | {"eavi/excursion_seconds": seconds / channel.world}
