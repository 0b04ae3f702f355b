"""Lightning's Trainer from our configuration, without what we do ourselves or not at all."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from tiny_onn.config.schema import TrainerConfig
from tiny_onn.errors import UserError
from tiny_onn.training.resume import AtomicCheckpointIO

LOGS = "logs"

IRRELEVANT_WARNINGS = (
    r".*does not have many workers.*",  # workers are a setting, measured
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # inside Lightning
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Found .* module\(s\) in eval mode at the start of training.*",
    r".*GPU available but not used.*",  # trainer.accelerator=cpu is explicit
    r".*torch\.distributed.*barrier.*device.*",
    r".*No device id is provided via `init_process_group`.*",
)


def quiet_lightning() -> None:
    """Hide Lightning's banners and the warnings listed above; all others are shown."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def process_rank() -> int:
    """Rank by the launcher's environment (torchrun, Lightning's own, SLURM), 0 alone.

    Known before Lightning sets the processes up.
    """
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    # Lightning's own launcher numbers the processes it starts on each machine.
    node, local = (int(os.environ.get(name, "0")) for name in ("NODE_RANK", "LOCAL_RANK"))
    return 1000 * node + local


def make_loggers(folder: Path, tensorboard: bool) -> list[Logger]:
    """CSV and, if asked, TensorBoard logs in ``folder/logs/version_<n>``, a new one a start."""
    csv = CSVLogger(str(folder), name=LOGS, flush_logs_every_n_steps=10**9)
    if not tensorboard:
        return [csv]
    return [csv, TensorBoardLogger(str(folder), name=LOGS, version=csv.version)]


def _strategy(settings: TrainerConfig) -> str | Strategy:
    processes = settings.devices * settings.nodes
    if settings.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    if settings.strategy == "ddp" or (settings.strategy == "auto" and processes > 1):
        return DDPStrategy(gradient_as_bucket_view=True)
    return settings.strategy


def make_trainer(
    settings: TrainerConfig, folder: Path, callbacks: list[L.Callback], loggers: list[Logger]
) -> L.Trainer:
    """A Trainer that runs one endless epoch until a callback stops it.

    Raises:
        UserError: devices, strategy or precision that this machine or Lightning refuses.
    """
    options: dict[str, Any] = {
        "accelerator": settings.accelerator,
        "devices": settings.devices,
        "num_nodes": settings.nodes,
        "strategy": _strategy(settings),
        "precision": "bf16-mixed" if settings.precision == "bf16" else "32-true",
        "logger": loggers,
        "callbacks": callbacks,
        "plugins": [AtomicCheckpointIO()],
        "log_every_n_steps": 10**9,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": str(folder),
    }
    try:
        return L.Trainer(**options)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"trainer.accelerator={settings.accelerator} devices={settings.devices} "
            f"nodes={settings.nodes} strategy={settings.strategy} "
            f"precision={settings.precision} cannot run here: {text}; change one of them"
        ) from error
