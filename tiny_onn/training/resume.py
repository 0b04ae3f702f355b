"""The resume file of a run folder: written atomically, the one before it kept.

``resume.ckpt`` is Lightning's checkpoint (weights, optimizer, loops, our own state); while a new
one is written the old one stays; afterwards it becomes ``resume.prev.ckpt``.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from tiny_onn.errors import UserError
from tiny_onn.training.run_folder import CHECKPOINT

NEWEST = "resume.ckpt"
PREVIOUS = "resume.prev.ckpt"
STATE_KEY = "tiny_onn"
"""Where our own entries stand in Lightning's checkpoint."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's door to the disk: temporary name, fsync, rename; the previous file is kept.

    ``failure`` is the OSError of the last save, or None. It is noted and not raised, because
    the other processes of a run wait for this one behind the save.
    """

    def __init__(self) -> None:
        self.failure: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; on any error what was there stays."""
        try:
            self._replace(checkpoint, Path(path))
            self.failure = None
        except OSError as error:
            self.failure = error

    def _replace(self, checkpoint: dict[str, Any], path: Path) -> None:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                _write(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                os.replace(path, path.with_name(PREVIOUS))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Tensors and plain values only; nothing is unpickled into foreign classes."""
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _write(checkpoint: dict[str, Any], file: Any) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's zip writer hides a failed write behind a RuntimeError of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


@dataclass(frozen=True)
class ResumePoint:
    """A whole resume file and our own entries in it."""

    path: Path
    state: dict[str, Any]


def _read_state(path: Path) -> dict[str, Any]:
    """Our entries of a resume file, after checking every byte against its checksums.

    Raises:
        ValueError: torn, damaged or not ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"record {damaged} is damaged")
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)[STATE_KEY]
    except (
        zipfile.BadZipFile,
        EOFError,
        KeyError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"{type(error).__name__}") from error
    return state


def find_resume(folder: Path) -> tuple[ResumePoint | None, list[str]]:
    """The newest whole resume file of ``folder`` and what the user should know.

    Raises:
        UserError: there are resume files, but none is whole.
    """
    notes: list[str] = []
    candidates = [p for p in (folder / NEWEST, folder / PREVIOUS) if p.exists()]
    for path in candidates:
        try:
            point = ResumePoint(path, _read_state(path))
        except ValueError as error:
            notes.append(f"{path} is torn or damaged ({error})")
            continue
        if notes:
            notes.append(f"going on from the checkpoint before it, {path}")
        return point, notes
    if candidates:
        raise UserError(
            f"{'; '.join(notes)}; expected a whole resume file; "
            "start over with resume=false or choose another out"
        )
    return None, notes


def remove_resume(folder: Path) -> None:
    """Delete the resume files and what an interrupted write of one left behind."""
    for path in (folder / NEWEST, folder / PREVIOUS, *folder.glob(f".{NEWEST}.*.tmp")):
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders that a killed process left in the run folder."""
    for path in folder.glob(f".{NEWEST}.*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f".{CHECKPOINT}.*.tmp"):  # its tables on disk may be large
        shutil.rmtree(path, ignore_errors=True)
