"""On import: the packages of this working tree, where they are not installed (a lent machine)."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if importlib.util.find_spec("tiny_onn") is None:
    sys.path.append(str(ROOT))
if importlib.util.find_spec("tiny_onn_kernels") is None:  # its folder has another name
    _spec = importlib.util.spec_from_file_location("tiny_onn_kernels", ROOT / "kernels/__init__.py")
    sys.modules["tiny_onn_kernels"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["tiny_onn_kernels"])
