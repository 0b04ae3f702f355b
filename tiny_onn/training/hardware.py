"""Settings that follow from the machine, decided once before training."""

from __future__ import annotations

from dataclasses import replace

import torch

from tiny_onn.config.schema import Config


def has_fast_bf16(accelerator: str) -> bool:
    """Whether bfloat16 products run in hardware: GPUs since Ampere, CPUs with AVX512-bf16."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()


def with_precision(config: Config) -> Config:
    """``config`` with trainer.precision=auto replaced by what this machine runs fastest."""
    if config.trainer.precision != "auto":
        return config
    chosen = "bf16" if has_fast_bf16(config.trainer.accelerator) else "fp32"
    return replace(config, trainer=replace(config.trainer, precision=chosen))
