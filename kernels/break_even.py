"""From which size on our 2:4 kernels beat PyTorch, by GPU generation, as measured.

    python exp/bench/sparse24_gpu.py

ends with the lines to write here: of training passes, forward and backward, of the model's own
modules by both back-ends. What is not here was not measured, and ``auto`` leaves it alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Capability = tuple[int, int]

WINS_FROM: dict[Capability, dict[str, float | None]] = {}
"""Compute capability -> {"pattern24": weights of a matrix, "relu2_24": operations of the second
product (2 T F C)} from which on the kernel wins; None: it wins nowhere."""

MEASURED_IN = {"pattern24": torch.float32, "relu2_24": torch.bfloat16}
"""Of weights as they are trained, and of activations."""


def loses(
    operation: str,
    capability: Capability,
    size: float,
    dtype: torch.dtype,
    wins_from: Mapping[Capability, Mapping[str, float | None]] = WINS_FROM,
) -> str | None:
    """Why not to take our kernel for ``operation`` at this size and in this type; None: it was
    measured to win."""
    measured = wins_from.get(capability, {})
    if operation not in measured:
        generation = ".".join(map(str, capability))
        return f"not measured on compute capability {generation}: python exp/bench/sparse24_gpu.py"
    if dtype != MEASURED_IN[operation]:
        return f"measured in {MEASURED_IN[operation]}, here {dtype}"
    least = measured[operation]
    if least is None or size < least:
        wins = "nowhere" if least is None else f"from {least:.3g} on"
        return f"measured to win {wins}, here {size:.3g}"
    return None
