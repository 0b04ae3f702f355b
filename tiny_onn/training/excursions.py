"""Excursions: the model writes each document's output from what it itself wrote before.

No gradient, no trace (see :mod:`tiny_onn.inference.excursion`). At every step the model gives a
distribution q over the legal tokens; what is fed back for it is

    soft     q itself, as the mean of the token vectors under q
    sample   one token drawn from q
    greedy   the likeliest token
    single   not its own output at all: true tokens, some of them replaced by a draw from what the
             model says after the true ones (scheduled sampling in parallel, arXiv 1906.04331),
             the control that EAVI is compared with

Only colours are ever mixed: where q's choice (its likeliest token, or the drawn one) is NEWLINE or
END, that token is fed, for it decides where the next one stands. ``geometry=truth`` takes NEWLINEs
and the end from the true grid, so an excursion is aligned with the truth token by token;
``geometry=free`` leaves both to the model, under the grammar of grids.

Shapes: G excursions of a batch, B of them still being written, T tokens of the longest, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from tiny_onn.arc.packing import Batch, SoftTokens, pack
from tiny_onn.arc.task import NUM_COLORS
from tiny_onn.arc.tokens import END, IGNORE, MAX_DOCUMENT, VOCAB, Document
from tiny_onn.inference.excursion import Precision, autocast, excursion
from tiny_onn.training.excursion_paths import FreePath, TruePath

Feed = Literal["soft", "sample", "greedy", "single"]
Geometry = Literal["truth", "free"]

LEAVE_SHARE = 0.25
"""Finished excursions leave once they are this share of those being written."""


class Writer(Protocol):
    """What excursions ask of a model (an ``nn.Module``)."""

    def prefill(self, batch: Any, max_new_tokens: int) -> tuple[Tensor, Any]: ...

    def step(
        self, tokens_B: Tensor, positions_B3: Tensor, cache: Any, soft: Any | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Excursion:
    """What a model fed itself after one document's prompt.

    tokens: int64 (T,), END not among them (T is 0 for one that ended at once). probs: float32
    (T, V) what was fed where it was a mixture, rows of zeros elsewhere; None unless feed=soft.
    places: int64 (T + 1, 2), the (x, y) of every fed token and of the one that would have come
    next. ended: False where it was cut at the limit.
    """

    tokens: np.ndarray
    probs: np.ndarray | None
    places: np.ndarray
    ended: bool

    def document(self, truth: Document) -> Document:
        """Prompt, the excursion, and the END that :func:`tiny_onn.arc.packing.pack` takes off."""
        prompt = truth.prefix_len
        output = np.zeros((len(self.tokens) + 1, 3), dtype=np.int64)
        output[:, :2] = self.places
        output[:, 2] = truth.positions[prompt, 2]
        return Document(
            np.concatenate([truth.tokens[:prompt], self.tokens, [END]]),
            np.concatenate([truth.positions[:prompt], output]),
            prompt,
            truth.task,
            truth.view,
        )


@dataclass(frozen=True)
class ExcursionSettings:
    """How excursions are made. temperature: of q, at 0 every feed is greedy; per_document: how
    many of each document; max_tokens: of prompt and output, where a free one is cut;
    single_share: of the colours that feed=single replaces."""

    feed: Feed = "soft"
    geometry: Geometry = "truth"
    temperature: float = 1.0
    per_document: int = 1
    max_tokens: int = MAX_DOCUMENT
    single_share: float = 0.25


def make_excursions(
    model: Writer,
    documents: Sequence[Document],
    settings: ExcursionSettings,
    *,
    precision: Precision = "fp32",
    generator: torch.Generator | None = None,
    begin_with: Sequence[np.ndarray] | None = None,
) -> list[list[Excursion]]:
    """Excursions of every complete document, in the order given.

    All documents are one batch, whose prompts pass the network once, whatever
    ``settings.per_document``; finished excursions leave it.

    Args:
        generator: of drawn tokens (feed=sample), on the model's device.
        begin_with: for every document, output tokens to feed before the model's own (with the
            true geometry only).
    """
    with excursion(model) as device, autocast(device, precision):
        if settings.feed == "single":
            assert begin_with is None and settings.geometry == "truth", settings
            return _replaced(model, documents, settings, generator, device)
        batch = _Excursions(model, documents, settings, generator, device, begin_with)
        batch.run()
        return batch.collect()


def prompt_of(document: Document) -> Document:
    """``document`` up to and including its query's SEP."""
    length = document.prefix_len
    return replace(document, tokens=document.tokens[:length], positions=document.positions[:length])


def _replaced(
    model: Any,
    documents: Sequence[Document],
    settings: ExcursionSettings,
    generator: torch.Generator | None,
    device: torch.device,
) -> list[list[Excursion]]:
    """feed=single: one parallel forward over the truth gives every draw."""
    batch = pack(documents).to(device)
    rows_M = torch.nonzero(batch.targets_N != IGNORE).squeeze(1)
    logits_MV = _finite(model(batch, rows_M).logits_MV[:, :NUM_COLORS])
    targets_M = batch.targets_N[rows_M]
    found: list[list[Excursion]] = [[] for _ in documents]
    for _ in range(settings.per_document):
        if settings.temperature > 0:
            q_MV = _cooled(logits_MV, settings.temperature)
            drawn_M = torch.multinomial(q_MV, 1, generator=generator).squeeze(1)
        else:
            drawn_M = logits_MV.argmax(dim=-1)
        chance_M = torch.rand(len(rows_M), generator=generator, device=device)
        replaced_M = (chance_M < settings.single_share) & (targets_M < NUM_COLORS)
        tokens_M = torch.where(replaced_M, drawn_M, targets_M).cpu().numpy()
        begin = 0
        for i in batch.order:
            document = documents[i]
            length = len(document.tokens) - document.prefix_len
            output = document.positions[document.prefix_len :, :2].copy()
            output[-1] = 0, output[-2, 1] + 1
            found[i].append(Excursion(tokens_M[begin : begin + length - 1], None, output, True))
            begin += length
    return found


def _finite(logits: Tensor) -> Tensor:
    """What is not finite, made finite: the loss of the step is what reports a broken model."""
    most = torch.finfo(logits.dtype).max / 4
    return logits.nan_to_num(nan=0.0, posinf=most, neginf=-most)


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature), for any temperature above 0 without overflow."""
    return ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)


class _Excursions:
    """One batch. ``alive_B`` maps rows to excursions; each document has ``per_document`` of them in
    a row, in the order of the packed prompts."""

    def __init__(
        self,
        model: Writer,
        documents: Sequence[Document],
        settings: ExcursionSettings,
        generator: torch.Generator | None,
        device: torch.device,
        begin_with: Sequence[np.ndarray] | None,
    ) -> None:
        self.model, self.device, self.generator = model, device, generator
        self.settings, self.num_documents = settings, len(documents)
        self.soft = settings.feed == "soft" and settings.temperature > 0
        prompts = pack([prompt_of(d) for d in documents])
        self.order = [i for i in prompts.order for _ in range(settings.per_document)]
        written = [documents[i] for i in self.order]
        if settings.geometry == "truth":
            begun = [] if begin_with is None else [begin_with[i] for i in self.order]
            self.path: TruePath | FreePath = TruePath(written, begun, device)
        else:
            assert begin_with is None, "what is begun with stands in the true geometry"
            self.path = FreePath(written, settings.max_tokens, device)
        # Tokens that may be fed; the last choice of an excursion never is.
        self.most = most = max(self.path.limits)
        self._prefill(prompts)
        num = len(written)
        self.limit_B = torch.tensor(self.path.limits, device=device)
        self.plane_B = torch.tensor([d.positions[d.prefix_len, 2] for d in written], device=device)
        self.tokens_GT = torch.full((num, most), END, device=device)
        self.places_GT2 = torch.zeros(num, most + 1, 2, dtype=torch.int64, device=device)
        self.probs_GTV = torch.zeros(num, most if self.soft else 0, VOCAB, device=device)
        self.length_G = torch.zeros(num, dtype=torch.int64, device=device)
        self.ended_G = torch.zeros(num, dtype=torch.bool, device=device)
        self.alive_B = torch.arange(num, device=device)
        self.open_B = torch.ones(num, dtype=torch.bool, device=device)

    def _prefill(self, prompts: Batch) -> None:
        self.logits_BV, self.cache = self.model.prefill(prompts.to(self.device), self.most + 1)
        if self.settings.per_document > 1:
            index_B = torch.arange(len(self.logits_BV), device=self.device)
            index_B = index_B.repeat_interleave(self.settings.per_document)
            self.logits_BV = self.logits_BV[index_B]
            self.cache.keep(index_B)

    def run(self) -> None:
        for step in range(self.most + 1):
            tokens_B, colors_BV = self._choose()
            self.places_GT2[self.alive_B, step] = self.path.places()
            self.ended_G[self.alive_B] |= self.open_B & (tokens_B == END)
            self.open_B &= (tokens_B != END) & (self.limit_B > step)
            rows = self.path.going_on(self.open_B)
            if rows == [] or step == self.most:
                return
            kept_B = None if rows is None else self._leave(rows)
            if kept_B is not None:
                tokens_B, colors_BV = tokens_B[kept_B], colors_BV[kept_B]
            self._feed(step, tokens_B, colors_BV)

    def _choose(self) -> tuple[Tensor, Tensor]:
        """int64 (B,) chosen tokens and (B, V) q among the colours (read by feed=soft alone)."""
        logits_BV = _finite(self.logits_BV).masked_fill(~self.path.legal(), -torch.inf)
        temperature = self.settings.temperature
        if self.settings.feed == "sample" and temperature > 0:
            q_BV = _cooled(logits_BV, temperature)
            return torch.multinomial(q_BV, 1, generator=self.generator).squeeze(1), q_BV
        tokens_B = logits_BV.argmax(dim=-1)
        if not self.soft:
            return tokens_B, logits_BV
        colors_BV = torch.zeros_like(logits_BV, dtype=torch.float32)
        colors_BV[:, :NUM_COLORS] = _cooled(logits_BV[:, :NUM_COLORS], temperature).float()
        return tokens_B, colors_BV

    def _leave(self, rows: list[int]) -> Tensor | None:
        """Drop all but ``rows`` once the others are many; which ones stay, None if all do.

        Two rows always stay: for one row compiled parts would be compiled anew.
        """
        if len(rows) == 1:
            rows = [rows[0], rows[0] - 1] if rows[0] else [0, 1]
        num = len(self.open_B)
        if num - len(rows) < LEAVE_SHARE * num:
            return None
        index_B = torch.tensor(rows, device=self.device)
        self.path.keep(rows, index_B)
        self.cache.keep(index_B)
        for name in ("alive_B", "open_B", "limit_B", "plane_B"):
            setattr(self, name, getattr(self, name)[index_B])
        return index_B

    def _feed(self, step: int, tokens_B: Tensor, colors_BV: Tensor) -> None:
        """Note what is fed where excursions are open (what closed rows are fed, nobody reads)."""
        self.tokens_GT[self.alive_B, step] = tokens_B
        self.length_G[self.alive_B] += self.open_B
        soft = None
        if self.soft:
            rows_S = torch.nonzero(tokens_B < NUM_COLORS).squeeze(-1)
            soft = SoftTokens(rows_S, colors_BV[rows_S])
            self.probs_GTV[self.alive_B[rows_S], step] = soft.probs_SV
        positions_B3 = torch.cat([self.path.places(), self.plane_B[:, None]], dim=1)
        self.path.advance(tokens_B)
        self.logits_BV = self.model.step(tokens_B, positions_B3, self.cache, soft)

    def collect(self) -> list[list[Excursion]]:
        found: list[list[Excursion]] = [[] for _ in range(self.num_documents)]
        tokens_GT, places_GT2 = self.tokens_GT.cpu().numpy(), self.places_GT2.cpu().numpy()
        probs_GTV = self.probs_GTV.cpu().numpy()
        ended = self.ended_G.tolist()
        for row, (i, length) in enumerate(zip(self.order, self.length_G.tolist(), strict=True)):
            found[i].append(
                Excursion(
                    tokens_GT[row, :length],
                    probs_GTV[row, :length] if self.soft else None,
                    places_GT2[row, : length + 1],
                    ended[row],
                )
            )
        return found
