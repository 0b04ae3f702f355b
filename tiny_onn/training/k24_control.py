"""What a run does to its 2:4 masks between steps: schedule, noise, activity, resets, revival.

- Before a step: kappa and tau of its place in the schedule, and the seed of its noise, a function
  of (seed, step), so that a resumed run draws the same masks. All processes draw the same.
- After it: what inputs were seen, over all processes, enters the activity's moving average. Every
  ``reset_interval`` steps that is a soft reset: the average jumps to the batch's, for statistics of
  an old input distribution mislead the score. With ``reset_kl`` it waits for a step that moved the
  model's own predictions on its batch by more than that, KL(before || after) in nats a token.
- Every ``revive_window`` steps: see k24_revival.py.

The moving averages are buffers of the model. What else there is to go on from (the window's
selections) is in :meth:`K24Control.snapshot`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.arc.tokens import IGNORE
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.inference.excursion import Precision, autocast, excursion
from tiny_onn.model.tiny_onn import TinyONN
from tiny_onn.sparse.k24_layer import PatternMask
from tiny_onn.sparse.k24_schedule import ScheduleState
from tiny_onn.training.datamodule import TrainBatch
from tiny_onn.training.ema import WeightEma
from tiny_onn.training.k24_revival import revive
from tiny_onn.training.optim import MuonAdamW
from tiny_onn.training.pretrain import Pretrain
from tiny_onn.training.step_seed import step_seed

NOISE, REVIVAL = 0x24, 0x2424
"""Streams of their own, not the one that dropout draws from."""


class K24Control(L.Callback):
    """Must come before the callback that saves checkpoints.

    Args:
        config: the run's ``k24`` section.
        seed: the run's.
        log_every_steps: how often :meth:`metrics` is asked.
        ema: the weights' moving average, if there is one by then.
        share: how much of the budget is spent, the same number in all processes.
        precision: the run's, in which predictions are compared.
        restored: what :meth:`snapshot` returned, to go on from.
    """

    def __init__(
        self,
        config: K24Config,
        seed: int,
        log_every_steps: int = 1,
        *,
        ema: Callable[[], WeightEma | None] = lambda: None,
        share: Callable[[], float] = lambda: 0.0,
        precision: Precision = "fp32",
        restored: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.seed, self._log_every_steps = config, seed, log_every_steps
        self._ema, self._share, self._restored = ema, share, restored
        self._precision: Precision = precision
        self._masks: list[tuple[PatternMask, nn.Parameter]] = []
        self._before: Tensor | None = None
        self.resets = self.revived = 0

    # Lightning's hooks, in the order in which they run.

    def on_train_start(self, trainer: L.Trainer, module: Pretrain) -> None:
        self.attach(module.model)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: Pretrain, batch: TrainBatch, index: int
    ) -> None:
        self.begin_step(batch.step)
        if self.config.reset_kl and self._may_reset(batch.step):
            self._before = predictions(module.model, batch, self._precision)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Pretrain, outputs: Any, batch: TrainBatch, index: int
    ) -> None:
        moved = None
        if self._before is not None:
            moved = prediction_kl(self._before, predictions(module.model, batch, self._precision))
            self._before = None
        self.end_step(trainer.optimizers[0], batch.step, moved)

    # The same without Lightning.

    def attach(self, model: TinyONN) -> None:
        """Steer this model's masks, or go on with the restored counts."""
        assert model.k24 is not None, "a model with weights=k24"
        self._masks, self._state = model.masked_weights, model.k24.state
        for pattern, _ in self._masks:
            pattern.track = bool(self.config.revive_window)
        if self._restored is not None:
            self.resets, self.revived = self._restored["resets"], self._restored["revived"]
            for (pattern, weight), selected in zip(
                self._masks, self._restored["selected"], strict=True
            ):
                pattern.selected = None if selected is None else selected.to(weight.device)

    def snapshot(self) -> dict[str, Any]:
        """All there is to go on from, as CPU tensors; the window's phase follows from the step."""
        selected = [None if p.selected is None else p.selected.cpu() for p, _ in self._masks]
        return {"resets": self.resets, "revived": self.revived, "selected": selected}

    def metrics(self) -> dict[str, float]:
        """For the log: the schedule, how often a sampled pattern is the likeliest, resets so far
        and weights revived so far. Waits."""
        found = {
            "k24/kappa": self._state.kappa,
            "k24/tau": self._state.tau,
            "k24/resets": float(self.resets),
            "k24/revived": float(self.revived),
        }
        agreements = [p.agreement for p, _ in self._masks if p.agreement is not None]
        if agreements:
            found["k24/agreement"] = float(torch.stack(agreements).mean())
        return found

    def begin_step(self, step: int) -> None:
        """Schedule and noise of step number ``step`` (from 0)."""
        state: ScheduleState = self._state
        if self.config.schedule_steps:
            state.set_step(step, self.config.schedule_steps)
        else:
            state.set_progress(min(1.0, self._share()))
        state.seed = step_seed(self.seed, step, 0) ^ NOISE
        state.watch = (step + 1) % self._log_every_steps == 0

    def end_step(self, optimizer: MuonAdamW, step: int, moved: float | None = None) -> None:
        """Take the step's statistics in; reset and revive where that is due.

        ``moved``: KL by which the step moved predictions, where ``reset_kl`` asks for it.
        """
        resets = self._may_reset(step) and (
            not self.config.reset_kl or (moved is not None and moved > self.config.reset_kl)
        )
        self.resets += resets
        found = [pattern.activity.take() for pattern, _ in self._masks]
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([f.flatten() for f in found])
            dist.all_reduce(flat)
            parts = flat.split([f.numel() for f in found])
            found = [part.view_as(f) for part, f in zip(parts, found, strict=True)]
        ratio = self.config.reset_ratio if resets else None
        for (pattern, _), sums_AX in zip(self._masks, found, strict=True):
            pattern.activity.commit(sums_AX, ratio)
        if self.config.revive_window and (step + 1) % self.config.revive_window == 0:
            self._revive(optimizer, step)

    def _may_reset(self, step: int) -> bool:
        interval = self.config.reset_interval
        due = interval > 0 and (step + 1) % interval == 0
        return due and self._share() <= self.config.until_share

    def _revive(self, optimizer: MuonAdamW, step: int) -> None:
        late = self._share() > self.config.until_share
        for pattern, weight in self._masks:
            selected_AOI, pattern.selected = pattern.selected, None
            if late or selected_AOI is None:
                continue
            generator = torch.Generator()
            generator.manual_seed(step_seed(self.seed, step, pattern.place) ^ REVIVAL)
            self.revived += revive(
                pattern,
                weight,
                selected_AOI,
                self.config.revive_share,
                generator,
                optimizer,
                self._ema(),
            )


def predictions(model: TinyONN, batch: TrainBatch, precision: Precision = "fp32") -> Tensor:
    """float32 (M, V): log-probabilities at the batch's targets, in evaluation mode, no trace."""
    with excursion(model) as device, autocast(device, precision):
        logits_MV = model(batch.batch, batch.rows_M, batch.num_targets).logits_MV
        return logits_MV[batch.targets_M != IGNORE].float().log_softmax(dim=-1)


def prediction_kl(before_MV: Tensor, after_MV: Tensor) -> float:
    """Mean over rows of KL(before || after) in nats, over all processes. Waits."""
    kl = F.kl_div(after_MV, before_MV, reduction="sum", log_target=True)
    both = torch.stack([kl, kl.new_tensor(float(len(before_MV)))])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(both)
    return float(both[0] / both[1].clamp(min=1))
