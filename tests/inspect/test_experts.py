from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import NEWLINE, SEP, encode_pair
from tiny_onn.inspect.experts import batches, expert_stats
from tiny_onn.inspect.kinds import KIND_NAMES


def grid(*rows):
    return np.array(rows, dtype=np.uint8)


DOCUMENTS = [
    encode_pair(Pair(grid([1, 2], [2, 2]), grid([1, 1]))),
    encode_pair(Pair(grid([2]), grid([1], [0]))),
]


class Routed(nn.Module):
    """Layers 1 and 3: expert 0 fires for colour 1, expert 1 for newlines, expert 2 for nothing.
    Layer 3 runs twice."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.modes = []

    def forward(self, batch):
        self.modes.append((self.training, torch.is_grad_enabled()))
        tokens = batch.tokens_N
        fires = torch.stack([tokens == 1, tokens == NEWLINE, tokens < 0], dim=1)
        entries = [
            SimpleNamespace(
                layer=n,
                fires_NE=fires.float(),
                runs_NE=fires | (tokens == SEP)[:, None],  # a fallback to all three
                thresholds_E=torch.full((3,), n / 10),
            )
            for n in (3, 1, 3)
        ]
        return SimpleNamespace(routing=tuple(entries))


@pytest.mark.parametrize("batch_tokens", [1, 12, 1000])
def test_counts_are_those_of_the_tokens_however_they_are_batched(batch_tokens):
    stats = expert_stats(Routed(), DOCUMENTS, batch_tokens)
    assert stats.layers == (1, 3)
    kind = {name: number for number, name in enumerate(KIND_NAMES)}
    # 19 tokens: 2 START, 5 cells and 3 newlines of inputs, 2 SEP, 4 cells and 3 newlines of outputs
    assert stats.tokens_LQ.sum(axis=1).tolist() == [19, 38]
    assert stats.fired_LQE[0, kind["in 1"]].tolist() == [1, 0, 0]
    assert stats.fired_LQE[0, kind["out 1"]].tolist() == [3, 0, 0]
    assert stats.fired_LQE[1, kind["in newline"]].tolist() == [0, 6, 0]
    assert stats.fired_LQE[0, kind["out newline"]].tolist() == [0, 3, 0]
    assert stats.fired_LQE[0].sum() == 10


def test_loads_dead_experts_and_tokens_without_any():
    stats = expert_stats(Routed(), DOCUMENTS)
    np.testing.assert_allclose(stats.load_LE(), [[4 / 19, 6 / 19, 0]] * 2)
    assert stats.mean_active() == pytest.approx({1: 10 / 19, 3: 10 / 19})
    assert stats.mean_run() == pytest.approx({1: 16 / 19, 3: 16 / 19})  # 2 SEP x 3 experts more
    assert stats.dead_LE.tolist() == [[False, False, True]] * 2
    assert (stats.num_dead, stats.num_experts) == (2, 6)
    assert stats.none_share() == pytest.approx(9 / 19)
    np.testing.assert_allclose(stats.thresholds_LE, [[0.1] * 3, [0.3] * 3], rtol=1e-6)


def test_kinds_that_do_not_occur_have_no_load():
    load_LQE = expert_stats(Routed(), DOCUMENTS).load_LQE()
    kind = {name: number for number, name in enumerate(KIND_NAMES)}
    assert np.isnan(load_LQE[:, kind["END"]]).all()
    assert load_LQE[0, kind["out 1"]].tolist() == [1, 0, 0]


def test_looking_leaves_the_model_in_training():
    model = Routed().train()
    expert_stats(model, DOCUMENTS)
    assert model.training and model.modes == [(False, False)]


@pytest.mark.parametrize("routing", [None, ()])
def test_a_network_without_experts_has_no_statistics(routing):
    class Dense(Routed):
        def forward(self, batch):
            return SimpleNamespace(routing=routing)

    assert expert_stats(Dense(), DOCUMENTS) is None


def test_batches_keep_order_and_stay_small():
    runs = list(batches(DOCUMENTS * 3, 25))
    assert [document for run in runs for document in run] == DOCUMENTS * 3
    assert all(len(run) == 1 or sum(len(d.tokens) for d in run) <= 25 for run in runs)
    assert len(runs) > 1
