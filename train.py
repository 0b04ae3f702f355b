"""python train.py stage=pretrain [preset=nano|small|base] [key=value ...]; --help lists all."""

from __future__ import annotations

import sys
import time

STARTED = time.monotonic()  # before the heavy imports: budget.minutes counts them too

from tiny_onn.config.load import load_train_config  # noqa: E402
from tiny_onn.errors import run_cli  # noqa: E402


def main() -> int:
    config = load_train_config(sys.argv[1:])
    if config is None:
        return 0
    from tiny_onn.training.run import run_training

    return run_training(config, started=STARTED)


if __name__ == "__main__":
    run_cli(main)
