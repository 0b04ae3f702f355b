"""Bad settings on the real command line: exit status 2, one line, no traceback, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("script", "arguments", "parts"),
    [
        ("train.py", ["stage=pretran"], ["unknown stage 'pretran'", "pretrain"]),
        ("train.py", ["preset=nanoo"], ["unknown preset 'nanoo'", "did you mean nano?"]),
        ("train.py", ["model.widht=3"], ["model.widht", "did you mean model.width?"]),
        ("train.py", ["model.width=wide"], ["model.width=wide", "a whole number"]),
        ("train.py", ["budget.minutes=0"], ["budget.minutes=0", "above 0"]),
        ("train.py", ["--preset", "nano"], ["--preset", "key=value"]),
        ("submit.py", [], ["checkpoint is missing", "checkpoint=VALUE"]),
        ("submit.py", ["checkpoint=x", "predict.veiws=1"], ["did you mean predict.views?"]),
        ("submit.py", ["checkpoint=x", "predict.minutes=0"], ["predict.minutes=0", "above 0"]),
    ],
)
def test_bad_settings_exit_with_2_one_line_and_nothing_written(script, arguments, parts, tmp_path):
    result = run(script, *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["train.py", "submit.py"])
def test_help_exits_with_0_and_writes_nothing(script, tmp_path):
    result = run(script, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: python {script}")
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_settings_are_judged_before_torch_and_lightning_are_imported(tmp_path):
    code = (
        "import sys, tiny_onn.cli\n"
        "sys.argv = ['train.py', 'model.widht=3']\n"
        "try:\n    tiny_onn.cli.train()\n"
        "except SystemExit as stop:\n"
        "    print(stop.code, {'torch', 'lightning'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "2 set()", result.stderr


def test_the_entry_points_stay_thin():
    for script in ("train.py", "submit.py"):
        assert len((REPOSITORY / script).read_text().splitlines()) <= 40
