"""How the documents of one batch attend by NSA: which sparsely, and which branches densely.

Where n l' tokens cover a document, its selected branch is full attention, and so is the window
where w does: these go to the full-attention back-end, which is faster and equal; once for both
where they share keys.

Shapes: N tokens, X of them, H query heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_onn.config.schema import NsaConfig
from tiny_onn.model.packed_attention import Attend, DocumentSpans
from tiny_onn.ops import nsa


@dataclass(frozen=True)
class Split:
    """One branch's documents: those it reads sparsely, and those that it reads in full.

    layout: of the sparse ones alone, None if there are none; sparse_row_X, full_row_X: rows of
    either among all tokens; back_N: puts sparse rows, then full ones, into their order (all three
    None unless there are both); full: attention of the full ones, None if there are none, or if it
    is never asked because their output is known; sparse: this branch of the sparse ones by another
    back-end than NSA's, None: by NSA's own.
    """

    layout: nsa.NsaLayout | None = None
    full: Attend | None = None
    sparse: Attend | None = None
    sparse_row_X: Tensor | None = None
    full_row_X: Tensor | None = None
    back_N: Tensor | None = None

    def attend(
        self, sparse: Callable[..., Tensor], *tensors: Tensor, known_NHD: Tensor | None = None
    ) -> Tensor:
        """(N, H, D). ``sparse`` takes ``tensors``, queries, keys and values first, and a layout.

        known_NHD: an output that is right for the full documents, which are not computed again.
        """
        if self.layout is None:
            return self.full(*tensors[:3]) if known_NHD is None else known_NHD
        if self.full_row_X is None:
            return self._attend_sparsely(sparse, tensors)
        rows = self.sparse_row_X
        sparse_XHD = self._attend_sparsely(sparse, [t.index_select(0, rows) for t in tensors])
        if known_NHD is None:
            full_XHD = self.full(*(t.index_select(0, self.full_row_X) for t in tensors[:3]))
        else:
            full_XHD = known_NHD.index_select(0, self.full_row_X)
        return torch.cat([sparse_XHD, full_XHD]).index_select(0, self.back_N)

    def _attend_sparsely(self, own: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
        if self.sparse is not None:
            return self.sparse(*tensors[:3])
        return own(*tensors, self.layout)


@dataclass(frozen=True)
class NsaPlan:
    """Made once for a batch, used by all layers.

    layout: of all documents; num_filler: rows after them that attend to nothing; selected, window:
    how these branches read them; window_known: what the window reads in full, the selected branch
    has read in full already, with the same keys; full: attention of the blocks without NSA, None if
    all have it.
    """

    layout: nsa.NsaLayout
    num_filler: int
    selected: Split
    window: Split
    window_known: bool
    full: Attend | None = None

    def compute_for_kernels(self) -> None:
        """See :meth:`nsa.NsaLayout.compute_for_kernels`."""
        layouts = {id(x): x for x in (self.layout, self.selected.layout, self.window.layout) if x}
        for layout in layouts.values():
            layout.compute_for_kernels()


def window_is_known(lengths: tuple[int, ...], settings: NsaConfig) -> bool:
    """Whether each document that its window covers has been read in full by the selected branch."""
    covered = settings.select_count * settings.select_block
    return settings.kv == "shared" and all(n <= covered for n in lengths if n <= settings.window)


def plan_nsa(
    spans: DocumentSpans,
    settings: NsaConfig,
    plan_full: Callable[[DocumentSpans], Attend],
    num_filler: int = 0,
    full: Attend | None = None,
    plan_window: Callable[[DocumentSpans], Attend] | None = None,
) -> NsaPlan:
    """The plan for the documents of ``spans``; ``plan_full`` makes full attention for some, and
    ``full`` is that of blocks without NSA; ``plan_window`` makes the window branch for some where
    it is not NSA's own."""
    layout, covered = _lay_out(spans, settings), settings.select_count * settings.select_block
    known = window_is_known(spans.lengths, settings)
    selected = _split(spans, covered, layout, settings, plan_full)
    window = _split(
        spans, settings.window, layout, settings, None if known else plan_full, plan_window
    )
    return NsaPlan(layout, num_filler, selected, window, known, full)


def _split(
    spans: DocumentSpans,
    longest: int,
    layout: nsa.NsaLayout,
    settings: NsaConfig,
    plan_full: Callable[[DocumentSpans], Attend] | None,
    plan_sparse: Callable[[DocumentSpans], Attend] | None = None,
) -> Split:
    """Documents of at most ``longest`` tokens are read in full; ``layout`` is that of all."""
    short = [i for i, n in enumerate(spans.lengths) if n <= longest]
    long = [i for i, n in enumerate(spans.lengths) if n > longest]
    sparse = None
    if long and plan_sparse is not None:
        sparse = plan_sparse(_some(spans, long) if short else spans)
    if not short:
        return Split(layout, sparse=sparse)
    full = plan_full and plan_full(_some(spans, short) if long else spans)
    if not long:
        return Split(full=full)
    device = spans.cu_seqlens_B1.device
    sparse_rows, full_rows = _rows(spans, long), _rows(spans, short)
    back_N = torch.cat([sparse_rows, full_rows]).argsort()
    return Split(
        _lay_out(_some(spans, long), settings),
        full,
        sparse,
        *(rows.to(device) for rows in (sparse_rows, full_rows, back_N)),
    )


def _lay_out(spans: DocumentSpans, settings: NsaConfig) -> nsa.NsaLayout:
    return nsa.lay_out(
        spans.cu_seqlens_B1,
        block=settings.block,
        stride=settings.stride,
        select_block=settings.select_block,
        window=settings.window,
        prefix_lens_B=spans.prefix_lens_B,
        lengths=spans.lengths,
    )


def _rows(spans: DocumentSpans, chosen: list[int]) -> Tensor:
    """Rows of the chosen documents, on the CPU."""
    starts = [0]
    for length in spans.lengths:
        starts.append(starts[-1] + length)
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])


def _some(spans: DocumentSpans, chosen: list[int]) -> DocumentSpans:
    """Only the chosen documents, packed."""
    device = spans.cu_seqlens_B1.device
    lengths = tuple(spans.lengths[i] for i in chosen)
    prefixes = tuple(spans.prefixes[i] for i in chosen)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return DocumentSpans(offsets.to(device), torch.tensor(prefixes).to(device), lengths, prefixes)
