"""python -m tiny_onn.inspect checkpoint=RUN [task=ID] [out=DIR] [key=value ...]; --help."""

from __future__ import annotations

import sys

from tiny_onn.config.load import load_inspect_config
from tiny_onn.errors import run_cli


def main() -> int:
    config = load_inspect_config(sys.argv[1:])
    if config is None:
        return 0
    from tiny_onn.inspect.run import run_inspect

    return run_inspect(config)


if __name__ == "__main__":
    run_cli(main)
