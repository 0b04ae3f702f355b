import csv
import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_onn.config.schema import BudgetConfig
from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import load_model
from tiny_onn.training import resume, run
from tiny_onn.training.pretrain import Pretrain
from tiny_onn.training.run import run_training


def weights(config):
    return load_file(Path(config.out) / "checkpoint" / "weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def curve(config, version=0):
    path = Path(config.out) / "logs" / f"version_{version}" / "metrics.csv"
    with open(path) as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def test_a_run_leaves_a_loadable_model_and_its_papers(tiny):
    config = tiny(budget={"steps": 30}, optim={"ema_decay": 0.5})
    assert run_training(config) == 0
    folder = Path(config.out)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint", "config.yaml", "leak_report.json", "logs", "metrics.json"
    ]  # fmt: skip
    loaded = load_model(folder)
    assert loaded.config.model == config.model
    assert len(loaded.task_ids) == 8
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["finished"] and facts["trained"] and facts["steps"] == 30
    assert facts["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert facts["table_parameters"] == (8 + 8) * 32
    losses = curve(config)
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.3


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny, tmp_path):
    runs = [tiny(seed=seed) for seed in (0, 0, 1)]
    runs = [replace(c, out=str(tmp_path / f"r{i}")) for i, c in enumerate(runs)]
    for config in runs:
        run_training(config)
    a, b, c = (weights(config) for config in runs)
    assert same(a, b) and not same(a, c)


def test_a_finished_run_is_left_alone_unless_resume_is_off(tiny, capsys):
    config = tiny()
    run_training(config)
    first = weights(config)
    assert run_training(config) == 0
    assert "finished" in capsys.readouterr().out
    assert run_training(replace(config, resume=False)) == 0
    assert "trained 6 steps" in capsys.readouterr().out
    assert same(first, weights(config))


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_folder_of_another_configuration_is_refused_by_key(tiny, monkeypatch, state):
    config = tiny(budget={"steps": 8}, trainer={"checkpoint_steps": 2})
    if state == "finished":
        run_training(config)
    else:
        stop_at(monkeypatch, 5)
        with pytest.raises(Died):
            run_training(config)
        monkeypatch.undo()
    other = replace(config, seed=7, budget=BudgetConfig(steps=9))
    with pytest.raises(UserError, match=r"budget\.steps \(8 -> 9\), seed \(0 -> 7\).*resume=false"):
        run_training(other)
    harmless = replace(config, trainer=replace(config.trainer, log_every_steps=3))
    assert run_training(harmless) == 0


class Died(BaseException):
    pass


def stop_at(monkeypatch, step):
    """The process dies, as far as Python can tell, in the forward of ``step``."""
    original = Pretrain.training_step

    def training_step(self, batch, batch_idx):
        if batch.step == step:
            raise Died
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Pretrain, "training_step", training_step)


def test_changed_data_are_refused(tiny, monkeypatch, tmp_path, task_dir):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for path in task_dir.iterdir():
        (folder / path.name).write_text(path.read_text())
    config = tiny(data={"extra_dirs": [str(folder)]}, trainer={"checkpoint_steps": 2})
    stop_at(monkeypatch, 4)
    with pytest.raises(Died):
        run_training(config)
    monkeypatch.undo()
    next(iter(sorted(folder.iterdir()))).unlink()
    with pytest.raises(UserError, match="data .* changed"):
        run_training(config)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tiny, monkeypatch):
    config = tiny(budget={"steps": 9}, trainer={"checkpoint_steps": 2})
    original = Pretrain.training_step

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        return loss * float("nan") if batch.step == 5 else loss

    monkeypatch.setattr(Pretrain, "training_step", training_step)
    with pytest.raises(UserError, match=r"not finite at step 6.*step 4 is kept"):
        run_training(config)
    point, _ = resume.find_resume(Path(config.out))
    assert point.state["totals"]["step"] == 4
    assert not (Path(config.out) / "checkpoint").exists()


def test_a_full_disk_is_told_and_training_goes_on(tiny, monkeypatch, capsys):
    config = tiny(budget={"steps": 9}, trainer={"checkpoint_steps": 3})
    original, calls = torch.save, []

    def failing_save(checkpoint, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(checkpoint, file)

    monkeypatch.setattr(resume.torch, "save", failing_save)
    assert run_training(config) == 0
    out = capsys.readouterr().out
    assert "No space left" in out and "that of step 3" in out
    assert len(calls) >= 3


def test_a_full_disk_at_the_end_is_a_user_error_and_can_be_gone_on_with(tiny, monkeypatch):
    config = tiny()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "save_checkpoint", full)
    with pytest.raises(UserError, match="No space left"):
        run_training(config)
    monkeypatch.undo()
    assert run_training(config) == 0
    assert len(curve(config, version=0)) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": {}}, "budget"),
        ({"budget": {"minutes": 0}}, "minutes"),
        ({"budget": {"epochs": 1, "steps": 1}}, "exactly one"),
        ({"optim": {"warmup_share": 0.8, "decay_share": 0.8}}, "warmup_share"),
        ({"trainer": {"strategy": "nonsense"}}, "strategy"),
        ({"trainer": {"accelerator": "abacus"}}, "accelerator"),
        ({"trainer": {"accelerator": "gpu", "devices": 99}}, "devices"),
    ],
)
def test_impossible_settings_are_user_errors_before_training(tiny, change, message):
    if "budget" in change and not change["budget"]:
        config = replace(tiny(), budget=BudgetConfig())
    else:
        config = tiny(**change)
    with pytest.raises(UserError, match=message):
        run_training(config)
    assert not (Path(config.out) / "checkpoint").exists()


def test_an_output_folder_that_is_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run_training(replace(tiny(), out=str(tmp_path / "file")))


def test_the_ema_is_what_is_saved(tiny, tmp_path):
    plain = replace(tiny(), out=str(tmp_path / "plain"))
    averaged = replace(tiny(optim={"ema_decay": 0.9}), out=str(tmp_path / "averaged"))
    run_training(plain)
    run_training(averaged)
    assert curve(plain) == curve(averaged)
    assert not same(weights(plain), weights(averaged))


def test_a_minutes_run_ends_on_time_with_the_decay_complete(tiny):
    config = tiny(budget={"minutes": 0.1})
    assert run_training(config) == 0
    facts = json.loads((Path(config.out) / "metrics.json").read_text())
    assert facts["minutes"] == pytest.approx(0.1, rel=0.02)
    path = Path(config.out) / "logs" / "version_0" / "metrics.csv"
    with open(path) as file:
        scales = [float(row["lr_scale"]) for row in csv.DictReader(file)]
    assert scales[-1] < 0.05 and max(scales) == 1.0


def test_data_workers_change_nothing(tiny, tmp_path):
    runs = [replace(tiny(data={"workers": n}), out=str(tmp_path / f"r{n}")) for n in (0, 2)]
    for config in runs:
        run_training(config)
    assert curve(runs[0]) == curve(runs[1])


def test_holdout_is_measured_on_the_way_and_at_the_end_without_a_trace(tiny, tmp_path, monkeypatch):
    seen = []

    def evaluate(model, corpus, config):
        seen.append(torch.rand(1))  # an excursion that even draws random numbers
        return {"nll": 1.25}

    monkeypatch.setattr(run, "evaluate_holdout", evaluate)
    shared = {
        "data": {"holdout": "demos"},
        "model": {"dropout": 0.2},
        "budget": {"steps": 10},
    }
    often = replace(tiny(**shared, trainer={"holdout_share": 0.25}), out=str(tmp_path / "often"))
    once = replace(tiny(**shared), out=str(tmp_path / "once"))
    run_training(often)
    assert len(seen) == 4  # at 1/4, 2/4, 3/4 and the end
    run_training(once)
    assert len(seen) == 5
    assert same(weights(often), weights(once))
    facts = json.loads((tmp_path / "often" / "metrics.json").read_text())
    assert facts["holdout"] == {"nll": 1.25}


def test_the_real_holdout_ends_up_in_the_metrics(tiny):
    config = tiny(
        data={"holdout": "demos"}, trainer={"holdout_decode": 2}, optim={"ema_decay": 0.5}
    )
    run_training(config)
    facts = json.loads((Path(config.out) / "metrics.json").read_text())
    assert facts["examples"] == 24
    assert facts["holdout"]["num_outputs"] == 8 and facts["holdout"]["num_decoded"] == 2
    assert 0 < facts["holdout"]["nll_per_token"] < 5


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_start_up_ends_the_command_at_once(
    tiny, monkeypatch, capsys, number, status
):
    monkeypatch.setattr(run, "build_corpus", lambda *given: os.kill(os.getpid(), number))
    assert run_training(tiny()) == status
    assert "go on with" in capsys.readouterr().out


def test_settings_that_cannot_run_here_destroy_nothing(tiny, monkeypatch):
    config = tiny()
    monkeypatch.setattr(run, "remove_resume", lambda folder: None)
    run_training(config)
    before = {path: path.read_bytes() for path in Path(config.out).glob("*.*") if path.is_file()}
    assert any(path.name == "resume.ckpt" for path in before)
    monkeypatch.undo()
    broken = replace(config, resume=False, ops=replace(config.ops, backend="flash"))
    with pytest.raises(UserError, match="ops.backend=flash"):
        run_training(broken)
    assert before == {path: path.read_bytes() for path in before}


def test_the_way_to_go_on_never_starts_over(monkeypatch):
    monkeypatch.setattr(run.sys, "argv", ["train.py", "preset=nano", "resume=false"])
    assert run._how_to_go_on() == "go on with: python train.py preset=nano"
