"""Shapes that every implementation of NSA is compared on, odd ones included, and their tensors.

Shapes: N tokens, M compressed blocks, H query heads, K key/value heads, D head width, E value
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tiny_onn_kernels.nsa.layout import TILE, NsaLayout, lay_out
from tiny_onn_kernels.nsa.naive import NaiveBranches, naive_branches
from tiny_onn_kernels.nsa.reference import nsa_attention


@dataclass(frozen=True)
class Case:
    """Packed documents (``prefixes``: 0 is causal) and settings; tile: queries of a tile."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    heads: int = 2
    kv_heads: int = 1
    width: int = 8
    value_width: int = 8
    block: int = 4
    stride: int = 2
    select_block: int = 4
    count: int = 5
    window: int = 5
    tile: int = TILE

    def layout(self, device: torch.device | str = "cpu") -> NsaLayout:
        """The layout of these documents."""
        cu_seqlens_B1 = torch.tensor([0, *self.lengths], device=device).cumsum(0)
        return lay_out(
            cu_seqlens_B1.int(),
            block=self.block,
            stride=self.stride,
            select_block=self.select_block,
            window=self.window,
            prefix_lens_B=torch.tensor(self.prefixes, device=device),
            lengths=self.lengths,
            tile=self.tile,
        )

    def inputs(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0
    ) -> Inputs:
        """Normal random tensors, the same in every dtype but for rounding."""
        generator = torch.Generator().manual_seed(seed)
        num_tokens = sum(self.lengths)
        num_blocks = len(self.layout().compressed_rows_ML)

        def normal(*shape: int) -> Tensor:
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
            return tensor.to(device=device, dtype=dtype)

        kv = self.kv_heads
        return Inputs(
            normal(num_tokens, self.heads, self.width),
            normal(num_blocks, kv, self.width),
            normal(num_blocks, kv, self.value_width),
            normal(num_tokens, kv, self.width),
            normal(num_tokens, kv, self.value_width),
            normal(num_tokens, kv, self.width),
            normal(num_tokens, kv, self.value_width),
            normal(num_tokens, self.heads, 3).sigmoid(),
        )

    def naive(self, inputs: Inputs, choices: list[list[set[int]]] | None = None) -> NaiveBranches:
        """The naive branches of all documents, one after the other."""
        layout, start, first, parts = self.layout(), 0, 0, []
        counts = layout.compressed.doc_M.bincount(minlength=len(self.lengths)).tolist()
        for length, prefix, blocks in zip(self.lengths, self.prefixes, counts, strict=True):
            tokens, compressed = slice(start, start + length), slice(first, first + blocks)
            parts.append(
                naive_branches(
                    inputs.q[tokens],
                    inputs.k_compressed[compressed],
                    inputs.v_compressed[compressed],
                    *(t[tokens] for t in inputs.tensors()[3:7]),
                    prefix=prefix,
                    block=self.block,
                    stride=self.stride,
                    select_block=self.select_block,
                    count=self.count,
                    window=self.window,
                    choices=None if choices is None else choices[tokens],
                )
            )
            start, first = start + length, first + blocks
        return NaiveBranches(
            compressed=torch.cat([p.compressed for p in parts]),
            selected=torch.cat([p.selected for p in parts]),
            window=torch.cat([p.window for p in parts]),
            scores=[row for p in parts for row in p.scores],
            choices=[row for p in parts for row in p.choices],
        )


@dataclass
class Inputs:
    """What :func:`tiny_onn_kernels.nsa.reference.nsa_attention` takes, in its order."""

    q: Tensor
    k_compressed: Tensor
    v_compressed: Tensor
    k_selected: Tensor
    v_selected: Tensor
    k_window: Tensor
    v_window: Tensor
    gate: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())

    def require_grad(self) -> Inputs:
        for tensor in self.tensors():
            tensor.requires_grad_()
        return self

    def run(
        self, layout: NsaLayout, count: int, index_NKn: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and chosen blocks of the reference."""
        return nsa_attention(*self.tensors(), layout, count, index_NKn)

    def run_with(
        self, implementation: ModuleType, layout: NsaLayout, count: int
    ) -> tuple[Tensor, Tensor]:
        """Output and chosen blocks of any module with the reference's names."""
        return implementation.nsa_attention(*self.tensors(), layout, count)


def choices_of(index_NKn: Tensor) -> list[list[set[int]]]:
    """Chosen blocks as sets, one for each token and group."""
    return [[{j for j in row if j >= 0} for row in heads] for heads in index_NKn.tolist()]


LENGTHS = (1, 3, 4, 5, 7, 8, 9, 11, 13, 23)
"""Documents of one token, around l = l' = 4 and its multiples, and primes."""

CASES: tuple[Case, ...] = (
    *(Case((n,), (0,)) for n in LENGTHS),
    *(Case((n,), (n // 2,)) for n in LENGTHS),
    Case((23,), (23,)),
    Case((5, 1, 17, 3, 30), (2, 0, 17, 3, 11), heads=4, kv_heads=2),
    Case((5, 1, 17, 3, 30), (0, 0, 0, 0, 0), heads=4, kv_heads=2, tile=8),
    Case((29, 14), (9, 3), heads=3, kv_heads=1, width=5, value_width=7, tile=4),
    Case((31, 26), (13, 0), heads=2, kv_heads=2, block=6, stride=3, select_block=3, count=4),
    Case((31, 26), (0, 20), block=8, stride=2, select_block=4, count=4, window=1, tile=16),
    Case((37,), (12,), block=2, stride=2, select_block=6, count=3, window=6, tile=8),
    Case((33,), (0,), block=1, stride=1, select_block=5, count=4, window=2),
    Case(
        (70, 66),
        (30, 0),
        heads=4,
        kv_heads=1,
        select_block=8,
        block=8,
        stride=4,
        count=3,
        window=11,
    ),
)
"""Small enough for the naive implementation."""
