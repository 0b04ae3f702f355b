"""Rebirth of idle experts, in place of a load-balancing loss.

Over windows of ``window_steps`` optimizer steps it is counted for how many training tokens each
expert fired, before any fallback, over all processes. An expert below ``min_share`` of the tokens
for ``patience`` windows in a row is reborn:

- prototype: of the tokens of the step that closes the window, those that few of the living experts
  fire for (no more than for the worst served quarter); among them the one farthest from all
  prototypes, then the next (Gonzalez 1985), so that reborn experts do not coincide. No token apart
  from all prototypes: no rebirth.
- threshold: where the expert fires for its fair share of those tokens, target_active / experts.
- weights: fresh; ``down`` is zero, so that the newborn adds nothing yet. With combine=mean its
  tokens' other experts are diluted, 1/k to 1/(k+1), which nothing can avoid.
- 2:4 masks (weights=k24): what chooses them is drawn anew, and their activity counted anew. Experts
  that share a weight have nothing else of their own: the weight stays.
- optimizer: its moments become zero, and its learning rate rises over ``warmup_steps``. AdamW's
  step count is shared by all experts, so its bias correction is not begun anew; at beta2 = 0.95
  the first updates are smaller than usual for it, not larger.
- EMA: takes the new values, or it would mix them with the dead expert's.

All processes count the same, see the same gathered tokens and draw weights from a generator that
is seeded by (seed, step, layer), so they decide alike and need no message about it.

Shapes: L layers with experts, E experts, S sampled tokens, C width, R reborn experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from tiny_onn.config.schema import ResetConfig
from tiny_onn.model.dyn_moe import DynMoE
from tiny_onn.model.gate import unit
from tiny_onn.training.datamodule import TrainBatch
from tiny_onn.training.distributed import set_rows, whole
from tiny_onn.training.ema import WeightEma
from tiny_onn.training.optim import MuonAdamW
from tiny_onn.training.pretrain import Pretrain
from tiny_onn.training.step_seed import step_seed

SAMPLES = 512
"""Tokens of a layer that each process contributes to the choice of prototypes."""
SAME = 1 - 1e-4
"""A token whose cosine with a prototype is above this is not apart from it."""
GAP = 1e-3
"""How far below the only value that cosines take a threshold is set."""


class ExpertReset(L.Callback):
    """Must come before the callback that saves checkpoints and averages weights.

    Args:
        config: the run's ``reset`` section; window_steps above 0.
        target_share: share of the tokens that an expert should fire for.
        seed: the run's.
        ema: the weights' moving average, if there is one by then.
        share: how much of the budget is spent, the same number in all processes.
        restored: what :meth:`snapshot` returned, to go on from.
    """

    def __init__(
        self,
        config: ResetConfig,
        target_share: float,
        seed: int,
        *,
        ema: Callable[[], WeightEma | None] = lambda: None,
        share: Callable[[], float] = lambda: 0.0,
        restored: dict[str, Tensor] | None = None,
    ) -> None:
        self.config, self.target_share, self.seed = config, target_share, seed
        self._ema, self._share, self._restored = ema, share, restored
        self._layers: list[DynMoE] = []

    # Lightning's hooks, in the order in which they run.

    def on_train_start(self, trainer: L.Trainer, module: Pretrain) -> None:
        self.attach(module.model.expert_layers)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: Pretrain, batch: TrainBatch, index: int
    ) -> None:
        self.begin_step(trainer.optimizers[0])
        module.samples = SAMPLES if self._closes(batch.step) else 0

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Pretrain, outputs: Any, batch: TrainBatch, index: int
    ) -> None:
        routing = module.routing
        assert routing is not None, "a model with experts leaves its routing"
        self.end_step(
            trainer.optimizers[0],
            batch.step,
            routing.active_LE,
            routing.tokens_L,
            routing.samples_LSC,
        )

    # The same without Lightning.

    def attach(self, layers: list[DynMoE]) -> None:
        """Begin to count for these layers, or go on with the restored counts."""
        self._layers = layers
        shape = (len(layers), layers[0].gate.thresholds.shape[0])
        device = layers[0].gate.thresholds.device
        self._active_LE = torch.zeros(shape, dtype=torch.int64, device=device)
        self._tokens_L = torch.zeros(shape[:1], dtype=torch.int64, device=device)
        self._idle_LE = torch.zeros(shape, dtype=torch.int64)
        self._age_LE = torch.full(shape, self.config.warmup_steps)
        self.resets_LE = torch.zeros(shape, dtype=torch.int64)
        if self._restored is not None:
            for name, value in self._restored.items():
                getattr(self, name).copy_(value)

    def snapshot(self) -> dict[str, Tensor]:
        """All there is to go on from, as CPU tensors; the window's phase follows from the step."""
        names = ("_active_LE", "_tokens_L", "_idle_LE", "_age_LE", "resets_LE")
        return {name: getattr(self, name).cpu().clone() for name in names}

    def metrics(self) -> dict[str, float]:
        """Experts reborn so far, by layer."""
        return {
            f"moe/resets_{layer.layer}": float(resets_E.sum())
            for layer, resets_E in zip(self._layers, self.resets_LE, strict=True)
        }

    def begin_step(self, optimizer: MuonAdamW) -> None:
        """Hand the optimizer the learning rates of young experts."""
        warmup = self.config.warmup_steps
        optimizer.row_scale = {}
        for layer, age_E in zip(self._layers, self._age_LE, strict=True):
            if bool((age_E < warmup).any()):
                scale_E = (age_E + 1) / (warmup + 1)
                optimizer.row_scale |= {p: scale_E for p in layer.expert_parameters()}

    def end_step(
        self,
        optimizer: MuonAdamW,
        step: int,
        active_LE: Tensor,
        tokens_L: Tensor,
        samples_LSC: Tensor | None,
    ) -> None:
        """Count a step (its number from 0, counts of all processes); let experts be reborn where
        a window closes. ``samples_LSC`` is needed there only."""
        self._active_LE += active_LE
        self._tokens_L += tokens_L
        self._age_LE = (self._age_LE + 1).clamp(max=self.config.warmup_steps)
        if not self._closes(step):
            return
        least_L = self.config.min_share * self._tokens_L.double()
        idle_LE = (self._active_LE < least_L.unsqueeze(1)).cpu()
        self._active_LE.zero_()
        self._tokens_L.zero_()
        self._idle_LE = torch.where(idle_LE, self._idle_LE + 1, 0)
        dead_LE = self._idle_LE >= self.config.patience
        if self._share() > self.config.until_share:
            return
        for index, dead_E in enumerate(dead_LE):
            experts = dead_E.nonzero().squeeze(1).tolist()[: self.config.max_experts]
            if experts:
                assert samples_LSC is not None, "a window closes with a sample of tokens"
                self._rebirth(index, experts, samples_LSC[index], step, optimizer)

    def _closes(self, step: int) -> bool:
        return (step + 1) % self.config.window_steps == 0

    def _rebirth(
        self, index: int, experts: list[int], sample_SC: Tensor, step: int, optimizer: MuonAdamW
    ) -> None:
        layer = self._layers[index]
        unit_SC = unit(_gather(sample_SC).cpu())
        unit_SC = unit_SC[unit_SC.square().sum(dim=1) > 0.5]  # a zero vector has no direction
        prototypes_EC = whole(layer.gate.prototypes.detach()).cpu()
        thresholds_E = whole(layer.gate.thresholds.detach()).cpu()
        found_RC = choose_prototypes(unit_SC, unit(prototypes_EC), thresholds_E, experts)
        experts = experts[: len(found_RC)]
        if not experts:
            return
        generator = torch.Generator().manual_seed(step_seed(self.seed, step, layer.layer))
        gate_up_shape = (len(experts), *layer.experts.gate_up.shape[1:])
        width = gate_up_shape[-1]
        new: dict[Tensor, Tensor | float] = {
            layer.gate.prototypes: found_RC * layer.gate.sharpness,
            layer.gate.thresholds: torch.stack(
                [threshold_for(unit_SC @ found_C, self.target_share) for found_C in found_RC]
            ),
        }
        if not layer.experts.shared:
            fresh = torch.randn(gate_up_shape, generator=generator) * width**-0.5
            new |= {layer.experts.gate_up: fresh, layer.experts.down: 0.0}
        for pattern in layer.experts.patterns():
            new |= pattern.fresh_agents(len(experts), generator)
            pattern.activity.forget(experts)
        ema = self._ema()
        for parameter, values in new.items():
            set_rows(parameter, experts, values)
            for moment in optimizer.state.get(parameter, {}).values():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    set_rows(moment, experts, 0.0)
            if ema is not None:
                ema.adopt_rows(parameter, experts)
        self._idle_LE[index, experts] = 0
        self._age_LE[index, experts] = 0
        self.resets_LE[index, experts] += 1


def choose_prototypes(
    unit_SC: Tensor, prototypes_EC: Tensor, thresholds_E: Tensor, experts: list[int]
) -> Tensor:
    """(R, C) unit vectors for ``experts``, R at most their number, from sampled tokens.

    Args:
        unit_SC: tokens, normalised; prototypes_EC: normalised, of all experts; thresholds_E.
        experts: those to be reborn; the others are taken to live on.
    """
    if not len(unit_SC):
        return unit_SC
    alive_E = torch.ones(len(thresholds_E), dtype=torch.bool)
    alive_E[experts] = False
    cos_SA = unit_SC @ prototypes_EC[alive_E].T
    served_S = (cos_SA > thresholds_E[alive_E]).sum(dim=1)
    quarter = min(len(unit_SC), max(len(experts), len(unit_SC) // 4))
    pool_S = (served_S <= served_S.sort().values[quarter - 1]).nonzero().squeeze(1)
    nowhere_S1 = torch.full((len(unit_SC), 1), -2.0)  # where nobody lives, all is far
    nearest_S = torch.cat([cos_SA, nowhere_S1], dim=1).amax(dim=1)[pool_S]
    found: list[Tensor] = []
    for _ in experts:
        pick = int(nearest_S.argmin())
        if float(nearest_S[pick]) > SAME:
            break
        found.append(unit_SC[pool_S[pick]])
        nearest_S = torch.maximum(nearest_S, unit_SC[pool_S] @ found[-1])
    return torch.stack(found) if found else unit_SC[:0]


def threshold_for(cos_S: Tensor, share: float) -> Tensor:
    """The threshold that at least ``share`` of these cosines pass, and few more: halfway between
    the last that must pass and the next smaller one."""
    descending_S = cos_S.sort(descending=True).values
    last = descending_S[max(1, round(share * len(cos_S))) - 1]
    below_S = descending_S[descending_S < last]
    return (last + below_S[0]) / 2 if len(below_S) else last - GAP


def _gather(sample_SC: Tensor) -> Tensor:
    """The samples of all processes below each other, by rank; a collective call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return sample_SC
    parts = [torch.empty_like(sample_SC) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sample_SC.contiguous())
    return torch.cat(parts)
