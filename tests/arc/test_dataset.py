"""Epochs are pure functions of (seed, epoch, index): order, views, shards, workers, resume."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.arc.dataset import EpochBatches, split_evenly
from tiny_onn.arc.tokens import END, IGNORE, SEP, START, longest_orientation
from tiny_onn.config.schema import DataConfig
from tiny_onn.errors import UserError

DATA = DataConfig(track="nano", learn="demos", batch_tokens=4096)


@pytest.fixture(scope="module")
def corpus():
    return build_corpus(DATA, 0)


def documents(batch):
    """Every document as (task, view, tokens, positions, targets), hashable."""
    cu = batch.layout.cu_seqlens.tolist()
    return [
        (
            int(batch.task_B[row]),
            int(batch.view_B[row]),
            batch.layout.prefixes[row],
            batch.tokens_N[begin:end].numpy().tobytes(),
            batch.positions_N3[begin:end].numpy().tobytes(),
            batch.targets_N[begin:end].numpy().tobytes(),
        )
        for row, (begin, end) in enumerate(zip(cu, cu[1:], strict=False))
    ]


def same(first, second):
    return first.order == second.order and documents(first) == documents(second)


def epoch_of(epochs, epoch):
    return [epochs.batch(epoch, i) for i in range(epochs.num_batches(epoch))]


def test_an_epoch_shows_every_example_once_within_the_budget(corpus):
    batches = epoch_of(EpochBatches(corpus, DATA, 0), 3)
    assert sum(len(batch.task_B) for batch in batches) == len(corpus.examples)
    shown = Counter(int(task) for batch in batches for task in batch.task_B)
    assert shown == Counter(example.task for example in corpus.examples)
    sizes = [batch.num_tokens for batch in batches]
    assert max(sizes) <= DATA.batch_tokens and min(sizes) > 0.9 * DATA.batch_tokens


def test_epochs_differ_in_order_and_in_every_view(corpus):
    epochs = EpochBatches(corpus, DATA, 0)
    first, second = (
        Counter(d[:4] for b in epoch_of(epochs, epoch) for d in documents(b)) for epoch in (0, 1)
    )
    assert sum((first & second).values()) < 0.05 * len(corpus.examples)
    assert not torch.equal(epochs.batch(0, 0).task_B[:20], epochs.batch(1, 0).task_B[:20])


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(corpus):
    one, two, other = (EpochBatches(corpus, DATA, seed) for seed in (5, 5, 6))
    assert all(same(a, b) for a, b in zip(epoch_of(one, 2), epoch_of(two, 2), strict=True))
    assert documents(one.batch(2, 0)) != documents(other.batch(2, 0))


def test_a_resume_in_mid_epoch_goes_on_with_the_same_batches(corpus):
    undisturbed = EpochBatches(corpus, DATA, 1)
    places = [(e, i) for e in range(4) for i in range(undisturbed.num_batches(e))]
    seen = [undisturbed.batch(*place) for place in places]
    stop = len(places) // 2 + 1
    resumed = EpochBatches(corpus, DATA, 1)
    for place, batch in zip(places[stop:], seen[stop:], strict=True):
        assert same(resumed.batch(*place), batch)
    for place, batch in zip(reversed(places), reversed(seen), strict=True):
        assert same(undisturbed.batch(*place), batch)  # any order, from any state


class Indexed(Dataset):
    def __init__(self, epochs, places):
        self.epochs, self.places = epochs, places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        return self.epochs.batch(*self.places[index])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(corpus, workers):
    epochs = EpochBatches(corpus, DATA, 0)
    places = [(epoch, index) for epoch in (0, 1) for index in range(epochs.num_batches(epoch))][:24]
    loader = DataLoader(Indexed(epochs, places), batch_size=None, num_workers=workers)
    fresh = EpochBatches(corpus, DATA, 0)
    for place, batch in zip(places, loader, strict=True):
        assert same(batch, fresh.batch(*place))


@pytest.mark.parametrize("context", ["pair", "demos"])
@pytest.mark.parametrize("world", [2, 3])
def test_shards_together_are_the_global_batch(corpus, world, context):
    tokens = 16384 if context == "demos" else 4096
    data = DataConfig(track="nano", learn="demos", batch_tokens=tokens, context=context)
    whole = EpochBatches(corpus, data, 0)
    shards = [EpochBatches(corpus, data, 0, rank, world) for rank in range(world)]
    for epoch, index in ((0, 0), (0, 1), (1, 0), (1, whole.num_batches(1) - 1)):
        batch = whole.batch(epoch, index)
        parts = [shard.batch(epoch, index) for shard in shards]
        together = Counter(d for part in parts for d in documents(part))
        assert together == Counter(documents(batch))
        sizes = [part.num_tokens for part in parts]
        assert max(sizes) - min(sizes) <= 2 * batch.layout.max_seqlen
    assert all(shard.num_batches(e) == whole.num_batches(e) for shard in shards for e in (0, 1))


def test_a_document_of_the_batch_is_a_view_of_its_pair(corpus):
    from tiny_onn.arc.tokens import encode_pair
    from tiny_onn.arc.view import apply_pair, fixed_colors

    epochs = EpochBatches(corpus, DATA, 0)
    shown = {d[3] for b in epoch_of(epochs, 7) for d in documents(b)}
    for number in range(0, len(corpus.examples), 37):
        example, view = corpus.examples[number], epochs.views.view(number, 7)
        tokens = encode_pair(apply_pair(view, example.pair)).tokens[:-1]
        assert tokens.tobytes() in shown
        assert all(view.colors[c] == c for c in fixed_colors(corpus.tasks[example.task]))


def test_without_augmentation_the_pairs_stand_as_they_are(corpus):
    data = DataConfig(track="nano", learn="demos", batch_tokens=4096, views="none")
    first, second = (
        Counter(d for b in epoch_of(EpochBatches(corpus, data, 0), e) for d in documents(b))
        for e in (0, 1)
    )
    assert first == second
    assert all(view == 0 for _, view, *_ in first)


def test_with_demonstrations_the_query_comes_last_and_is_not_among_them(corpus):
    data = DataConfig(track="nano", learn="demos", context="demos", max_tokens=600)
    epochs = EpochBatches(corpus, data, 0)
    assert sum(len(b.task_B) for b in epoch_of(epochs, 0)) == len(corpus.examples)
    most = 0
    for batch in epoch_of(epochs, 0)[:10]:
        assert batch.layout.max_seqlen < 600 and batch.num_tokens <= data.batch_tokens
        cu = batch.layout.cu_seqlens.tolist()
        for row, (begin, end) in enumerate(zip(cu, cu[1:], strict=False)):
            tokens = batch.tokens_N[begin:end].numpy()
            targets = batch.targets_N[begin:end].numpy()
            pairs = np.split(tokens, np.flatnonzero(tokens == START)[1:])
            assert len(pairs) >= 2 and all((p[0], p[-1]) == (START, END) for p in pairs[:-1])
            query = [*pairs[-1], END]
            assert not any(np.array_equal(query, shown) for shown in pairs[:-1])
            assert tokens[batch.layout.prefixes[row] - 1] == SEP
            silent = batch.layout.prefixes[row] - 1
            assert silent >= sum(map(len, pairs[:-1]))
            assert (targets[:silent] == IGNORE).all() and (targets[silent:] != IGNORE).all()
            most = max(most, len(pairs))
    assert most > 3


def test_too_small_a_budget_is_a_user_error(corpus):
    longest = max(longest_orientation(example.pair) for example in corpus.examples) - 1
    small = DataConfig(track="nano", learn="demos", batch_tokens=longest - 1)
    got = rf"data\.batch_tokens={longest - 1}, expected at least"
    with pytest.raises(UserError, match=f"{got} {longest} for 1 processes"):
        EpochBatches(corpus, small, 0)
    with pytest.raises(UserError, match=f"{got} {5 * longest} for 2 processes"):
        EpochBatches(corpus, small, 0, rank=1, world=2)
    just_enough = DataConfig(track="nano", learn="demos", batch_tokens=longest)
    assert EpochBatches(corpus, just_enough, 0).batch(0, 0).num_tokens <= longest


def test_no_views_per_example_is_a_user_error(corpus):
    with pytest.raises(UserError, match=r"views_per_example=0, expected at least 1"):
        EpochBatches(corpus, DataConfig(track="nano", views_per_example=0), 0)


def test_more_processes_than_examples_is_a_user_error(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(
        '{"a": {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[1]]}]}}'
    )
    data = DataConfig(sources=[str(path)])
    corpus = build_corpus(data, 0)
    with pytest.raises(UserError, match="1 examples for 2 processes"):
        EpochBatches(corpus, data, 0, rank=0, world=2)
    assert EpochBatches(corpus, data, 0).num_batches(0) == 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 400))
def test_runs_are_whole_ordered_and_within_the_budget(lengths, budget):
    starts = split_evenly(np.array(lengths), budget)
    assert starts[0] == 0 and starts[-1] == len(lengths) and (np.diff(starts) > 0).all()
    sizes = np.add.reduceat(lengths, starts[:-1])
    assert sizes.max() <= budget


@given(st.integers(2, 4), st.integers(0, 10**6))
def test_with_the_required_budget_every_rank_gets_a_document(world, seed):
    longest = 20
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, size=int(rng.integers(world, 300)))
    starts = split_evenly(lengths, (2 * world + 1) * longest)
    assert np.diff(starts).min() >= world
