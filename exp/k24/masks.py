"""The 2:4 masks that a model evaluates with, and the bytes of its FFNs' weights.

Shapes: A agents (experts), O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiny_onn.model.experts import Experts
from tiny_onn.sparse.bits import pack_bits, unpack_bits
from tiny_onn.sparse.k24_layer import K24Linear
from tiny_onn.sparse.masked_linear import MaskedLinear

MASKS = "masks"
"""Folder of a run's snapshots."""

BF16, PACKED_24 = 2.0, 2.0 * 0.5625
"""Bytes a weight: dense; 2 of 4 with 2 bits of place for each that is kept."""


def evaluation_masks(model: nn.Module) -> dict[str, Tensor]:
    """bool (A, O, I) by name of the weight; {} where all weights are dense."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, K24Linear):
            found[f"{name}.weight"] = module.pattern.likeliest(module.weight)
        elif isinstance(module, MaskedLinear):
            found[f"{name}.weight"] = module.mask().unsqueeze(0)
        elif isinstance(module, Experts) and module.gate_up_pattern is not None:
            found[f"{name}.gate_up"] = module.gate_up_pattern.likeliest(module.gate_up)
            found[f"{name}.down"] = module.down_pattern.likeliest(module.down)
    return found


class MaskSnapshots(L.Callback):
    """Writes a run's masks to ``folder/masks`` before its first step and every ``every`` steps.

    A function of the step alone: a run that goes on where it was cut writes the same files again.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder / MASKS, every

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if batch.step == 0:
            self.write(module.model, 0)

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if (batch.step + 1) % self.every == 0:
            self.write(module.model, batch.step + 1)

    @torch.no_grad()
    def write(self, model: nn.Module, step: int) -> None:
        masks = evaluation_masks(model)
        if not masks:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        bits = {name: pack_bits(mask.cpu().flatten()) for name, mask in masks.items()}
        fresh = self.folder / f".{step}"
        save_file(bits, fresh)
        fresh.replace(self.folder / f"step_{step:08d}.safetensors")


def flips(folder: Path) -> list[dict[str, float]]:
    """Of the snapshots of a run: ``step``, and the share of the weights, over all matrices and
    agents, whose mask is another than at the snapshot before (``flipped``) and than at the first
    one (``from_start``). [] where there are fewer than two."""
    paths = sorted((folder / MASKS).glob("step_*.safetensors"))
    series, first, before = [], None, None
    for path in paths:
        now = _all_bits(path)
        if before is None:
            first = now
        else:
            step = int(path.stem.removeprefix("step_"))
            shares = {
                "flipped": int((now != before).sum()) / now.numel(),
                "from_start": int((now != first).sum()) / now.numel(),
            }
            series.append({"step": step, **{k: round(v, 6) for k, v in shares.items()}})
        before = now
    return series


def _all_bits(path: Path) -> Tensor:
    """bool: all masks of a snapshot, end to end (each filled up to whole bytes)."""
    return torch.cat([unpack_bits(b, 8 * len(b)) for _, b in sorted(load_file(path).items())])


def ffn_weights(model: nn.Module) -> Iterator[tuple[int, float]]:
    """(weights, bytes at bf16) of every matrix of the blocks' FFNs or experts, as they are kept
    once trained: dense, 2:4 packed, or shared by experts with a mask of a bit for each."""
    for block in model.blocks:
        for module in block.ffn.modules():
            if isinstance(module, Experts):
                masks = module.gate_up_pattern is not None
                each = PACKED_24 if masks else BF16
                if module.shared:
                    each = BF16 + module.gate_up_pattern.agents / 8
                for weight in (module.gate_up, module.down):
                    yield weight.numel(), weight.numel() * each
            elif isinstance(module, K24Linear | MaskedLinear):
                yield module.weight.numel(), module.weight.numel() * PACKED_24
            elif isinstance(module, nn.Linear):
                yield module.weight.numel(), module.weight.numel() * BF16
