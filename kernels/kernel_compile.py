"""Compiles the launches that some calls would make, for a GPU that is not there.

Launches are recorded, not run: their tensors may stand on a CPU and outputs stay uninitialised.
Works in a process without TRITON_INTERPRET only. It proves that kernels compile, and what they
take of a multiprocessor; not that they are right or fast.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
SHARED_BYTES = {80: 166912, 90: 232448}
"""Shared memory that a program may have, by compute capability times ten."""

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """A kernel, types of its arguments, its constants, arguments divisible by 16, its options."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a launch; bytes spilled are stores and loads together."""

    name: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_cores: str
    seconds: float


def describe(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """The launch as the compiler sees it: numbers that are 1, and None, are constants."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = kernel.signature.bind(*args, **kwargs).arguments
    signature, constants, divisible = [], [], []
    for param in kernel.params:
        value = values[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature.append((param.name, "constexpr"))
            constants.append((param.name, value))
            continue
        if isinstance(value, Tensor):
            signature.append((param.name, "*" + TYPE_NAMES[value.dtype]))
            divides = value.data_ptr() % 16 == 0
        else:
            signature.append((param.name, "i32" if abs(value) < 2**31 else "i64"))
            divides = value % 16 == 0
        if divides:
            divisible.append(param.name)
    parts = (signature, constants, divisible, sorted(options.items()))
    return Launch(kernel, *(tuple(part) for part in parts))


@contextmanager
def recorded_launches() -> Iterator[dict[Launch, None]]:
    """Collects different launches instead of running them."""
    found: dict[Launch, None] = {}

    def record(self, *args, grid, warmup, **kwargs):
        found[describe(self, args, kwargs)] = None

    right, JITFunction.run = JITFunction.run, record
    try:
        yield found
    finally:
        JITFunction.run = right


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile for compute capability ``capability`` / 10; the compiler's errors are raised."""
    begin, names = time.perf_counter(), launch.kernel.arg_names
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    ptx = compiled.asm["ptx"]
    arch = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return Compiled(
        name=launch.kernel.fn.__name__,
        capability=capability,
        registers=int(re.search(r"Used (\d+) registers", said).group(1)),
        spilled_bytes=sum(map(int, spilled.groups())),
        shared_bytes=compiled.metadata.shared,
        tensor_cores="wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else "none",
        seconds=time.perf_counter() - begin,
    )
