"""The LightningModule of stage eavi: excursions without gradient, one parallel alignment.

EAVI (Excursion-Alignment Variational Inference). A step of it

1. lets the frozen model write outputs of the batch's documents from its own previous tokens
   (excursions.py);
2. packs what it wrote beside the truth (alignment_batch.py), passes both through the network in
   one parallel forward, and goes back once through the loss (losses/alignment.py, with the
   bound that it comes from)

       loss = w_truth * NLL(truth | true prefixes) + w_excursion * NLL(truth | self-fed prefixes)
            + w_divergence * KL(p on true prefixes, without gradient || p on self-fed ones)

   each summed over its rows (alignment_batch.py says what a row counts), the last two divided by
   eavi.excursions_per_document, and all by the number of the true outputs' tokens. The truth's
   weight is that of all documents, whether they take an excursion or not.

With ``eavi.feed=soft`` no colour is argmaxed on the way but where a table is looked up by token
(DeepEmbed's keys read the likeliest one).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.arc.packing import unpack
from tiny_onn.arc.tokens import Document
from tiny_onn.config.schema import Config
from tiny_onn.inference.excursion import Precision
from tiny_onn.losses.alignment import AlignmentTerms, alignment_terms
from tiny_onn.losses.language import IGNORE
from tiny_onn.model.tiny_onn import ModelOutput
from tiny_onn.training.alignment_batch import align
from tiny_onn.training.datamodule import TrainBatch, prepare, rounding
from tiny_onn.training.distributed import StepChannel
from tiny_onn.training.excursion_tally import ExcursionTally
from tiny_onn.training.excursions import Excursion, ExcursionSettings, make_excursions
from tiny_onn.training.pretrain import Pretrain
from tiny_onn.training.step_seed import step_seed


class Eavi(Pretrain):
    """Args:
    model: already trained.
    config: the run's; rank: number of this process.
    """

    def __init__(self, model: nn.Module, config: Config, rank: int = 0) -> None:
        super().__init__(model, config.optim, config.moe, config.k24)
        self.eavi = config.eavi
        self._causal = config.model.mask == "causal"
        self._nsa = config.nsa if config.model.attention == "nsa" else None
        # On a CPU a step of decoding is slower in bf16 (exp/LOG.md).
        self._precision: Precision = "bf16" if config.trainer.precision == "bf16" else "fp32"
        self._seed, self._rank = config.seed, rank
        self._settings = ExcursionSettings(
            feed=config.eavi.feed,
            geometry=config.eavi.geometry,
            temperature=config.eavi.temperature,
            per_document=config.eavi.excursions_per_document,
            max_tokens=config.data.max_tokens,
            single_share=config.eavi.single_share,
        )
        self._tally = ExcursionTally()
        self._train: TrainBatch | None = None
        self._aligned = torch.empty(0), torch.empty(0), torch.empty(0)

    def begin_step(self, batch: TrainBatch, share: float) -> TrainBatch:
        """Excursions of a part of the batch's documents, and the super-batch of all of them."""
        began = time.monotonic()
        device = batch.rows_M.device
        generator = torch.Generator(device)
        # Not the stream that dropout draws from.
        generator.manual_seed(step_seed(self._seed, batch.step, self._rank) ^ 0xE471)
        documents = unpack(batch.batch)
        chosen = self._choose(documents, share, batch.step)
        excursions: list[list[Excursion]] = [[] for _ in documents]
        passed = 0
        if chosen:
            found = make_excursions(
                self.model,
                [documents[i] for i in chosen],
                self._settings,
                precision=self._precision if device.type == "cuda" else "fp32",
                generator=generator,
            )
            for i, own in zip(chosen, found, strict=True):
                excursions[i] = own
                # One forward over the truth gives all draws of feed=single.
                fed = own[:1] if self.eavi.feed == "single" else own
                passed += documents[i].prefix_len + sum(len(e.tokens) for e in fed)
        aligned = align(documents, excursions)
        train = prepare(aligned.batch, batch.step, self._causal, rounding(device), self._nsa)
        filler = len(train.rows_M) - len(aligned.rows_M)
        self._aligned = (
            F.pad(aligned.truth_M, (0, filler)).to(device),
            F.pad(aligned.weight_M, (0, filler)).to(device),
            F.pad(aligned.twin_M, (0, filler), value=IGNORE).to(device),
        )
        self._train = replace(train, num_outputs=batch.num_outputs, excursion_tokens=passed).to(
            device
        )
        self._tally.excursions(documents, excursions, aligned, time.monotonic() - began)
        return self._train

    def _choose(self, documents: Sequence[Document], share: float, step: int) -> list[int]:
        """Documents that take an excursion at this share of the budget.

        Neighbours by length, from a random one on (the shortest follow the longest): all are
        equally likely, and few write on while most have ended.
        """
        num = len(documents)
        generator = torch.Generator().manual_seed(step_seed(self._seed, step, self._rank) ^ 0xC403)
        fraction, first = torch.rand(2, generator=generator).tolist()
        wanted = self.eavi.share_start + (self.eavi.share_end - self.eavi.share_start) * share
        # A fraction of a document is drawn, so that small batches take their share too.
        count = min(num, int(wanted * num + fraction))
        lengths = [len(d.tokens) - d.prefix_len for d in documents]
        by_length = sorted(range(num), key=lengths.__getitem__)
        return [by_length[(int(first * num) + k) % num] for k in range(count)]

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """The alignment of what :meth:`begin_step` prepared from ``batch``."""
        assert self._train is not None and self._train.step == batch.step, batch.step
        scale = self.trainer.world_size / self.global_targets
        terms, output = self.align(self._train)
        self._train = None
        self.language_loss = (terms.truth * scale).detach()
        return self.with_sdl(self.weighted(terms) * scale, output)

    def align(self, train: TrainBatch) -> tuple[AlignmentTerms, ModelOutput]:
        """One forward over the super-batch of the last :meth:`begin_step`."""
        output = self.model(train.batch, train.rows_M, train.num_targets)
        terms = alignment_terms(output.logits_MV, train.targets_M, *self._aligned)
        self._tally.terms(terms)
        return terms, output

    def weighted(self, terms: AlignmentTerms) -> Tensor:
        """The loss, summed over the rows."""
        eavi = self.eavi
        own = eavi.excursion_weight * terms.excursion + eavi.divergence_weight * terms.divergence
        return eavi.truth_weight * terms.truth + own / eavi.excursions_per_document

    def take_metrics(self, channel: StepChannel) -> dict[str, float]:
        return super().take_metrics(channel) | self._tally.take(channel)
