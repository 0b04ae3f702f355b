"""Random numbers of a step: a stream of its own for every step and process.

What a step draws (dropout) is a function of (seed, step, process), so a resumed run needs no
saved generator state, and nothing that draws between two steps can change training.
"""

from __future__ import annotations

import torch


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the random numbers of one step in one process."""
    return (seed * 1_000_003 + step) * 10_007 + rank


def seed_step(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of ``device`` (torch.manual_seed takes a millisecond:
    it keeps a stack trace for every kind of accelerator that is not in use)."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
