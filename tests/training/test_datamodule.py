import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.arc.dataset import EpochBatches
from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import IGNORE, encode_pair
from tiny_onn.training.datamodule import CPU_ROUNDING, Positions, StepStream, prepare, rounding


def test_positions_walk_through_epochs_of_different_lengths():
    positions = Positions([2, 1, 3].__getitem__)
    expected = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert [positions.locate(step) for step in range(6)] == expected
    assert positions.locate(4) == (2, 1)


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 4), (2, 8), (2.5, 10), (0.25, 1), (0.01, 1), (1.9, 8)]
)
def test_steps_of_a_budget_in_epochs(epochs, steps):
    assert Positions(lambda epoch: 4).steps(epochs) == steps


def test_rows_are_those_with_a_target(tiny):
    config = tiny()
    batch = EpochBatches(build_corpus(config.data), config.data, 0).batch(0, 0)
    ready = prepare(batch, step=3)
    assert ready.rows_M.tolist() == [i for i, t in enumerate(batch.targets_N.tolist()) if t >= 0]
    assert torch.equal(ready.targets_M, batch.targets_N[ready.rows_M])
    assert (ready.step, ready.num_tokens) == (3, len(batch.tokens_N))
    assert ready.num_targets == batch.num_target_tokens


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 5])
def test_a_stream_from_any_step_with_any_workers_gives_the_same_batches(tiny, workers, first):
    config = tiny()
    epochs = EpochBatches(build_corpus(config.data), config.data, 0)
    loader = DataLoader(StepStream(epochs, first), batch_size=None, num_workers=workers)
    got = list(itertools.islice(loader, 7))
    assert [b.step for b in got] == list(range(first, first + 7))
    positions = Positions(epochs.num_batches)
    for batch in got:
        expected = epochs.batch(*positions.locate(batch.step))
        assert torch.equal(batch.batch.tokens_N, expected.tokens_N)
        assert torch.equal(batch.batch.task_B, expected.task_B)


def test_pinning_reaches_every_tensor_and_changes_no_value(monkeypatch):
    rng = np.random.default_rng(0)
    pairs = [Pair(*rng.integers(0, 9, (2, 3, 3)).astype(np.uint8)) for _ in range(3)]
    plain = prepare(pack([encode_pair(pair, 0) for pair in pairs]), step=4)
    pinned_tensors = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned_tensors.append(t) or t.clone())
    pinned = plain.pin_memory()
    assert len(pinned_tensors) == 10
    assert torch.equal(pinned.batch.tokens_N, plain.batch.tokens_N)
    assert torch.equal(pinned.batch.layout.doc_N, plain.batch.layout.doc_N)
    assert torch.equal(pinned.rows_M, plain.rows_M) and pinned.step == 4


@pytest.mark.parametrize("multiple", [1, 64])
def test_rounded_batches_have_the_same_targets_and_counts(tiny, multiple):
    config = tiny()
    batch = EpochBatches(build_corpus(config.data), config.data, 0).batch(0, 0)
    plain, rounded = prepare(batch, 0), prepare(batch, 0, multiple=multiple)
    assert len(rounded.rows_M) % multiple == len(rounded.batch.tokens_N) % multiple == 0
    assert len(rounded.targets_M) == len(rounded.rows_M)
    real = rounded.targets_M != IGNORE
    assert torch.equal(rounded.rows_M[real], plain.rows_M)
    assert torch.equal(rounded.targets_M[real], plain.targets_M)
    for name in ("num_tokens", "num_targets", "attention"):
        assert getattr(rounded, name) == getattr(plain, name)


def test_only_a_cpu_rounds():
    assert rounding(torch.device("cpu")) == CPU_ROUNDING > 1
    assert rounding(torch.device("cuda")) == 1
