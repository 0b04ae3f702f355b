"""The LightningModule of stage pretrain: next-token loss on the outputs, one optimizer."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.utils import clip_grad_norm_

from tiny_onn.config.schema import OptimConfig
from tiny_onn.losses.language import output_nll
from tiny_onn.training.datamodule import TrainBatch
from tiny_onn.training.optim import MuonAdamW, build_optimizer
from tiny_onn.training.row_optim import pending_leaves


class Pretrain(L.LightningModule):
    """``global_targets`` is set before every step: targets of the batch over all processes."""

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.global_targets = 1
        self.grad_norm: Tensor | None = None

    def configure_model(self) -> None:
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None or isinstance(self.model, FSDPModule):
            return
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])
        for name in ("prefill", "step"):  # decoding gathers the weights too
            register_fsdp_forward_method(self.model, name)

    def configure_optimizers(self) -> MuonAdamW:
        return build_optimizer(self.model, self.optim)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Mean NLL of the global batch, times its share here.

        Processes' gradients are averaged, so each one's summed NLL is divided by the targets
        per process: the average is the gradient of the mean over all targets.
        """
        logits_MV = self.model(batch.batch, batch.rows_M).logits_MV
        nll, _ = output_nll(logits_MV, batch.targets_M)
        return nll * (self.trainer.world_size / self.global_targets)

    def configure_gradient_clipping(self, optimizer: Any, **limits: Any) -> None:
        if self.optim.clip_norm > 0:
            parameters = [*self.model.parameters(), *pending_leaves(self.model)]
            self.grad_norm = clip_grad_norm_(parameters, self.optim.clip_norm)
