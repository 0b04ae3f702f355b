"""EAVI's step: what the excursion costs, and what going back through the generation would.

    python exp/bench/eavi.py [--quick] [--device cpu|cuda] [--threads N] [--network sparse|dense]
                             [--step-only] (section 1, written as eavi_step)

1. Preset nano as stage eavi runs it (compiled where a compiler is), real batches: seconds of the
   excursion (feed=soft, true geometry), of the alignment's forward and of its backward; the
   excursion's share, and over the backward. With excursions of all documents, with the default
   share of them, and four batches' in one excursion.
2. Outputs of 56, 110 and 210 tokens, dense network, each arm in a process of its own:
   - decoupled: excursion without gradient, one parallel alignment, one backward;
   - through the cache: the same outputs written with gradient, keys and values kept with their
     graph, one backward through all steps (the cheapest way to go back through the generation);
   - recomputed: every step a whole forward of all tokens so far, with its graph;
   - excursion: the writing alone, after inputs of 3 x 3 cells, whose peak is to be the cache's and
     nothing that grows beside it.
   In float64 all arms' loss on the self-fed prefix must be the same number first.
3. Excursion against writing the same tokens without a cache (no gradient).
"""

from __future__ import annotations

import json
import time
from typing import Any

from processes import peak_mib, run_child

GRIDS = {56: (7, 7), 110: (10, 10), 210: (14, 14)}
"""Tokens of an output (END not counted): height and width of input and output."""

BATCHES = {
    "decoupled": 8,
    "through the cache": 8,
    "decoupled, 2": 2,
    "recomputed": 2,
    "excursion": 8,
    "excursion, 64": 64,
}
"""Arm -> documents; recomputed graphs of 8 do not fit."""

TARGET = 10.0
NUM_BATCHES = 8


def child(args: Any, arm: str, tokens: int) -> dict[str, Any]:
    """Seconds of every repeat and the peak memory of one arm, in this process alone."""
    from timing import prepare, wait_for

    device = prepare(args)
    asked = (3, 3) if arm.startswith("excursion") else None
    way = Way(device, BATCHES[arm], tokens, double=False, asked=asked)
    run = way.arms()[arm.split(",")[0]]
    on_gpu = device.type == "cuda"
    if on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats(device)

    def peak() -> float:
        return torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else peak_mib()

    began = peak()
    seconds = []
    for _ in range(1 if args.quick else 3 if BATCHES[arm] == 2 else 4):  # compared pair by pair
        start = time.perf_counter()
        run()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds[1:] or seconds,
        "peak_mib": peak(),
        "before_mib": began,
        "cache_mib": way.cache_mib(),
    }


class Way:
    """The three ways to learn from self-fed outputs, on the same documents."""

    def __init__(
        self,
        device: Any,
        count: int,
        tokens: int,
        double: bool,
        asked: tuple[int, int] | None = None,
    ) -> None:
        import numpy as np
        import torch
        from timing import wake

        from tiny_onn.arc.task import Pair
        from tiny_onn.arc.tokens import encode_pair
        from tiny_onn.config.load import load_config
        from tiny_onn.model.tiny_onn import build_model

        torch.manual_seed(0)
        self.config = load_config(["preset=nano", "network=dense"]).model
        self.model = wake(build_model(self.config, count)).to(device).eval()
        self.model.use_backend("sdpa", device)
        if double:
            self.model.double()
        rng = np.random.default_rng(0)
        size = GRIDS[tokens]
        self.documents = [
            encode_pair(
                Pair(*(rng.integers(0, 10, s).astype(np.uint8) for s in (asked or size, size))),
                task=n,
            )
            for n in range(count)
        ]
        self.device = device

    def arms(self) -> dict[str, Any]:
        return {
            "decoupled": self.decoupled,
            "through the cache": self.through_the_cache,
            "recomputed": self.recomputed,
            "excursion": self.excursion,
        }

    def cache_mib(self) -> float:
        """Keys and values, float32, of prompts and outputs whole."""
        config, tokens = self.config, sum(len(d.tokens) for d in self.documents)
        return tokens * config.layers * 2 * config.kv_heads * config.head_width * 4 / 2**20

    def excursion(self) -> float:
        from tiny_onn.training.excursions import ExcursionSettings, make_excursions

        make_excursions(self.model, self.documents, ExcursionSettings())
        return 0.0

    def _back(self, loss: Any) -> float:
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        return float(loss.detach())

    def decoupled(self) -> float:
        """NLL of the truth on the self-fed prefixes, after its backward."""
        from tiny_onn.losses.alignment import alignment_terms
        from tiny_onn.training.alignment_batch import align
        from tiny_onn.training.excursions import ExcursionSettings, make_excursions

        own = make_excursions(self.model, self.documents, ExcursionSettings())
        batch = align(self.documents, own)
        packed, rows_M = batch.batch.to(self.device), batch.rows_M.to(self.device)
        terms = alignment_terms(
            self.model(packed, rows_M).logits_MV,
            packed.targets_N[rows_M],
            batch.truth_M.to(self.device),
            batch.weight_M.to(self.device),
            batch.twin_M.to(self.device),
        )
        self._back(terms.excursion + terms.truth)
        return float(terms.excursion.detach())

    def through_the_cache(self) -> float:
        import torch
        import torch.nn.functional as F

        from tiny_onn.arc.packing import pack
        from tiny_onn.model import tiny_onn
        from tiny_onn.model.tiny_onn import TinyONN
        from tiny_onn.training.excursions import prompt_of

        batch = pack([prompt_of(d) for d in self.documents]).to(self.device)
        tokens_BT, positions_BT3 = self._outputs()
        right, tiny_onn.KVCache = tiny_onn.KVCache, growing_cache()
        try:
            with torch.enable_grad():
                logits_BV, cache = TinyONN.prefill.__wrapped__(self.model, batch, 0)
                loss = logits_BV.new_zeros(())
                for t in range(tokens_BT.shape[1]):
                    target_B = tokens_BT[:, t]
                    loss = loss + F.cross_entropy(logits_BV, target_B, reduction="sum")
                    if t + 1 < tokens_BT.shape[1]:
                        fed_B, soft = mixture(logits_BV, target_B)
                        logits_BV = TinyONN.step.__wrapped__(
                            self.model, fed_B, positions_BT3[:, t], cache, soft
                        )
        finally:
            tiny_onn.KVCache = right
        return self._back(loss)

    def recomputed(self) -> float:
        import torch
        import torch.nn.functional as F

        from tiny_onn.arc.packing import SoftTokens, pack
        from tiny_onn.training.excursions import prompt_of

        prompts = pack([prompt_of(d) for d in self.documents]).to(self.device)
        tokens_BT, positions_BT3 = self._outputs()
        count, prompt = len(self.documents), len(prompts.tokens_N) // len(self.documents)
        fed: list[Any] = []  # (tokens_B, soft or None) of every step so far
        loss = torch.zeros((), device=self.device, dtype=self.model.head.weight.dtype)
        for t in range(tokens_BT.shape[1]):
            written = torch.stack([tokens for tokens, _ in fed], 1) if fed else tokens_BT[:, :0]
            batch = longer(prompts, written, positions_BT3[:, :t])
            rows = [
                (
                    soft.rows_S * (prompt + t) + prompt + number,
                    soft.probs_SV,
                )
                for number, (_, soft) in enumerate(fed)
                if soft is not None
            ]
            if rows:
                batch = with_soft(
                    batch,
                    SoftTokens(torch.cat([r for r, _ in rows]), torch.cat([p for _, p in rows])),
                )
            last_B = torch.arange(1, count + 1, device=self.device) * (prompt + t) - 1
            logits_BV = self.model(batch, last_B).logits_MV
            loss = loss + F.cross_entropy(logits_BV, tokens_BT[:, t], reduction="sum")
            fed.append(mixture(logits_BV, tokens_BT[:, t]))
        return self._back(loss)

    def _outputs(self) -> tuple[Any, Any]:
        """int64 (B, T) true output tokens with END and (B, T, 3) their places."""
        import numpy as np
        import torch

        first = self.documents[0].prefix_len
        tokens = torch.from_numpy(np.stack([d.tokens[first:] for d in self.documents]))
        places = torch.from_numpy(np.stack([d.positions[first:] for d in self.documents]))
        return tokens.to(self.device), places.to(self.device)


def mixture(logits_BV: Any, target_B: Any) -> tuple[Any, Any]:
    """What feed=soft feeds in the true geometry, with its gradient: tokens, and mixtures where the
    truth is a colour (all rows alike here: the documents have one shape)."""
    import torch

    from tiny_onn.arc.packing import SoftTokens

    if int(target_B[0]) >= 10:
        return target_B, None
    probs_BV = torch.nn.functional.pad(logits_BV[:, :10].softmax(-1), (0, 4))
    rows_B = torch.arange(len(target_B), device=target_B.device)
    return logits_BV[:, :10].argmax(-1), SoftTokens(rows_B, probs_BV)


def growing_cache() -> Any:
    """A cache of documents of one length that joins new keys on, so that a graph goes through."""
    import torch

    from tiny_onn.model.kv_cache import KVCache

    class GrowingCache(KVCache):
        def fill(self, k_NKD: Any, v_NKD: Any, doc_N: Any, column_N: Any) -> None:
            for store, packed in ((self.keys, k_NKD), (self.values, v_NKD)):
                store.append(packed.unflatten(0, (len(self.lengths_B), -1)).transpose(1, 2))

        def start_step(self) -> None:
            self._call = 0

        def append(self, k_BKD: Any, v_BKD: Any) -> tuple[Any, Any]:
            call, self._call = self._call, self._call + 1
            self.keys[call] = torch.cat([self.keys[call], k_BKD.unsqueeze(2)], 2)
            self.values[call] = torch.cat([self.values[call], v_BKD.unsqueeze(2)], 2)
            return self.keys[call], self.values[call]

    return GrowingCache


def longer(prompts: Any, written_BT: Any, positions_BT3: Any) -> Any:
    """The packed prompts, of one length, each with ``written`` behind it."""
    from dataclasses import replace

    import torch

    from tiny_onn.arc.packing import Layout

    count, steps = written_BT.shape
    prompt = len(prompts.tokens_N) // count
    tokens_BT = torch.cat([prompts.tokens_N.view(count, prompt), written_BT], 1)
    places_BT3 = torch.cat([prompts.positions_N3.view(count, prompt, 3), positions_BT3], 1)
    length = prompt + steps
    device = tokens_BT.device
    layout = Layout(
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32, device=device) * length,
        max_seqlen=length,
        prefix_lens=torch.full((count,), prompt, device=device),
        doc_N=torch.arange(count, device=device).repeat_interleave(length),
        lengths=(length,) * count,
        prefixes=(prompt,) * count,
    )
    return replace(
        prompts,
        tokens_N=tokens_BT.flatten(),
        positions_N3=places_BT3.flatten(0, 1),
        targets_N=torch.full((count * length,), -1, device=device),
        layout=layout,
    )


def with_soft(batch: Any, soft: Any) -> Any:
    from dataclasses import replace

    return replace(batch, soft=soft)


def check() -> None:
    """In float64 all three ways find the same loss on the self-fed prefixes."""
    import torch
    from timing import require

    way = Way(torch.device("cpu"), 2, 56, double=True)
    found = {name: run() for name, run in way.arms().items() if name != "excursion"}
    first = found["decoupled"]
    require(all(abs(v / first - 1) < 1e-6 for v in found.values()), f"losses differ: {found}")


def own_step(args: Any, device: Any, share: float | None) -> dict[str, Any]:
    """Section 1, with excursions of this share of the documents (None: the default)."""
    import torch
    from timing import ratios, spread, wait_for, wake

    from tiny_onn.arc.corpus import build_corpus
    from tiny_onn.arc.dataset import EpochBatches
    from tiny_onn.arc.packing import unpack
    from tiny_onn.config.load import load_config
    from tiny_onn.model.tiny_onn import build_model
    from tiny_onn.training.compiler import compile_model
    from tiny_onn.training.datamodule import prepare as prepare_batch
    from tiny_onn.training.datamodule import rounding
    from tiny_onn.training.eavi import Eavi
    from tiny_onn.training.excursions import ExcursionSettings, make_excursions
    from tiny_onn.training.hardware import with_precision

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
    import torch
    from timing import measure, ratios, require, spread

    from tiny_onn.arc.packing import pack
    from tiny_onn.training.excursions import ExcursionSettings, make_excursions, prompt_of

    way = Way(device, 2 if args.quick else 16, 56 if args.quick else 110, double=False)
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


def print_step(args: Any, step: dict[str, Any], some: dict[str, Any]) -> None:
    """Section 1, of excursions of all documents and of the default share."""
    from timing import print_table, text

    print(f"preset nano, network {args.network}: milliseconds a step of one batch")
    print_table(
        ["excursions of", *step["milliseconds"], "excursion / step", "excursion / backward"],
        [
            [
                f"{one['share']:.0%}",
                *(text(values, 0) for values in one["milliseconds"].values()),
                text(one["excursion_share"]),
                text(one["excursion_over_backward"]),
            ]
            for one in (step, some)
        ],
    )
    print(
        f"all documents: {step['excursion_tokens_per_s']:,} tokens/s, "
        f"{text(step['four_batches_at_once'])} times as many with four batches at once"
    )


def main() -> None:
    args = read_arguments()
    if args.child:
        arm, tokens = args.child.split(":")
        print(json.dumps(child(args, arm, int(tokens))))
        return
    if args.step_only:
        from timing import prepare, write_result

        device = prepare(args)
        step, some = own_step(args, device, 1.0), own_step(args, device, None)
        print_step(args, step, some)
        write_result("eavi_step", args, device, step=step, step_with_the_default_share=some)
        return
    lengths = [56] if args.quick else list(GRIDS)
    found = {
        arm: {n: json.loads(run_child("--child", f"{arm}:{n}")) for n in lengths} for arm in BATCHES
    }
    from timing import prepare, print_table, ratios, spread, text, write_result

    device = prepare(args)
    check()
    step, some = own_step(args, device, 1.0), own_step(args, device, None)
    cache = without_cache(args, device)
    gains = {
        f"{slow} over {fast}": {
            n: ratios(found[slow][n]["seconds"], found[fast][n]["seconds"]) for n in lengths
        }
        for slow, fast in (("through the cache", "decoupled"), ("recomputed", "decoupled, 2"))
    }

    def more(arm: str, tokens: int) -> float:
        """MiB of the arm's peak beyond what it began with."""
        one = found[arm][tokens]
        return one["peak_mib"] - one["before_mib"]

    print_step(args, step, some)
    print(f"cached over uncached writing {text(cache['gain'])}")
    print_table(
        ["output tokens", *(f"{arm}: s, MiB" for arm in BATCHES), *gains],
        [
            [
                str(n),
                *(
                    f"{spread(found[arm][n]['seconds'])['median']:.2f}, {more(arm, n):,.0f}"
                    for arm in BATCHES
                ),
                *(text(gains[name][n], 1) for name in gains),
            ]
            for n in lengths
        ],
    )
    growth = {
        arm: more(arm, lengths[-1])
        - found[arm][lengths[-1]]["cache_mib"]
        - (more(arm, lengths[0]) - found[arm][lengths[0]]["cache_mib"])
        for arm in ("excursion", "excursion, 64")
    }
    print(
        f"from {lengths[0]} to {lengths[-1]} tokens the excursion's peak grows by "
        + ", ".join(f"{mib:.1f} MiB ({arm})" for arm, mib in growth.items())
        + " beyond its cache"
    )
    reached = {name: gain[lengths[-1]]["median"] >= TARGET for name, gain in gains.items()}
    print_table(
        ["output tokens", "excursion of 8, of 64: MiB of the cache, MiB more than that"],
        [
            [
                str(n),
                "; ".join(
                    f"{found[arm][n]['cache_mib']:.1f}, "
                    f"{more(arm, n) - found[arm][n]['cache_mib']:,.1f}"
                    for arm in ("excursion", "excursion, 64")
                ),
            ]
            for n in lengths
        ],
    )
    print(f"target {TARGET:g}x at {lengths[-1]} tokens reached: {reached}")
    write_result(
        "eavi",
        args,
        device,
        step=step,
        step_with_the_default_share=some,
        cached_over_uncached=cache,
        outputs=found,
        gains=gains,
        target_over_generation=TARGET,
        target_reached=reached,
        peak_growth_beyond_cache_mib=growth,
    )


def read_arguments() -> Any:
    """The children import torch through ``timing`` here; the parent must not."""
    import argparse

    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="smoke test: tiny, not written")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--threads", type=int, default=0, help="0: torch's default")
    made.add_argument("--network", default="sparse", choices=("sparse", "dense"))
    made.add_argument("--eager", action="store_true", help="section 1 uncompiled")
    made.add_argument("--step-only", action="store_true", help="section 1 alone")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made.parse_args()


if __name__ == "__main__":
    main()
