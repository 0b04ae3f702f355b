"""What NSA is measured on: random packed documents and the complete function.

Complete: phi of keys and values (compression), scores and choice of blocks, three branches, gates
with their sigmoid; one pair of keys and values for all branches, as in every public benchmark.
Rotations and norms, which full attention needs too, are not in it. Documents that n l' or w covers
are read sparsely all the same, where the model would go dense.

Shapes: N tokens, H query heads, K key/value heads, D head width, M compressed blocks, n chosen
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiny_onn_kernels.nsa import kernel

PASSES = ("forward", "backward", "forward+backward")
POSITION_STD = 0.02


@dataclass(frozen=True)
class Setting:
    """Heads and sizes in tokens (block l, stride d, select_block l', count n, window w); checked:
    lengths of the documents compared with the reference; ways_from: shortest document on which both
    ways round of the selected branch are compared."""

    name: str
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    block: int
    stride: int
    select_block: int
    count: int
    window: int
    checked: tuple[int, ...]
    ways_from: int = 8192

    def shapes(self, length: int, num_documents: int) -> dict[str, Any]:
        others = ("name", "dtype", "checked", "ways_from")
        sizes = {k: v for k, v in vars(self).items() if k not in others}
        dtype = str(self.dtype).removeprefix("torch.")
        return {"tokens": length, "documents": num_documents, "dtype": dtype, **sizes}


PAPER = Setting("paper", 64, 4, 128, torch.bfloat16, 32, 16, 64, 16, 512, (1237,))
ARC = Setting("arc", 16, 2, 64, torch.bfloat16, 32, 16, 32, 8, 128, (37, 700, 291))
TINY = replace(
    PAPER, heads=4, kv_heads=2, width=16, dtype=torch.float32, block=8, stride=4, select_block=8,
    count=4, window=8, checked=(41,), ways_from=0,
)  # fmt: skip
TINY_ARC = replace(TINY, name="arc", window=5, checked=(7, 37))


def normal(device: torch.device, dtype: torch.dtype, *shape: int, std: float = 1.0) -> Tensor:
    """A random leaf, drawn on the device."""
    return (torch.randn(shape, device=device, dtype=dtype) * std).requires_grad_()


class Documents:
    """Packed documents of ``lengths`` with everything that the complete function takes.

    leaves: q_NHD, k_NKD, v_NKD, gate logits (N, H, 3), then phi of keys and of values: position
    (l, 1, D), inner (D, l D), outer (D, D) each.
    """

    def __init__(self, setting: Setting, lengths: Sequence[int], device: torch.device) -> None:
        self.setting, self.lengths = setting, tuple(lengths)
        self.layout = self.lay_out(setting.window, device)
        num_tokens, width, long = sum(lengths), setting.width, setting.block * setting.width
        options = (device, setting.dtype, num_tokens)
        self.leaves = [
            normal(*options, setting.heads, width),
            normal(*options, setting.kv_heads, width),
            normal(*options, setting.kv_heads, width),
            normal(*options, setting.heads, 3),
        ]
        for _ in ("keys", "values"):
            self.leaves += [
                normal(*options[:2], setting.block, 1, width, std=POSITION_STD),
                normal(*options[:2], width, long, std=long**-0.5),
                normal(*options[:2], width, width, std=width**-0.5),
            ]
        self.grad_NHD = normal(*options, setting.heads, width).detach()

    def lay_out(self, window: int, device: torch.device) -> kernel.NsaLayout:
        setting = self.setting
        layout = kernel.lay_out(
            torch.tensor([0, *self.lengths], device=device).cumsum(0).int(),
            block=setting.block,
            stride=setting.stride,
            select_block=setting.select_block,
            window=window,
            lengths=self.lengths,
        )
        layout.compute_for_kernels()
        return layout

    def cast(self, dtype: torch.dtype) -> Documents:
        """The same numbers in another dtype."""
        other = object.__new__(Documents)
        other.setting, other.lengths, other.layout = self.setting, self.lengths, self.layout
        other.leaves = [t.detach().to(dtype).requires_grad_() for t in self.leaves]
        other.grad_NHD = self.grad_NHD.to(dtype)
        return other

    def compressed(self, branches: Any = kernel) -> tuple[Tensor, Tensor]:
        """phi of keys and values, (M, K, D) each."""
        _, k_NKD, v_NKD, _, *phi = self.leaves
        k_MKD = branches.compress_packed(k_NKD, self.layout, *phi[:3])
        return k_MKD, branches.compress_packed(v_NKD, self.layout, *phi[3:])

    def attend(self, branches: Any = kernel, index_NKn: Tensor | None = None) -> Any:
        """Output (N, H, D) of the complete function, and the chosen blocks."""
        q_NHD, k_NKD, v_NKD, logits_NH3, *_ = self.leaves
        return branches.nsa_attention(
            q_NHD,
            *self.compressed(branches),
            *(k_NKD, v_NKD, k_NKD, v_NKD),
            logits_NH3.sigmoid(),
            self.layout,
            self.setting.count,
            index_NKn,
        )

    def complete(self) -> Tensor:
        return self.attend()[0]


Call = Callable[[], Any]


def passes(forward: Call, leaves: Sequence[Tensor], grad: Tensor) -> dict[str, Callable[[], Call]]:
    """Makers of PASSES. Forward is without gradient, so NSA inverts the index in it only where it
    goes keys first; backward keeps one graph."""

    def without_gradient() -> Any:
        with torch.no_grad():
            return forward()

    def backward() -> Call:
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def both() -> Any:
        return torch.autograd.grad(forward(), leaves, grad)

    return dict(zip(PASSES, (lambda: without_gradient, backward, lambda: both), strict=True))
