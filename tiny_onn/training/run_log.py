"""What a run tells while it goes on: metrics to the loggers, and the progress line."""

from __future__ import annotations

import math
import time

import lightning as L
from torch import Tensor

from tiny_onn.training.budget import Budget
from tiny_onn.training.distributed import whole
from tiny_onn.training.expert_reset import ExpertReset
from tiny_onn.training.k24_control import K24Control
from tiny_onn.training.progress import ProgressLine
from tiny_onn.training.routing_monitor import RoutingMonitor
from tiny_onn.training.totals import RunTotals

SMOOTHING = 50


class RunLog:
    """Reads the run's own counters and monitors; decides nothing.

    Args:
        progress: where lines go.
        totals, budget, routing, reset, k24: the run's.
    """

    def __init__(
        self,
        progress: ProgressLine,
        totals: RunTotals,
        budget: Budget,
        routing: RoutingMonitor,
        reset: ExpertReset | None,
        k24: K24Control | None = None,
    ) -> None:
        self.progress, self.totals, self.budget = progress, totals, budget
        self.routing, self.reset, self.k24 = routing, reset, k24
        self.loss: float | None = None

    def begin_window(self) -> None:
        """Tokens a second are counted from here."""
        self._window = (time.monotonic(), self.totals.tokens)

    def _tokens_per_s(self) -> float:
        since, tokens = self._window
        return (self.totals.tokens - tokens) / max(time.monotonic() - since, 1e-9)

    def smooth(self, loss: float, steps: int = 1) -> None:
        """The loss that is shown: an average over about the last SMOOTHING steps."""
        weight = 1 - math.exp(-steps / SMOOTHING)
        self.loss = loss if self.loss is None else self.loss + weight * (loss - self.loss)

    def log(
        self, trainer: L.Trainer, loss: float, grad_norm: Tensor | None, more: dict[str, float]
    ) -> None:
        """A log step: metrics since the last one, and the progress line if it is due."""
        rate = self._tokens_per_s()
        if trainer.loggers:
            metrics = {
                "loss": loss,
                "lr_scale": self._lr(trainer)[0],
                "tokens_per_s": rate,
                "tokens": float(self.totals.tokens),
                "seconds": self.budget.elapsed(),
            }
            if grad_norm is not None:
                metrics["grad_norm"] = float(whole(grad_norm))
            metrics |= self.routing.take_metrics() | more
            if self.reset is not None:
                metrics |= self.reset.metrics()
            if self.k24 is not None:
                metrics |= self.k24.metrics()
            self._write(trainer, metrics)
        self.show_if_due(trainer)
        self.begin_window()

    def holdout(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        """Metrics of the hold-out, logged and on a line of their own."""
        self._write(trainer, {f"holdout/{k}": v for k, v in metrics.items()})
        text = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        self.progress.line(f"hold-out at step {self.totals.step}: {text}")

    def _write(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, self.totals.step)
            logger.save()

    def _lr(self, trainer: L.Trainer) -> tuple[float, float]:
        group = trainer.optimizers[0].param_groups[0]
        return group["lr"] / group["peak_lr"], group["lr"]

    def show_if_due(self, trainer: L.Trainer) -> None:
        """The progress line, if it is time for one."""
        if not self.progress.due():
            return
        elapsed, step = self.budget.elapsed(), self.totals.step
        self.progress.show(
            share=self.budget.share(elapsed, max(0, step - 1)),
            step=step,
            loss=self.loss,
            tokens_per_s=self._tokens_per_s(),
            lr=self._lr(trainer)[1],
            elapsed=elapsed,
            left=self.budget.seconds_left(elapsed, step),
        )
