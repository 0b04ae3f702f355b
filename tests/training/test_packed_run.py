"""A packed checkpoint is for inference: no run begins with it or goes on in its folder."""

from dataclasses import replace

import pytest

from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import save_checkpoint
from tiny_onn.model.convert import convert
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.initial_weights import begin_with
from tiny_onn.training.run import run_training


def test_training_refuses_a_packed_checkpoint_in_one_line(tiny):
    config = tiny(model={"weights": "k24"})
    model = build_model(config.model, 1)
    convert(model, "reference")
    facts = {"steps": 1, "trained": True}
    folder = config.out + "/checkpoint"
    save_checkpoint(folder, model, config, ("a",), facts)
    for run, words in (
        (
            lambda: run_training(config),
            "holds a packed checkpoint.*delete .*/checkpoint.*resume=false",
        ),
        (
            lambda: begin_with(model, replace(config, init_from=folder), ("a",)),
            "init_from.*, a packed checkpoint, .*unpack=true",
        ),
    ):
        with pytest.raises(UserError, match=words) as caught:
            run()
        assert "\n" not in str(caught.value)
