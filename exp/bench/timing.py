"""What the benchmarks share: arguments, checks, interleaved repeats, tables, result files.

Scripts import it from their own folder, before torch. Interleaving means that a slow minute of the
machine hits every arm alike. OpenMP threads wait passively unless OMP_WAIT_POLICY says otherwise:
about 10% slower than spinning on a quiet machine, but not tenfold slower when another process
shares the cores.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

STARTED = time.monotonic()

import source_tree  # noqa: E402, F401
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from tiny_onn.files import atomic_write_text  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def parser(description: str) -> argparse.ArgumentParser:
    """--quick, --device and --threads."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="smoke test: tiny, not written")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--threads", type=int, default=0, help="0: torch's default")
    return made


def prepare(args: argparse.Namespace) -> torch.device:
    """Set threads and seeds; the device to measure on."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    require(name == "cpu" or torch.cuda.is_available(), "--device cuda, but torch sees none")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def require(correct: bool, what: str) -> None:
    """Nothing is timed (or written) once something is wrong."""
    if not correct:
        raise SystemExit(f"refused: {what}")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; infinite if not finite."""
    difference = (got.detach().double() - expected.detach().double()).norm()
    error = float(difference / expected.detach().double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def wake(model: nn.Module) -> nn.Module:
    """Give the zero-initialised head weights, so that logits and gradients can be compared."""
    nn.init.normal_(model.head.weight, std=model.head.in_features**-0.5)
    return model


def optimizer_step(model: nn.Module, optimizer: Any, loss: Tensor, clip_norm: float) -> None:
    """Backward, clipping and update, as a plain PyTorch loop writes them."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip_norm > 0:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    arms: Mapping[str, Callable[[], Any]],
    device: torch.device,
    repeats: int,
    warmups: int = 1,
    limit_s: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of every repeat of every arm, taken in turn (to and fro).

    No further round begins when it would end after ``limit_s`` seconds, but there are two.
    """
    for _ in range(warmups):
        for arm in arms.values():
            arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    began = time.perf_counter()
    for number in range(repeats):
        if number >= 2 and (time.perf_counter() - began) * (number + 1) / number > limit_s:
            break
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            wait_for(device)
            start = time.perf_counter()
            arms[name]()
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> dict[str, Any]:
    """Median, smallest, largest and number of ``values`` times ``scale``."""
    scaled = [scale * value for value in values]
    return {
        "median": round(median(scaled), digits),
        "min": round(min(scaled), digits),
        "max": round(max(scaled), digits),
        "repeats": len(scaled),
    }


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, Any]:
    """Median, 5th and 95th percentile (linear between neighbours) and number of ``values`` times
    ``scale``: as :func:`spread`, for repeats so many that some are outliers."""
    ordered = sorted(scale * value for value in values)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    found = {"median": median(ordered), "p5": percentile(0.05), "p95": percentile(0.95)}
    return {name: round(value, 5) for name, value in found.items()} | {"repeats": len(ordered)}


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """Spread of slow / fast, round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def text(values: Mapping[str, Any], digits: int = 2, ends: tuple[str, str] = ("min", "max")) -> str:
    """``median (min..max)``, or other ``ends`` that ``values`` names."""
    low, high = (f"{values[name]:,.{digits}f}" for name in ends)
    return f"{values['median']:,.{digits}f} ({low}..{high})"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown, as exp/LOG.md takes it."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"| {' | '.join(cells)} |")


def write_result(name: str, args: argparse.Namespace, device: torch.device, **found: Any) -> None:
    """exp/results/bench_<name>.json; a smoke test writes below runs/, which git ignores."""
    result = {
        "benchmark": name,
        "quick": args.quick,
        "commit": commit(),
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "python": platform.python_version(),
        "seconds_total": round(time.monotonic() - STARTED, 1),
        **found,
    }
    folder = ROOT / "runs" / "bench_quick" if args.quick else ROOT / "exp" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bench_{name}.json"
    atomic_write_text(path, json.dumps(result, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)} ({result['seconds_total']} s)")


def commit(*folders: str) -> str | None:
    """HEAD, "-dirty" if something tracked in ``folders`` is changed; None without a history."""
    folders = folders or ("tiny_onn", "configs", "exp/bench")
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", *folders],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"
