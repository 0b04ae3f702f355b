"""Documents packed into flat batches: no padding between them, boundaries in a Layout.

Shapes: N packed tokens, B documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.arc.tokens import END, END_POSITION, IGNORE, START, Document


@dataclass(frozen=True)
class Layout:
    """Where documents begin and end.

    cu_seqlens: int32 (B+1,) offsets; max_seqlen: longest document; prefix_lens: int64 (B,);
    doc_N: int64 (N,) document of every token (0 for filler rows); ``lengths`` and ``prefixes``
    say the same as Python numbers, so that nothing has to wait for a device.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    prefix_lens: Tensor
    doc_N: Tensor
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]

    def pin_memory(self) -> Layout:
        """In page-locked memory, from which copies to a GPU need not wait for it."""
        return replace(
            self,
            cu_seqlens=self.cu_seqlens.pin_memory(),
            prefix_lens=self.prefix_lens.pin_memory(),
            doc_N=self.doc_N.pin_memory(),
        )

    def to(self, device: torch.device | str) -> Layout:
        return replace(
            self,
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            prefix_lens=self.prefix_lens.to(device, non_blocking=True),
            doc_N=self.doc_N.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class SoftTokens:
    """Tokens that are a mixture: rows_S int64 (S,) among all rows, probs_SV float (S, V), each row
    summing to 1. What else reads a token (DeepEmbed's keys) reads the one in ``tokens``."""

    rows_S: Tensor
    probs_SV: Tensor

    def to(self, device: torch.device | str) -> SoftTokens:
        return SoftTokens(
            self.rows_S.to(device, non_blocking=True), self.probs_SV.to(device, non_blocking=True)
        )


@dataclass(frozen=True)
class Batch:
    """A packed batch.

    tokens_N, targets_N: int64 (N,), the target is the next token, IGNORE where there is no
    loss; positions_N3: int64 (N, 3); task_B, view_B: int64 (B,); order: for each document of
    the batch its index among those given to :func:`pack`; soft: which tokens are mixtures.
    """

    tokens_N: Tensor
    positions_N3: Tensor
    targets_N: Tensor
    task_B: Tensor
    view_B: Tensor
    layout: Layout
    order: tuple[int, ...]
    soft: SoftTokens | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_N)

    @property
    def num_target_tokens(self) -> int:
        return int((self.targets_N != IGNORE).sum())

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which copies to a GPU need not wait for it."""
        return replace(
            self,
            tokens_N=self.tokens_N.pin_memory(),
            positions_N3=self.positions_N3.pin_memory(),
            targets_N=self.targets_N.pin_memory(),
            task_B=self.task_B.pin_memory(),
            view_B=self.view_B.pin_memory(),
            layout=self.layout.pin_memory(),
        )

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            tokens_N=self.tokens_N.to(device, non_blocking=True),
            positions_N3=self.positions_N3.to(device, non_blocking=True),
            targets_N=self.targets_N.to(device, non_blocking=True),
            task_B=self.task_B.to(device, non_blocking=True),
            view_B=self.view_B.to(device, non_blocking=True),
            layout=self.layout.to(device),
            soft=None if self.soft is None else self.soft.to(device),
        )


def fill(batch: Batch, multiple: int) -> Batch:
    """``batch`` with rows after its last document, so that their number is a multiple.

    A CPU's matrix library compiles code for every new shape; rounded batches have few shapes.
    Filler rows hold START at the origin, carry no target and are attended by nothing: every
    other row's result is what it is without them.
    """
    rows = -batch.num_tokens % multiple
    if not rows:
        return batch
    return replace(
        batch,
        tokens_N=F.pad(batch.tokens_N, (0, rows), value=START),
        positions_N3=F.pad(batch.positions_N3, (0, 0, 0, rows)),
        targets_N=F.pad(batch.targets_N, (0, rows), value=IGNORE),
        layout=replace(batch.layout, doc_N=F.pad(batch.layout.doc_N, (0, rows))),
    )


def pack(documents: Sequence[Document], loss_on_inputs: bool = False) -> Batch:
    """Pack ``documents``, shortest first (ties in the given order).

    A complete document (it ends in END) enters without its last token, with the next tokens as
    targets: those of the query's output up to and including END, or all of them with
    ``loss_on_inputs`` (only sound under a causal mask). A prompt enters whole, without targets.
    """
    assert documents, "a batch needs a document"
    complete = [bool(document.tokens[-1] == END) for document in documents]
    length_of = [len(d.tokens) - c for d, c in zip(documents, complete, strict=True)]
    order = sorted(range(len(documents)), key=length_of.__getitem__)
    lengths = [length_of[i] for i in order]
    chosen = [documents[i] for i in order]
    prefixes = [min(d.prefix_len, n) for d, n in zip(chosen, lengths, strict=True)]
    length_B = np.array(lengths)
    cu_seqlens = np.zeros(len(chosen) + 1, dtype=np.int32)
    np.cumsum(length_B, out=cu_seqlens[1:])
    doc_N = np.repeat(np.arange(len(chosen)), length_B)

    tokens_N = np.concatenate([d.tokens[:n] for d, n in zip(chosen, lengths, strict=True)])
    positions = [d.positions[:n] for d, n in zip(chosen, lengths, strict=True)]
    targets_N = np.full(len(tokens_N), IGNORE, dtype=np.int64)
    targets_N[:-1] = tokens_N[1:]
    last_B = cu_seqlens[1:] - 1
    complete_B = np.array([complete[i] for i in order])
    targets_N[last_B] = np.where(complete_B, END, IGNORE)
    if loss_on_inputs:
        targets_N[~complete_B[doc_N]] = IGNORE
    else:
        first_B = cu_seqlens[:-1] + np.array(prefixes) - 1
        targets_N[np.arange(len(tokens_N)) < first_B[doc_N]] = IGNORE
    return Batch(
        tokens_N=torch.from_numpy(tokens_N),
        positions_N3=torch.from_numpy(np.concatenate(positions)),
        targets_N=torch.from_numpy(targets_N),
        task_B=torch.tensor([d.task for d in chosen]),
        view_B=torch.tensor([d.view for d in chosen]),
        layout=Layout(
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=lengths[-1],
            prefix_lens=torch.tensor(prefixes),
            doc_N=torch.from_numpy(doc_N),
            lengths=tuple(lengths),
            prefixes=tuple(prefixes),
        ),
        order=tuple(order),
    )


def unpack(batch: Batch) -> list[Document]:
    """The complete documents that :func:`pack` made ``batch`` of, in the batch's order.

    They must have been pairs (or demonstrations and a query), not prompts.
    """
    tokens_N, positions_N3 = batch.tokens_N.cpu().numpy(), batch.positions_N3.cpu().numpy()
    task_B, view_B = batch.task_B.tolist(), batch.view_B.tolist()
    documents, begin = [], 0
    for slot, length in enumerate(batch.layout.lengths):
        rows = slice(begin, begin + length)
        documents.append(
            Document(
                np.append(tokens_N[rows], END),
                np.concatenate([positions_N3[rows], [END_POSITION]]),
                batch.layout.prefixes[slot],
                task_B[slot],
                view_B[slot],
            )
        )
        begin += length
    return documents
