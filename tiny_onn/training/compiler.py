"""torch.compile on a CPU needs a C++ compiler and Python's headers: found out before training."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from tiny_onn.errors import UserError
from tiny_onn.model.tiny_onn import TinyONN

REMEDY = "on Debian apt-get install g++ python3-dev, or give trainer.compile=false"


def compile_model(model: TinyONN, device: torch.device) -> None:
    """Compile the model's blocks for ``device``.

    Raises:
        UserError: on a CPU without a C++ compiler or without Python.h.
    """
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(f"trainer.compile=true got no C++ compiler '{compiler}'; {REMEDY}")
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not header.is_file():
            raise UserError(f"trainer.compile=true got no '{header}', expected it; {REMEDY}")
    model.compile_blocks()
