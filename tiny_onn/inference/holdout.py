"""How well a model does on pairs whose outputs are known: likelihood, accuracy, exact match.

Likelihood and accuracy are teacher-forced over the output's tokens (END included); exact match is
free-running greedy decoding under the grammar, in the identity view and without the size rule.
Measuring leaves no trace in a model that is being trained (see ``excursion.py``).

Shapes: N packed tokens, M rows with a target, B documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tiny_onn.arc.corpus import Corpus, Example
from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Pair, Task
from tiny_onn.arc.tokens import IGNORE, Document, encode_pair
from tiny_onn.config.schema import Config
from tiny_onn.inference.excursion import Precision, autocast, excursion
from tiny_onn.inference.generate import generate
from tiny_onn.inference.prompt import Context, encode_query

BATCH_TOKENS = 16384


@dataclass(frozen=True)
class HoldoutMetrics:
    """nll_per_token: nats; token_accuracy and exact_match: shares from 0 to 1, the latter over
    the first ``num_decoded`` of ``num_outputs`` outputs."""

    nll_per_token: float
    token_accuracy: float
    exact_match: float
    num_outputs: int
    num_decoded: int
    num_tokens: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def evaluate_holdout(model: nn.Module, corpus: Corpus, config: Config) -> dict[str, float]:
    """:func:`measure` of the corpus's hold-out, as the run's configuration asks for it."""
    return measure(
        model,
        corpus.holdout,
        corpus.tasks,
        context=config.data.context,
        max_tokens=config.data.max_tokens,
        max_decoded=config.trainer.holdout_decode,
        precision=config.trainer.precision,
    ).to_dict()


def measure(
    model: nn.Module,
    examples: Sequence[Example],
    tasks: Sequence[Task],
    *,
    context: Context = "pair",
    max_tokens: int = 1863,
    max_decoded: int = 64,
    batch_tokens: int = BATCH_TOKENS,
    precision: Precision = "fp32",
) -> HoldoutMetrics:
    """Metrics of ``examples``, whose ``task`` is a row of ``tasks`` and of the task vectors.

    ``max_decoded`` examples, spread evenly, are decoded freely; 0 leaves exact_match at nan.
    """
    assert examples, "a hold-out needs an example"
    documents = [
        encode_query(tasks[e.task], e.pair, row=e.task, context=context, max_tokens=max_tokens)
        for e in examples
    ]
    nll, num_tokens, correct = teacher_forced(model, documents, batch_tokens, precision)
    count = min(max_decoded, len(examples))
    chosen = [examples[i * len(examples) // count] for i in range(count)]
    prompts = [
        encode_query(
            tasks[e.task], e.pair.input, row=e.task, context=context, max_tokens=max_tokens
        )
        for e in chosen
    ]
    generations = generate(model, prompts, batch_tokens=batch_tokens, precision=precision)
    exact = [
        g.grid is not None and np.array_equal(g.grid, e.pair.output)
        for g, e in zip(generations, chosen, strict=True)
    ]
    return HoldoutMetrics(
        nll_per_token=float(nll.sum() / num_tokens.sum()),
        token_accuracy=float(correct.sum() / num_tokens.sum()),
        exact_match=float(np.mean(exact)) if exact else float("nan"),
        num_outputs=len(examples),
        num_decoded=count,
        num_tokens=int(num_tokens.sum()),
    )


def output_nll(
    model: nn.Module,
    pairs: Sequence[tuple[int, Pair]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    precision: Precision = "fp32",
) -> tuple[float, int]:
    """Summed NLL in nats of the pairs' output tokens, and their number.

    ``pairs`` are (row of the task vector or -1, pair) in the identity view, one a document.
    """
    documents = [encode_pair(pair, row) for row, pair in pairs]
    nll, num_tokens, _ = teacher_forced(model, documents, batch_tokens, precision)
    return float(nll.sum()), int(num_tokens.sum())


def teacher_forced(
    model: nn.Module,
    documents: Sequence[Document],
    batch_tokens: int = BATCH_TOKENS,
    precision: Precision = "fp32",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per document: summed NLL (float64), output tokens and correct ones (int64).

    ``report`` is told after every batch how many documents of all are done.
    """
    nll = np.zeros(len(documents))
    num_tokens = np.zeros(len(documents), dtype=np.int64)
    correct = np.zeros(len(documents), dtype=np.int64)
    done = 0
    for indices in _batches(documents, batch_tokens):
        with excursion(model) as device, autocast(device, precision):
            batch = pack([documents[i] for i in indices]).to(device)
            rows_M = torch.nonzero(batch.targets_N != IGNORE).squeeze(-1)
            targets_M = batch.targets_N[rows_M]
            logits_MV = model(batch, rows_M).logits_MV
            nll_M = F.cross_entropy(logits_MV.double(), targets_M, reduction="none")
            hit_M = logits_MV.argmax(dim=-1) == targets_M
            doc_M = batch.layout.doc_N[rows_M].cpu().numpy()
        owner = np.array([indices[i] for i in batch.order])[doc_M]
        np.add.at(nll, owner, nll_M.cpu().numpy())
        np.add.at(num_tokens, owner, 1)
        np.add.at(correct, owner, hit_M.cpu().numpy().astype(np.int64))
        done += len(indices)
        report(done, len(documents))
    return nll, num_tokens, correct


def _batches(documents: Sequence[Document], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, shortest document first, in runs of at most ``batch_tokens`` (or of one)."""
    run: list[int] = []
    used = 0
    for i in sorted(range(len(documents)), key=lambda i: len(documents[i].tokens)):
        length = len(documents[i].tokens)
        if run and used + length > batch_tokens:
            yield run
            run, used = [], 0
        run.append(i)
        used += length
    if run:
        yield run
