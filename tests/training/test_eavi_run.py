"""Stage eavi as a run: it starts from a trained model, logs, resumes exactly."""

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_pair
from tiny_onn.config.schema import (
    DeepEmbedConfig,
    EaviConfig,
    NsaConfig,
)
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.eavi import Eavi
from tiny_onn.training.loop import RunLoop
from tiny_onn.training.run import run_training

SPARSE = {
    "model": {
        "layers": 2,
        "attention": "nsa",
        "ffn": "dynmoe",
        "deep_embed": DeepEmbedConfig(keys=["token", "task"], form="1x", task_rank=3),
        "dropout": 0.1,
    },
    "nsa": NsaConfig(block=8, stride=4, select_block=4, select_count=4, window=8),
}


def rows(config, version=0):
    with open(Path(config.out) / "logs" / f"version_{version}" / "metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def weights(config):
    return {
        k: v.numpy().tobytes()
        for k, v in load_file(Path(config.out) / "checkpoint" / "weights.safetensors").items()
    }


@pytest.mark.parametrize(
    ("feed", "geometry"),
    [
        ("soft", "truth"),
        ("sample", "truth"),
        ("greedy", "truth"),
        ("single", "truth"),
        ("soft", "free"),
        ("sample", "free"),
    ],
)
@pytest.mark.parametrize("settings", [{}, SPARSE], ids=["dense", "sparse"])
def test_it_runs_logs_every_term_and_moves_the_weights(pretrained, feed, geometry, settings):
    given = {"feed": feed, "geometry": geometry, "divergence_weight": 0.1}
    first, second = pretrained(eavi=given, **settings)
    assert run_training(second) == 0
    for row in rows(second):
        for name in ("excursion_nll", "truth_nll", "divergence", "own_accuracy"):
            assert np.isfinite(float(row[f"eavi/{name}"])), name
        assert float(row["eavi/share"]) == 1
        assert float(row["loss"]) == pytest.approx(float(row["eavi/truth_nll"]), rel=1e-5)
    assert weights(first) != weights(second)
    facts = json.loads((Path(second.out) / "checkpoint" / "provenance.json").read_text())
    assert facts["init_from"]["steps"] == 6 and facts["stage"] == "eavi"


def test_it_begins_where_the_other_run_ended(pretrained):
    """With steps too small to change a float, all weights are the first run's."""
    first, second = pretrained()
    second = replace(
        second,
        optim=replace(
            second.optim,
            muon_lr=1e-30,
            adamw_lr=1e-30,
            table_lr=1e-30,
            muon_weight_decay=0.0,
            adamw_weight_decay=0.0,
        ),
    )
    assert run_training(second) == 0
    assert weights(first) == weights(second)


def test_pretraining_may_begin_with_weights_too(pretrained):
    first, second = pretrained()
    again = replace(second, stage="pretrain")
    assert run_training(again) == 0
    assert weights(again) != weights(first)
    assert "eavi/truth_nll" not in rows(again)[0]


def test_a_step_without_excursions_is_a_step_of_teacher_forcing(pretrained):
    _, second = pretrained(eavi={"share_start": 0.0, "share_end": 0.0, "truth_weight": 1.0})
    assert run_training(second) == 0
    again = replace(second, stage="pretrain", out=second.out + "2")
    assert run_training(again) == 0
    assert weights(second) == weights(again)


def test_the_share_of_excursions_follows_its_curriculum(pretrained):
    _, second = pretrained(eavi={"share_start": 0.0, "share_end": 1.0}, budget={"steps": 12})
    assert run_training(second) == 0
    shares = [float(row["eavi/share"]) for row in rows(second)]
    # A part of a document is drawn, so a step's share is off by less than one of its documents.
    for step, share in enumerate(shares):
        assert share == pytest.approx(step / 12, abs=0.2), step
    assert shares[0] < 0.2 and shares[-1] > 0.8


def test_documents_of_like_length_are_chosen_and_all_of_them_equally_often(tiny):
    eavi = EaviConfig(share_start=0.3, share_end=0.3)
    config = replace(tiny(), eavi=eavi, init_from="x")
    module = Eavi(build_model(config.model, 1), config)
    rng = np.random.default_rng(0)
    grids = [np.zeros((rng.integers(1, 9), rng.integers(1, 9)), np.uint8) for _ in range(11)]
    documents = [encode_pair(Pair(grid, grid), task=0) for grid in grids]
    lengths = sorted((len(d.tokens) - d.prefix_len, i) for i, d in enumerate(documents))
    rank_of = {i: rank for rank, (_, i) in enumerate(lengths)}
    counts, times = [], np.zeros(11)
    for step in range(3000):
        chosen = module._choose(documents, 0.5, step)
        assert len(set(chosen)) == len(chosen)
        ranks = [rank_of[i] for i in chosen]
        assert ranks == [(ranks[0] + k) % 11 for k in range(len(ranks))]
        counts.append(len(chosen))
        times[chosen] += 1
    assert set(counts) == {3, 4} and np.mean(counts) == pytest.approx(3.3, abs=0.05)
    np.testing.assert_allclose(times / 3000, 0.3, atol=0.04)


@pytest.mark.parametrize(
    ("feed", "settings"), [("soft", {}), ("sample", SPARSE)], ids=["soft-dense", "sample-sparse"]
)
def test_a_stopped_run_goes_on_to_the_same_bits(pretrained, interrupt, settings, feed):
    given = {"feed": feed, "share_start": 0.3}
    _, whole = pretrained(eavi=given, budget={"steps": 8}, **settings)
    stopped = replace(whole, out=whole.out + "-stopped")
    assert run_training(whole) == 0
    with interrupt(4, signal.SIGTERM):
        assert run_training(stopped) == 143
    assert run_training(stopped) == 0
    assert weights(whole) == weights(stopped)
    assert {r["step"]: r["loss"] for r in rows(whole)} == {
        r["step"]: r["loss"] for version in (0, 1) for r in rows(stopped, version)
    }


@pytest.mark.parametrize("feed", ["soft", "sample", "single"])
def test_excursions_leave_what_training_keeps_alone(pretrained, monkeypatch, feed):
    """The random stream, what routing is told of, the experts' counters, the EMA, the mode."""
    original, watched = Eavi.begin_step, []

    def state(module):
        (loop,) = (c for c in module.trainer.callbacks if isinstance(c, RunLoop))
        return [
            torch.get_rng_state(),
            *loop.reset.snapshot().values(),
            *(t.clone() for t in loop.ema.state_dict()["shadow"].values()),
            torch.tensor(int(loop.routing._pairs)),
            *(t.clone() for t in loop.routing._sums),
            torch.tensor([m.training for m in module.modules()]),
            *(torch.zeros(()) if p.grad is None else p.grad.clone() for p in module.parameters()),
        ]

    def begin_step(self, batch, share):
        before = state(self)
        prepared = original(self, batch, share)
        after = state(self)
        assert len(before) == len(after)
        watched.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        return prepared

    monkeypatch.setattr(Eavi, "begin_step", begin_step)
    settings = SPARSE | {"optim": {"ema_decay": 0.9}, "reset": {"window_steps": 4}}
    _, second = pretrained(eavi={"feed": feed}, **settings)
    assert run_training(second) == 0
    assert watched == [True] * 6


def test_it_learns_to_be_right_on_its_own_outputs(pretrained):
    """The tiny corpus, by heart: what the model writes itself ends up nearly all right."""
    views = {"data": {"views": "none"}, "model": {"layers": 2}}
    _, second = pretrained(steps=150, budget={"steps": 150}, eavi={"feed": "greedy"}, **views)
    assert run_training(second) == 0
    found = [float(row["eavi/own_accuracy"]) for row in rows(second)]
    assert np.mean(found[-10:]) > max(0.97, np.mean(found[:10]))


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"loops": 2}},
        {"data": {"context": "demos", "max_tokens": 300}},
        {"optim": {"ema_decay": 0.9}},
        {"eavi": {"feed": "sample", "excursions_per_document": 3}},
    ],
    ids=["loops", "demos", "ema", "several"],
)
def test_it_goes_with_the_rest(pretrained, settings):
    _, second = pretrained(**settings)
    assert run_training(second) == 0
    facts = json.loads((Path(second.out) / "checkpoint" / "provenance.json").read_text())
    assert np.isfinite([float(row["loss"]) for row in rows(second)]).all()
    assert facts["excursion_tokens"] > 0


def test_several_excursions_weigh_as_much_as_one(pretrained):
    """feed=sample so cold that all are the likeliest output."""
    _, one = pretrained(eavi={"feed": "sample", "temperature": 1e-6, "divergence_weight": 0.2})
    many = replace(one, out=one.out + "3", eavi=replace(one.eavi, excursions_per_document=3))
    for config in (one, many):
        assert run_training(config) == 0
    for a, b in zip(rows(one), rows(many), strict=True):
        for name in ("eavi/truth_nll", "eavi/excursion_nll", "eavi/divergence", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-3), name


@pytest.mark.slow
def test_compiled_blocks_write_and_learn_as_plain_ones(pretrained):
    _, plain = pretrained(eavi={"feed": "greedy"}, budget={"steps": 3}, model={"layers": 2})
    compiled = replace(
        plain, out=plain.out + "-compiled", trainer=replace(plain.trainer, compile=True)
    )
    for config in (plain, compiled):
        assert run_training(config) == 0
    a, b = rows(plain)[0], rows(compiled)[0]
    for name in ("loss", "eavi/excursion_nll", "eavi/own_accuracy", "grad_norm"):
        assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3), name


@pytest.mark.slow
def test_two_processes_share_the_work(pretrained, start, tmp_path):
    """Batches are dealt out, losses are means over both, and weights stay alike."""
    given = {"feed": "greedy", "divergence_weight": 0.1}
    settings = SPARSE | {"model": SPARSE["model"] | {"dropout": 0.0}}
    _, one = pretrained(eavi=given, budget={"steps": 5}, **settings)
    assert run_training(one) == 0
    two = replace(
        one, out=str(tmp_path / "two"), trainer=replace(one.trainer, devices=2, strategy="ddp")
    )
    process = start(two, prelude=WITNESS)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    ranks = [torch.load(tmp_path / "two" / f"rank{r}.pt") for r in (0, 1)]
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
    a, b = rows(one)[0], rows(two)[0]
    names = ("loss", "grad_norm", "eavi/truth_nll", "eavi/excursion_nll", "eavi/divergence")
    for name in (*names, "eavi/share", "eavi/own_accuracy"):
        assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-3), name
    facts = [
        json.loads((Path(c.out) / "checkpoint" / "provenance.json").read_text()) for c in (one, two)
    ]
    assert facts[0]["excursion_tokens"] == pytest.approx(facts[1]["excursion_tokens"], rel=0.3)


WITNESS = """
import torch
from tiny_onn.training.initial_weights import TASK_TABLES, begin_with
from tiny_onn.training.loop import RunLoop

original = RunLoop.on_train_end

def on_train_end(self, trainer, module):
    found = {k: v.clone() for k, v in module.state_dict().items()}
    torch.save(found, f"{self.config.out}/rank{trainer.global_rank}.pt")
    original(self, trainer, module)

RunLoop.on_train_end = on_train_end
"""
