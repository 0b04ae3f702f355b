"""DeepEmbed's tables on disk, over the life of a run.

``<run>/deep_embed/`` holds the files that training writes to, and beside every resume file a
copy of them as they were at that step (``step<n>/``): rows change in place, so a killed run goes
on from the copy. Files are sparse, so a copy takes what was ever touched. The finished checkpoint
has files of its own; then the folder goes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tiny_onn.errors import UserError
from tiny_onn.files import atomic_dir
from tiny_onn.model.deep_embed import DeepEmbed

FOLDER = "deep_embed"


class RowTables:
    """Args:
    deep_embed: the model's, with at least one table in a file.
    run: the run folder.
    """

    def __init__(self, deep_embed: DeepEmbed, run: Path) -> None:
        self.deep_embed = deep_embed
        self.folder = run / FOLDER

    def begin(self, step: int | None) -> None:
        """Open the tables for training: those of the checkpoint of ``step``, or new ones (None).

        Raises:
            UserError: that checkpoint's tables are missing, cut short or of another shape.
            OSError: no space left.
        """
        if step is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self.deep_embed.create_files(self.folder)
            return
        saved = self._copy(step)
        if not saved.is_dir():
            raise UserError(
                f"'{saved}' is missing; expected the DeepEmbed tables of the checkpoint of step "
                f"{step}; start over with resume=false or choose another out"
            )
        self.deep_embed.open_files(saved)
        self.deep_embed.copy_files(self.folder)
        self.deep_embed.open_files(self.folder, writable=True)

    def save(self, step: int) -> OSError | None:
        """Copy the tables for the checkpoint of ``step``; returns what went wrong, if anything."""
        try:
            with atomic_dir(self._copy(step)) as fresh:
                self.deep_embed.copy_files(fresh)
        except OSError as error:
            return error
        return None

    def forget_all_but(self, steps: set[int | None]) -> None:
        """Remove the copies of other checkpoints than those of ``steps``."""
        kept = {self._copy(step) for step in steps if step is not None}
        for path in self.folder.iterdir():
            if path.is_dir() and path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _copy(self, step: int) -> Path:
        return self.folder / f"step{step}"


def remove_row_tables(run: Path) -> None:
    """Delete the working files and copies of a finished run."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
