"""How the documents of one batch attend by NSA: which sparsely, and which branches densely.

Where n l' tokens cover a document, its selected branch is full attention, and so is the window
where w does: these go to the full-attention back-end, which is faster and equal.

Shapes: N tokens, B documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_onn.config.schema import NsaConfig
from tiny_onn.model.packed_attention import Attend, DocumentSpans
from tiny_onn.ops import nsa


@dataclass(frozen=True)
class SparseDocuments:
    """The documents that n l' tokens do not cover.

    layout: theirs alone; row_X: their rows among all tokens, None if there are no others.
    """

    layout: nsa.NsaLayout
    row_X: Tensor | None


@dataclass(frozen=True)
class NsaPlan:
    """Made once for a batch, used by all layers.

    layout: of all documents; num_filler: rows after them that attend to nothing; sparse: whose
    selected branch chooses blocks; dense: full attention for the rest, whose rows are dense_row_X
    (None: all); back_N: puts sparse rows, then dense ones, into their order; window: full
    attention where every window is the whole document, else None.
    """

    layout: nsa.NsaLayout
    num_filler: int
    sparse: SparseDocuments | None
    dense: Attend | None
    dense_row_X: Tensor | None
    back_N: Tensor | None
    window: Attend | None

    def selected(self, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, index_NKn: Tensor | None):
        """The selected branch of all documents, (N, H, D); index_NKn: None without sparse ones."""
        if self.sparse is None:
            return self.dense(q_NHD, k_NKD, v_NKD)
        rows = self.sparse.row_X
        if rows is None:
            return nsa.selected_attention(q_NHD, k_NKD, v_NKD, index_NKn, self.sparse.layout)
        sparse_XHD = nsa.selected_attention(
            *(t.index_select(0, rows) for t in (q_NHD, k_NKD, v_NKD, index_NKn)),
            self.sparse.layout,
        )
        dense_XHD = self.dense(
            *(t.index_select(0, self.dense_row_X) for t in (q_NHD, k_NKD, v_NKD))
        )
        return torch.cat([sparse_XHD, dense_XHD]).index_select(0, self.back_N)


def plan_nsa(
    spans: DocumentSpans,
    settings: NsaConfig,
    plan_full: Callable[[DocumentSpans], Attend],
    num_filler: int = 0,
) -> NsaPlan:
    """The plan for the documents of ``spans``; ``plan_full`` makes full attention for some."""
    layout = _lay_out(spans, settings)
    covered = settings.select_count * settings.select_block
    short = [i for i, n in enumerate(spans.lengths) if n <= covered]
    long = [i for i, n in enumerate(spans.lengths) if n > covered]
    dense = dense_row_X = back_N = sparse = window = None
    if not long:
        dense = plan_full(spans)
    elif not short:
        sparse = SparseDocuments(layout, None)
    else:
        device = spans.cu_seqlens_B1.device
        sparse_rows, dense_row_X = _rows(spans, long), _rows(spans, short)
        back_N = torch.cat([sparse_rows, dense_row_X]).argsort().to(device)
        dense_row_X = dense_row_X.to(device)
        sparse = SparseDocuments(_lay_out(_some(spans, long), settings), sparse_rows.to(device))
        dense = plan_full(_some(spans, short))
    if layout.longest <= settings.window:
        window = plan_full(spans) if long else dense
    return NsaPlan(layout, num_filler, sparse, dense, dense_row_X, back_N, window)


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
