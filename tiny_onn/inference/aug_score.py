"""AugScore: candidates scored anew, each by its likelihood in the same views.

A vote asks how often decoding came to a grid, and the likelihoods it saw are of different views
for different candidates. AugScore(grid) = sum over the first S views of the task of
log p(view(grid) | view(input)): every candidate is turned into each view exactly (dihedral and
colours; a grid keeps its shape, nothing is padded) and read in one parallel forward with the
others. Only the candidates that the vote ranks first are read; the others stay behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from tiny_onn.arc.task import Pair, Task
from tiny_onn.arc.tokens import MAX_DOCUMENT, grid_length
from tiny_onn.arc.view import View
from tiny_onn.inference.excursion import Precision
from tiny_onn.inference.holdout import BATCH_TOKENS, teacher_forced
from tiny_onn.inference.prompt import Context, encode_query
from tiny_onn.inference.size_rule import Size
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
    seconds_left: Callable[[], float] = lambda: math.inf,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, list[list[Candidate]]], int]:
    """The same candidates, the first READ_CANDIDATES of each test input with their ``score``, and
    how many views they were read in.

    A test input with one candidate is left as it is: there is nothing to choose. All are read in
    one view after the other; a view that is begun is read to its end.

    Args:
        candidates: task id -> test input -> candidates.
        views: of each task, those to read every candidate in; rows: of its vector, -1 for none.
        seconds_left: no view is begun that takes longer, as far as those before it tell.
        report: called after every batch with the documents read of this view, and their number.
    """
    places = [
        (
            _Place(t, test, test_candidates.index(candidate)),
            _largest(chosen, task.test_inputs[test].shape),
        )
        for t, task in enumerate(tasks)
        for test, test_candidates in enumerate(candidates[task.id])
        if len(test_candidates) > 1
        for chosen in [rank(test_candidates, "count_then_likelihood")[:READ_CANDIDATES]]
        for candidate in chosen
    ]
    scores = dict.fromkeys((place for place, _ in places), 0.0)
    longest, read = 0.0, 0
    for number in range(max(map(len, views), default=0)):
        before = seconds_left()
        if before <= longest:
            break
        asked = [(place, size) for place, size in places if number < len(views[place.task])]
        documents = [
            encode_query(
                tasks[place.task],
                Pair(
                    tasks[place.task].test_inputs[place.test],
                    candidates[tasks[place.task].id][place.test][place.number].grid,
                ),
                row=rows[place.task],
                view=views[place.task][number],
                context=context,
                max_tokens=max_tokens,
                size=size,
            )
            for place, size in asked
        ]
        nll, _, _ = teacher_forced(model, documents, batch_tokens, precision, report)
        for (place, _), value in zip(asked, nll.tolist(), strict=True):
            scores[place] -= value
        read += 1
        longest = max(longest, before - seconds_left())
    found = {task.id: [list(test) for test in candidates[task.id]] for task in tasks}
    for place, score in scores.items() if read else ():
        test = found[tasks[place.task].id][place.test]
        test[place.number] = replace(test[place.number], score=score)
    return found, read


def _largest(candidates: Sequence[Candidate], asked: Size) -> Size:
    """Height and width of the one that makes the longest document with the test input, standing or
    lying: demonstrations that fit beside it fit beside all."""

    def tokens(size: Size) -> int:
        lying = grid_length(*asked[::-1]) + grid_length(*size[::-1])
        return max(grid_length(*asked) + grid_length(*size), lying)

    return max((candidate.grid.shape for candidate in candidates), key=tokens)
