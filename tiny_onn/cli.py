"""The two commands: ``train.py`` and ``submit.py``, or the wheel's console scripts."""

from __future__ import annotations

import sys
import time
from typing import NoReturn

STARTED = time.monotonic()  # before the heavy imports: budget.minutes counts them too

from tiny_onn.config.load import load_submit_config, load_train_config  # noqa: E402
from tiny_onn.errors import run_cli  # noqa: E402


def _train() -> int:
    config = load_train_config(sys.argv[1:])
    if config is None:
        return 0
    from tiny_onn.training.run import run_training

    return run_training(config, started=STARTED)


def _submit() -> int:
    config = load_submit_config(sys.argv[1:])
    if config is None:
        return 0
    from tiny_onn.inference.run import run_submit

    return run_submit(config)


def train() -> NoReturn:
    """``python train.py``: exit status 0, 2 for bad input, 130 or 143 when interrupted."""
    run_cli(_train)


def submit() -> NoReturn:
    """``python submit.py``: exit status 0, or 2 for bad input."""
    run_cli(_submit)
