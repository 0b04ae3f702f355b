"""The LightningModule of stage pretrain: next-token loss on the outputs, one optimizer."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.utils import clip_grad_norm_

from tiny_onn.config.schema import MoeConfig, OptimConfig
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.losses.language import output_nll
from tiny_onn.losses.mask_diversity import mask_diversity
from tiny_onn.losses.sdl import SDLTerms
from tiny_onn.model.ffn import count_optimizer_steps
from tiny_onn.model.tiny_onn import ModelOutput
from tiny_onn.training.activation_drops import take_drops
from tiny_onn.training.datamodule import TrainBatch
from tiny_onn.training.distributed import StepChannel
from tiny_onn.training.optim import MuonAdamW, build_optimizer
from tiny_onn.training.routing import StepRouting, gather_routing
from tiny_onn.training.row_optim import pending_leaves


class Pretrain(L.LightningModule):
    """Set before every step: ``global_targets``, targets of the batch over all processes, and
    ``samples``, tokens of every layer of experts to keep for resets.

    Left by it: ``language_loss``, the loss without what SDL and the masks' diversity add;
    ``routing`` and ``sdl``, None where there are no experts or SDL is off; ``mask_diversity``, None
    unless experts share a weight.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        moe: MoeConfig | None = None,
        k24: K24Config | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.moe = moe or MoeConfig()
        self.k24 = k24 or K24Config()
        self.global_targets = 1
        self.samples = 0
        self.language_loss: Tensor | None = None
        self.routing: StepRouting | None = None
        self.sdl: SDLTerms | None = None
        self.mask_diversity: Tensor | None = None
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
        optimizer = build_optimizer(self.model, self.optim)
        count_optimizer_steps(optimizer, self.model)
        return optimizer

    def begin_step(self, batch: TrainBatch, share: float) -> TrainBatch:
        """What the step is going to train on, at this ``share`` of the budget: ``batch``."""
        return batch

    def take_metrics(self, channel: StepChannel) -> dict[str, float]:
        """What else the log says of the steps since the last call; a collective call."""
        return take_drops(self.model, channel)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Mean NLL of the global batch, times its share here; plus SDL where there are experts.

        Processes' gradients are averaged, so each one's summed NLL is divided by the targets
        per process: the average is the gradient of the mean over all targets.
        """
        output = self.model(batch.batch, batch.rows_M, batch.num_targets)
        nll, _ = output_nll(output.logits_MV, batch.targets_M)
        loss = nll * (self.trainer.world_size / self.global_targets)
        self.language_loss = loss.detach()
        return self.with_sdl(loss, output)

    def with_sdl(self, loss: Tensor, output: ModelOutput) -> Tensor:
        """``loss`` and, where there are experts, what SDL and their masks' diversity add to it."""
        if not output.routing:
            return loss
        routing = gather_routing(output.routing, self.samples)
        self.routing = routing.detached()
        sparsity_weight, diversity_weight = self.moe.sparsity_weight, self.moe.diversity_weight
        if sparsity_weight or diversity_weight:
            sdl = routing.sdl(self.moe.target_active)
            self.sdl = SDLTerms(sdl.sparsity.detach(), sdl.diversity.detach())
            loss = loss + sparsity_weight * sdl.sparsity + diversity_weight * sdl.diversity
        overlap = mask_diversity(output)
        if overlap is not None:
            self.mask_diversity = overlap.detach()
            loss = loss + self.k24.div_coef * overlap
        return loss

    def configure_gradient_clipping(self, optimizer: Any, **limits: Any) -> None:
        if self.optim.clip_norm > 0:
            parameters = [*self.model.parameters(), *pending_leaves(self.model)]
            self.grad_norm = clip_grad_norm_(parameters, self.optim.clip_norm)
