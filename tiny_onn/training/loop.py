"""The callback that steers a run: budget, schedule, checkpoints, hold-outs, the end.

Lightning runs the fit loop; this decides between its steps, and run_log.py tells of them. All
processes take every decision alike: what only one of them knows (its clock, a signal) goes through
the StepChannel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from tiny_onn.config.schema import Config
from tiny_onn.model.ffn import act24_layers
from tiny_onn.training.activation_drops import count_drops
from tiny_onn.training.attention_work import AttentionWork
from tiny_onn.training.budget import Budget, lr_scale
from tiny_onn.training.datamodule import TrainBatch
from tiny_onn.training.distributed import StepChannel, whole
from tiny_onn.training.ema import WeightEma
from tiny_onn.training.expert_reset import ExpertReset
from tiny_onn.training.finite import require_finite_loss, require_finite_weights
from tiny_onn.training.k24_control import K24Control
from tiny_onn.training.loss_monitor import LossMonitor
from tiny_onn.training.optim import MuonAdamW
from tiny_onn.training.pretrain import Pretrain
from tiny_onn.training.progress import ProgressLine
from tiny_onn.training.resume import NEWEST, STATE_KEY, AtomicCheckpointIO
from tiny_onn.training.routing_monitor import RoutingMonitor
from tiny_onn.training.row_tables import RowTables
from tiny_onn.training.run_log import RunLog
from tiny_onn.training.signals import StopSignals
from tiny_onn.training.step_seed import seed_step, step_seed
from tiny_onn.training.totals import RunTotals


class RunLoop(L.Callback):
    """Args:
    config: the run's.
    budget: decides share and end.
    signals: stop requests.
    identity: entries of the resume file that tell whose it is (config, data).
    restored: our entries of the resume file to go on from.
    holdout: measures the hold-out with the weights that the model holds; None for no hold-out.
    finish: takes the final weights (averaged, full, on the CPU) in the first process.
    reset: lets idle experts be reborn; its state is saved with the run's.
    tables: DeepEmbed's tables on disk, if there are any.
    k24: steers 2:4 masks, if there are any; its state is saved with the run's.
    """

    def __init__(
        self,
        config: Config,
        budget: Budget,
        signals: StopSignals,
        progress: ProgressLine,
        identity: dict[str, Any],
        restored: dict[str, Any] | None = None,
        holdout: Callable[[], dict[str, float]] | None = None,
        finish: Callable[[dict[str, Tensor]], None] | None = None,
        reset: ExpertReset | None = None,
        tables: RowTables | None = None,
        k24: K24Control | None = None,
    ) -> None:
        self.config = config
        self.budget = budget
        self.signals = signals
        self.progress = progress
        self.identity = identity
        self.holdout = holdout
        self.finish = finish
        self.reset, self.k24 = reset, k24
        self.routing = RoutingMonitor()
        self.share = 0.0
        self.tables = tables
        self.final_holdout: dict[str, float] | None = None
        self.facts: dict[str, Any] = {}
        self.totals = RunTotals(**restored["totals"]) if restored else RunTotals()
        self.told = RunLog(progress, self.totals, budget, self.routing, reset, k24)
        self.ema: WeightEma | None = None
        self.saved_step = self.totals.step if restored else None
        self.stopped_by: int | None = None
        self._restored_ema = restored["ema"] if restored else None
        self._folder = Path(config.out)
        self._holdout_seconds = 0.0

    # Lightning's hooks, in the order in which they run.

    def on_fit_start(self, trainer: L.Trainer, module: Pretrain) -> None:
        self.channel = StepChannel()
        self.monitor = LossMonitor(module.device)
        self._on_cpu = module.device.type == "cpu"

    def on_train_start(self, trainer: L.Trainer, module: Pretrain) -> None:
        if self.config.optim.ema_decay > 0:
            self.ema = WeightEma(module.model, self.config.optim.ema_decay)
            if self._restored_ema is not None:
                self.ema.load_state_dict(self._restored_ema)
        self._restored_ema = None
        self.signals.install()
        self.signals.deferred = True
        self.told.begin_window()
        self._last_save = time.monotonic()
        self._prepare_next_step(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: Pretrain, batch: TrainBatch, index: int
    ) -> None:
        assert batch.step == self.totals.step, (batch.step, self.totals.step)
        count_drops(module.model, (batch.step + 1) % self.config.trainer.log_every_steps == 0)
        batch = module.begin_step(batch, self.share)
        counts = self.channel.gather(
            batch.num_outputs,
            batch.num_targets,
            batch.num_tokens,
            len(batch.batch.task_B),
            batch.excursion_tokens,
            *batch.attention,
        )
        outputs, targets, tokens, documents, passed, *work = (int(n) for n in counts.sum(dim=0))
        module.global_targets = outputs
        self.totals.targets += targets
        self.totals.tokens += tokens
        self.totals.documents += documents
        if any(layer.is_sparse for layer in act24_layers(module.model)):
            self.totals.sparse_targets += targets
            self.totals.sparse_tokens += tokens
        self.totals.excursion_tokens += passed
        for name, count in AttentionWork(*work)._asdict().items():
            setattr(self.totals, name, getattr(self.totals, name) + count)
        # Dropout draws from a stream of its own for every step and process, so a resumed run
        # needs no saved generator state.
        seed_step(module.device, step_seed(self.config.seed, batch.step, trainer.global_rank))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: Pretrain,
        outputs: Any,
        batch: TrainBatch,
        index: int,
    ) -> None:
        step = self.totals.step
        self.totals.step = step + 1
        loss = outputs["loss"].detach()
        told = loss if module.language_loss is None else module.language_loss
        self.monitor.add(step, loss, told)
        if module.routing is not None:
            self.routing.add(module.routing, module.sdl)
        logging = self.totals.step % self.config.trainer.log_every_steps == 0
        if self._on_cpu:  # an accelerator is waited for only at log steps
            self.told.smooth(float(told))
        if self._on_cpu or logging:
            require_finite_loss(self.monitor, self.channel, self.saved_step)
        if self.ema is not None:
            self.ema.update()
        self.budget.end_step()
        if logging:
            mean = float(self.channel.gather(self.monitor.take_mean()).mean())
            if not self._on_cpu:
                self.told.smooth(mean, self.config.trainer.log_every_steps)
            more = module.take_metrics(self.channel)
            if module.mask_diversity is not None:
                more |= {"k24/diversity": float(module.mask_diversity)}
            self.told.log(trainer, mean, module.grad_norm, more)
        else:
            self.told.show_if_due(trainer)
        self._prepare_next_step(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: Pretrain, checkpoint: dict[str, Any]
    ) -> None:
        self.totals.expert_pairs += self.routing.take_pairs()
        checkpoint[STATE_KEY] = {
            **self.identity,
            "totals": asdict(self.totals),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "expert_reset": None if self.reset is None else self.reset.snapshot(),
            "k24": None if self.k24 is None else self.k24.snapshot(),
        }

    def on_train_end(self, trainer: L.Trainer, module: Pretrain) -> None:
        self.progress.close()
        self.signals.deferred = False
        self.totals.expert_pairs += self.routing.take_pairs()
        if self.stopped_by is not None:
            return
        with self._averaged():
            weights = {
                k: whole(v.detach()).to("cpu", copy=True)
                for k, v in module.model.state_dict().items()
            }
        if trainer.is_global_zero and self.finish is not None:
            self.finish(weights)
        if self.holdout is not None:
            self.final_holdout = self.measure_holdout(trainer)

    # Between two steps.

    def _prepare_next_step(self, trainer: L.Trainer) -> None:
        """Stop, checkpoint, measure, then set the learning rate; begins the step's clock."""
        # The first process's clock decides for all; a signal to any of them counts.
        elapsed, step = self.budget.elapsed(), self.totals.step
        rows = self.channel.gather(
            elapsed,
            self.budget.share(elapsed, step),
            self.budget.done(elapsed, step),
            time.monotonic() - self._last_save,
            self.budget.has_time_for(1.5 * self._holdout_seconds, elapsed),
            self.signals.received or 0,
        )
        elapsed, share, done, since_save, has_time, _ = rows[0].tolist()
        signum = int(rows[:, -1].max())
        self.totals.seconds, self.share = elapsed, share
        if done or signum:
            self.stopped_by = None if done else signum
            trainer.should_stop = True
            if step != self.saved_step:
                self.save(trainer)
            return
        if has_time:
            self._maybe_measure_holdout(trainer, share)
        if self._save_due(since_save):
            self.save(trainer)
        optimizer: MuonAdamW = trainer.optimizers[0]
        optimizer.set_lr_scale(lr_scale(share, self.config.optim))
        self.budget.begin_step()

    def _save_due(self, since_save: float) -> bool:
        settings = self.config.trainer
        if self.totals.step == (self.saved_step or 0):
            return False
        if settings.checkpoint_steps and self.totals.step % settings.checkpoint_steps == 0:
            return True
        return settings.checkpoint_minutes > 0 and since_save >= 60 * settings.checkpoint_minutes

    def save(self, trainer: L.Trainer) -> None:
        """Write the resume file; a failed write is reported and tried again at the next turn."""
        require_finite_loss(self.monitor, self.channel, self.saved_step)
        parameters = trainer.lightning_module.parameters()
        require_finite_weights(parameters, self.totals.step, self.channel, self.saved_step)
        began = time.monotonic()
        failure = None if self.tables is None else self.tables.save(self.totals.step)
        if failure is None:
            trainer.save_checkpoint(self._folder / NEWEST)
            files: AtomicCheckpointIO = trainer.strategy.checkpoint_io
            failure = files.failure
        self._last_save = time.monotonic()
        self.budget.reserve = max(self.budget.reserve, self._last_save - began)
        if not self.channel.any(failure is not None):
            if self.tables is not None:
                self.tables.forget_all_but({self.totals.step, self.saved_step})
            self.saved_step = self.totals.step
        elif failure is not None:
            kept = "none" if self.saved_step is None else f"that of step {self.saved_step}"
            self.progress.line(
                f"warning: cannot write {self._folder / NEWEST} ({failure}); "
                f"the last checkpoint is {kept}; free some space"
            )

    def _maybe_measure_holdout(self, trainer: L.Trainer, share: float) -> None:
        every = self.config.trainer.holdout_share
        if self.holdout is None or every <= 0:
            return
        if share < self.totals.next_holdout * every:
            return
        self.totals.next_holdout = int(share / every) + 1
        self.measure_holdout(trainer)

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.ema is None else self.ema.applied()

    def measure_holdout(self, trainer: L.Trainer) -> dict[str, float]:
        """Hold-out metrics of the averaged weights (or the live ones), logged and shown."""
        assert self.holdout is not None
        began = time.monotonic()
        with self._averaged():
            metrics = self.holdout()
        self._holdout_seconds = time.monotonic() - began
        self.told.holdout(trainer, metrics)
        return metrics
