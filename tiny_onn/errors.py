"""Errors a user can mend: one line, exit status 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message is one line: what was got, what was expected, the remedy."""


class BackendUnavailable(UserError):
    """An explicitly chosen back-end cannot run here; the message says what to do."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit with its status; a UserError becomes one line and status 2.

    Ctrl-C gives status 130.
    """
    try:
        status = main()
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    sys.exit(status or 0)
