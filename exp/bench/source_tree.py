"""On import: ``tiny_onn`` and ``tiny_onn_kernels`` are this working tree's, whatever is installed.

A lent machine has them nowhere else; another checkout's, installed, would be measured unnoticed.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def take_from_here(root: Path = ROOT) -> None:
    """Both packages from ``root``. Raises SystemExit if one was imported from elsewhere before."""
    if sys.path[0] != str(root):
        sys.path.insert(0, str(root))
    for name, folder in (("tiny_onn", "tiny_onn"), ("tiny_onn_kernels", "kernels")):
        if name not in sys.modules:  # the kernels' folder has another name: no path leads to it
            start = root / folder / "__init__.py"
            spec = importlib.util.spec_from_file_location(name, start)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        found = Path(sys.modules[name].__file__ or ".").resolve().parent
        if found != root / folder:
            raise SystemExit(
                f"refused: {name} was imported from {found}, expected {root / folder}; "
                "run the script with this checkout alone on PYTHONPATH"
            )


take_from_here()
