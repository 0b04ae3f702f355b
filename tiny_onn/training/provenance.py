"""Where a trained model comes from: code, data, machine, effort."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from tiny_onn.arc.corpus import Corpus
from tiny_onn.config.schema import Config, ModelConfig
from tiny_onn.model.ffn import ActSparse24MLP
from tiny_onn.model.nsa import NativeSparseAttention
from tiny_onn.model.tiny_onn import TinyONN
from tiny_onn.sparse.activation import num_sparse_features
from tiny_onn.training.optim import split_parameters
from tiny_onn.training.totals import RunTotals


def code_version() -> dict[str, Any]:
    """Commit of the source tree and whether it has local changes; None outside a git tree."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", "-C", str(root), *arguments),
                check=False,
                capture_output=True,
                text=True,
                timeout=20,
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def device_name(device: torch.device) -> str:
    """Model name of the accelerator or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.machine()
    return platform.machine()


def _rows(name: str, config: ModelConfig, totals: RunTotals) -> int:
    """How often a block's matrix was passed in one loop, if every row went through to its end."""
    if ".film." in name:
        return totals.documents
    if ".compress_" in name:
        inner = name.endswith(".inner.weight")
        phi_rows = totals.compressed_chunks if inner else totals.compressed_blocks
        return config.kv_heads * phi_rows
    return totals.tokens


def _left_out_by_24(model: TinyONN, config: ModelConfig, totals: RunTotals) -> int:
    """Of 6 per weight and row of an FFN with 2:4 activations, what its sparse products leave out.

    Each of them would cost 2 and costs 1: the second one forward, dX if it is taken direct, dU and
    dD of the features that are not dense.
    """
    saved = 0
    for number, block in enumerate(model.blocks):
        if not isinstance(block.ffn, ActSparse24MLP):
            continue
        rows = config.loops * totals.sparse_tokens
        if number == config.layers - 1:
            rows -= totals.sparse_tokens - totals.sparse_targets
        hidden, width = block.ffn.up.weight.shape
        options = block.ffn.options
        features = num_sparse_features(hidden, options.split_ratio)
        saved += rows * width * (hidden * (1 + options.dx_direct_sparse) + 2 * features)
    return saved


def train_flops(model: TinyONN, config: ModelConfig, totals: RunTotals) -> int:
    """Floating-point operations of the steps' matrix products: excursions, forward and backward.

    6 per weight of a matrix and row that passes it: tokens for the blocks (after the last
    attention only rows with a target), executed pairs for one expert's matrices, target rows for
    the head, documents for the task modulation; NSA's phi, once for each key head: chunks for
    W_inner, of which each passes all slices, blocks for W_outer. 12 per head channel and visible
    query-key pair of every branch (attention_work.py). A token of an excursion counts as the
    forward part, a third, of an average token trained on. Newton-Schulz, the gates' few cosines
    and phi's positions (a row a batch) are not counted. A product with 2:4 activations counts half,
    as on hardware that leaves the zeros out (the reference multiplies by them); a weight under a
    2:4 mask counts whole: it is multiplied as a dense matrix.
    """
    products = config.width * config.vocab_size * totals.targets
    last = f"blocks.{config.layers - 1}."
    for name, p in split_parameters(model)["matrices"].items():
        if ".experts." in name:  # all layers' experts are alike, and the last layer has some
            matrix = p[0] if p.dim() == 3 else p  # one that experts share
            products += matrix.numel() * totals.expert_pairs * name.startswith(last)
            continue
        rows = config.loops * _rows(name, config, totals)
        after = any(part in name for part in (".attention.out.", ".ffn.", ".mix."))
        if name.startswith(last) and after:
            rows -= totals.tokens - totals.targets
        products += p.numel() * rows
    saved = _left_out_by_24(model, config, totals)
    sparse = sum(isinstance(block.attention, NativeSparseAttention) for block in model.blocks)
    pairs = config.layers * totals.visible_pairs
    if sparse:
        pairs = sparse * totals.visible_pairs + (config.layers - sparse) * totals.full_pairs
    trained = 6 * products - saved + 12 * config.loops * config.heads * config.head_width * pairs
    return trained + trained * totals.excursion_tokens // (3 * max(1, totals.tokens))


def provenance(
    config: Config,
    model: TinyONN,
    corpus: Corpus,
    totals: RunTotals,
    device: torch.device,
    world: int,
) -> dict[str, Any]:
    """What ``provenance.json`` says of a finished run. Names no host and no path."""
    kinds = split_parameters(model)
    tables = sum(p.numel() for p in kinds["tables"].values())
    experts = sum(p.numel() for name, p in kinds["matrices"].items() if ".experts." in name)
    return {
        "trained": True,
        **code_version(),
        "stage": config.stage,
        "network": config.network,
        "attention": config.model.attention,
        "ffn": config.model.ffn,
        "weights": config.model.weights,
        "deep_embed": list(config.model.deep_embed.keys),
        "preset": config.preset,
        "seed": config.seed,
        "data_sha256": corpus.report.corpus_sha256,
        "sources_sha256": {n: c.sha256 for n, c in corpus.report.sources.items()},
        "tasks": len(corpus.task_ids),
        "examples": len(corpus.examples),
        "steps": totals.step,
        "tokens": totals.tokens,
        "target_tokens": totals.targets,
        "excursion_tokens": totals.excursion_tokens,
        "seconds": round(totals.seconds, 3),
        "train_flops": train_flops(model, config.model, totals),
        "parameters": sum(p.numel() for p in model.parameters()),
        "table_parameters": tables,
        "expert_parameters": experts,
        "pattern_parameters": sum(p.numel() for p in kinds["patterns"].values()),
        "expert_pairs": totals.expert_pairs,
        "deep_embed_parameters": (
            0 if model.deep_embed is None else model.deep_embed.num_parameters()
        ),
        "device": device_name(device),
        "processes": world,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
