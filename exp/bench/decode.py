"""Batched greedy decoding with the KV cache, against no cache and against one prompt at a time.

    python exp/bench/decode.py [--quick] [--device cpu|cuda] [--threads N] [--precision bf16]

Two workloads of 64 prompts: "mixed" is 64 different test inputs of ARC-AGI-1 (track nano,
evaluation tasks), each once; "views" is 64 neighbours in the order in which submit.py decodes
these tasks in 16 views, shortest first. The nano preset's network with random weights, grammar on,
output sizes fixed (by the size rule, else the input's), so that all three ways write the same
number of tokens. A batch writes as many tokens a step as rows are left, so new tokens over the
longest output (``rows_a_step``) bounds its gain over one prompt at a time. First all three must
write the same in float64 for some prompts; then every timed run in fp32 must write the same tokens
for all. In bf16 kernels round by batch size, so there only the share of equal outputs is reported.
Target: at least 20 times one prompt at a time.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from timing import (
    measure,
    parser,
    prepare,
    print_table,
    ratios,
    require,
    spread,
    text,
    wake,
    write_result,
)

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

from tiny_onn.arc.packing import Batch, pack
from tiny_onn.arc.select import select_track
from tiny_onn.arc.sources import load_challenges
from tiny_onn.arc.tokens import Document
from tiny_onn.config.load import load_config
from tiny_onn.inference.generate import Generation, generate, plan_batches
from tiny_onn.inference.grammar import output_length
from tiny_onn.inference.predict import task_views
from tiny_onn.inference.prompt import encode_query
from tiny_onn.inference.size_rule import Size, output_sizes, size_under
from tiny_onn.model.tiny_onn import TinyONN, build_model

TARGET = 20.0
ONE_BATCH = 10**9
NUM_CHECKED = 8
WORKLOADS = ("mixed", "views")
VIEWS = 16


@dataclass
class History:
    """What stands in for a cache: every document whole."""

    documents: list[Document]

    def keep(self, index_B: Tensor) -> None:
        self.documents = [self.documents[i] for i in index_B.tolist()]


class Uncached(nn.Module):
    """The same network, which reads every document anew for each of its tokens."""

    def __init__(self, model: TinyONN) -> None:
        super().__init__()
        self.model = model

    def prefill(self, batch: Batch, max_new_tokens: int) -> tuple[Tensor, History]:
        lengths = batch.layout.lengths
        tokens = batch.tokens_N.cpu().split(lengths)
        positions = batch.positions_N3.cpu().split(lengths)
        rows = zip(tokens, positions, batch.task_B.tolist(), batch.view_B.tolist(), strict=True)
        history = History([Document(t.numpy(), p.numpy(), len(t), r, v) for t, p, r, v in rows])
        return self.logits(history, batch.tokens_N.device), history

    def step(self, tokens_B: Tensor, positions_B3: Tensor, history: History) -> Tensor:
        new = zip(history.documents, tokens_B.tolist(), positions_B3.cpu().numpy(), strict=True)
        history.documents = [
            replace(
                document,
                tokens=np.append(document.tokens, token),
                positions=np.concatenate([document.positions, position[None]]),
            )
            for document, token, position in new
        ]
        return self.logits(history, tokens_B.device)

    def logits(self, history: History, device: torch.device) -> Tensor:
        batch = pack(history.documents).to(device)
        last_B = batch.layout.cu_seqlens[1:].long() - 1
        logits_BV = self.model(batch, last_B).logits_MV
        return torch.empty_like(logits_BV).index_copy_(
            0, torch.tensor(batch.order, device=device), logits_BV
        )


def choose_prompts(workload: str, count: int) -> tuple[list[Document], list[Size]]:
    """``count`` prompts of a workload, and the sizes to write."""
    views = 1 if workload == "mixed" else VIEWS
    prompts, sizes = [], []
    for task in select_track(load_challenges("arc1:evaluation"), "nano"):
        for grid, size in zip(task.test_inputs, output_sizes(task), strict=True):
            for view in task_views(task, views, seed=0):
                prompts.append(encode_query(task, grid, row=0, view=view))
                sizes.append(size_under(view, size or (grid.shape[0], grid.shape[1])))
    if workload == "views":
        order = [i for batch in plan_batches(prompts, sizes, 1) for i in batch]
        middle = (len(order) - count) // 2
        chosen = order[middle : middle + count]
        prompts, sizes = [prompts[i] for i in chosen], [sizes[i] for i in chosen]
    return prompts[:count], sizes[:count]


class Ways:
    """The three ways to decode; each notes what it wrote."""

    def __init__(
        self, model: TinyONN, prompts: list[Document], sizes: list[Size], precision: str
    ) -> None:
        self.model, self.uncached = model, Uncached(model)
        self.prompts, self.sizes, self.precision = prompts, sizes, precision
        self.written: dict[str, list[Generation]] = {}

    def _decode(self, model: nn.Module, which: slice) -> list[Generation]:
        return generate(
            model,
            self.prompts[which],
            self.sizes[which],
            batch_tokens=ONE_BATCH,
            precision=self.precision,
        )

    def run_batched(self) -> None:
        self.written["batched"] = self._decode(self.model, slice(None))

    def run_uncached(self) -> None:
        self.written["uncached"] = self._decode(self.uncached, slice(None))

    def run_one_by_one(self) -> None:
        self.written["one_by_one"] = [
            self._decode(self.model, slice(i, i + 1))[0] for i in range(len(self.prompts))
        ]

    def agreement(self) -> dict[str, float]:
        """Share of the outputs equal to the batched ones, of the other two ways."""
        batched = self.written["batched"]
        return {
            name: sum(_same(a, b) for a, b in zip(batched, other, strict=True)) / len(batched)
            for name, other in self.written.items()
            if name != "batched"
        }


def _same(a: Generation, b: Generation) -> bool:
    return np.array_equal(a.tokens, b.tokens)


def check(model: TinyONN, prompts: Sequence[Document], sizes: Sequence[Size]) -> None:
    """All three ways write the same in float64, with likelihoods equal to rounding."""
    exact = copy.deepcopy(model).double()
    ways = Ways(exact, list(prompts), list(sizes), "fp32")
    ways.run_batched()
    ways.run_uncached()
    ways.run_one_by_one()
    require(all(s == 1 for s in ways.agreement().values()), f"outputs differ: {ways.agreement()}")
    expected = np.array([g.logprob for g in ways.written["batched"]])
    for name, written in ways.written.items():
        close = np.allclose([g.logprob for g in written], expected, rtol=1e-6)
        require(close, f"log-likelihoods of {name} differ in float64")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    args = arguments.parse_args()
    device = prepare(args)
    model_config = load_config(["preset=nano", "network=dense"]).model
    model = wake(build_model(model_config, 1)).eval()
    # float64 needs the back-end that takes it; CUDA's variable-length kernels do not
    model.use_backend("sdpa", device).to(device)
    workloads = {name: run(name, model, args, device) for name in WORKLOADS}
    reached = {
        name: found["gain"]["one_by_one"]["median"] >= TARGET for name, found in workloads.items()
    }
    print(f"target {TARGET:g}x one by one reached: {reached}")
    write_result(
        "decode" if args.precision == "fp32" else f"decode_{args.precision}",
        args,
        device,
        precision=args.precision,
        model=vars(model_config),
        workloads=workloads,
        target_over_one_by_one=TARGET,
        target_reached=reached,
    )


def run(workload: str, model: TinyONN, args: argparse.Namespace, device: torch.device) -> dict:
    """Check and time one workload; prints its table."""
    model.use_backend("sdpa", device)
    prompts, sizes = choose_prompts(workload, 4 if args.quick else 64)
    shortest = sorted(range(len(prompts)), key=lambda i: output_length(sizes[i]))[:NUM_CHECKED]
    check(model, [prompts[i] for i in shortest], [sizes[i] for i in shortest])

    model.use_backend("auto", device, args.precision)
    ways = Ways(model, prompts, sizes, args.precision)
    ways.run_batched()  # warm-up
    arms = {
        "batched": ways.run_batched,
        "uncached": ways.run_uncached,
        "one_by_one": ways.run_one_by_one,
    }
    repeats = 1 if args.quick else 5
    seconds = measure(arms, device, repeats, warmups=0, limit_s=25)
    agreement = ways.agreement()
    exact = args.precision == "fp32" and device.type == "cpu"
    require(not exact or min(agreement.values()) == 1, f"outputs differ: {agreement}")

    new_tokens = sum(len(g.tokens) for g in ways.written["batched"])
    rate = {
        name: spread([new_tokens / s for s in taken], digits=1) for name, taken in seconds.items()
    }
    gain = {n: ratios(seconds[n], seconds["batched"]) for n in ("uncached", "one_by_one")}
    rows_a_step = new_tokens / max(len(g.tokens) for g in ways.written["batched"])
    print(
        f"{workload}: {len(prompts)} prompts, {new_tokens} new tokens, {rows_a_step:.1f} rows a "
        f"step, {args.precision}"
    )
    print_table(
        ["decoding", "new tokens/s", "batched is faster by", "equal outputs"],
        [
            [n, text(rate[n], 0), text(gain[n]) if n in gain else "", f"{agreement.get(n, 1):.0%}"]
            for n in arms
        ],
    )
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(len(p.tokens) for p in prompts),
        "new_tokens": new_tokens,
        "rows_a_step": round(rows_a_step, 1),
        "tokens_per_s": rate,
        "gain": gain,
        "equal_outputs": agreement,
    }


if __name__ == "__main__":
    main()
