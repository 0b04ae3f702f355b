"""train.py, with the run's 2:4 masks written down: the child process of arc.py.

python exp/k24/train_observed.py EVERY key=value ...     (EVERY: optimizer steps between looks)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

STARTED = time.monotonic()  # before the heavy imports, as train.py counts

from tiny_onn.config.load import load_config  # noqa: E402
from tiny_onn.errors import run_cli  # noqa: E402


def main() -> int:
    every, *words = sys.argv[1:]
    config = load_config(words)
    from masks import MaskSnapshots

    from tiny_onn.training.run import run_training

    return run_training(config, STARTED, [MaskSnapshots(Path(config.out), int(every))])


if __name__ == "__main__":
    run_cli(main)
