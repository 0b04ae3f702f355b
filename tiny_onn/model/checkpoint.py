"""A trained model as a folder: weights, configuration, task rows, provenance.

``weights.safetensors`` + ``config.yaml`` + ``tasks.json`` + ``provenance.json``, and for every
DeepEmbed table on disk ``deep_embed.<key>.safetensors``, which a loaded model reads by rows. Of a
network that convert.py packed the weights are the packed ones, and ``packed.json`` says how. The
folder is written under a temporary name and renamed; loading unpickles nothing and needs nothing
from ``configs/``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tiny_onn.config.load import dump_config, load_saved_config
from tiny_onn.config.schema import Config
from tiny_onn.errors import UserError
from tiny_onn.files import atomic_dir
from tiny_onn.model.convert import build_packed, packed_weights
from tiny_onn.model.tiny_onn import TinyONN, build_model

WEIGHTS, CONFIG, TASKS, PROVENANCE = (
    "weights.safetensors",
    "config.yaml",
    "tasks.json",
    "provenance.json",
)
PACKED = "packed.json"


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint folder holds; ``task_ids[i]`` owns row i of the task vectors."""

    model: TinyONN
    config: Config
    task_ids: tuple[str, ...]
    provenance: dict[str, Any]


def save_checkpoint(
    path: str | Path,
    model: TinyONN,
    config: Config,
    task_ids: tuple[str, ...],
    provenance: dict[str, Any],
) -> None:
    """Write the folder ``path`` whole, or leave what was there untouched."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with atomic_dir(path) as fresh:
        try:
            save_file(tensors, fresh / WEIGHTS)
        except SafetensorError as error:  # its form of a full disk
            raise UserError(
                f"cannot write checkpoint '{path}' ({error}); expected a writable disk with "
                "space; free some and give the same command again"
            ) from error
        if model.deep_embed is not None:
            model.deep_embed.copy_files(fresh)
        (fresh / CONFIG).write_text(dump_config(config))
        (fresh / TASKS).write_text(json.dumps(list(task_ids), indent=0))
        (fresh / PROVENANCE).write_text(json.dumps(provenance, indent=1, sort_keys=True))
        if model.packed is not None:
            (fresh / PACKED).write_text(json.dumps(model.packed, indent=1))


def checkpoint_folder(path: str | Path) -> Path:
    """``path`` itself, or its ``checkpoint`` sub-folder when ``path`` is a run folder.

    Raises:
        UserError: neither is a complete checkpoint folder.
    """
    path = Path(path)
    for folder in (path, path / "checkpoint"):
        if (folder / WEIGHTS).is_file():
            missing = [n for n in (CONFIG, TASKS, PROVENANCE) if not (folder / n).is_file()]
            if missing:
                raise UserError(
                    f"checkpoint '{folder}' is torn: {', '.join(missing)} missing; "
                    "train again or choose another folder"
                )
            return folder
    if (path / "resume.ckpt").is_file():
        raise UserError(
            f"checkpoint '{path}' is of an unfinished run; expected a trained model; give the same "
            "train.py command again to finish it"
        )
    what = "has no weights.safetensors" if path.is_dir() else "does not exist"
    raise UserError(
        f"checkpoint '{path}' {what}; expected a run folder written by train.py; "
        "run python train.py stage=pretrain first"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"checkpoint file '{path}' is torn ({error}); expected JSON; train again"
        ) from error


def load_model(path: str | Path) -> Loaded:
    """Read a checkpoint folder (or the run folder that holds it) onto the CPU.

    Raises:
        UserError: missing, torn, or weights that do not fit its own configuration.
    """
    folder = checkpoint_folder(path)
    config = load_saved_config(folder / CONFIG)
    task_ids, provenance = _read_json(folder / TASKS), _read_json(folder / PROVENANCE)
    if not isinstance(task_ids, list) or not isinstance(provenance, dict):
        raise UserError(
            f"checkpoint '{folder}' is torn: expected a list in {TASKS} and an object in "
            f"{PROVENANCE}; train again"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"'{folder / WEIGHTS}' is torn ({error}); expected a safetensors file; train again"
        ) from error
    model = build_model(config.model, len(task_ids), config.moe, config.nsa, config.k24)
    if (folder / PACKED).is_file():
        try:
            build_packed(model, _read_json(folder / PACKED))
        except UserError as error:
            raise UserError(f"checkpoint '{folder}': {error}") from error
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    got = {k: tuple(v.shape) for k, v in tensors.items()}
    if model.packed is not None:  # codes and bits are nothing in another type
        expected = {k: (*expected[k], v.dtype) for k, v in model.state_dict().items()}
        got = {k: (*got[k], v.dtype) for k, v in tensors.items()}
    if got != expected:
        name = next(k for k in sorted(expected | got) if expected.get(k) != got.get(k))
        raise UserError(
            f"checkpoint '{folder}' is of another model: '{name}' has shape {got.get(name)}, "
            f"its configuration expects {expected.get(name)}; choose the folder train.py wrote"
        )
    model.load_state_dict(tensors)
    for name, weight in packed_weights(model).items():
        try:
            weight.dense()
        except UserError as error:
            raise UserError(f"checkpoint '{folder}', weight {name}: {error}") from error
    if model.deep_embed is not None:
        model.deep_embed.open_files(folder)
    return Loaded(model.eval(), config, tuple(task_ids), provenance)
