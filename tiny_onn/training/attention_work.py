"""What attention has to do for one batch, counted from its documents' lengths alone.

Shapes: N tokens of all documents, B documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tiny_onn.arc.packing import Layout
from tiny_onn.config.schema import NsaConfig
from tiny_onn.model.nsa_plan import window_is_known
from tiny_onn.ops import nsa


class AttentionWork(NamedTuple):
    """Of one pass through one layer, one with NSA where there are any.

    visible_pairs: query-key pairs looked at, over all branches (a compressed block is one key);
    full_pairs: those of a layer without NSA, in a network that has both, else 0;
    compressed_chunks, compressed_blocks: runs of d tokens that pass phi's W_inner, and blocks that
    pass its W_outer, of one head; 0 without NSA.
    """

    visible_pairs: int
    full_pairs: int = 0
    compressed_chunks: int = 0
    compressed_blocks: int = 0


def attention_work(
    layout: Layout, causal: bool = False, settings: NsaConfig | None = None
) -> AttentionWork:
    """The work of full attention, or of NSA where its ``settings`` are given.

    Exact but for one thing: a token inside a prefix of more than n blocks may or may not have
    chosen the prefix's last block, which need not be full; that block counts as full. Dummies
    count as nothing: rows of a batch's filler, and the block that stands in where no document has
    one. What is computed and thrown away (hidden keys of a tile) is no work of the model's.
    """
    length_B = torch.tensor(layout.lengths)
    prefix_B = torch.zeros_like(length_B)
    if not causal:
        prefix_B = torch.minimum(torch.tensor(layout.prefixes), length_B)
    doc_N = torch.arange(len(length_B)).repeat_interleave(length_B)
    time_N = torch.arange(len(doc_N)) - (length_B.cumsum(0) - length_B)[doc_N]
    end_N = torch.maximum(time_N, prefix_B[doc_N] - 1)
    if settings is None:
        return AttentionWork(int((end_N + 1).sum()))
    stride, block = settings.stride, settings.block
    compressed_N = ((end_N + 1 - block) // stride + 1).clamp(min=0)
    window_N = (end_N + 1).clamp(max=settings.window)
    if window_is_known(layout.lengths, settings):
        window_N = window_N * (length_B > settings.window)[doc_N]
    return AttentionWork(
        int((compressed_N + _selected(time_N, end_N, settings) + window_N).sum()),
        int((end_N + 1).sum()) if settings.every > 1 else 0,
        sum(n // stride for n in layout.lengths if n >= block),
        sum(nsa.num_compressed(n, block, stride) for n in layout.lengths),
    )


def _selected(time_N: Tensor, end_N: Tensor, settings: NsaConfig) -> Tensor:
    """Keys that each token reads in its chosen blocks, its own always among them."""
    size, count = settings.select_block, settings.select_count
    last_N = end_N // size
    own_is_last_N = time_N // size == last_N
    chosen_N = count * size - own_is_last_N * (size - 1 - end_N % size)
    return torch.where(last_N < count, end_N + 1, chosen_N)
