"""Whole runs with weights=s_ste and weights=random24: learning, exact resumption, prediction."""

import signal
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from tiny_onn.training.run import run_training


def weights(config):
    path = Path(config.out) / "checkpoint" / "weights.safetensors"
    return {k: v.numpy().tobytes() for k, v in load_file(path).items()}


def test_a_run_cut_in_the_middle_goes_on_bit_for_bit(tiny, tmp_path, interrupt):
    whole = tiny(model={"weights": "s_ste"}, budget={"steps": 6})
    whole = replace(whole, out=str(tmp_path / "whole"))
    run_training(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))
    with interrupt(3, signal.SIGINT):
        assert run_training(cut) == 130
    assert run_training(cut) == 0
    assert weights(whole) == weights(cut)


@pytest.mark.parametrize("kind", ["s_ste", "random24"])
def test_stage_eavi_goes_on_with_it_and_predicts(pretrained, predict_two, kind):
    first, second = pretrained(model={"weights": kind})
    assert run_training(second) == 0
    before, after = weights(first), weights(second)
    assert before != after
    frozen = [n for n in before if n.endswith((".scale", ".kept"))]
    assert frozen and all(before[n] == after[n] for n in frozen)
    scores = [predict_two(Path(second.out)) for _ in range(2)]
    assert scores[0] == scores[1]


class Watch(L.Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.steps.append(batch.step)
        torch.rand(3)


def test_an_observer_is_told_of_every_step_and_changes_nothing(tiny, tmp_path):
    plain = replace(tiny(budget={"steps": 4}), out=str(tmp_path / "plain"))
    seen = replace(plain, out=str(tmp_path / "seen"))
    watch = Watch()
    run_training(plain)
    run_training(seen, observers=[watch])
    assert watch.steps == [0, 1, 2, 3] and weights(plain) == weights(seen)
