"""Epochs of packed batches: a pure function of (seed, epoch, index), for any number of workers.

Batches hold nearly equal numbers of tokens, at most ``data.batch_tokens``, and no epoch ends in
a small rest. With several ranks each takes its share of the documents of every global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiny_onn.arc.corpus import Corpus, Example
from tiny_onn.arc.packing import Batch, pack
from tiny_onn.arc.task import Grid, Pair
from tiny_onn.arc.tokens import (
    Document,
    document_length,
    encode_demos,
    encode_pair,
    longest_orientation,
)
from tiny_onn.arc.view import NUM_DIHEDRALS, ViewSampler, apply_pair, fixed_colors, swaps_sides
from tiny_onn.config.schema import DataConfig
from tiny_onn.errors import UserError

SWAPS_SIDES = np.array([swaps_sides(dihedral) for dihedral in range(NUM_DIHEDRALS)])
EPOCHS_KEPT = 2
"""Plans of epochs kept in memory: batches are read in order."""


@dataclass(frozen=True)
class _Plan:
    """An epoch: order of the examples, the demonstrations shown with each, batch starts."""

    order: np.ndarray
    demos: list[list[Pair]]
    starts: np.ndarray


class EpochBatches:
    """The batches of a corpus.

    Args:
        corpus: what to learn from.
        data: ``batch_tokens``, ``views``, ``views_per_example``, ``context``, ``max_tokens`` and
            ``loss_on_inputs`` are used.
        seed: decides order and views.
        rank, world: this process's share of every global batch.

    Raises:
        UserError: ``data.batch_tokens`` or the corpus is too small for ``world`` processes, or
            ``data.views_per_example`` is below 1.
    """

    def __init__(
        self, corpus: Corpus, data: DataConfig, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        assert 0 <= rank < world, (rank, world)
        self.corpus, self.data, self.seed, self.rank, self.world = corpus, data, seed, rank, world
        if data.views_per_example < 1:
            raise UserError(
                f"got data.views_per_example={data.views_per_example}, expected at least 1; "
                "use data.views=none to switch views off"
            )
        self._check_budget()
        self.views = ViewSampler(self._shown(), seed, data.views, data.views_per_example)
        pairs = [example.pair for example in corpus.examples]
        self._upright = np.array([_length(pair, False) for pair in pairs])
        self._lying = np.array([_length(pair, True) for pair in pairs])
        self._num_batches: dict[int, int] = {}
        self._plans: dict[int, _Plan] = {}

    def _shown(self) -> list[tuple[list[Pair], frozenset[int], list[Grid]]]:
        """For every example what the sampler of views asks for."""
        tasks = self.corpus.tasks
        fixed = [fixed_colors(task) for task in tasks]
        inputs = [[*(demo.input for demo in t.demos), *t.test_inputs] for t in tasks]
        return [
            (
                [e.pair] if self.data.context == "pair" else [*tasks[e.task].demos, e.pair],
                fixed[e.task],
                inputs[e.task],
            )
            for e in self.corpus.examples
        ]

    def _check_budget(self) -> None:
        """Every global batch must fit its longest document and give each rank one."""
        longest = max(self._longest(example) for example in self.corpus.examples)
        # starts are rounded to whole documents (longest tokens), so with this many tokens even
        # the smallest batch of the coarsest split keeps a document for every rank
        needed = longest if self.world == 1 else (2 * self.world + 1) * longest
        if self.data.batch_tokens < needed:
            raise UserError(
                f"got data.batch_tokens={self.data.batch_tokens}, expected at least {needed} for "
                f"{self.world} processes and documents of up to {longest} tokens; raise it or "
                "lower data.max_tokens"
            )
        if len(self.corpus.examples) < self.world:
            raise UserError(
                f"got {len(self.corpus.examples)} examples for {self.world} processes, expected "
                "at least one each; use fewer devices"
            )

    def _longest(self, example: Example) -> int:
        """Input tokens of the example's longest possible document."""
        length = longest_orientation(example.pair) - 1
        if self.data.context == "pair":
            return length
        demos = self.corpus.tasks[example.task].demos
        shown = sum(longest_orientation(demo) for demo in demos if demo is not example.pair)
        return min(length + shown, self.data.max_tokens - 1)

    def num_batches(self, epoch: int) -> int:
        """Batches of this epoch (lengths differ a little between views, so epochs do too)."""
        if epoch not in self._num_batches:
            self._num_batches[epoch] = len(self._plan(epoch).starts) - 1
        return self._num_batches[epoch]

    def batch(self, epoch: int, index: int) -> Batch:
        """This rank's share of global batch ``index`` of ``epoch``."""
        plan = self._plan(epoch)
        assert 0 <= index < len(plan.starts) - 1, (epoch, index, len(plan.starts) - 1)
        chosen = plan.order[plan.starts[index] : plan.starts[index + 1]].tolist()
        documents = [self._document(example, epoch, plan) for example in chosen]
        if self.world > 1:
            documents.sort(key=lambda document: len(document.tokens))
            documents = [d for n, d in enumerate(documents) if self._owner(n) == self.rank]
        return pack(documents, self.data.loss_on_inputs)

    def _owner(self, number: int) -> int:
        """Rank of the n-th shortest document, dealt to and fro so that shares are equal."""
        turn, place = divmod(number, self.world)
        return place if turn % 2 == 0 else self.world - 1 - place

    def _document(self, example: int, epoch: int, plan: _Plan) -> Document:
        source, view = self.corpus.examples[example], self.views.view(example, epoch)
        query = apply_pair(view, source.pair)
        if self.data.context == "pair":
            return encode_pair(query, source.task, view.dihedral)
        demos = [apply_pair(view, demo) for demo in plan.demos[example]]
        return encode_demos(demos, query, source.task, view.dihedral)

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self._plans:
            while len(self._plans) >= EPOCHS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> _Plan:
        num_examples = len(self.corpus.examples)
        rng = np.random.default_rng([self.seed, epoch, num_examples])
        order = rng.permutation(num_examples)
        swapped = SWAPS_SIDES[self.views.dihedrals(epoch)]
        lengths = np.where(swapped, self._lying, self._upright)
        demos: list[list[Pair]] = []
        if self.data.context == "demos":
            for number in range(num_examples):
                shown, extra = self._choose_demos(number, bool(swapped[number]), rng)
                demos.append(shown)
                lengths[number] += extra
        return _Plan(order, demos, split_evenly(lengths[order], self.data.batch_tokens))

    def _choose_demos(
        self, number: int, swapped: bool, rng: np.random.Generator
    ) -> tuple[list[Pair], int]:
        """Other demonstrations of the task in random order, as many as fit, and their tokens."""
        example = self.corpus.examples[number]
        task = self.corpus.tasks[example.task]
        left = self.data.max_tokens - 1 - _length(example.pair, swapped)
        shown, used = [], 0
        for place in rng.permutation(len(task.demos)).tolist():
            demo = task.demos[place]
            length = _length(demo, swapped) + 1
            if demo is not example.pair and used + length <= left:
                shown.append(demo)
                used += length
        return shown, used


def _length(pair: Pair, swapped: bool) -> int:
    """Input tokens (all but the last) of a pair's document, lying down if ``swapped``."""
    (in_height, in_width), (out_height, out_width) = pair.input.shape, pair.output.shape
    if swapped:
        return document_length(in_width, in_height, out_width, out_height) - 1
    return document_length(in_height, in_width, out_height, out_width) - 1


def split_evenly(lengths: np.ndarray, budget: int) -> np.ndarray:
    """Starts (the end included) of few near-equal runs of at most ``budget`` tokens each.

    Each cut goes to the document boundary nearest to an equal share.
    """
    ends = np.cumsum(lengths)
    assert lengths.max() <= budget, (lengths.max(), budget)
    edges = np.concatenate([[0], ends])
    runs = -(-int(ends[-1]) // budget)
    while runs < len(lengths):
        shares = ends[-1] * np.arange(1, runs) / runs
        cuts = np.searchsorted(ends - lengths / 2, shares)
        starts = np.concatenate([[0], cuts, [len(lengths)]])
        tokens = np.diff(edges[starts])
        if tokens.max() <= budget and tokens.min() > 0:
            return starts
        runs += 1 + runs // 64
    return np.arange(len(lengths) + 1)
