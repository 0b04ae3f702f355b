"""A checkpoint folder round-trips, and a broken one says in one line what is wrong."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tiny_onn.config.schema import BudgetConfig, Config, ModelConfig
from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import load_model, save_checkpoint
from tiny_onn.model.tiny_onn import build_model

CONFIG = Config(
    out="runs/x",
    model=ModelConfig(width=32, layers=1, heads=2, kv_heads=2, head_width=16, ffn_width=48),
    budget=BudgetConfig(steps=3),
)
IDS = ("a", "b", "c")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = build_model(CONFIG.model, len(IDS))
    save_checkpoint(tmp_path / "run" / "checkpoint", model, CONFIG, IDS, {"seed": 7})
    return tmp_path / "run" / "checkpoint"


def test_weights_config_tasks_and_provenance_come_back(folder):
    torch.manual_seed(0)
    model = build_model(CONFIG.model, len(IDS))
    loaded = load_model(folder)
    assert loaded.task_ids == IDS and loaded.provenance == {"seed": 7}
    assert replace(loaded.config, out=CONFIG.out) == CONFIG
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def test_the_run_folder_stands_for_its_checkpoint(folder):
    assert load_model(folder.parent).task_ids == IDS


def test_saving_again_replaces_the_folder_whole(folder):
    save_checkpoint(folder, build_model(CONFIG.model, 2), CONFIG, ("x", "y"), {})
    assert load_model(folder).task_ids == ("x", "y")
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint"]


def test_a_failed_save_leaves_the_old_folder(folder, monkeypatch):
    monkeypatch.setattr("tiny_onn.model.checkpoint.json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(folder, build_model(CONFIG.model, 2), CONFIG, ("x", "y"), {})
    monkeypatch.undo()
    assert load_model(folder).task_ids == IDS
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint"]


def test_a_full_disk_is_one_line_and_leaves_the_old_folder(folder, monkeypatch):
    def full(*given):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("tiny_onn.model.checkpoint.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(folder, build_model(CONFIG.model, 2), CONFIG, ("x", "y"), {})
    monkeypatch.undo()
    assert load_model(folder).task_ids == IDS


def _tear_weights(folder):
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(data[: len(data) // 2])


def _other_model(folder):
    other = build_model(replace(CONFIG.model, width=48), len(IDS))
    save_file(other.state_dict(), folder / "weights.safetensors")


BREAKS = {
    "torn": (_tear_weights, "torn"),
    "no tasks": (lambda f: (f / "tasks.json").unlink(), "tasks.json missing"),
    "bad tasks": (lambda f: (f / "tasks.json").write_text("[1,"), "tasks.json' is torn"),
    "tasks null": (lambda f: (f / "tasks.json").write_text("null"), "expected a list"),
    "pickle": (lambda f: (f / "weights.safetensors").write_bytes(b"\x80\x04K."), "torn"),
    "other model": (_other_model, "of another model"),
    "fewer tasks": (
        lambda f: (f / "tasks.json").write_text(json.dumps(["a"])),
        "of another model: 'embedding.task.weight'",
    ),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "has no weights.safetensors"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_one_clear_line(folder, name):
    breaks, message = BREAKS[name]
    breaks(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_names_the_remedy(tmp_path):
    with pytest.raises(UserError, match="does not exist.*python train.py stage=pretrain"):
        load_model(tmp_path / "nothing")


def test_an_unfinished_run_names_the_remedy(tmp_path):
    (tmp_path / "resume.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="unfinished run.*train.py command again"):
        load_model(tmp_path)
