"""Our training step, Lightning included, against a bare PyTorch loop of the same model.

    python exp/bench/training_step.py [--quick] [--device cpu|cuda] [--threads N] [key=value ...]

One run of ``tiny_onn.training`` as ``train.py preset=nano network=dense`` makes it (RunLoop, CSV
and TensorBoard loggers, progress line, loss checks, data made on the way). After every stretch of
20 steps (one of which logs) the run is held, and a bare loop trains the same model object with the
same optimizer and autocast on the same batches: forward, backward, clip, step. So both use the
same compiled code and interleave within a minute. Both make their batches as they go; the bare
loop's time without that is reported too. Before anything is timed, both must turn the same
initial weights into the same trained ones. Target: overhead below 5%.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timing import (
    STARTED,
    optimizer_step,
    parser,
    prepare,
    print_table,
    relative_error,
    require,
    spread,
    text,
    wait_for,
    write_result,
)

# isort: split
import torch
from torch import Tensor

from tiny_onn.arc.corpus import Corpus, build_corpus
from tiny_onn.arc.dataset import EpochBatches
from tiny_onn.config.load import load_config
from tiny_onn.config.schema import Config
from tiny_onn.losses.language import output_nll
from tiny_onn.model.tiny_onn import TinyONN, build_model
from tiny_onn.training.budget import Budget, lr_scale
from tiny_onn.training.datamodule import PretrainData, StepStream, TrainBatch, rounding
from tiny_onn.training.hardware import with_precision
from tiny_onn.training.lightning_trainer import (
    make_loggers,
    make_trainer,
    quiet_lightning,
)
from tiny_onn.training.loop import RunLoop
from tiny_onn.training.optim import build_optimizer
from tiny_onn.training.pretrain import Pretrain
from tiny_onn.training.progress import ProgressLine
from tiny_onn.training.signals import StopSignals

TARGET_PERCENT = 5.0
CHECKED_STEPS = 4


class Setup:
    """One model on its device, compiled at most once, and the data both loops read."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.corpus: Corpus = build_corpus(config.data, config.seed)
        self.model: TinyONN = build_model(
            config.model, len(self.corpus.task_ids), config.moe, config.nsa
        )
        self.model.use_backend(config.ops.backend, device).to(device)
        self.initial = {k: v.clone() for k, v in self.model.state_dict().items()}
        if config.trainer.compile:
            self.model.compile_blocks()

    def epochs(self, rank: int = 0, world: int = 1, shift: int = 0) -> EpochBatches:
        seed = self.config.seed + shift
        return EpochBatches(self.corpus, self.config.data, seed, rank, world)

    def stream(self, first: int, shift: int = 0) -> Iterator[TrainBatch]:
        """The batches of step ``first`` and on, of the run's seed plus ``shift``.

        The epoch it stands in is planned here.
        """
        stream = StepStream(self.epochs(shift=shift), first, self._causal, rounding(self.device))
        stream.positions.locate(first)
        return iter(stream)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten().cpu() for p in self.model.parameters()])

    def fit(self, steps: int, folder: Path, kind: type[RunLoop], **options: Any) -> RunLoop:
        """``steps`` steps from the initial weights, through Lightning, as train.py does."""
        self.model.load_state_dict(self.initial)
        loop = kind(
            self.config,
            Budget(steps=steps),
            StopSignals(),
            ProgressLine(self.config.trainer.progress, io.StringIO()),
            identity={},
        )
        for name, value in options.items():
            setattr(loop, name, value)
        loggers = make_loggers(folder, self.config.trainer.tensorboard)
        trainer = make_trainer(self.config.trainer, folder, [loop], loggers)
        data = PretrainData(self.epochs, 0, self.config.data.workers, self._causal)
        trainer.fit(Pretrain(self.model, self.config.optim, self.config.moe), data)
        return loop

    @property
    def _causal(self) -> bool:
        return self.config.model.mask == "causal"

    def bare_step(self, batch: TrainBatch, optimizer: Any) -> None:
        mixed = self.config.trainer.precision == "bf16"
        # Lightning's autocast keeps no cache of casted weights either
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
            logits_MV = self.model(batch.batch, batch.rows_M).logits_MV
            loss = output_nll(logits_MV, batch.targets_M)[0] / batch.num_targets
        optimizer_step(self.model, optimizer, loss, self.config.optim.clip_norm)


class Interleaved(RunLoop):
    """A run that is held after every ``stretch`` steps for as many bare ones.

    It ends early rather than begin a round that would end after ``limit_s`` seconds of the
    process; there are at least two.
    """

    setup: Setup
    stretch: int
    warmup: int
    limit_s: float

    def on_train_start(self, trainer: Any, module: Pretrain) -> None:
        self.ours, self.bare, self.making, self.tokens = [], [], [], []
        self.stream = self.setup.stream(self.warmup, shift=1)
        self.began: float | None = None
        super().on_train_start(trainer, module)

    def on_train_batch_end(self, trainer: Any, module: Pretrain, *rest: Any) -> None:
        super().on_train_batch_end(trainer, module, *rest)
        done = self.totals.step - self.warmup
        if done < 0 or done % self.stretch:
            return
        wait_for(self.setup.device)
        if self.began is not None:
            self.ours.append(time.perf_counter() - self.began)
            self._bare_stretch(trainer.optimizers[0], self.totals.step - self.stretch)
            next_end = time.monotonic() - STARTED + self.ours[-1] + self.bare[-1]
            if len(self.ours) >= 2 and next_end > self.limit_s:
                trainer.should_stop = True
        self.began = time.perf_counter()

    def _bare_stretch(self, optimizer: Any, first: int) -> None:
        """The batches of the stretch that has just ended, made and trained on once more."""
        tokens, making = 0, 0.0
        began = time.perf_counter()
        for step in range(first, first + self.stretch):
            start = time.perf_counter()
            batch = next(self.stream)
            assert batch.step == step, (batch.step, step)
            if self.setup.device.type != "cpu":
                batch = batch.to(self.setup.device)
            making += time.perf_counter() - start
            self.setup.bare_step(batch, optimizer)
            tokens += batch.num_tokens
        wait_for(self.setup.device)
        self.bare.append(time.perf_counter() - began)
        self.making.append(making)
        self.tokens.append(tokens)


def check(setup: Setup, folder: Path) -> float:
    """Relative difference between the weights after the same steps in both loops."""
    setup.fit(CHECKED_STEPS, folder, RunLoop)
    ours = setup.weights()
    setup.model.to(setup.device).load_state_dict(setup.initial)
    start = setup.weights()
    optimizer, stream = build_optimizer(setup.model, setup.config.optim), setup.stream(0)
    setup.model.train()
    for step in range(CHECKED_STEPS):
        optimizer.set_lr_scale(lr_scale((step + 0.5) / CHECKED_STEPS, setup.config.optim))
        setup.bare_step(next(stream).to(setup.device), optimizer)
    error = relative_error(ours - start, setup.weights() - start)
    limit = 1e-6 if setup.device.type == "cpu" else 1e-1  # CUDA's atomics, times bfloat16
    require(error <= limit, f"trained weights differ by {error:.2g}, expected at most {limit}")
    return error


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("overrides", nargs="*", help="key=value for the configuration")
    args = arguments.parse_args()
    device = prepare(args)
    quiet_lightning()
    quick = ["trainer.compile=false", "data.batch_tokens=512", "model.layers=1"]
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    words = ["preset=nano", "network=dense", f"trainer.accelerator={accelerator}"]
    words += quick if args.quick else []
    rounds, stretch, warmup = (2, 20, 2) if args.quick else (6, 20, 4)
    with tempfile.TemporaryDirectory() as folder:
        config = with_precision(load_config([*words, *args.overrides, f"out={folder}"]))
        setup = Setup(config, device)
        error = check(setup, Path(folder))
        loop = setup.fit(
            warmup + rounds * stretch + 1,  # the last step saves a checkpoint: not timed
            Path(folder),
            Interleaved,
            setup=setup,
            stretch=stretch,
            warmup=warmup,
            limit_s=52,
        )
    pairs = list(zip(loop.ours, loop.bare, loop.making, strict=True))
    overhead = spread([100 * (a / b - 1) for a, b, _ in pairs], digits=2)
    over_made = spread([100 * (a / (b - m) - 1) for a, b, m in pairs], digits=2)
    rate = {
        name: spread([n / s for n, s in zip(loop.tokens, seconds, strict=True)], digits=1)
        for name, seconds in (
            ("ours", loop.ours),
            ("bare", loop.bare),
            ("bare_batches_ready", [b - m for _, b, m in pairs]),
        )
    }
    print_table(
        ["loop", "tokens/s", "our overhead %"],
        [
            ["ours (Lightning)", text(rate["ours"], 0), ""],
            ["bare PyTorch", text(rate["bare"], 0), text(overhead)],
            ["bare, batches ready", text(rate["bare_batches_ready"], 0), text(over_made)],
        ],
    )
    reached = overhead["median"] < TARGET_PERCENT
    print(f"target below {TARGET_PERCENT:g}%: {'reached' if reached else 'missed'}")
    write_result(
        "training_step",
        args,
        device,
        precision=config.trainer.precision,
        compile=config.trainer.compile,
        model=vars(config.model),
        batch_tokens=config.data.batch_tokens,
        parameters=sum(p.numel() for p in setup.model.parameters()),
        steps_per_stretch=stretch,
        weights_relative_difference=error,
        overrides=args.overrides,
        tokens_per_s=rate,
        overhead_percent=overhead,
        overhead_percent_batches_ready=over_made,
        target_percent=TARGET_PERCENT,
        target_reached=reached,
    )


if __name__ == "__main__":
    main()
