"""A benchmark's arms in processes of their own, whose peak memory is theirs alone.

Imports no torch: a child's ru_maxrss begins at what its parent holds.
"""

from __future__ import annotations

import resource
import subprocess
import sys


def peak_mib() -> float:
    """This process's largest resident set so far (Linux counts in KiB, macOS in bytes)."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run_child(*words: str) -> str:
    """This script again, with ``words``; its output."""
    command = [sys.executable, *sys.argv, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout
