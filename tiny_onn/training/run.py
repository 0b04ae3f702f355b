"""A training stage from a configuration to a trained checkpoint in its run folder."""

from __future__ import annotations

import errno
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tiny_onn.arc.corpus import Corpus, build_corpus
from tiny_onn.arc.dataset import EpochBatches
from tiny_onn.clock import clock_text
from tiny_onn.config.check import check_train
from tiny_onn.config.load import dump_config
from tiny_onn.config.schema import Config
from tiny_onn.errors import UserError
from tiny_onn.files import atomic_write_text, ensure_writable_dir
from tiny_onn.inference.holdout import evaluate_holdout
from tiny_onn.inspect.parameters import total_parameters
from tiny_onn.model.checkpoint import save_checkpoint
from tiny_onn.model.tiny_onn import TinyONN, build_model
from tiny_onn.training.budget import Budget
from tiny_onn.training.compiler import compile_model
from tiny_onn.training.datamodule import Positions, PretrainData
from tiny_onn.training.eavi import Eavi
from tiny_onn.training.expert_reset import ExpertReset
from tiny_onn.training.hardware import with_precision
from tiny_onn.training.initial_weights import begin_with, require_same_beginning
from tiny_onn.training.k24_control import K24Control
from tiny_onn.training.lightning_trainer import (
    make_loggers,
    make_trainer,
    process_rank,
    quiet_lightning,
)
from tiny_onn.training.loop import RunLoop
from tiny_onn.training.pretrain import Pretrain
from tiny_onn.training.progress import ProgressLine
from tiny_onn.training.provenance import provenance
from tiny_onn.training.resume import (
    ResumePoint,
    find_resume,
    remove_leftovers,
    remove_resume,
)
from tiny_onn.training.row_tables import RowTables, remove_row_tables
from tiny_onn.training.run_folder import (
    CHECKPOINT,
    METRICS,
    finished,
    refuse_packed,
    require_same_run,
)
from tiny_onn.training.signals import Interrupted, StopSignals

SECOND_HALF = 1_000_000
"""What is added to the seed of the data of a run that begins with another's weights."""


def run_training(
    config: Config, started: float | None = None, observers: Sequence[L.Callback] = ()
) -> int:
    """Train as ``config`` says; a run folder with a resume file is gone on with.

    Args:
        started: ``time.monotonic()`` when the command began, if that is what budget.minutes
            should count from (by default: this call).
        observers: told of every step after all else is done; they change nothing that is trained.

    Returns:
        Exit status: 0, or 130 and 143 after Ctrl-C and SIGTERM.

    Raises:
        UserError: bad settings, a run folder of another configuration, a loss that is not
            finite, a full disk.
    """
    started = time.monotonic() if started is None else started
    check_train(config)  # a Config made in Python was not loaded, so not checked
    quiet_lightning()
    config = with_precision(config)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    with StopSignals() as signals:
        try:
            return _Run(config, started, signals, observers).execute()
        except Interrupted as stop:
            print(f"stopped by {stop} before anything new was saved; {_how_to_go_on()}")
            return stop.status
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(
                f"cannot write to '{config.out}' ({error.strerror}); expected free space; "
                "free some and give the same command again to go on"
            ) from error


def _how_to_go_on() -> str:
    if not sys.argv[0].endswith(".py"):
        return "go on with: the same call (without resume=false)"
    words = [word for word in sys.argv if not word.startswith("resume=")]  # it would start over
    return f"go on with: {shlex.join(['python', *words])}"


def _without_nan(metrics: dict[str, float] | None) -> dict[str, float | None] | None:
    """JSON knows no NaN: what was not measured is null."""
    return metrics and {k: None if math.isnan(v) else v for k, v in metrics.items()}


def data_seed(config: Config) -> int:
    """Seeds order and views: another one where the weights have seen this seed's before."""
    return config.seed + SECOND_HALF * (config.init_from is not None)


class _Run:
    def __init__(
        self,
        config: Config,
        started: float,
        signals: StopSignals,
        observers: Sequence[L.Callback] = (),
    ) -> None:
        self.config, self.started, self.signals = config, started, signals
        self.observers = observers
        self.folder = Path(config.out)
        self.first = process_rank() == 0

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def execute(self) -> int:
        config = self.config
        ensure_writable_dir(self.folder)
        if config.resume:
            refuse_packed(self.folder)
        if config.resume and (done := finished(self.folder, config)):
            if config.init_from is not None:
                require_same_beginning(config, done["init_from"]["weights_sha256"])
            self.say(
                f"{self.folder} holds a finished run of this configuration; nothing to do "
                "(resume=false trains it anew)"
            )
            if self.first:
                self._remove_resume()  # what a kill at the very end left
            return 0
        corpus = build_corpus(config.data, config.seed)
        data_hash = corpus.report.corpus_sha256
        restored = self._resume_point(data_hash)
        torch.manual_seed(config.seed)
        model = self._build(len(corpus.task_ids))
        initial = self._begin(model, corpus, restored)
        identity = {"config": asdict(config), "data": data_hash, "init_from": initial}
        budget = self._budget(corpus, spent=restored.state["totals"]["seconds"] if restored else 0)
        module = self._module(model)
        reset = self._expert_reset(lambda: loop, restored)
        k24 = self._k24_control(lambda: loop, restored)
        tables = None
        if model.deep_embed is not None and model.deep_embed.files:
            tables = RowTables(model.deep_embed, self.folder)
        loop = RunLoop(
            config,
            budget,
            self.signals,
            ProgressLine(config.trainer.progress and self.first),
            identity,
            restored.state if restored else None,
            holdout=self._holdout(module, corpus),
            finish=lambda weights: self._finish(loop, module, corpus, weights, initial),
            reset=reset,
            tables=tables,
            k24=k24,
        )
        trainer = make_trainer(
            config.trainer,
            self.folder,
            # What is reborn or counted is in the checkpoint of its step.
            [c for c in (reset, k24, loop, *self.observers) if c is not None],
            make_loggers(self.folder, config.trainer.tensorboard) if self.first else [],
        )
        device = trainer.strategy.root_device
        ops, precision = config.ops, config.trainer.precision
        tokens = config.data.batch_tokens // trainer.world_size
        sparse24 = (ops.pattern24, ops.relu2_24, tokens)
        model.use_backend(ops.backend, device, precision, ops.experts, ops.nsa, *sparse24)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if config.trainer.compile:
            compile_model(model, device)
        self._open_folder(corpus, restored)  # only now: what cannot run here destroys nothing
        if tables is not None:
            tables.begin(loop.saved_step)
        self._describe(model, trainer)
        data = PretrainData(
            lambda rank, world: EpochBatches(corpus, config.data, data_seed(config), rank, world),
            loop.totals.step,
            config.data.workers,
            causal=config.model.mask == "causal",
            nsa=config.nsa if config.model.attention == "nsa" else None,
        )
        try:
            trainer.fit(
                module,
                data,
                ckpt_path=str(restored.path) if restored else None,
                weights_only=True,
            )
        finally:
            self.signals.deferred = False
            loop.progress.close()
        if loop.stopped_by is not None:
            kept = (
                "no checkpoint could be written"
                if loop.saved_step is None
                else f"checkpoint of step {loop.saved_step} in {self.folder}"
            )
            self.say(f"stopped at step {loop.totals.step}; {kept}; {_how_to_go_on()}")
            return 128 + loop.stopped_by
        if self.first:
            self._close_folder(loop)
        return 0

    def _begin(
        self, model: TinyONN, corpus: Corpus, restored: ResumePoint | None
    ) -> dict[str, Any] | None:
        """Take over the weights of init_from; what its run is known by, None without it."""
        config = self.config
        if config.init_from is None:
            return None
        if restored is not None:  # with its own weights
            initial = restored.state["init_from"]
            require_same_beginning(config, initial["weights_sha256"])
            return initial
        initial = begin_with(model, config, corpus.task_ids)
        new = initial["new_tasks"]
        self.say(
            f"weights of {config.init_from}: {initial['steps']} steps, "
            f"{initial['tokens']:,} tokens" + (f"; {new} tasks are new" if new else "")
        )
        return initial

    def _build(self, num_tasks: int) -> TinyONN:
        config = self.config
        return build_model(config.model, num_tasks, config.moe, config.nsa, config.k24)

    def _module(self, model: TinyONN) -> Pretrain:
        if self.config.stage == "eavi":
            return Eavi(model, self.config, process_rank())
        return Pretrain(model, self.config.optim, self.config.moe, self.config.k24)

    def _resume_point(self, data_hash: str) -> ResumePoint | None:
        """Where to go on from, if that is asked for and there is such a place."""
        if not self.config.resume:
            return None
        restored, notes = find_resume(self.folder)
        for note in notes:
            self.say(f"warning: {note}")
        if restored is not None:
            require_same_run(self.folder, restored.state, self.config, data_hash)
        return restored

    def _open_folder(self, corpus: Corpus, restored: ResumePoint | None) -> None:
        """Leak report and resolved configuration, in place of those of an earlier run."""
        config = self.config
        if self.first:
            if not config.resume:
                self._remove_resume()
            remove_leftovers(self.folder)
            print(corpus.report.render())
            report = json.dumps(corpus.report.to_dict(), indent=1)
            atomic_write_text(self.folder / "leak_report.json", report)
            atomic_write_text(self.folder / "config.yaml", dump_config(config))
            if restored is None:
                (self.folder / METRICS).unlink(missing_ok=True)
        if restored is not None:
            totals = restored.state["totals"]
            self.say(
                f"going on from step {totals['step']} "
                f"({clock_text(totals['seconds'])} spent) of {restored.path}"
            )

    def _budget(self, corpus: Corpus, spent: float) -> Budget:
        given = self.config.budget
        if given.minutes is not None:
            return Budget(minutes=given.minutes, started=self.started, spent=spent)
        steps = given.steps
        if steps is None:
            epochs = EpochBatches(corpus, self.config.data, data_seed(self.config))
            steps = Positions(epochs.num_batches).steps(given.epochs)
        return Budget(steps=steps, started=self.started, spent=spent)

    def _expert_reset(
        self, loop: Callable[[], RunLoop], restored: ResumePoint | None
    ) -> ExpertReset | None:
        config = self.config
        if config.model.ffn != "dynmoe" or not config.reset.window_steps:
            return None
        return ExpertReset(
            config.reset,
            config.moe.target_active / config.moe.experts,
            config.seed,
            ema=lambda: loop().ema,
            share=lambda: loop().share,
            restored=restored.state["expert_reset"] if restored else None,
        )

    def _k24_control(
        self, loop: Callable[[], RunLoop], restored: ResumePoint | None
    ) -> K24Control | None:
        config = self.config
        if config.model.weights != "k24":
            return None
        return K24Control(
            config.k24,
            config.seed,
            config.trainer.log_every_steps,
            ema=lambda: loop().ema,
            share=lambda: loop().share,
            precision=config.trainer.precision,
            restored=restored.state["k24"] if restored else None,
        )

    def _holdout(self, module: Pretrain, corpus: Corpus) -> Callable[[], dict[str, float]] | None:
        if not corpus.holdout:
            return None
        return lambda: evaluate_holdout(module.model, corpus, self.config)

    def _describe(self, model: TinyONN, trainer: Any) -> None:
        count = total_parameters(model)
        self.say(
            f"training {count:,} parameters on {trainer.strategy.root_device.type} x "
            f"{trainer.num_devices * trainer.num_nodes}, {self.config.trainer.precision}, "
            f"{torch.get_num_threads()} threads, into {self.folder}"
        )

    def _finish(
        self,
        loop: RunLoop,
        module: Pretrain,
        corpus: Corpus,
        weights: dict[str, torch.Tensor],
        initial: dict[str, Any] | None,
    ) -> None:
        """Save the trained model (first process only)."""
        model = self._build(len(corpus.task_ids))
        model.load_state_dict(weights)
        if loop.tables is not None:
            model.deep_embed.open_files(loop.tables.folder)
        facts = provenance(
            self.config,
            model,
            corpus,
            loop.totals,
            module.device,
            module.trainer.world_size,
        )
        if initial is not None:
            facts["init_from"] = initial
        save_checkpoint(self.folder / CHECKPOINT, model, self.config, corpus.task_ids, facts)
        loop.facts = facts

    def _remove_resume(self) -> None:
        remove_resume(self.folder)
        remove_row_tables(self.folder)

    def _close_folder(self, loop: RunLoop) -> None:
        metrics = {
            "finished": True,
            "loss": loop.told.loss,
            "minutes": round(loop.totals.seconds / 60, 4),
            "holdout": _without_nan(loop.final_holdout),
            **loop.facts,
        }
        atomic_write_text(self.folder / METRICS, json.dumps(metrics, indent=1, sort_keys=True))
        self._remove_resume()
        print(
            f"trained {loop.totals.step} steps, {loop.totals.tokens:,} tokens in "
            f"{clock_text(loop.totals.seconds)}; checkpoint: {self.folder / CHECKPOINT}"
        )
