import re

import pytest

from tiny_onn.config.help import convert_help, inspect_help, submit_help
from tiny_onn.config.keys import keys_of
from tiny_onn.config.load import (
    KINDS,
    load_convert_config,
    load_inspect_config,
    load_submit_config,
    load_train_config,
    names_in,
)
from tiny_onn.config.schema import Config, ConvertConfig, InspectConfig, SubmitConfig


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_is_printed_instead_of_a_configuration(flag, capsys):
    assert load_train_config(["preset=nonsense", flag]) is None
    assert "usage: python train.py" in capsys.readouterr().out
    assert load_submit_config([flag]) is None
    assert "usage: python submit.py" in capsys.readouterr().out


@pytest.fixture
def train_text(capsys) -> str:
    load_train_config(["--help"])
    return capsys.readouterr().out


def test_train_help_describes_every_stage_network_and_preset_in_one_line(train_text):
    for name in [name for kind in KINDS for name in names_in(kind)]:
        assert re.search(rf"^  {name} +\w.{{20,}}$", train_text, re.MULTILINE), name


def test_help_gives_every_key_with_type_default_and_meaning(train_text):
    for schema, text in (
        (Config, train_text),
        (SubmitConfig, submit_help()),
        (ConvertConfig, convert_help()),
        (InspectConfig, inspect_help()),
    ):
        for name, key in keys_of(schema).items():
            found = re.search(rf"^  {re.escape(name)}=(.*)  \((.*)\)\n      (.+)$", text, re.M)
            assert found, name
            assert found[2] == key.expected
            assert key.help.startswith(found[3])


def test_help_shows_choices_lists_and_required_keys_as_they_are_written(train_text):
    assert "  data.track=all  (one of all, nano)" in train_text
    assert "  data.sources=[arc1]  (a list such as [a,b])" in train_text
    assert "  budget.minutes=null  (a number or null)" in train_text
    assert "  resume=true  (true or false)" in train_text
    assert "  checkpoint=(required)  (text)" in submit_help()


def test_help_fits_100_columns(train_text):
    assert max(map(len, (train_text + submit_help()).splitlines())) <= 100


def test_the_examples_in_help_are_valid_command_lines(train_text):
    for text, load, script in (
        (train_text, load_train_config, "train.py"),
        (submit_help(), load_submit_config, "submit.py"),
        (convert_help(), load_convert_config, "tiny_onn.convert"),
        (inspect_help(), load_inspect_config, "tiny_onn.inspect"),
    ):
        examples = re.findall(rf"{script} (.*=.*)$", text.partition("examples:")[2], re.MULTILINE)
        assert len(examples) >= 3
        for example in examples:
            assert load(example.split()) is not None
