"""Whether the code that makes a result is the code of its commit."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


def code_changed(root: Path, parts: Sequence[str]) -> bool:
    """Whether any of ``parts`` (files, folders) differs from the commit of the git tree ``root``;
    False outside one."""
    status = ["git", "-C", str(root), "status", "--porcelain", "-uno", "--", *parts]
    try:
        return bool(subprocess.run(status, capture_output=True, text=True).stdout.strip())
    except FileNotFoundError:
        return False
