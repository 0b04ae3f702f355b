"""Every preset's own data, optimizer and batches, with the network shrunk, from train to score."""

import json

import pytest

from tiny_onn.config.load import load_config
from tiny_onn.training.run import run_training

SHRUNK = [
    "model.width=32",
    "model.layers=1",
    "model.heads=2",
    "model.kv_heads=2",
    "model.head_width=16",
    "model.ffn_width=48",
    "moe.expert_width=16",
    "budget.steps=2",
    "data.workers=0",
    "data.batch_tokens=4096",
    "trainer.compile=false",
    "trainer.precision=fp32",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "network"),
    [
        ("nano", "sparse"),
        ("nano", "dense"),
        ("small", "sparse_long"),
        ("base", "sparse"),
    ],
)
def test_a_shrunk_preset_trains_predicts_and_scores(preset, network, predict_two, tmp_path, capsys):
    run = tmp_path / "run"
    config = load_config([f"preset={preset}", f"network={network}", f"out={run}", *SHRUNK])
    assert run_training(config) == 0
    assert predict_two(run, "precision=fp32")["num_tasks"] == 2
    report = json.loads((run / "leak_report.json").read_text())
    text = capsys.readouterr().out
    assert "answers of" in text and "were not read" in text
    assert report
