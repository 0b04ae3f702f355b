"""What excursions and alignments of many steps were like, for the log."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiny_onn.arc.task import NUM_COLORS
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
        self._documents = self._taken = self._excursions = self._perfect = self._cut = 0
        self._colors = 0
        self._fed = self._right = self._true_rows = 0
        self._own_rows = self._seconds = 0.0
        self._steps = 0
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
            self._taken += bool(own)
            for excursion in own:
                wanted = labels(excursion, document)[0][: len(excursion.tokens)]
                right = excursion.tokens == wanted
                color = excursion.tokens < NUM_COLORS
                self._excursions += 1
                self._fed += len(wanted)
                self._colors += int(color.sum())
                self._right += int(right[color].sum())
                whole = len(wanted) == len(document.tokens) - document.prefix_len - 1
                self._perfect += whole and bool(right.all())
                self._cut += not excursion.ended
        self._documents += len(documents)
        self._own_rows += float(aligned.weight_M.sum())
        self._true_rows += int(aligned.truth_M.sum())
        self._seconds += seconds
        self._steps += 1

    def terms(self, terms: AlignmentTerms) -> None:
        """One step's sums."""
        sums = torch.stack([terms.excursion, terms.truth, terms.divergence]).detach().double()
        self._terms = sums if self._terms is None else self._terms + sums

    def take(self, channel: StepChannel) -> dict[str, float]:
        """Means of all processes since the last call, under ``eavi/``; collective. What there was
        nothing of is left out. The divergence is a mean over all rows of excursions, those without
        a place in the truth included."""
        terms = [0.0, 0.0, 0.0] if self._terms is None else self._terms.tolist()
        names = ("own_rows", "true_rows", "documents", "taken", "excursions", "perfect")
        names += ("cut", "fed", "colors", "right", "seconds", "steps")
        rows = channel.gather(*terms, *(getattr(self, f"_{name}") for name in names))
        excursion, truth, divergence, *counts = rows.sum(dim=0).tolist()
        count = dict(zip(names, counts, strict=True))
        self._begin()
        quotients = {
            "excursion_nll": (excursion, count["own_rows"]),
            "truth_nll": (truth, count["true_rows"]),
            "divergence": (divergence, count["own_rows"]),
            "share": (count["taken"], count["documents"]),
            "own_accuracy": (count["right"], count["colors"]),
            "perfect": (count["perfect"], count["excursions"]),
            "cut": (count["cut"], count["excursions"]),
            "excursion_tokens_per_s": (count["fed"] * channel.world, count["seconds"]),
            "excursion_seconds_per_step": (count["seconds"], count["steps"]),
        }
        return {f"eavi/{k}": a / b for k, (a, b) in quotients.items() if b}
