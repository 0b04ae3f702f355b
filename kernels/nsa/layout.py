"""Where packed documents, their tokens and their blocks lie, and who may see whom.

Everything restarts with a document: token numbers, compressed blocks, selectable blocks. A batch's
layout is built once and shared by all layers; its parts are computed when first asked for.

Visibility, with t the query's number in its document, P the length of the document's prefix and
e(t) = P - 1 for t < P, else t (prefix-LM: the prefix sees itself both ways; P = 0 is causal):

    token s                      is visible if  s <= e(t)
    compressed block i           is visible if  i d + l - 1 <= e(t), so all its tokens are
    selectable block j           may be chosen  if  j l' <= e(t); its tokens past e(t) are hidden
    window                       the w visible tokens nearest to t, the earlier of two equally near

Without a prefix the window is t - w + 1 ... t. So w keys, never w + 1, and with w >= the document
it is full attention under either mask.

Shapes: N tokens, B documents, M blocks of one kind, L tokens of a block, S query tiles, R queries
of a tile, C keys that a tile looks at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TILE = 64
"""Queries of a tile."""

LONG_TILE = 256
"""Queries of a tile of the compressed branch in long documents, whose keys every tile copies."""

LONG = 512
"""Tokens from which a document is long."""


def compressed_visible(end: Tensor, number: Tensor, block: int, stride: int) -> Tensor:
    """Whether the whole compressed block ``number`` lies at or before token ``end``."""
    return number * stride + (block - 1) <= end


def token_visible(end: Tensor, time: Tensor) -> Tensor:
    """Whether token ``time`` lies at or before ``end``."""
    return time <= end


def block_visible(end: Tensor, number: Tensor, select_block: int) -> Tensor:
    """Whether selectable block ``number`` begins at or before token ``end``."""
    return number * select_block <= end


def window_bounds(time: Tensor, prefix: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """First token of the window and the one after its last, for a query at ``time``."""
    in_prefix = time < prefix
    centred = torch.minimum((time - window // 2).clamp(min=0), (prefix - window).clamp(min=0))
    first = torch.where(in_prefix, centred, (time - window + 1).clamp(min=0))
    return first, torch.where(in_prefix, torch.minimum(first + window, prefix), time + 1)


def num_compressed(length: int, block: int, stride: int) -> int:
    """floor((T - l) / d) + 1 blocks of ``block`` tokens, every ``stride``; 0 if T < l."""
    return max(0, (length - block) // stride + 1)


@dataclass(frozen=True)
class Blocks:
    """Runs of L tokens, ``stride`` apart, counted from the start of each document.

    doc_M, number_M: int64 (M,) document and number in it; first_B: int64 (B,) a document's first
    block among all M; time_ML: int64 (M, L) token numbers in the document, past its end in the
    last run of documents that L does not divide; row_ML: int64 (M, L) rows of the packed batch,
    there cut off at the document's last; most: most blocks of any document.
    """

    doc_M: Tensor
    number_M: Tensor
    first_B: Tensor
    time_ML: Tensor
    row_ML: Tensor
    most: int

    @cached_property
    def first_row_M(self) -> Tensor:
        """int64 (M,) row of every run's first token, side by side."""
        return self.row_ML[:, 0].clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Cover:
    """Blocks without overlap, and the way back.

    slot_N: int64 (N,) place of every token among the M * L of the blocks, -1 where there is none;
    token_X: int64 (M * L,) token of every place, -1 where a document's last block is not full.
    """

    blocks: Blocks
    slot_N: Tensor
    token_X: Tensor


@dataclass(frozen=True)
class NsaLayout:
    """A packed batch as NSA sees it; made by :func:`lay_out`.

    lengths: tokens of each document, as numbers, so that sizes need no device; start_B, length_B,
    prefix_B: int64 (B,); doc_N, time_N, end_N: int64 (N,) document, token number t in it, last
    visible token e(t); block, stride, select_block, window: l, d, l', w in tokens; tile: queries
    of a tile.
    """

    lengths: tuple[int, ...]
    start_B: Tensor
    length_B: Tensor
    prefix_B: Tensor
    doc_N: Tensor
    time_N: Tensor
    end_N: Tensor
    block: int
    stride: int
    select_block: int
    window: int
    tile: int

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def most_select_blocks(self) -> int:
        """Selectable blocks of the longest document."""
        return -(-self.longest // self.select_block)

    def compute_for_kernels(self) -> None:
        """What the Triton kernels read of a layout, now: torch.compile cannot trace the lock that
        cached_property takes before Python 3.12, but finds what is computed as plain attributes
        (and guards on the numbers that it reads, but not on all lengths)."""
        for cover in (self.chunks, self.selectable, self.tiles):
            assert cover.blocks.first_row_M is not None
        assert self.compressed_rows_ML is not None
        assert self.compressed_range and self.window_range
        assert self.longest and self.most_select_blocks

    def _blocks(self, counts: list[int], size: int, stride: int) -> Blocks:
        device, total = self.start_B.device, sum(counts)
        count_B = torch.tensor(counts, device=device)
        documents = torch.arange(len(counts), device=device)
        doc_M = documents.repeat_interleave(count_B, output_size=total)
        first_B = count_B.cumsum(0) - count_B
        number_M = torch.arange(total, device=device) - first_B[doc_M]
        time_ML = number_M[:, None] * stride + torch.arange(size, device=device)
        last_M1 = self.length_B[doc_M][:, None] - 1
        row_ML = self.start_B[doc_M][:, None] + torch.minimum(time_ML, last_M1)
        return Blocks(doc_M, number_M, first_B, time_ML, row_ML, max(counts))

    def _cover(self, size: int) -> Cover:
        blocks = self._blocks([-(-n // size) for n in self.lengths], size, size)
        slot_N = (blocks.first_B[self.doc_N] + self.time_N // size) * size + self.time_N % size
        real_MR = blocks.time_ML < self.length_B[blocks.doc_M][:, None]
        return Cover(blocks, slot_N, torch.where(real_MR, blocks.row_ML, -1).flatten())

    @cached_property
    def compressed(self) -> Blocks:
        """The compressed branch's blocks: none in documents shorter than one."""
        counts = [num_compressed(n, self.block, self.stride) for n in self.lengths]
        return self._blocks(counts, self.block, self.stride)

    @cached_property
    def chunks(self) -> Cover:
        """Runs of d tokens that compressed blocks are made of: block i of a document is its chunks
        i to i + l / d - 1. None in documents without such blocks."""
        counts = [n // self.stride if n >= self.block else 0 for n in self.lengths]
        blocks = self._blocks(counts, self.stride, self.stride)
        token_X = blocks.row_ML.flatten()
        slot_N = torch.full_like(self.doc_N, -1)
        slot_N[token_X] = torch.arange(len(token_X), device=token_X.device)
        return Cover(blocks, slot_N, token_X)

    @cached_property
    def compressed_rows_ML(self) -> Tensor:
        """Token rows of every compressed block (M, l); one dummy, seen by nobody, if there is
        none, so that parameters take part (with gradient zero) in every batch."""
        rows_ML = self.compressed.row_ML
        return rows_ML if len(rows_ML) else self.start_B[:1, None].expand(1, self.block)

    @cached_property
    def selectable(self) -> Cover:
        """Blocks of l' tokens that cover every document."""
        return self._cover(self.select_block)

    @cached_property
    def tiles(self) -> Cover:
        """Tiles of queries that cover every document."""
        return self._cover(self.tile)

    @cached_property
    def compressed_tiles(self) -> Cover:
        """Tiles of queries of the compressed branch."""
        if self.longest <= LONG or self.tile >= LONG_TILE:
            return self.tiles
        return self._cover(LONG_TILE)

    @cached_property
    def compressed_keys(self) -> tuple[Tensor, Tensor]:
        """(S, C) compressed keys of each tile and bool (S, C, R), which its queries may see."""
        tiles = self.compressed_tiles.blocks
        number_C = torch.arange(max(1, self.compressed.most), device=self.start_B.device)
        first_S1 = self.compressed.first_B[tiles.doc_M][:, None]
        count_B = (self.length_B - self.block + self.stride) // self.stride
        last_S1 = (count_B - 1).clamp(min=0)[tiles.doc_M][:, None]
        key_SC = first_S1 + torch.minimum(number_C, last_S1)
        key_SC = key_SC.clamp(max=len(self.compressed_rows_ML) - 1)
        end_SR = self.end_N[tiles.row_ML]
        number_C1 = number_C[:, None]
        visible_SCR = compressed_visible(end_SR[:, None], number_C1, self.block, self.stride)
        return key_SC, visible_SCR

    @cached_property
    def compressed_range(self) -> tuple[Tensor, Tensor]:
        """int32 (N,) first compressed row that a token sees, and the one after its last: one run.
        Neither ever falls from a token to the next."""
        first_N = self.compressed.first_B[self.doc_N]
        count_N = ((self.end_N + 1 - self.block + self.stride) // self.stride).clamp(min=0)
        return first_N.int(), (first_N + count_N).int()

    @cached_property
    def window_range(self) -> tuple[Tensor, Tensor]:
        """As ``compressed_range``: the token rows of every window."""
        first_N, stop_N = window_bounds(self.time_N, self.prefix_B[self.doc_N], self.window)
        start_N = self.start_B[self.doc_N]
        return (start_N + first_N).int(), (start_N + stop_N).int()

    @cached_property
    def window_keys(self) -> tuple[Tensor, Tensor]:
        """(S, C) token rows that the windows of each tile cover, bool (S, C, R) which are whose."""
        tiles = self.tiles.blocks
        num_keys = min(self.window + self.tile - 1, self.longest)
        time_SR = self.time_N[tiles.row_ML]
        prefix_S = self.prefix_B[tiles.doc_M]
        first_SR, stop_SR = window_bounds(time_SR, prefix_S[:, None], self.window)
        time_SC = first_SR[:, :1] + torch.arange(num_keys, device=self.start_B.device)
        visible_SCR = (time_SC[..., None] >= first_SR[:, None]) & (
            time_SC[..., None] < stop_SR[:, None]
        )
        last_S1 = self.length_B[tiles.doc_M][:, None] - 1
        row_SC = self.start_B[tiles.doc_M][:, None] + torch.minimum(time_SC, last_S1)
        return row_SC, visible_SCR


def lay_out(
    cu_seqlens_B1: Tensor,
    *,
    block: int,
    stride: int,
    select_block: int,
    window: int,
    prefix_lens_B: Tensor | None = None,
    lengths: tuple[int, ...] | None = None,
    tile: int = TILE,
) -> NsaLayout:
    """The layout of a packed batch.

    Args:
        cu_seqlens_B1: integer (B+1,) offsets of the documents, each of at least one token.
        block, stride, select_block, window: l, d, l', w in tokens; d divides l and l'.
        prefix_lens_B: integer (B,) tokens that see each other both ways; None: causal.
        lengths: the documents' lengths as numbers; read from the offsets (which waits for a
            device) if not given.
        tile: queries of a tile.

    Raises:
        ValueError: lengths that the stride does not divide, or a number below 1.
    """
    sizes = (block, stride, select_block, window, tile)
    if min(sizes) < 1 or block % stride or select_block % stride:
        raise ValueError(
            f"got block={block}, stride={stride}, select_block={select_block}, window={window}, "
            f"tile={tile}; expected numbers of at least 1 and a stride that divides both blocks"
        )
    start_B = cu_seqlens_B1[:-1].long()
    length_B = cu_seqlens_B1.diff().long()
    if lengths is None:
        lengths = tuple(length_B.tolist())
    num_tokens, device = sum(lengths), start_B.device
    doc_N = torch.arange(len(lengths), device=device)
    doc_N = doc_N.repeat_interleave(length_B, output_size=num_tokens)
    time_N = torch.arange(num_tokens, device=device) - start_B[doc_N]
    if prefix_lens_B is None:
        prefix_B = torch.zeros_like(length_B)
    else:
        prefix_B = torch.minimum(prefix_lens_B.long(), length_B)
    end_N = torch.maximum(time_N, prefix_B[doc_N] - 1)
    return NsaLayout(
        lengths=lengths,
        start_B=start_B,
        length_B=length_B,
        prefix_B=prefix_B,
        doc_N=doc_N,
        time_N=time_N,
        end_N=end_N,
        block=block,
        stride=stride,
        select_block=select_block,
        window=window,
        tile=tile,
    )
