"""A run's packed checkpoint is for inference: no run begins with it or goes on in its folder."""

from dataclasses import replace
from pathlib import Path

import pytest

from tiny_onn.config.load import load_convert_config
from tiny_onn.convert.run import run_convert
from tiny_onn.errors import UserError
from tiny_onn.training.run import run_training


def test_training_refuses_a_packed_checkpoint_in_one_line(tiny, tmp_path):
    config = tiny(model={"weights": "k24"}, budget={"steps": 1})
    run_training(config)
    packed = Path(config.out) / "packed"
    run_convert(load_convert_config([f"checkpoint={config.out}", "backend=reference"]))
    before = sorted(packed.rglob("*"))
    for changes, words in (
        ({"init_from": str(packed), "out": str(tmp_path / "new")}, "init_from.*packed checkpoint"),
        ({"out": str(packed)}, "holds a packed checkpoint.*resume=false"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            run_training(replace(config, **changes))
        assert "\n" not in str(caught.value)
    assert sorted(packed.rglob("*")) == before
