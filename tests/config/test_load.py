import dataclasses
import typing
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest

from tiny_onn.config import load
from tiny_onn.config.check import EXCLUSIVE
from tiny_onn.config.keys import keys_of
from tiny_onn.config.load import (
    KINDS,
    config_from_dict,
    dump_config,
    load_config,
    load_saved_config,
    load_submit,
    names_in,
)
from tiny_onn.config.ranges import RANGES
from tiny_onn.config.schema import Config, InspectConfig, SubmitConfig
from tiny_onn.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def message(*arguments: str, submit: bool = False) -> str:
    """The one line that these arguments are answered with."""
    with pytest.raises(UserError) as caught:
        (load_submit if submit else load_config)(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def layered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """A configs folder of one stage, network and preset in place of the real one."""
    texts = {"base": "", "stage/pretrain": "", "network/sparse": "", **files}
    texts.setdefault("preset/nano", "budget: {steps: 5}")
    for name, text in texts.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    monkeypatch.setattr(load, "configs_folder", lambda: tmp_path)


@pytest.mark.parametrize("preset", names_in("preset"))
@pytest.mark.parametrize("network", names_in("network"))
@pytest.mark.parametrize("stage", names_in("stage"))
def test_every_combination_of_files_loads_typed_resolved_and_says_its_names(stage, network, preset):
    words = [f"stage={stage}", f"network={network}", f"preset={preset}"]
    config = load_config([*words, "init_from=runs/x"] if stage == "eavi" else words)
    assert (config.stage, config.network, config.preset) == (stage, network, preset)
    assert config.out == f"runs/{stage}-{preset}-{network}"
    assert isinstance(config.budget.minutes, float)
    with pytest.raises(FrozenInstanceError):
        config.model.width = 1


def test_the_yaml_files_are_exactly_the_choices_of_the_schema():
    keys = keys_of(Config)
    for kind in KINDS:
        assert sorted(keys[kind].choices) == names_in(kind)


def test_a_file_of_settings_holds_its_own_name():
    for kind in KINDS:
        for name in names_in(kind):
            text = (REPOSITORY / "configs" / kind / f"{name}.yaml").read_text()
            assert f"{kind}: {name}" in text


def test_the_default_network_is_sparse_in_all_three_parts_and_the_dense_one_in_none():
    sparse, dense = (load_config(words).model for words in ([], ["network=dense"]))
    assert (sparse.attention, sparse.ffn) == ("nsa", "dynmoe") and sparse.deep_embed.keys
    assert (dense.attention, dense.ffn, dense.deep_embed.keys) == ("full", "dense", [])


def test_each_layer_overrides_the_one_before(tmp_path, monkeypatch):
    numbers = "\n".join(f"  {k}: 1" for k in ("width", "layers", "loops", "ffn_width"))
    layered(
        tmp_path,
        monkeypatch,
        **{
            "base": f"model:\n{numbers}",
            "preset/nano": "model: {layers: 2, loops: 2, ffn_width: 2}\nbudget: {steps: 5}",
            "stage/pretrain": "model: {loops: 3, ffn_width: 3}",
        },
    )
    model = load_config(["model.ffn_width=4"]).model
    assert (model.width, model.layers, model.loops, model.ffn_width) == (1, 2, 3, 4)
    assert model.heads == keys_of(Config)["model.heads"].default


@pytest.mark.parametrize("preset", names_in("preset"))
def test_stage_eavi_moves_the_weights_of_every_preset_less(preset):
    first = load_config([f"preset={preset}"]).optim
    second = load_config([f"preset={preset}", "stage=eavi", "init_from=runs/x"]).optim
    for name in ("muon_lr", "adamw_lr", "table_lr", "deep_embed_lr"):
        assert getattr(second, name) < getattr(first, name), name


def test_the_preset_asked_for_is_the_one_that_counts():
    assert load_config(["preset=base"]).model.width == 768
    assert load_config(["preset=small"]).model.width == 256


def test_a_later_argument_wins_over_an_earlier_one():
    assert load_config(["seed=1", "seed=2"]).seed == 2


def test_a_group_can_be_given_as_a_mapping():
    config = load_config(["data={track: all, learn: demos}"])
    assert (config.data.track, config.data.learn) == ("all", "demos")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("optim.muon_lr=3e-3", 3e-3),
        ("budget.minutes=7", 7.0),
        ("data.sources=[arc1,my tasks.json]", ["arc1", "my tasks.json"]),
        ("data.ids=007", "007"),
        ("data.ids=null", None),
        ("out=1e3", "1e3"),
        ("out=runs/a=b: c", "runs/a=b: c"),
        ("trainer.compile=true", True),
        ("model.kv_heads=${model.heads}", 6),
    ],
)
def test_values_get_the_type_of_their_key(argument, value):
    config = asdict(load_config(["model.heads=6", "model.kv_heads=6", argument]))
    for part in argument.partition("=")[0].split("."):
        config = config[part]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.widht", "model.width"),
        ("widht", "model.width"),
        ("batch_tokens", "data.batch_tokens"),
        ("modl.layers", "model.layers"),
        ("data.trak", "data.track"),
        ("minutes", "budget.minutes"),
        ("trainer.precison", "trainer.precision"),
        ("model.width.x", "model.width"),
    ],
)
def test_a_mistyped_key_is_answered_with_the_nearest_full_key(typed, meant):
    text = message(f"{typed}=1")
    assert text == f"unknown key '{typed}'; did you mean {meant}?"


def test_a_key_like_no_other_is_sent_to_help():
    assert message("qqq=1") == "unknown key 'qqq'; see --help for every key"


def test_a_mistyped_key_of_submit_is_answered_from_its_own_keys():
    assert "did you mean predict.views?" in message("checkpoint=x", "predict.view=1", submit=True)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("model.width=wide", ["model.width=wide", "a whole number"]),
        ("model.width=1.5", ["model.width=1.5", "a whole number"]),
        ("seed=true", ["seed=true", "a whole number"]),
        ("seed=null", ["seed=null", "a whole number"]),
        ("optim.muon_lr=fast", ["optim.muon_lr=fast", "a number"]),
        ("optim.muon_lr=[1]", ["optim.muon_lr=[1]", "a number"]),
        ("optim.muon_lr=true", ["optim.muon_lr=true", "a number"]),
        ("trainer.compile=1", ["trainer.compile=1", "true or false"]),
        ("data.sources=arc1", ["data.sources=arc1", "a list", "write data.sources=[arc1]"]),
        ("data.sources=[1]", ["data.sources=[1]", "a list"]),
        ("data.sources=[arc1", ["data.sources=[arc1", "a list"]),
        ("data=3", ["data=3", "data.sources"]),
        ("data.track=nanno", ["data.track=nanno", "one of all, nano", "did you mean nano?"]),
        ("ops.backend=cuda", ["ops.backend=cuda", "auto, reference, sdpa, flash, varlen"]),
        ("trainer.precision=fp16", ["fp16", "one of auto, fp32, bf16", "did you mean bf16?"]),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(argument, parts):
    text = message(argument)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("stage=pretain", ["unknown stage 'pretain'", "pretrain", "did you mean pretrain?"]),
        ("preset=nanoo", ["unknown preset 'nanoo'", "base, nano, small", "did you mean nano?"]),
        ("preset=smal", ["did you mean small?"]),
        ("preset=", ["unknown preset ''", "base, nano, small"]),
    ],
)
def test_an_unknown_stage_or_preset_names_the_choices_and_the_nearest(argument, parts):
    text = message(argument)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("nano", "write nano=VALUE"),
        ("--preset=nano", "write preset=nano"),
        ("--resume", "write resume=VALUE"),
        ("=3", "expected key=value"),
        ("", "expected key=value"),
    ],
)
def test_an_argument_that_is_no_key_value_says_how_to_write_it(argument, remedy):
    assert remedy in message(argument)


@pytest.mark.parametrize("given", ["epochs=90", "steps=100", "minutes=3"])
def test_a_budget_on_the_command_line_clears_that_of_the_preset(given):
    name, _, value = given.partition("=")
    budget = asdict(load_config(["preset=nano", f"budget.{given}"]).budget)
    assert budget.pop(name) == float(value)
    assert set(budget.values()) == {None}


def test_two_budgets_on_the_command_line_are_refused():
    text = message("budget.minutes=3", "budget.epochs=2")
    assert "budget.minutes=3.0 and budget.epochs=2.0" in text and "exactly one" in text


def test_no_budget_is_refused():
    assert "no budget" in message("budget.minutes=null")


@pytest.mark.parametrize("value", ["minutes=0", "minutes=-1", "minutes=nan", "minutes=inf"])
def test_a_budget_that_is_not_above_0_is_refused(value):
    assert "expected a number above 0" in message(f"budget.{value}")


def test_steps_below_1_are_refused():
    assert "at least 1" in message("budget.steps=0")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["model.heads=4", "model.kv_heads=3"], "multiple of kv_heads"),
        (["model.kv_heads=0"], "model.kv_heads=0"),
        (["model.head_width=9"], "use 10"),
        (["model.head_width=6"], "at least 8"),
        (["model.vocab_size=15"], "expected 14"),
        (["model.dropout=1"], "below 1"),
        (["data.views_per_example=0"], "at least 1"),
        (["data.sources=[]"], "data.sources=[arc1]"),
        (["optim.warmup_share=0.5", "optim.decay_share=0.6"], "at most 1 together"),
        (["optim.adamw_lr=0"], "above 0"),
        (["seed=-1"], "from 0 to"),
        (["out="], "such as out=runs/x"),
        (["data.loss_on_inputs=true"], "model.mask=causal"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(arguments, part):
    assert part in message(*arguments)


def test_every_number_of_the_schema_has_a_range_and_every_range_a_key():
    keys = keys_of(Config) | keys_of(SubmitConfig) | keys_of(InspectConfig)
    assert {name for name, key in keys.items() if key.hint in (int, float)} - {
        "model.vocab_size"
    } == set(RANGES)
    groups = {f"{group}.{name}" for group, names in EXCLUSIVE.items() for name in names}
    assert groups <= set(keys)


def test_defaults_are_within_their_own_types_and_ranges():
    for name, key in (keys_of(Config) | keys_of(SubmitConfig)).items():
        if key.default is None:
            assert key.optional, name
        elif key.choices:
            assert key.default in key.choices, name
        else:
            assert isinstance(key.default, typing.get_origin(key.hint) or key.hint), name


@pytest.mark.parametrize("out", ["${nothing}", "${out}", "a${", "${model.width"])
def test_a_reference_that_leads_nowhere_is_one_line(out):
    assert "out" in message(f"out={out}") or "reference" in message(f"out={out}")


def test_a_mistake_in_a_yaml_file_names_the_file(tmp_path, monkeypatch):
    layered(tmp_path, monkeypatch, **{"preset/nano": "model: {widht: 3}"})
    text = message()
    assert text == "unknown key 'model.widht' in configs/preset/nano.yaml; " + (
        "did you mean model.width?"
    )
    layered(tmp_path, monkeypatch, base="model: {width: wide}")
    assert "model.width=wide in configs/base.yaml" in message()


@pytest.mark.parametrize("text", ["model: [", "- 1", "seed: 1\nseed: 2", "just words"])
def test_a_yaml_file_that_is_no_mapping_is_one_line_with_its_name(tmp_path, monkeypatch, text):
    layered(tmp_path, monkeypatch, base=text)
    assert "configs/base.yaml" in message()


def test_submit_needs_a_checkpoint_and_puts_its_output_beside_it():
    assert "checkpoint is missing" in message(submit=True)
    config = load_submit(["checkpoint=runs/x"])
    assert config.out == "runs/x/submission"
    assert (config.predict.views, config.predict.minutes) == (16, None)


def test_minutes_for_prediction_free_the_number_of_views_unless_both_are_given():
    assert load_submit(["checkpoint=x", "predict.minutes=5"]).predict.views is None
    both = load_submit(["checkpoint=x", "predict.minutes=5", "predict.views=8"]).predict
    assert (both.views, both.minutes) == (8, 5.0)
    assert "expected one of them" in message("checkpoint=x", "predict.views=null", submit=True)


@pytest.mark.parametrize("value", ["views=0", "views=-3", "minutes=0", "batch_tokens=0"])
def test_prediction_numbers_below_their_range_are_refused(value):
    assert f"predict.{value.partition('=')[0]}" in message(
        "checkpoint=x", f"predict.{value}", submit=True
    )


@pytest.mark.parametrize("preset", names_in("preset"))
def test_a_dumped_configuration_is_read_back_equal(tmp_path, preset):
    config = load_config([f"preset={preset}", "out=runs/ü: 1", "optim.muon_lr=1e-9"])
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_saved_config(tmp_path / "config.yaml") == config
    assert config_from_dict(asdict(config)) == config


def test_a_submit_configuration_can_be_dumped():
    assert "checkpoint: runs/x" in dump_config(load_submit(["checkpoint=runs/x"]))


def test_a_saved_configuration_needs_no_budget_and_no_configs_folder(tmp_path, monkeypatch):
    config = dataclasses.replace(load_config(), budget=Config().budget)
    monkeypatch.setattr(load, "configs_folder", lambda: tmp_path / "nothing")
    assert config_from_dict(asdict(config)) == config


def test_a_saved_configuration_must_hold_every_key_and_no_other():
    saved = asdict(load_config())
    del saved["model"]["mask"]
    with pytest.raises(UserError, match=r"lacks model\.mask"):
        config_from_dict(saved)
    saved = asdict(load_config())
    saved["model"]["wings"] = 2
    with pytest.raises(UserError, match=r"unknown key 'model\.wings'"):
        config_from_dict(saved)
    saved = asdict(load_config())
    saved["model"]["width"] = "wide"
    with pytest.raises(UserError, match=r"model\.width=wide"):
        config_from_dict(saved)


def test_a_torn_saved_configuration_is_one_line_that_names_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    whole = dump_config(load_config()).encode()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"config\.yaml") as caught:
            load_saved_config(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_saved_config(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_saved_config(tmp_path / "missing.yaml")


def test_a_saved_configuration_is_not_a_way_into_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "word")
    saved = asdict(load_config())
    saved["out"] = "${oc.env:SECRET}"
    with pytest.raises(UserError, match="plain value"):
        config_from_dict(saved)


def test_the_long_network_keeps_its_blocks_whatever_the_preset():
    for preset in names_in("preset"):
        nsa = load_config(["network=sparse_long", f"preset={preset}"]).nsa
        sizes = (nsa.block, nsa.stride, nsa.select_block, nsa.select_count, nsa.window, nsa.every)
        assert sizes == (32, 16, 64, 16, 512, 1)
