"""The endless stream of training batches, from any step on.

Shapes: N packed tokens, M rows with a target, B documents.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tiny_onn.arc.packing import Batch, fill
from tiny_onn.arc.tokens import IGNORE
from tiny_onn.config.schema import NsaConfig
from tiny_onn.training.attention_work import AttentionWork, attention_work
from tiny_onn.training.signals import SIGNALS

CPU_ROUNDING = 64
"""On a CPU, N and M are multiples of this: every new shape costs time (exp/LOG.md)."""


class Epochs(Protocol):
    """What the stream needs of :class:`tiny_onn.arc.dataset.EpochBatches`."""

    def num_batches(self, epoch: int) -> int: ...

    def batch(self, epoch: int, index: int) -> Batch: ...


@dataclass(frozen=True)
class TrainBatch:
    """A packed batch and what the loader can work out before the accelerator needs it.

    rows_M, targets_M: int64, the rows that carry a target and their targets (filled up with row 0
    and IGNORE where batches are rounded). num_tokens, num_targets: without filler. attention: its
    work. step: number of the step (from 0) it is for. num_outputs: targets that the loss is a mean
    over, those of the true outputs. excursion_tokens: what was passed through the network without
    gradient to make it.
    """

    batch: Batch
    rows_M: Tensor
    targets_M: Tensor
    num_tokens: int
    num_targets: int
    attention: AttentionWork
    step: int
    num_outputs: int
    excursion_tokens: int = 0

    def pin_memory(self) -> TrainBatch:
        """What the data loader calls for a GPU: copies from page-locked memory do not wait."""
        return replace(
            self,
            batch=self.batch.pin_memory(),
            rows_M=self.rows_M.pin_memory(),
            targets_M=self.targets_M.pin_memory(),
        )

    def to(self, device: torch.device) -> TrainBatch:
        return replace(
            self,
            batch=self.batch.to(device),
            rows_M=self.rows_M.to(device, non_blocking=True),
            targets_M=self.targets_M.to(device, non_blocking=True),
        )


def prepare(
    batch: Batch,
    step: int,
    causal: bool = False,
    multiple: int = 1,
    nsa: NsaConfig | None = None,
) -> TrainBatch:
    """Rows, targets and counts of ``batch``; N and M are rounded up to a multiple.

    ``nsa``: its settings if that is how the model attends; None for full attention.
    """
    rows_M = (batch.targets_N != IGNORE).nonzero().squeeze(1)
    filler = -len(rows_M) % multiple
    return TrainBatch(
        batch=fill(batch, multiple),
        rows_M=F.pad(rows_M, (0, filler)),
        targets_M=F.pad(batch.targets_N[rows_M], (0, filler), value=IGNORE),
        num_tokens=batch.num_tokens,
        num_targets=len(rows_M),
        attention=attention_work(batch.layout, causal, nsa),
        step=step,
        num_outputs=len(rows_M),
    )


class Positions:
    """Which (epoch, batch) each step reads: epoch after epoch, each with its own length."""

    def __init__(self, num_batches: Callable[[int], int]) -> None:
        self._num_batches = num_batches
        self._ends: list[int] = []

    def _end(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            start = self._ends[-1] if self._ends else 0
            self._ends.append(start + self._num_batches(len(self._ends)))
        return self._ends[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, index in the epoch) of step number ``step``."""
        epoch = 0
        while self._end(epoch) <= step:
            epoch += 1
        return epoch, step - (self._end(epoch - 1) if epoch else 0)

    def steps(self, epochs: float) -> int:
        """Steps in the first ``epochs`` epochs; a fraction of the last one counts, at least 1."""
        whole = int(epochs)
        start = self._end(whole - 1) if whole else 0
        fraction = epochs - whole
        if fraction:
            start += round(fraction * (self._end(whole) - start))
        return max(1, start)


class StepStream(IterableDataset):
    """Batches of steps ``first``, ``first + 1``, ...; worker w of W makes every W-th one.

    A data loader asks its workers in turn, so the order is that of a single process.
    """

    def __init__(
        self,
        epochs: Epochs,
        first: int = 0,
        causal: bool = False,
        multiple: int = 1,
        nsa: NsaConfig | None = None,
    ) -> None:
        self.epochs, self.first, self.causal, self.multiple = epochs, first, causal, multiple
        self.nsa = nsa
        self.positions = Positions(epochs.num_batches)

    def __iter__(self) -> Iterator[TrainBatch]:
        worker = get_worker_info()
        step, stride = self.first, 1
        if worker is not None:
            step, stride = self.first + worker.id, worker.num_workers
        while True:
            batch = self.epochs.batch(*self.positions.locate(step))
            yield prepare(batch, step, self.causal, self.multiple, self.nsa)
            step += stride


def rounding(device: torch.device) -> int:
    """What the rows of a batch are rounded up to on ``device``."""
    return CPU_ROUNDING if device.type == "cpu" else 1


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: a worker that died of it would end training
    before it could save. Workers end with the process that started them."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class PretrainData(L.LightningDataModule):
    """Hands the stream to Lightning. ``make_epochs(rank, world)`` is called when both are known."""

    def __init__(
        self,
        make_epochs: Callable[[int, int], Epochs],
        first_step: int = 0,
        workers: int = 0,
        causal: bool = False,
        nsa: NsaConfig | None = None,
    ) -> None:
        super().__init__()
        self._make_epochs = make_epochs
        self._first_step, self._workers = first_step, workers
        self._causal, self._nsa = causal, nsa

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        epochs = self._make_epochs(self.trainer.global_rank, self.trainer.world_size)
        multiple = rounding(self.trainer.strategy.root_device)
        return DataLoader(
            StepStream(epochs, self._first_step, self._causal, multiple, self._nsa),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=4 if self._workers else None,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            worker_init_fn=leave_signals_to_the_trainer,
        )

    def transfer_batch_to_device(
        self, batch: TrainBatch, device: torch.device, dataloader_idx: int
    ) -> Any:
        return batch if device.type == "cpu" else batch.to(device)
