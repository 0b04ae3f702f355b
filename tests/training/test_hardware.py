"""precision=auto is bf16 only where the hardware multiplies in it; a choice is never changed."""

import pytest

from tiny_onn.config.schema import Config, TrainerConfig
from tiny_onn.training import hardware


@pytest.mark.parametrize("fast, expected", [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_hardware(monkeypatch, fast, expected):
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda accelerator: fast)
    config = Config(trainer=TrainerConfig(precision="auto"))
    assert hardware.with_precision(config).trainer.precision == expected


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_an_explicit_precision_stays(monkeypatch, asked):
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda accelerator: asked == "fp32")
    config = Config(trainer=TrainerConfig(precision=asked))
    assert hardware.with_precision(config) == config
