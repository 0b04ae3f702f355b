"""What ``--help`` prints: stages, presets, every key with type, default and meaning, examples."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from tiny_onn.config.keys import Key, keys_of
from tiny_onn.config.schema import Config, ConvertConfig, InspectConfig, SubmitConfig

WIDTH = 100

TRAIN_EXAMPLES = """\
examples:
  python train.py stage=pretrain preset=nano out=runs/demo
  python train.py stage=eavi init_from=runs/demo out=runs/demo-eavi budget.minutes=3
  python train.py preset=small data.sources=[arc1,my_tasks.json] budget.minutes=45 seed=1
  python train.py preset=nano budget.epochs=20 data.holdout=train_tests model.width=192
  python train.py preset=nano weights=k24 network=dense out=runs/k24
  torchrun --nproc-per-node=8 train.py preset=base trainer.devices=8 data.batch_tokens=196608
"""

SUBMIT_EXAMPLES = """\
examples:
  python submit.py checkpoint=runs/demo solutions=arc1:evaluation
  python submit.py checkpoint=runs/demo challenges=arc-agi_test_challenges.json out=submission
  python submit.py checkpoint=runs/demo predict.minutes=5
"""

CONVERT_EXAMPLES = """\
examples:
  python -m tiny_onn.convert checkpoint=runs/k24
  python -m tiny_onn.convert checkpoint=runs/k24 out=runs/k24-bf16 dtype=bf16
  python -m tiny_onn.convert checkpoint=runs/k24/packed out=runs/k24-dense unpack=true
"""

INSPECT_EXAMPLES = """\
examples:
  python -m tiny_onn.inspect checkpoint=runs/demo
  python -m tiny_onn.inspect checkpoint=runs/demo task=00576224 out=figures
  python -m tiny_onn.inspect checkpoint=runs/demo examples=2000
"""


def train_help(files: Mapping[str, Mapping[str, Path]]) -> str:
    """Text of ``train.py --help``.

    ``files`` maps the kinds stage, preset and network to their files by name; each is described by
    its first line.
    """
    return "\n".join(
        [
            "usage: python train.py [stage=STAGE] [preset=PRESET] [network=NETWORK] "
            "[key=value ...]",
            "",
            "Trains a model on ARC tasks, from scratch or from init_from. Later settings win:",
            "defaults < configs/base.yaml < configs/preset/PRESET.yaml",
            "< configs/network/NETWORK.yaml < configs/stage/STAGE.yaml < key=value.",
            "",
            *(line for kind, named in files.items() for line in (f"{kind}s:", *_files(named), "")),
            *_keys(keys_of(Config)),
            "",
            TRAIN_EXAMPLES.rstrip(),
        ]
    )


def submit_help() -> str:
    """Text of ``submit.py --help``."""
    return "\n".join(
        [
            "usage: python submit.py checkpoint=RUN [key=value ...]",
            "",
            "Predicts two attempts for every test input, writes submission.json and report.html, "
            "and",
            "scores them where solutions are given. Later settings win: defaults < "
            "configs/submit.yaml",
            "< key=value.",
            "",
            *_keys(keys_of(SubmitConfig)),
            "",
            SUBMIT_EXAMPLES.rstrip(),
        ]
    )


def inspect_help() -> str:
    """Text of ``python -m tiny_onn.inspect --help``."""
    return "\n".join(
        [
            "usage: python -m tiny_onn.inspect checkpoint=RUN [key=value ...]",
            "",
            "Draws what the sparse parts of a trained network do, as PNGs: the load of its experts "
            "by",
            "layer, which of them fire for which colours and structure tokens, NSA's gates by "
            "branch,",
            "and the blocks that it selects over a task's grids. Needs matplotlib (extra plots).",
            "",
            *_keys(keys_of(InspectConfig)),
            "",
            INSPECT_EXAMPLES.rstrip(),
        ]
    )


def convert_help() -> str:
    """Text of ``python -m tiny_onn.convert --help``."""
    return "\n".join(
        [
            "usage: python -m tiny_onn.convert checkpoint=RUN [out=DIR] [key=value ...]",
            "",
            "Packs the 2:4 weights of a trained network (weights=k24, s_ste or random24): half the",
            "values and four bits for every group of four, or, where experts share a weight, that",
            "weight and a bit an expert. The packed checkpoint predicts what the trained one does,",
            "in submit.py and tiny_onn.inspect; it cannot be trained. A table tells what was",
            "packed, and what was refused and why.",
            "",
            *_keys(keys_of(ConvertConfig)),
            "",
            CONVERT_EXAMPLES.rstrip(),
        ]
    )


def _files(files: Mapping[str, Path]) -> list[str]:
    column = max(map(len, files)) + 2
    return [f"  {name:<{column}}{_first_comment(path)}" for name, path in files.items()]


def _first_comment(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().lstrip("#").strip()


def _keys(keys: Mapping[str, Key]) -> list[str]:
    lines = ["keys (default; a preset may set another):"]
    group = ""
    for key in keys.values():
        head = key.name.rpartition(".")[0]
        if head != group:
            lines.append("")
            group = head
        lines.append(f"  {key.name}={_default(key)}  ({key.expected})")
        lines += textwrap.wrap(key.help, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _default(key: Key) -> str:
    value = key.default
    if value == "???":
        return "(required)"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return str(value)
