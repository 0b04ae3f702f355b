"""Scripts of exp/ import their neighbours from their own folder."""

import importlib.util
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    """``script("ablation", "table")``: the module of that file, neighbours within its reach."""

    def load(folder, name):
        place = REPOSITORY / "exp" / folder
        monkeypatch.syspath_prepend(str(place))
        for neighbour in place.glob("*.py"):  # none of an earlier test's
            monkeypatch.delitem(sys.modules, neighbour.stem, raising=False)
        spec = importlib.util.spec_from_file_location(name, place / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def experiment(script, tmp_path, monkeypatch):
    """As ``script``, its results under ``tmp_path``."""

    def load(folder, name):
        module = script(folder, name)
        results = tmp_path / "exp" / "results"
        results.mkdir(parents=True)
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "RESULTS", results)
        return module

    return load
