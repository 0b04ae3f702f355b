"""Exponential moving average of the weights (Polyak and Juditsky 1992), with a warm-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tiny_onn.training.distributed import set_rows, set_where, sharded_like, whole


class WeightEma:
    """Shadow copy of a model's trainable parameters.

    After update t (from 1) the decay is min(decay, (1 + t) / (10 + t)), so that the random
    initial weights are forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"EMA decay must be between 0 and 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self._live = dict(model.named_parameters())
        self._shadow = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the live weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self._shadow.values()), list(self._live.values()), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside the context, its own again after."""
        kept = {name: p.detach().clone() for name, p in self._live.items()}
        try:
            for name, p in self._live.items():
                p.copy_(self._shadow[name])
            yield
        finally:
            for name, p in self._live.items():
                p.copy_(kept[name])

    def state_dict(self) -> dict[str, object]:
        """Full CPU tensors by parameter name (a collective call under FSDP)."""
        shadow = {name: whole(t).cpu() for name, t in self._shadow.items()}
        return {"updates": self.updates, "shadow": shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        self.updates = int(state["updates"])
        shadow: dict[str, Tensor] = state["shadow"]
        assert shadow.keys() == self._shadow.keys(), "EMA state of another model"
        for name, target in self._shadow.items():
            target.copy_(sharded_like(shadow[name].to(target.device), target))

    def adopt_where(self, parameter: Tensor, where: Tensor) -> None:
        """The shadow of these entries becomes what they are now: they were begun anew."""
        (name,) = (name for name, p in self._live.items() if p is parameter)
        set_where(self._shadow[name], where, whole(parameter.detach()))

    def adopt_rows(self, parameter: Tensor, rows: Sequence[int]) -> None:
        """The shadow of these rows becomes what they are now: they were begun anew."""
        (name,) = (name for name, p in self._live.items() if p is parameter)
        set_rows(self._shadow[name], rows, whole(parameter.detach())[list(rows)])
