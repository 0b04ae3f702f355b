"""How an operation of the Triton kernels is registered: torch.library, and the right device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operation(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: ``torch.library.custom_op`` that changes none of its arguments.

    Triton launches on the current device, which need not be that of the tensors where there are
    several GPUs: the operation makes the device of its first argument the current one.
    """

    def define(function: Callable[..., Any]) -> Any:
        made = torch.library.custom_op(name, function, mutates_args=(), schema=schema)

        def on_its_device(*args: Any) -> Any:
            with torch.cuda.device_of(args[0]):
                return function(*args)

        made.register_kernel("cuda")(on_its_device)
        return made

    return define
