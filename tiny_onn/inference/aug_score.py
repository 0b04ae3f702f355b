"""AugScore: candidates scored anew, each by its likelihood in the same views.

A vote asks how often decoding came to a grid, and the likelihoods it saw are of different views
for different candidates. AugScore(grid) = sum over the first S views of the task of
log p(view(grid) | view(input)): every candidate is turned into each view exactly (dihedral and
colours; a grid keeps its shape, nothing is padded) and read in one parallel forward with the
others. Only the candidates that the vote ranks first are read; the others stay behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from tiny_onn.arc.task import Pair, Task
from tiny_onn.arc.tokens import MAX_DOCUMENT, Document
from tiny_onn.arc.view import View
from tiny_onn.inference.excursion import Precision
from tiny_onn.inference.holdout import BATCH_TOKENS, teacher_forced
from tiny_onn.inference.prompt import Context, encode_query
from tiny_onn.inference.vote import Candidate, rank

READ_CANDIDATES = 8
"""Most candidates of one test input that are read; the others rank behind them."""


@dataclass(frozen=True)
class _Place:
    """Numbers of a task, of its test input, of that one's candidate."""

    task: int
    test: int
    number: int


def with_scores(
    model: nn.Module,
    tasks: Sequence[Task],
    candidates: Mapping[str, Sequence[Sequence[Candidate]]],
    views: Sequence[Sequence[View]],
    rows: Sequence[int],
    *,
    context: Context = "pair",
    max_tokens: int = MAX_DOCUMENT,
    batch_tokens: int = BATCH_TOKENS,
    precision: Precision = "fp32",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[list[Candidate]]]:
    """The same candidates, the first READ_CANDIDATES of each test input with their ``score``.

    A test input with one candidate is left as it is: there is nothing to choose.

    Args:
        candidates: task id -> test input -> candidates.
        views: of each task, those to read every candidate in; rows: of its vector, -1 for none.
        report: called after every batch with the documents read, and their total.
    """
    places: list[_Place] = []
    documents: list[Document] = []
    found = {task.id: [list(test) for test in candidates[task.id]] for task in tasks}
    for t, task in enumerate(tasks):
        for test, given in enumerate(found[task.id]):
            if len(given) < 2:
                continue
            for candidate in rank(given, "count_then_likelihood")[:READ_CANDIDATES]:
                pair = Pair(task.test_inputs[test], candidate.grid)
                place = _Place(t, test, given.index(candidate))
                for view in views[t]:
                    places.append(place)
                    documents.append(
                        encode_query(
                            task,
                            pair,
                            row=rows[t],
                            view=view,
                            context=context,
                            max_tokens=max_tokens,
                        )
                    )
    scores: dict[_Place, float] = {}
    nll, _, _ = teacher_forced(model, documents, batch_tokens, precision, report)
    for place, value in zip(places, nll.tolist(), strict=True):
        scores[place] = scores.get(place, 0.0) - value
    for place, score in scores.items():
        test = found[tasks[place.task].id][place.test]
        test[place.number] = replace(test[place.number], score=score)
    return found
