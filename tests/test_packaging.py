"""The wheel: complete, importable from anywhere, and every requirement pinned for the tests."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
ONLY_ON_GPUS = re.compile(r"nvidia-|cuda-|triton|flash-attn|cupti")


def listed(section: str) -> list[str]:
    """Requirement texts of a list in pyproject.toml (Python 3.10 has no TOML reader)."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(
        re.search(rf"^{section} = (\[.*?\]$|\[[^\]]*^\])", text, re.M | re.S)[1]
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, without network and build isolation."""
    source, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        REPOSITORY,
        source,
        ignore=shutil.ignore_patterns(
            ".*", "runs", "build", "dist", "shared", "__pycache__", "*.egg-info"
        ),
    )
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "--no-index", "--quiet", "--wheel-dir", str(out), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("tiny_onn-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(code: str, *arguments: str, installed: Path, cwd: Path) -> str:
    """What a Python that sees the wheel and not the repository prints."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file(unpacked):
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "tiny_onn").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {
        f"tiny_onn/{path.relative_to(REPOSITORY).as_posix()}"
        for path in (REPOSITORY / "configs").rglob("*.yaml")
    }
    expected |= {
        f"tiny_onn_kernels/{path.relative_to(REPOSITORY / 'kernels').as_posix()}"
        for path in (REPOSITORY / "kernels").rglob("*.py")
    }
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    assert expected - held == set()


@pytest.mark.slow
def test_the_wheel_takes_no_import_name_but_its_own(unpacked):
    names = {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"tiny_onn", "tiny_onn_kernels"}
    (licence,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    assert licence.read_text().strip()


@pytest.mark.slow
def test_the_wheel_is_configured_from_its_own_files_in_another_folder(unpacked, tmp_path):
    code = (
        "import sys, tiny_onn, tiny_onn_kernels\n"
        "from tiny_onn.config.load import load_config, load_submit, configs_folder\n"
        "for name in ('nano', 'small', 'base'):\n"
        "    print(load_config([f'preset={name}']).preset)\n"
        "print(load_submit(['checkpoint=runs/x']).out)\n"
        "print(tiny_onn.__file__, configs_folder())"
    )
    *values, places = python(code, installed=unpacked, cwd=tmp_path).splitlines()
    assert values == ["nano", "small", "base", "runs/x/submission"]
    assert all(place.startswith(str(unpacked)) for place in places.split())


@pytest.mark.slow
def test_the_console_scripts_of_the_wheel_train_a_step_and_submit(unpacked, tmp_path):
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    scripts = dict(re.findall(r"^(tiny-onn-\w+) = (\S+)$", entry_points.read_text(), re.M))
    assert set(scripts) == {"tiny-onn-train", "tiny-onn-submit"}

    def call(script: str, *arguments: str) -> str:
        module, _, name = scripts[script].partition(":")
        code = f"import sys; from {module} import {name}; sys.argv[0] = '{script}'; {name}()"
        return python(code, *arguments, installed=unpacked, cwd=tmp_path)

    for script in scripts:
        assert call(script, "--help").startswith("usage: ")
    for name in ("mirror", "again"):
        task = REPOSITORY / "data" / "sample" / "mirror_left_right.json"
        (tmp_path / "tasks").mkdir(exist_ok=True)
        shutil.copy(task, tmp_path / "tasks" / f"{name}.json")
    call(
        "tiny-onn-train",
        *("preset=nano", "budget.steps=2", "data.track=all", "data.sources=[tasks]"),
        *("model.width=32", "model.layers=1", "model.heads=1", "model.kv_heads=1"),
        *("trainer.accelerator=cpu", "trainer.compile=false", "trainer.precision=fp32"),
        "out=run",
    )
    call(
        "tiny-onn-submit",
        *("checkpoint=run", "challenges=tasks", "predict.views=1", "accelerator=cpu"),
        *("precision=fp32", "out=answers"),
    )
    assert (tmp_path / "answers" / "submission.json").is_file()
    assert (tmp_path / "answers" / "report.html").is_file()


def pins() -> dict[str, list[Requirement]]:
    """constraints.txt by canonical name."""
    table: dict[str, list[Requirement]] = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            table.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return table


def test_every_constraint_is_one_exact_version_for_each_python():
    for name, requirements in pins().items():
        for python_version in ("3.10", "3.11", "3.12", "3.13"):
            environment = {"python_version": python_version, "sys_platform": "linux"}
            matching = [r for r in requirements if not r.marker or r.marker.evaluate(environment)]
            assert len(matching) <= 1, (name, python_version)
        for requirement in requirements:
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), str(requirement)


def test_whatever_the_project_needs_directly_or_not_is_pinned():
    """Over the installed distributions, so that a new requirement is noticed."""
    pinned, seen = pins(), set()
    ahead = [Requirement(text) for text in listed("dependencies") + listed("dev")]
    while ahead:
        requirement = ahead.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen or ONLY_ON_GPUS.match(key[0]):
            continue
        seen.add(key)
        assert key[0] in pinned, f"constraints.txt has no version of {key[0]}"
        for text in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                ahead.append(needed)
    assert len(seen) > 30


def test_every_dependency_is_listed_with_its_reason():
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)[1]
    for line in block.splitlines():
        assert re.search(r'",\s+# \w+', line), line
