"""NSA's window branch by a variable-length attention function that knows causal windows.

Windows of a prefix are centred on their query and moved inside the prefix at its borders
(:mod:`tiny_onn_kernels.nsa.layout`); such a function only knows windows that end a fixed number of
keys after it. But every document falls into at most four runs of queries whose windows are either
the same keys for all, or follow the query: those of one kind make one call.

Shapes: N tokens, H query heads, K key/value heads, D head width, Q queries and X keys of the runs
of one kind, R runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tiny_onn.model.packed_attention import Attend, DocumentSpans


class Run(NamedTuple):
    """Consecutive queries and keys of a document. follows: query i, counted from the last, sees the
    ``window`` keys that end at key i, counted from the last (fewer at the first key); else all."""

    first_query: int
    stop_query: int
    first_key: int
    stop_key: int
    follows: bool


def window_runs(length: int, prefix: int, window: int) -> list[Run]:
    """The runs of a document: a prefix's first border, inside and second border, and the rest."""
    before = window // 2
    inside = (before, prefix - window + before + 1)
    if prefix <= window:
        runs = [Run(0, prefix, 0, prefix, False)]
    else:
        runs = [
            Run(0, inside[0], 0, window, False),
            Run(*inside, 0, prefix, True),
            Run(inside[1], prefix, prefix - window, prefix, False),
        ]
    runs.append(Run(prefix, length, max(0, prefix - window + 1), length, True))
    return [run for run in runs if run.stop_query > run.first_query]


class _Call(NamedTuple):
    """One call of the function: which rows, and where the runs begin among them."""

    query_Q: Tensor
    key_X: Tensor
    cu_queries_R1: Tensor
    cu_keys_R1: Tensor
    most_queries: int
    most_keys: int


def _call(runs: list[Run], starts: list[int], device: torch.device) -> _Call:
    ranges = []
    for first, stop in (("first_query", "stop_query"), ("first_key", "stop_key")):
        edges = [
            (start + getattr(run, first), start + getattr(run, stop))
            for start, run in zip(starts, runs, strict=True)
        ]
        rows = torch.cat([torch.arange(*edge) for edge in edges])
        sizes = [stop - first for first, stop in edges]
        cumulative = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        ranges.append((rows.to(device), cumulative.to(device), max(sizes)))
    (query_Q, cu_queries, most_queries), (key_X, cu_keys, most_keys) = ranges
    return _Call(query_Q, key_X, cu_queries, cu_keys, most_queries, most_keys)


def plan_window_varlen(spans: DocumentSpans, window: int, varlen: Callable[..., Tensor]) -> Attend:
    """The window branch of ``window`` keys for these documents, in one or two calls.

    varlen: takes (q, k, v, cu_q, cu_k, max_q, max_k, causal, window), aligned at the bottom right,
    in half precision on CUDA.
    """
    device, start = spans.cu_seqlens_B1.device, 0
    found: dict[bool, tuple[list[Run], list[int]]] = {True: ([], []), False: ([], [])}
    for length, prefix in zip(spans.lengths, spans.prefixes, strict=True):
        for run in window_runs(length, prefix, window):
            found[run.follows][0].append(run)
            found[run.follows][1].append(start)
        start += length
    calls = {kind: _call(*runs, device) for kind, runs in found.items() if runs[0]}
    back_N = torch.cat([call.query_Q for call in calls.values()]).argsort()
    whole = list(calls) == [True] and not any(spans.prefixes)

    def attend(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        outputs = []
        for follows, call in calls.items():
            tensors = (q_NHD, k_NKD, v_NKD)
            if not whole:
                rows = (call.query_Q, call.key_X, call.key_X)
                tensors = (t.index_select(0, r) for t, r in zip(tensors, rows, strict=True))
            seen = window if follows else None
            outputs.append(varlen(*tensors, *call[2:], follows, seen))
        return outputs[0] if whole else torch.cat(outputs).index_select(0, back_N)

    return attend
