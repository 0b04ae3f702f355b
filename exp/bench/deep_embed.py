"""DeepEmbed: what a step costs with each key, and what a 1 GiB table on disk needs in memory.

    python exp/bench/deep_embed.py [--quick] [--device cpu|cuda] [--threads N]

Steps are the nano preset's network on random documents, eager. The table is that of 4-grams
(47,250 rows for 4 layers of 1,440 numbers, 1.01 GiB of float32, every byte written). One process
trains on it (batches of 512 tokens, whose own activations are small beside it) and saves a
checkpoint, another loads that and decodes; the peak of each is read from VmHWM, beside those of
the same network without the table; above those, no more than a quarter of the table is allowed.
Rows are read cold (the file dropped from the page cache first, which a virtual disk may
still answer from its host's memory) and warm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NANO = ["preset=nano", "network=dense", "trainer.compile=false"]
BIG = ["model.deep_embed.keys=[ngram]", "model.deep_embed.store=memmap"]
ARMS = {
    "off": [],
    "token 1x": ["keys=[token]", "form=1x"],
    "token 4x": ["keys=[token]"],
    "token v7a": ["keys=[token]", "form=v7a", "mix_rank=16"],
    "3-gram 4x": ["keys=[ngram]"],
    "patch 4x": ["keys=[patch]"],
    "patch=prefix 4x": ["keys=[patch]", "patch=prefix"],
    "task 4x": ["keys=[task]"],
    "token+task 1x": ["keys=[token,task]", "form=1x"],
    "3-gram 4x, rank 16": ["keys=[ngram]", "rank=16"],
    "3-gram 4x on disk": ["keys=[ngram]", "store=memmap"],
    "3-gram 4x on disk, no prefetch": ["keys=[ngram]", "store=memmap"],
}
TRAIN_STEPS = 8
MEMORY_BATCH_TOKENS = 512
STEPS_LIMIT_S = 150


def make_batch(seed: int, tokens: int) -> Any:
    """Random documents of the sizes of track nano, with rectangles of colour on a background."""
    import numpy as np

    from tiny_onn.arc.packing import pack
    from tiny_onn.arc.task import Pair
    from tiny_onn.arc.tokens import encode_pair

    rng, documents, used = np.random.default_rng(seed), [], 0
    while True:
        grids = []
        for _ in range(2):
            height, width = rng.integers(3, 10, 2)
            grid = np.zeros((height, width), dtype=np.uint8)
            for _ in range(4):
                top, left = rng.integers(0, height), rng.integers(0, width)
                grid[top : top + 3, left : left + 3] = rng.integers(0, 10)
            grids.append(grid)
        document = encode_pair(Pair(*grids), task=len(documents) % 8)
        used += len(document.tokens)
        if used > tokens and documents:
            return pack(documents)
        documents.append(document)


def make_model(args: Any, words: list[str]) -> tuple[Any, Any, Any]:
    """(model, configuration, device)."""
    from timing import prepare, wake

    from tiny_onn.config.load import load_config
    from tiny_onn.model.tiny_onn import build_model
    from tiny_onn.training.hardware import with_precision

    device = prepare(args)
    config = with_precision(load_config([*NANO, *words]))
    model = wake(build_model(config.model, 8)).to(device).train()
    return model.use_backend(config.ops.backend, device), config, device


def step_function(model: Any, config: Any, device: Any, batches: list[Any]) -> Any:
    """A function that takes one training step on the next batch."""
    import itertools

    from timing import optimizer_step

    from tiny_onn.inference.excursion import autocast
    from tiny_onn.losses.language import output_nll
    from tiny_onn.training.datamodule import prepare
    from tiny_onn.training.optim import build_optimizer

    optimizer = build_optimizer(model, config.optim)
    ready = [prepare(batch.to(device), 0) for batch in batches]
    stream = itertools.cycle(ready)

    def step() -> None:
        batch = next(stream)
        with autocast(device, config.trainer.precision):
            nll, _ = output_nll(model(batch.batch, batch.rows_M).logits_MV, batch.targets_M)
        optimizer_step(model, optimizer, nll / batch.num_targets, 0.0)

    return step


def time_steps(args: Any) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Seconds of a step of every arm, and its ratio to the arm without DeepEmbed."""
    from timing import measure, ratios, spread, text

    batches = [make_batch(seed, 500 if args.quick else 4096) for seed in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        arms, counts = {}, {}
        for number, (name, words) in enumerate(ARMS.items()):
            full = [f"model.deep_embed.{word}" for word in words]
            model, config, device = make_model(args, full)
            if model.deep_embed is not None and model.deep_embed.files:
                (Path(folder) / str(number)).mkdir()
                model.deep_embed.create_files(Path(folder) / str(number))
                for store in model.deep_embed.files.values():
                    store.prefetch = "no prefetch" not in name
            counts[name] = 0 if model.deep_embed is None else model.deep_embed.num_parameters()
            arms[name] = step_function(model, config, device, batches)
        seconds = measure(arms, device, 2 if args.quick else 12, 2, limit_s=STEPS_LIMIT_S)
    cases, rows = [], []
    for name, values in seconds.items():
        case = {
            "arm": name,
            "deep_embed_parameters": counts[name],
            "step_ms": spread(values, 1e3, 1),
            "times_off": ratios(values, seconds["off"]),
        }
        cases.append(case)
        rows.append([name, f"{counts[name]:,}", text(case["step_ms"], 0), text(case["times_off"])])
    return cases, rows


def write_all_rows(model: Any) -> None:
    """Random rows everywhere, a piece at a time."""
    import torch

    for store in model.deep_embed.files.values():
        for first in range(0, store.shape[0], 512):
            ids = torch.arange(first, min(first + 512, store.shape[0]))
            rows = torch.randn(len(ids), *store.shape[1:]) * 0.1
            store.file.write(ids, rows.to(store.dtype))
        with open(store.file.path, "rb") as file:
            os.fsync(file.fileno())


def train_child(args: Any, folder: Path) -> dict[str, Any]:
    """Train and save with (or without) the big table; peaks of this process."""
    from tiny_onn.model.checkpoint import save_checkpoint

    words, found = ["model.ffn_width=1440"], {}
    if args.arm != "off":
        words += [*BIG, f"model.deep_embed.ngram={2 if args.quick else 4}"]
    model, config, device = make_model(args, words)
    if args.arm != "off":
        model.deep_embed.create_files(folder)
        write_all_rows(model)
        store = model.deep_embed.files["ngram"]
        found["table_mib"] = store.file.path.stat().st_size / 2**20
        found |= read_speeds(store, args)
    found["before_mib"] = peak_mib()
    batches = [make_batch(seed, MEMORY_BATCH_TOKENS) for seed in range(TRAIN_STEPS)]
    step = step_function(model, config, device, batches)
    for _ in range(TRAIN_STEPS):
        step()
    found["train_mib"] = peak_mib()
    save_checkpoint(folder / "run", model.cpu(), config, tuple("abcdefgh"), {})
    return found | {"save_mib": peak_mib()}


def predict_child(args: Any, folder: Path) -> dict[str, Any]:
    """Load what ``train_child`` saved and decode 16 outputs; peak of this process."""
    import torch
    from timing import prepare

    from tiny_onn.arc.tokens import encode_prompt
    from tiny_onn.inference.generate import generate
    from tiny_onn.model.checkpoint import load_model

    model = load_model(folder / "run").model.to(prepare(args))
    grids = torch.randint(0, 10, (16, 8, 8), generator=torch.manual_seed(0)).byte().numpy()
    generate(model, [encode_prompt(grid, 0) for grid in grids], [(8, 8)] * len(grids))
    return {"predict_mib": peak_mib()}


def measure_memory(args: Any) -> dict[str, dict[str, Any]]:
    """Peaks with and without the table, each of training and prediction in its own process."""
    memory: dict[str, dict[str, Any]] = {}
    for arm in ("off", "on disk"):
        memory[arm] = {}
        with tempfile.TemporaryDirectory() as folder:
            for child in ("train", "predict"):
                words = ["--child", child, "--arm", arm, "--folder", folder]
                command = [sys.executable, __file__, *sys.argv[1:], *words]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode != 0:
                    raise SystemExit(done.returncode)
                memory[arm] |= json.loads(done.stdout.splitlines()[-1])
    return memory


def read_speeds(store: Any, args: Any) -> dict[str, Any]:
    """Rows a second of random rows, cold and warm."""
    import torch

    count = min(2000, store.shape[0] // 2)
    ids = torch.randperm(store.shape[0], generator=torch.manual_seed(0))[:count].sort().values
    found: dict[str, Any] = {"rows_read": count}
    handle = os.open(store.file.path, os.O_RDONLY)
    for name in ("cold", "warm"):
        if name == "cold":
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        rows = store.file.read(ids)
        seconds = time.perf_counter() - start
        found[f"{name}_rows_per_s"] = round(count / seconds)
        found[f"{name}_mib_per_s"] = round(rows.numel() * rows.element_size() / 2**20 / seconds)
    os.close(handle)
    return found


def peak_mib() -> float:
    """This process's largest resident set so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return round(int(line.split()[1]) / 1024, 1)
    raise SystemExit("refused: no VmHWM in /proc/self/status")


def read_arguments() -> Any:
    import argparse

    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="smoke test: tiny, not written")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--threads", type=int, default=0, help="0: torch's default")
    for name in ("--child", "--arm", "--folder"):
        made.add_argument(name, help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    began, args = time.monotonic(), read_arguments()
    if args.child is not None:
        child = train_child if args.child == "train" else predict_child
        return print(json.dumps(child(args, Path(args.folder))))
    memory = measure_memory(args)

    from timing import prepare, print_table, require, write_result

    table_mib = memory["on disk"]["table_mib"]
    for name in ("train_mib", "save_mib", "predict_mib"):
        more = memory["on disk"][name] - memory["off"][name]
        what = f"{name} is {more:.0f} above that without a table, which has {table_mib:.0f} MiB"
        require(args.quick or more < table_mib / 4, what)
    device = prepare(args)
    cases, rows = time_steps(args)
    print_table(["key", "its parameters", "step ms", "times off"], rows)
    names = ("before_mib", "train_mib", "save_mib", "predict_mib")
    table = [[n, *(f"{found[key]:.0f}" for key in names)] for n, found in memory.items()]
    print_table(["peak MiB", "before", "after training", "saving", "predicting"], table)
    speeds = {k: v for k, v in memory["on disk"].items() if not k.endswith("mib")}
    print(f"table of {table_mib:.0f} MiB: {speeds}")
    write_result(
        "deep_embed",
        args,
        device,
        steps=cases,
        memory=memory,
        train_steps=TRAIN_STEPS,
        memory_batch_tokens=MEMORY_BATCH_TOKENS,
        seconds_total=round(time.monotonic() - began, 1),
    )


if __name__ == "__main__":
    main()
