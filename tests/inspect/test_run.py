import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_onn.config.load import load_inspect_config
from tiny_onn.config.schema import InspectConfig
from tiny_onn.errors import UserError
from tiny_onn.inspect.run import run_inspect

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def look(small_checkpoint, tmp_path):
    folder = tmp_path / "run"

    def run(**settings):
        if not folder.exists():
            small_checkpoint(folder / "checkpoint")
        out = settings.pop("out", str(tmp_path / "figures"))
        return run_inspect(InspectConfig(checkpoint=str(folder), out=out, **settings))

    return run


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_dense_checkpoint_is_told_in_one_line_a_part(look, tmp_path, capsys):
    assert look() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "no expert figures: its FFN has no experts (model.ffn=dense)",
        "no NSA figures: attention is full (model.attention=full)",
    ]
    assert list((tmp_path / "figures").iterdir()) == []


def test_an_unknown_task_is_refused_with_the_nearest_one(look):
    with pytest.raises(UserError) as error:
        look(task="aaaa0003")
    text = one_line(error)
    assert "unknown task 'aaaa0003'" in text and "did you mean aaaa000" in text
    assert "2 that the checkpoint learnt" in text


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run_inspect(InspectConfig(checkpoint=str(tmp_path / "none"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_is_refused(look, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to folder"):
        look(out=str(tmp_path / "file"))


def test_without_matplotlib_the_extra_is_named_before_anything_is_read(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(UserError) as error:
        run_inspect(InspectConfig(checkpoint=str(tmp_path / "none"), out=str(tmp_path)))
    text = one_line(error)
    assert "got no matplotlib" in text and "pip install '.[plots]'" in text


def command(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tiny_onn.inspect", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "checkpoint is missing"),
        (["checkpoint=x", "taks=a"], "did you mean task?"),
        (["checkpoint=x", "examples=0"], "examples=0"),
        (["checkpoint="], "a run folder, such as checkpoint=runs/x"),
    ],
)
def test_bad_settings_exit_with_2_and_one_line(arguments, part, tmp_path):
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and part in line


def test_help_names_every_key(capsys):
    assert load_inspect_config(["--help"]) is None
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m tiny_onn.inspect")
    for key in ("checkpoint", "task", "examples", "out", "threads"):
        assert f"  {key}=" in text
    assert max(map(len, text.splitlines())) <= 100


def test_figures_go_beside_the_checkpoint_by_default():
    config = load_inspect_config(["checkpoint=runs/x", "task=00576224"])
    assert config.out == "runs/x/figures" and config.task == "00576224"
