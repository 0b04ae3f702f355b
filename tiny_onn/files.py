"""Atomic writes: a file or folder is either the old one or the whole new one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny_onn.errors import UserError


def _fsync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def ensure_writable_dir(path: str | Path) -> Path:
    """Create ``path`` if needed and prove that a file can be written there.

    Raises:
        UserError: the path is a file, or cannot be created or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to folder '{path}' ({error.strerror}); expected a writable folder; "
            "choose another one"
        ) from error
    return path


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` under a temporary name in the same folder, fsync, rename."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _fsync_dir(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """UTF-8 form of :func:`atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode())


def write_output(path: str | Path, text: str) -> None:
    """A result asked for by a command: atomic, and one clear line if it cannot be written.

    Raises:
        UserError: no space, no rights, no folder.
    """
    try:
        atomic_write_text(path, text)
    except OSError as error:
        raise UserError(
            f"cannot write '{path}' ({error.strerror}); expected a writable folder with space "
            "left; choose another one"
        ) from error


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success it replaces ``path``, else it is removed.

    Replacing an existing folder takes two renames; the old one is kept as ``.<name>.old`` until
    the new one is in place: after a crash just between the two, rename it back by hand.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        os.chmod(fresh, 0o755)
        old = path.with_name(f".{path.name}.old")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(fresh, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _fsync_dir(path.parent)
