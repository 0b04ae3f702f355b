"""What a run may begin with: weights by task id, known by their hash; all else is one line."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_onn.config.schema import (
    DataConfig,
    DeepEmbedConfig,
    EaviConfig,
    ModelConfig,
    TrainerConfig,
)
from tiny_onn.errors import UserError
from tiny_onn.model.checkpoint import load_model, save_checkpoint
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.initial_weights import TASK_TABLES, begin_with
from tiny_onn.training.run import run_training


@pytest.fixture
def retrained(pretrained):
    """A run of stage eavi as far as asked for, and its init_from with other weights since."""

    def make(run):
        first, second = pretrained(steps=2, budget={"steps": 8})
        own = Path(second.out + "-first")
        shutil.copytree(first.out, own)
        second = replace(second, init_from=str(own))
        run(second)
        weights_file = own / "checkpoint" / "weights.safetensors"
        state = {k: v + 1 for k, v in load_file(weights_file).items()}
        save_file(state, weights_file)
        return second, own

    return make


def test_a_finished_run_is_not_taken_for_one_of_other_weights(retrained):
    second, own = retrained(run_training)
    with pytest.raises(UserError, match="began with other weights.*resume=false") as caught:
        run_training(second)
    assert "\n" not in str(caught.value)
    shutil.rmtree(own)
    assert run_training(second) == 0  # there is nothing left to compare it with


def test_a_stopped_run_does_not_go_on_from_other_weights(retrained, interrupt):
    def stop(config):
        with interrupt(3, signal.SIGTERM):
            assert run_training(config) == 143

    second, own = retrained(stop)
    with pytest.raises(UserError, match="began with other weights"):
        run_training(second)
    shutil.rmtree(own)
    assert run_training(second) == 0
    facts = json.loads((Path(second.out) / "checkpoint" / "provenance.json").read_text())
    assert facts["init_from"]["steps"] == 2 and facts["steps"] == 8


BAD = [
    ({"init_from": None}, {}, "got stage=eavi without init_from"),
    ({}, {"excursions_per_document": 2}, "give eavi.feed=sample"),
    ({}, {"excursion_weight": 0.0}, "expected one above 0; raise one, or give stage=pretrain"),
    ({}, {"truth_weight": 0.0, "share_start": 0.5}, "some documents teach nothing"),
    ({}, {"feed": "single", "geometry": "free"}, "give eavi.geometry=truth"),
    ({}, {"temperature": -1.0}, "eavi.temperature=-1.0; expected a number at least 0"),
    ({}, {"share_end": 1.5}, "eavi.share_end=1.5; expected a number from 0 to 1"),
    ({"init_from": "runs/nothing"}, {}, "checkpoint 'runs/nothing' does not exist"),
    (
        {"data": DataConfig(loss_on_inputs=True), "model": ModelConfig(mask="causal")},
        {},
        "excursions are of outputs only",
    ),
    ({"init_from": "OUT"}, {}, "the same folder; expected another one to write to"),
    ({"init_from": "OUT/checkpoint"}, {}, "the first run's checkpoint would be overwritten"),
    ({"trainer": TrainerConfig(strategy="fsdp")}, {}, "give trainer.strategy=ddp"),
    (
        {"model": ModelConfig(deep_embed=DeepEmbedConfig(keys=["token"], store="memmap"))},
        {},
        "give model.deep_embed.store=dense",
    ),
]


@pytest.mark.parametrize(("top", "eavi", "message"), BAD, ids=str)
def test_bad_settings_are_one_line(tiny, tmp_path, top, eavi, message):
    top = {"stage": "eavi", "init_from": "x"} | top
    if top["init_from"]:
        top["init_from"] = top["init_from"].replace("OUT", tiny().out)
    config = replace(tiny(), **top, eavi=EaviConfig(**eavi))
    with pytest.raises(UserError, match=message) as caught:
        run_training(config)
    assert "\n" not in str(caught.value)
    assert not (Path(config.out) / "checkpoint").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 16}, "model.width=32; expected 16; give model.width=32, or choose another run"),
        ({"layers": 3}, "model.layers=1; expected 3"),
        ({"attention": "nsa"}, r"model.attention=full; expected nsa \(and"),
    ],
)
def test_another_network_is_named_in_one_line(pretrained, changes, message):
    _, second = pretrained(steps=1)
    second = replace(second, model=replace(second.model, **changes))
    with pytest.raises(UserError, match=message) as caught:
        run_training(second)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_vocabulary_is_refused(pretrained, tmp_path):
    first, second = pretrained(steps=1)
    other = tmp_path / "other"
    shutil.copytree(Path(first.out) / "checkpoint", other)
    saved = other / "config.yaml"
    saved.write_text(saved.read_text().replace("vocab_size: 14", "vocab_size: 15"))
    with pytest.raises(UserError, match="config.yaml'.*vocab_size=15; expected 14") as caught:
        run_training(replace(second, init_from=str(other)))
    assert "\n" not in str(caught.value)


def test_an_untrained_checkpoint_and_one_of_other_tasks_are_refused(pretrained, tmp_path):
    first, second = pretrained(steps=1)
    model = build_model(first.model, 1, first.moe, first.nsa)
    for name, facts, message in (
        ("never", {"trained": False, "steps": 0}, "was never trained"),
        ("other", {"trained": True, "steps": 1, "tokens": 1}, "knows none of this run's 8 tasks"),
    ):
        save_checkpoint(tmp_path / name, model, first, ("somebody",), facts)
        with pytest.raises(UserError, match=message):
            run_training(replace(second, init_from=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"holdout": "train_tests"}, "has learnt those pairs; expected a run that held them out"),
        ({"context": "demos"}, "give data.context=pair"),
    ],
)
def test_weights_that_know_the_hold_out_or_other_documents_are_refused(pretrained, data, message):
    _, second = pretrained(steps=1)
    with pytest.raises(UserError, match=message):
        run_training(replace(second, data=replace(second.data, **data)))


@pytest.mark.parametrize("name", TASK_TABLES)
def test_task_rows_go_by_task_id(pretrained, tmp_path, name):
    by_task = DeepEmbedConfig(keys=["token", "task"], form="1x", task_rank=3)
    first, second = pretrained(steps=1, model={"deep_embed": by_task})
    loaded = load_model(first.out)
    order = [7, 2, 0, 5]  # four of the eight tasks, in another order
    model = build_model(first.model, 4, first.moe, first.nsa)
    state = loaded.model.state_dict()
    theirs = {table: torch.randn_like(state[table]) for table in TASK_TABLES}
    for table, rows_TC in theirs.items():  # rows behind the tasks' are of tasks that nobody knows
        state[table] = torch.cat([rows_TC[order], rows_TC[8:]])
    model.load_state_dict(state)
    ids = tuple(loaded.task_ids[i] for i in order)
    save_checkpoint(tmp_path / "few", model, first, ids, loaded.provenance)
    torch.manual_seed(5)
    fresh = build_model(first.model, 8, first.moe, first.nsa)
    own = fresh.state_dict()[name].clone()
    facts = begin_with(fresh, replace(second, init_from=str(tmp_path / "few")), loaded.task_ids)
    assert facts["new_tasks"] == 4
    for row in range(8):
        want = theirs[name] if row in order else own
        assert torch.equal(fresh.state_dict()[name][row], want[row])
