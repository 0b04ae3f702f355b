"""Leaving training for a moment, without a trace: mode, random state and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


@contextmanager
def excursion(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the model's device.

    Afterwards every module's training flag and torch's random state (CPU, and the model's CUDA
    device) are what they were, also after an error.
    """
    device = device_of(model)
    flags = [(module, module.training) for module in model.modules()]
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        model.eval()
        try:
            yield device
        finally:
            for module, training in flags:
                module.training = training


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """bf16 autocast on ``device``, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
