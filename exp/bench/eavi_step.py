"""EAVI's step as training runs it, and writing with a cache against writing without one."""

from __future__ import annotations

import time
from typing import Any

import torch
from generation import Way, longer
from timing import measure, ratios, require, spread, wait_for, wake

from tiny_onn.arc.corpus import build_corpus
from tiny_onn.arc.dataset import EpochBatches
from tiny_onn.arc.packing import pack, unpack
from tiny_onn.config.load import load_config
from tiny_onn.model.tiny_onn import build_model
from tiny_onn.training.compiler import compile_model
from tiny_onn.training.datamodule import prepare as prepare_batch
from tiny_onn.training.datamodule import rounding
from tiny_onn.training.eavi import Eavi
from tiny_onn.training.excursions import ExcursionSettings, make_excursions, prompt_of
from tiny_onn.training.hardware import with_precision

NUM_BATCHES = 8


def own_step(args: Any, device: Any, share: float | None) -> dict[str, Any]:
    """Section 1, with excursions of this share of the documents (None: the default)."""
    words = ["preset=nano", "stage=eavi", "init_from=unused", f"network={args.network}"]
    # All documents and excursions, whatever is the default: the bench is of a whole step.
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    words.append("eavi.feed=soft")
    if share is not None:
        words += [f"eavi.share_start={share}", f"eavi.share_end={share}"]
    config = with_precision(load_config([*words, f"trainer.accelerator={accelerator}"]))
    precision = config.trainer.precision
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    corpus = build_corpus(config.data, 0)
    model = wake(build_model(config.model, len(corpus.task_ids), config.moe, config.nsa)).to(device)
    model.use_backend("auto", device, precision)
    compiled = not args.quick and not args.eager
    if compiled:
        compile_model(model, device)
    module = Eavi(model, config)
    epochs = EpochBatches(corpus, config.data, 0)
    seconds: dict[str, list[float]] = {"excursion": [], "forward": [], "backward": []}
    tokens, batches, warm_up = 0, 2 if args.quick else NUM_BATCHES, 1 if args.quick else 4
    batches *= 1 if share else 2  # a part of the documents varies more
    for number in range(batches + warm_up):
        batch = prepare_batch(epochs.batch(0, number), number, multiple=rounding(device)).to(device)
        marks = [time.perf_counter()]
        train = module.begin_step(batch, 1.0)
        wait_for(device)
        marks.append(time.perf_counter())
        with mixed:
            terms, _ = module.align(train)
            loss = module.weighted(terms) / train.num_outputs
        wait_for(device)
        marks.append(time.perf_counter())
        model.zero_grad(set_to_none=True)
        loss.backward()
        wait_for(device)
        marks.append(time.perf_counter())
        if number >= warm_up:
            for name, a, b in zip(seconds, marks[:-1], marks[1:], strict=True):
                seconds[name].append(b - a)
            tokens += train.excursion_tokens
    total = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
    shares = [e / t for e, t in zip(seconds["excursion"], total, strict=True)]
    over = [e / b for e, b in zip(seconds["excursion"], seconds["backward"], strict=True)]
    alone: list[float] = []
    joined: list[float] = []
    written = "bf16" if device.type == "cuda" and precision == "bf16" else "fp32"

    def seconds_of(documents: list[Any]) -> float:
        began = time.perf_counter()
        make_excursions(model, documents, ExcursionSettings(), precision=written)
        wait_for(device)
        return time.perf_counter() - began

    for number in range(0, batches if share else 0, 4):
        four = [unpack(epochs.batch(0, k)) for k in range(number, number + 4)]
        for _ in range(2):  # the second time counts: shapes are known
            one_by_one = sum(map(seconds_of, four))
            together = seconds_of([document for own in four for document in own])
        alone.append(one_by_one)
        joined.append(together)
    return {
        "network": args.network,
        "compiled": compiled,
        "precision": precision,
        "batch_tokens": config.data.batch_tokens,
        "milliseconds": {name: spread(taken, 1e3, 1) for name, taken in seconds.items()},
        "excursion_share": spread(shares),
        "excursion_over_backward": spread(over),
        "share": config.eavi.share_end,
        "four_batches_at_once": ratios(alone, joined) if joined else None,
        "excursion_tokens_per_s": round(tokens / sum(seconds["excursion"])),
    }


def without_cache(args: Any, device: Any) -> dict[str, Any]:
    """Section 3: the same greedy outputs, by a cache and by whole forwards."""
    way = Way(device, 2 if args.quick else 16, (7, 7) if args.quick else (10, 10), double=False)
    written: dict[str, Any] = {}

    def cached() -> None:
        own = make_excursions(way.model, way.documents, ExcursionSettings(feed="greedy"))
        written["cached"] = torch.tensor([e.tokens.tolist() for (e,) in own])

    @torch.no_grad()
    def uncached() -> None:
        prompts = pack([prompt_of(d) for d in way.documents]).to(device)
        tokens_BT, positions_BT3 = way._outputs()
        fed_BT = tokens_BT[:, :0]
        length = len(prompts.tokens_N) // len(way.documents)
        for t in range(tokens_BT.shape[1] - 1):
            batch = longer(prompts, fed_BT, positions_BT3[:, :t])
            last_B = torch.arange(1, len(tokens_BT) + 1, device=device) * (length + t) - 1
            next_B = way.model(batch, last_B).logits_MV[:, :10].argmax(-1)
            next_B = torch.where(tokens_BT[:, t] < 10, next_B, tokens_BT[:, t])
            fed_BT = torch.cat([fed_BT, next_B[:, None]], 1)
        written["uncached"] = fed_BT.cpu()

    seconds = measure(
        {"cached": cached, "uncached": uncached}, device, 1 if args.quick else 3, limit_s=60
    )
    same = float((written["cached"] == written["uncached"]).float().mean())
    require(same > 0.99, f"only {same:.1%} of the written tokens agree")
    num = written["cached"].numel()
    return {
        "documents": len(way.documents),
        "output_tokens": num // len(way.documents),
        "tokens_per_s": {n: spread([num / s for s in t], digits=0) for n, t in seconds.items()},
        "gain": ratios(seconds["uncached"], seconds["cached"]),
    }
