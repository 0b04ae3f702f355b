"""Scripts of exp/ import their neighbours from their own folder."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

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


class Clock:
    """Seconds that pass only where somebody says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


@pytest.fixture
def bench(script, monkeypatch, tmp_path, capsys):
    """``bench(cases, *options)``: exit status, the file's records and what was printed; ``on``: the
    module that runs cases, ``cases``: the one that makes them, ``clock``: the only one."""
    on = script("bench", "gpu_run")
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(on, "ROOT", tmp_path)
    monkeypatch.setattr(on, "_device", lambda quick: torch.device("cpu"))

    class Bench:
        clock, cases = Clock(), sys.modules["gpu_cases"]

        def __call__(self, cases, *options, minutes=1.0):
            monkeypatch.setattr(sys, "argv", ["bench.py", *options])
            status = on.run(
                *("some", "A benchmark.", lambda args: cases, lambda records: None),
                minutes=minutes,
                sources=("*.py",),
                clock=self.clock,
                add_options=lambda made: made.add_argument("--third-party"),
            )
            path = tmp_path / "exp" / "results" / "bench_some.json"
            records = json.loads(path.read_text())["cases"] if path.exists() else {}
            return status, records, capsys.readouterr().out

        def case(self, name, check=dict, ratios=None, targets=None, **arms):
            """Arms: seconds of a call, an error that it raises, or an Arm."""

            def arm(value):
                def call():
                    if isinstance(value, Exception):
                        raise value
                    self.clock.spend(value)

                return self.cases.Arm(lambda: call)

            made = {n: v if isinstance(v, self.cases.Arm) else arm(v) for n, v in arms.items()}
            work = self.cases.Work(made, check, ratios or {}, targets or {})
            return self.cases.Case(name, {"tokens": 1}, lambda device: work)

    made = Bench()
    made.on = on
    return made


@pytest.fixture
def restarted(bench, monkeypatch):
    """Words with which a script was started again, instead of doing so."""
    found = []

    def replace(words):
        found.append(words)
        raise SystemExit

    monkeypatch.setattr(bench.on, "replace_process", replace)
    return found
