"""Compiles the kernels for GPUs that need not be here; prints what each takes of one.

    python -m tiny_onn_kernels.compile_check [--arch 80 90] [--only TEXT] [--jobs N]

Workloads run on small tensors or on such without data (device "meta"), and instead of launching,
every launch is written down: the kernel, the types of its arguments, its constants and options.
These are what is compiled, so nothing has to be listed twice. Fails where a kernel spills more
registers than MOST_SPILLED_BYTES, wants more shared memory than the architecture has, or has its
matrix instructions serialised. It proves neither values nor speed.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined, below

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tiny_onn_kernels.moe.kernel_workloads import workloads as moe_workloads
from tiny_onn_kernels.nsa.kernel_workloads import workloads as nsa_workloads
from tiny_onn_kernels.pattern24.kernel_workloads import workloads as pattern24_workloads
from tiny_onn_kernels.relu2_24.kernel_workloads import workloads as relu2_24_workloads

SOURCES: tuple[Callable[[], Iterator[tuple[str, Callable[[], None]]]], ...] = (
    moe_workloads,
    nsa_workloads,
    pattern24_workloads,
    relu2_24_workloads,
)
"""Each gives names, and functions that launch kernels, on tensors whose numbers mean nothing."""

MOST_SPILLED_BYTES = 160
"""Of a thread, stores and loads together: a few values that live across a loop."""

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""What one program may have, by compute capability."""

TYPES = {
    torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Launch(NamedTuple):
    """A kernel as it would be specialised; the pairs are (name, value)."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


class Resources(NamedTuple):
    """Of one compiled kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    is_serialised: bool
    matrix_unit: str
    seconds: float


def specialise(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """What Triton would compile for this call: it knows integers that are 1 or multiples of 16.

    Memory that torch allocates begins at a multiple of 16 bytes.
    """
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = [], [], []
    for param in kernel.params:
        value = values.get(param.name, param.default)
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature.append((param.name, "constexpr"))
            constants.append((param.name, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((param.name, "*" + TYPES[value.dtype]))
            divisible.append(param.name)
        elif isinstance(value, bool):
            signature.append((param.name, "u1"))
        elif isinstance(value, int):
            signature.append((param.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if special and value % 16 == 0:
                divisible.append(param.name)
        else:
            assert isinstance(value, float), f"{kernel.__name__}: {param.name} is {value!r}"
            signature.append((param.name, "fp32"))
    options = tuple((name, kwargs[name]) for name in OPTIONS if name in kwargs)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), options)


def record(run: Callable[[], None]) -> list[Launch]:
    """The launches of a workload, each once; none is carried out."""
    found: dict[Launch, None] = {}
    launch = JITFunction.run

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[specialise(self, args, kwargs)] = None

    JITFunction.run = note
    try:
        run()
    finally:
        JITFunction.run = launch
    return list(found)


def compile_for(launch: Launch, arch: int) -> Resources:
    """Compile a launch and ask the assembler what it takes."""
    started = time.monotonic()
    kernel = launch.kernel
    index = kernel.arg_names.index
    multiples = {(index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), multiples)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options)
    )
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", told)[1]),
        spilled_bytes=int(spilled[1]) + int(spilled[2]),
        shared_bytes=compiled.metadata.shared,
        is_serialised="C7511" in told,
        matrix_unit="wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else "-",
        seconds=time.monotonic() - started,
    )


def faults(found: Resources, arch: int) -> list[str]:
    """Why a kernel cannot be shipped as it is."""
    texts = []
    if found.spilled_bytes > MOST_SPILLED_BYTES:
        texts.append(f"spills {found.spilled_bytes} bytes, at most {MOST_SPILLED_BYTES} allowed")
    if found.shared_bytes > SHARED_BYTES[arch]:
        texts.append(f"{found.shared_bytes} bytes shared, sm_{arch} has {SHARED_BYTES[arch]}")
    if found.is_serialised:
        texts.append("matrix instructions are serialised")
    return texts


_jobs: list[tuple[int, Launch]] = []
"""What is compiled; processes forked from this one find it here (kernels cannot be pickled)."""


def _compile_job(number: int) -> Resources:
    arch, launch = _jobs[number]
    return compile_for(launch, arch)


def gather(only: str) -> dict[Launch, str]:
    """Every launch of the workloads whose name holds ``only``, with the first that makes it."""
    first: dict[Launch, str] = {}
    for source in SOURCES:
        for name, run in source():
            if only in name:
                for launch in record(run):
                    first.setdefault(launch, name)
    return first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=SHARED_BYTES)
    parser.add_argument("--only", default="", help="workloads whose name holds this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    first = gather(args.only)
    _jobs[:] = [(arch, launch) for arch in args.arch for launch in first]
    faulty = 0
    titles = f"{'warps':>6}{'regs':>6}{'spill':>7}{'shared':>8}{'unit':>7}{'s':>7}"
    print(f"{'arch':6}{'kernel':28}{'workload':26}{titles}")
    with multiprocessing.get_context("fork").Pool(max(1, args.jobs)) as pool:
        results = pool.imap(_compile_job, range(len(_jobs)))
        for (arch, launch), found in zip(_jobs, results, strict=True):
            texts = faults(found, arch)
            faulty += bool(texts)
            print(
                f"sm_{arch:<3}{launch.kernel.__name__:28}{first[launch]:26}"
                f"{dict(launch.options).get('num_warps', 4):6}{found.registers:6}"
                f"{found.spilled_bytes:7}{found.shared_bytes:8}{found.matrix_unit:>7}"
                f"{found.seconds:7.1f}  {'; '.join(texts)}",
                flush=True,
            )
    print(f"{len(_jobs)} compiled, {faulty} faulty")
    return 1 if faulty or not _jobs else 0


if __name__ == "__main__":
    sys.exit(main())
