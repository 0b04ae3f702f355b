"""python -m tiny_onn.convert checkpoint=RUN [out=DIR] [key=value ...]; --help."""

from __future__ import annotations

import sys

from tiny_onn.config.load import load_convert_config
from tiny_onn.errors import run_cli


def main() -> int:
    config = load_convert_config(sys.argv[1:])
    if config is None:
        return 0
    from tiny_onn.convert.run import run_convert

    return run_convert(config)


if __name__ == "__main__":
    run_cli(main)
