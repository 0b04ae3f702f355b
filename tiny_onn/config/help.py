"""``--help``: stages, presets and every key with its type, default and one-line meaning."""

from __future__ import annotations

import typing
from dataclasses import MISSING, fields, is_dataclass

from tiny_onn.config.load import choices, configs_folder
from tiny_onn.config.schema import Config, SubmitConfig

TRAIN_EXAMPLES = """\
examples:
  python train.py stage=pretrain preset=nano
  python train.py stage=pretrain preset=nano budget.minutes=2 out=runs/quick
  python train.py stage=pretrain preset=small data.extra_dirs=[my_tasks]
  torchrun --nproc-per-node 8 train.py preset=base trainer.devices=8 trainer.strategy=ddp"""

SUBMIT_EXAMPLES = """\
examples:
  python submit.py checkpoint=runs/pretrain-nano track=nano solutions=arc1:evaluation
  python submit.py checkpoint=runs/x challenges=challenges.json predict.minutes=5 out=answers"""


def _type_name(annotation: object) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is not None and typing.get_origin(annotation) is not list:
        return "|".join(_type_name(part) for part in typing.get_args(annotation))
    return str(annotation) if typing.get_origin(annotation) else annotation.__name__


def _text(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def key_lines(schema: type, prefix: str = "") -> list[str]:
    """``key=default  (type)  meaning``, one line a key, nested keys dotted."""
    types = typing.get_type_hints(schema)
    lines = []
    for entry in fields(schema):
        if is_dataclass(types[entry.name]):
            lines += ["", *key_lines(types[entry.name], f"{prefix}{entry.name}.")]
            continue
        default = entry.default if entry.default is not MISSING else entry.default_factory()
        shown = f"{prefix}{entry.name}={_text(default)}"
        kind = _type_name(types[entry.name])
        lines.append(f"  {shown:<44} {entry.metadata['help']} ({kind})")
    return lines


def _comments(kind: str) -> list[str]:
    lines = []
    for name in choices(kind):
        first = (configs_folder() / kind / f"{name}.yaml").read_text().splitlines()[0]
        lines.append(f"  {kind}={name:<12} {first.lstrip('# ')}")
    return lines


def train_help() -> str:
    """What ``python train.py --help`` prints."""
    return "\n".join(
        [
            "usage: python train.py [stage=...] [preset=...] [key=value ...]",
            "",
            *_comments("stage"),
            *_comments("preset"),
            "",
            "keys, with the default of the schema (base.yaml, the stage and the preset change some):",
            *key_lines(Config),
            "",
            TRAIN_EXAMPLES,
        ]
    )


def submit_help() -> str:
    """What ``python submit.py --help`` prints."""
    return "\n".join(
        [
            "usage: python submit.py checkpoint=RUN [key=value ...]",
            "",
            *key_lines(SubmitConfig),
            "",
            SUBMIT_EXAMPLES,
        ]
    )
