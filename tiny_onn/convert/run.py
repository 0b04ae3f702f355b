"""What ``python -m tiny_onn.convert`` does: a checkpoint in, a packed (or unpacked) one out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from tiny_onn.config.schema import ConvertConfig
from tiny_onn.errors import UserError
from tiny_onn.files import ensure_writable_dir
from tiny_onn.model.checkpoint import (
    PACKED,
    PROVENANCE,
    WEIGHTS,
    Loaded,
    checkpoint_folder,
    load_model,
    save_checkpoint,
)
from tiny_onn.model.convert import ConvertReport, convert, dense_state
from tiny_onn.model.tiny_onn import build_model

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADER_LENGTH_BYTES = 8
CHECKPOINT = "checkpoint"
OF_A_RUN = ("resume.ckpt", "metrics.json", "leak_report.json")
"""Files by which a folder is known as one that train.py writes to."""
UNPACKED_FROM = "unpacked_from"


def run_convert(config: ConvertConfig) -> int:
    """Write ``out``/checkpoint, whole or not at all, and say what was packed and what was not.

    Returns:
        The exit status, 0.

    Raises:
        UserError: bad checkpoint or folder, nothing to pack or unpack, weights that cannot be
            packed; nothing was written then.
    """
    source = checkpoint_folder(config.checkpoint)
    name = "unpacked" if config.unpack else "packed"
    run = source.parent if source.name == CHECKPOINT else source
    out = run / name if config.out is None else Path(config.out)
    target = out / CHECKPOINT
    refuse_target(source, target, config.unpack)
    loaded = load_model(source)
    if config.unpack:
        save_unpacked(loaded, target, source)
        print(f"dense checkpoint, {file_bytes(target):,} bytes of weights: {target}")
        return 0
    if config.backend != "reference" and torch.cuda.is_available():
        loaded.model.to("cuda")
    report = convert(loaded.model, config.backend, DTYPES[config.dtype])
    if not report.packed:
        reasons = Counter(weight.reason for weight in report.refused)
        raise UserError(
            f"got checkpoint={config.checkpoint}, of which nothing can be packed ("
            f"{next(iter(reasons))}); expected a model trained with weights=k24 or s_ste; choose "
            "another"
        )
    ensure_writable_dir(out)
    about = {"checkpoint": str(source), "backend": config.backend, "dtype": config.dtype}
    facts = loaded.provenance | {"packed_from": about}
    save_checkpoint(target, loaded.model, loaded.config, loaded.task_ids, facts)
    print(render(report))
    print(render_files(report, source, target))
    print(f"packed checkpoint: {target}")
    return 0


def refuse_target(source: Path, target: Path, unpack: bool) -> None:
    """Raises:
    UserError: the checkpoint to read would be written over, or one of another kind than what is
        written, or a run would find it.
    """
    if target.resolve() == source.resolve():
        raise UserError(
            f"got out={target.parent}, which holds the checkpoint to read; expected another "
            "folder; choose another out"
        )
    wanted = "unpacked" if unpack else "packed"
    if target.exists() and (kind := _kind(target)) != wanted:
        raise UserError(
            f"got out={target.parent}, which holds a checkpoint that is {kind}; expected another "
            f"folder, for only one that is {wanted} is written over; choose another out"
        )
    if found := [name for name in OF_A_RUN if (target.parent / name).exists()]:
        raise UserError(
            f"got out={target.parent}, the folder of a run ({found[0]}), which could not go on "
            "from what is written there; expected another folder; choose another out"
        )


def _kind(checkpoint: Path) -> str:
    if (checkpoint / PACKED).is_file():
        return "packed"
    try:
        facts = json.loads((checkpoint / PROVENANCE).read_text())
    except (OSError, ValueError):
        return "torn"
    return "unpacked" if UNPACKED_FROM in facts else "not packed"


def save_unpacked(loaded: Loaded, target: Path, source: Path) -> None:
    """The dense network that predicts what the packed one does: masked weights, no masks.

    Raises:
        UserError: it is not packed.
    """
    state = dense_state(loaded.model)
    config = replace(
        loaded.config,
        model=replace(loaded.config.model, weights="dense"),
        moe=replace(loaded.config.moe, expert_weights="separate"),
    )
    model = build_model(config.model, len(loaded.task_ids), config.moe, config.nsa, config.k24)
    model.load_state_dict(state)
    ensure_writable_dir(target.parent)
    if model.deep_embed is not None:
        model.deep_embed.open_files(source)
    facts = loaded.provenance | {UNPACKED_FROM: str(source)}
    save_checkpoint(target, model, config, loaded.task_ids, facts)


def render(report: ConvertReport) -> str:
    """A row a weight, then totals, then what was refused and why. Bytes of the tensors."""
    head = ("weight", "shape", "layout", "bytes of weight", "of mask", "packed", "runs by")
    lines = [head]
    for w in report.weights:
        shape = " x ".join(map(str, w.shape))
        packed = f"{w.packed_bytes:,}" if w.form else "-"
        sizes = f"{w.weight_bytes:,}", f"{w.mask_bytes:,}", packed
        lines.append((w.name, shape, w.form or "not packed", *sizes, w.backend))
    weights, masks, packed = (
        sum(getattr(w, f"{part}_bytes") for w in report.packed)
        for part in ("weight", "mask", "packed")
    )
    lines.append(("all packed", "", "", f"{weights:,}", f"{masks:,}", f"{packed:,}", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if 3 <= n <= 5 else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    reasons = Counter(w.reason for w in report.refused)
    reasons.update(f"{name}: {why}" for w in report.packed for name, why in w.refused.items())
    refused = [f"refused, {count} weights: {why}" for why, count in reasons.items()]
    return "\n".join([*text, *refused])


def render_files(report: ConvertReport, source: Path, target: Path) -> str:
    """Bytes as computed against bytes on the disk."""
    before, after = file_bytes(source), file_bytes(target)
    headers = header_bytes(source) - header_bytes(target)
    computed = report.bytes_before - report.bytes_after
    return (
        f"tensors: {report.bytes_before:,} -> {report.bytes_after:,} bytes, {computed:,} fewer as "
        f"computed\n{WEIGHTS}: {before:,} -> {after:,} bytes, {before - after:,} fewer "
        f"({before - after - headers:,} of tensors, {headers:,} of names and shapes)"
    )


def file_bytes(folder: Path) -> int:
    return (folder / WEIGHTS).stat().st_size


def header_bytes(folder: Path) -> int:
    """Of a safetensors file: all that is no tensor."""
    with open(folder / WEIGHTS, "rb") as file:
        return HEADER_LENGTH_BYTES + int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
