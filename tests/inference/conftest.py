"""Stand-in models whose logits are a plain function of the history, and small real ones."""

import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tiny_onn.arc.task import Pair, Task
from tiny_onn.arc.tokens import VOCAB
from tiny_onn.config.schema import ModelConfig
from tiny_onn.model.tiny_onn import build_model


@dataclass
class History:
    """Everything one row has seen."""

    tokens: list
    positions: list
    prompt_len: int
    task: int
    view: int

    @property
    def written(self):
        return self.tokens[self.prompt_len :]


class StubCache:
    def __init__(self, rows, room):
        self.rows, self.room = rows, room

    def keep(self, index_B):
        self.rows = [self.rows[i] for i in index_B.tolist()]


class StubModel(torch.nn.Module):
    """``score(history) -> 14 logits``. Notes every row asked, and the sizes of batches."""

    def __init__(self, score, on_step=lambda: None):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.score, self.on_step = score, on_step
        self.prefills, self.steps, self.asked = [], [], []

    def _logits(self, cache):
        return torch.tensor(np.array([self.score(row) for row in cache.rows]), dtype=torch.float32)

    def prefill(self, batch, max_new_tokens):
        assert not self.training and not torch.is_grad_enabled()
        bounds = batch.layout.cu_seqlens.tolist()
        rows = [
            History(
                batch.tokens_N[a:b].tolist(),
                batch.positions_N3[a:b].tolist(),
                b - a,
                int(batch.task_B[i]),
                int(batch.view_B[i]),
            )
            for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        ]
        self.prefills.append(len(rows))
        self.asked += rows
        cache = StubCache(rows, max_new_tokens)
        return self._logits(cache), cache

    def step(self, tokens_B, positions_B3, cache):
        self.steps.append(len(tokens_B))
        for row, token, position in zip(
            cache.rows, tokens_B.tolist(), positions_B3.tolist(), strict=True
        ):
            assert len(row.written) < cache.room, "more tokens than prefill made room for"
            row.tokens.append(token)
            row.positions.append(position)
        self.on_step()
        return self._logits(cache)


def random_score(row, scale=2.0):
    """Logits drawn from the history: deterministic, and different for every history."""
    state = zlib.crc32(repr((row.tokens, row.positions, row.task, row.view)).encode())
    return np.random.default_rng(state).normal(size=VOCAB) * scale


@pytest.fixture
def stub():
    return StubModel


@pytest.fixture
def random_stub():
    return StubModel(random_score)


@pytest.fixture
def tiny_model():
    """A real network in float64 with no zero weights left."""

    def build(num_tasks=5, **changes):
        torch.manual_seed(0)
        sizes = {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "ffn_width": 48}
        model = build_model(ModelConfig(**(sizes | changes)), num_tasks).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model

    return build


def random_grid(rng, height, width, low=0):
    return rng.integers(low, 10, (height, width)).astype(np.uint8)


@pytest.fixture
def make_task():
    """A task with random grids of ``sizes`` ((in, out) of every demonstration)."""

    def build(sizes, test_sizes, seed=0, task_id="task"):
        rng = np.random.default_rng(seed)
        demos = tuple(Pair(random_grid(rng, *i), random_grid(rng, *o)) for i, o in sizes)
        return Task(task_id, "made", demos, tuple(random_grid(rng, *s) for s in test_sizes))

    return build
