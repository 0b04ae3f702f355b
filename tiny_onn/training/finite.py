"""A run ends, with its last good checkpoint, as soon as a loss or a weight is not finite.

Both checks are collective: every process calls them, and all raise if one must.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tiny_onn.errors import UserError
from tiny_onn.training.distributed import StepChannel, whole
from tiny_onn.training.loss_monitor import LossMonitor


def require_finite_loss(monitor: LossMonitor, channel: StepChannel, saved_step: int | None) -> None:
    """Raises UserError if the loss of any step so far was not finite, in any process.

    Args:
        saved_step: step of the last checkpoint, if there is one.
    """
    bad = int(channel.gather(float(monitor.first_bad())).max())
    if bad >= 0:
        raise UserError(f"the loss is not finite at step {bad + 1}; {_remedy(saved_step)}")


def require_finite_weights(
    parameters: Iterable[Tensor], step: int, channel: StepChannel, saved_step: int | None
) -> None:
    """Raises UserError if a weight is not finite after ``step`` steps, in any process.

    Args:
        saved_step: step of the last checkpoint, if there is one.
    """
    norms = torch._foreach_norm([p.detach() for p in parameters])
    total = torch.stack([whole(norm) for norm in norms]).sum()
    if channel.any(not math.isfinite(float(total))):
        raise UserError(f"the weights are not finite after step {step}; {_remedy(saved_step)}")


def _remedy(saved_step: int | None) -> str:
    kept = (
        f"the checkpoint of step {saved_step} is kept"
        if saved_step
        else "no checkpoint was written yet"
    )
    return (
        f"expected a finite number; {kept}; lower optim.muon_lr and optim.adamw_lr "
        "and start again with resume=false"
    )
