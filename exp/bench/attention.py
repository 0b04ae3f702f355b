"""NSA's reference against torch's SDPA as one document grows: time, memory, and where they cross.

    python exp/bench/attention.py [--quick] [--device cpu|cuda] [--threads N]
                                  [--dtype float32|bfloat16] [--heads 4] [--kv-heads 4]

One causal document of 256 to 16,384 tokens, head width 32, the default setting of ``nsa`` (l, d,
l', n, w = 32, 16, 32, 8, 128). NSA is all that the module does between its projections: both
compressors, three branches, selection, gates; the rival is one call of SDPA on given queries,
keys and values (on a CPU its flash kernel). Times are taken in turn in this process. Peaks are
those of a process of its own for each arm and length (ru_maxrss over what it held before; on CUDA
torch's allocator), which is why this process imports torch only after them. Exponents are fitted
to the lengths from 2,048 on. Before anything is timed, NSA told to read everything (all blocks
selected, or a window over the document) must equal full attention in float64, outputs and
gradients, and its float32 must equal its float64.

Shapes: N tokens, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from statistics import linear_regression
from typing import Any

from processes import peak_mib, run_child

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
FITTED_FROM = 2048
HEAD_WIDTH = 32
CHECKED_TOKENS = 300
WARM_UP_TOKENS = 64
ARMS = ("sdpa", "nsa")
PASSES = ("forward", "forward + backward")
LIMIT_S = 15.0
"""Of one length and pass."""


class Attention:
    """Both arms on one document's tensors. dtype: a torch dtype."""

    def __init__(self, args: Any, length: int, device: Any, dtype: Any) -> None:
        import torch

        from tiny_onn.config.schema import NsaConfig
        from tiny_onn.model.attention import AttentionContext
        from tiny_onn.model.nsa import NativeSparseAttention
        from tiny_onn.model.nsa_plan import plan_nsa
        from tiny_onn.model.packed_attention import DocumentSpans, plan_sdpa
        from tiny_onn.model.rope import Rope3D

        generator = torch.Generator().manual_seed(length)

        def normal(*shape: int) -> Any:
            return torch.randn(shape, generator=generator).to(device, dtype)

        heads, kv_heads = args.heads, args.kv_heads
        self.settings = NsaConfig()
        module = NativeSparseAttention(
            heads * HEAD_WIDTH, heads, kv_heads, HEAD_WIDTH, True, self.settings
        )
        self.module = module.to(device, dtype)
        q_NHD = normal(length, heads, HEAD_WIDTH)
        raw_k_NKD, k_NKD, v_NKD = (normal(length, kv_heads, HEAD_WIDTH) for _ in range(3))
        gate_NH3 = normal(length, heads, 3).sigmoid()
        self.tensors = [q_NHD, raw_k_NKD, k_NKD[:, None], v_NKD[:, None], gate_NH3]
        self.tensors = [t.detach().clone().requires_grad_() for t in self.tensors]
        self.grad_NHD = normal(length, heads, HEAD_WIDTH)
        spans = DocumentSpans(
            torch.tensor([0, length], dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            (length,),
            (0,),
        )
        place_N = torch.arange(length, device=device)
        positions_N3 = torch.stack([place_N % 31, place_N // 31 % 31, place_N * 0 + 1], dim=1)
        cos, sin = Rope3D(HEAD_WIDTH, 100.0).to(device)(positions_N3)
        self.context = AttentionContext(cos, sin, attend=plan_nsa(spans, self.settings, plan_sdpa))
        self.device = device
        phi = [p for n, p in self.module.named_parameters() if n.startswith("compress")]
        self.leaves = {
            "nsa": [*self.tensors, *phi],
            "sdpa": [self.tensors[0], self.tensors[2], self.tensors[3]],
        }

    def sdpa(self) -> Any:
        from contextlib import nullcontext

        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (
            t.transpose(0, 1)[None]
            for t in (self.tensors[0], self.tensors[2][:, 0], self.tensors[3][:, 0])
        )
        gqa = q.shape[1] != k.shape[1]
        flash = self.device.type == "cpu" and not gqa
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return out[0].transpose(0, 1)

    def nsa(self) -> Any:
        return self.module.attend(*self.tensors, self.context)

    def forward(self, arm: str) -> Any:
        import torch

        with torch.no_grad():
            return getattr(self, arm)()

    def both_ways(self, arm: str) -> list[Any]:
        import torch

        out = getattr(self, arm)()
        # a document that is read in full has no gradient into what only a choice would use
        grads = torch.autograd.grad(out, self.leaves[arm], self.grad_NHD, allow_unused=True)
        return [out, *grads]

    def call(self, arm: str, name: str) -> Callable[[], Any]:
        if name == "forward":
            return lambda: self.forward(arm)
        return lambda: self.both_ways(arm)


def check(args: Any) -> None:
    """NSA that reads everything is full attention; float32 is float64."""
    from timing import prepare, relative_error, require

    # isort: split
    import torch

    from tiny_onn.ops import nsa

    device = prepare(args)
    exact = Attention(args, CHECKED_TOKENS, device, torch.float64)
    q, _, k, v, _ = exact.tensors
    full = both(lambda: full_attention(q, k[:, 0], v[:, 0]), [q, k, v], exact.grad_NHD)
    settings = exact.settings
    for branch, name in ((1, "selected"), (2, "window")):
        layout = nsa.lay_out(
            torch.tensor([0, CHECKED_TOKENS], device=device),
            block=settings.block,
            stride=settings.stride,
            select_block=settings.select_block,
            window=CHECKED_TOKENS,
        )
        gate_NH3 = torch.zeros_like(exact.tensors[4])
        gate_NH3[..., branch] = 1
        blocks = nsa.take_blocks(k[:, 0], layout).mean(dim=1)
        pair = (k[:, 0], v[:, 0])
        found = both(
            lambda layout=layout, gate_NH3=gate_NH3, blocks=blocks, pair=pair: nsa.nsa_attention(
                q, blocks, blocks, *pair, *pair, gate_NH3, layout, layout.most_select_blocks
            )[0],
            [q, k, v],
            exact.grad_NHD,
        )
        error = max(relative_error(a, b) for a, b in zip(found, full, strict=True))
        require(error <= 1e-9, f"{name} branch that reads everything: error {error:.2g}")
    rounded = Attention(args, CHECKED_TOKENS, device, torch.float32)
    rounded.module.load_state_dict(exact.module.state_dict())
    pairs = zip(rounded.both_ways("nsa"), exact.both_ways("nsa"), strict=True)
    error = max(relative_error(a, b) for a, b in pairs if a is not None)
    require(error <= 1e-3, f"float32 against float64: error {error:.2g}, expected at most 1e-3")


def both(call: Callable[[], Any], leaves: Sequence[Any], grad: Any) -> list[Any]:
    import torch

    out = call()
    return [out, *torch.autograd.grad(out, leaves, grad)]


def full_attention(q_NHD: Any, k_NKD: Any, v_NKD: Any) -> Any:
    """Causal softmax attention, written out."""
    import torch

    groups = q_NHD.shape[1] // k_NKD.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1).transpose(0, 1) for t in (k_NKD, v_NKD))
    q = q_NHD.transpose(0, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v).transpose(0, 1)


def child(args: Any, arm: str, length: int) -> dict[str, Any]:
    """MiB that each pass of one arm adds to this process's peak."""
    from timing import prepare

    # isort: split
    import torch

    device = prepare(args)
    cuda = device.type == "cuda"
    attention = Attention(args, length, device, getattr(torch, args.dtype))
    held = torch.cuda.memory_allocated() / 2**20 if cuda else 0.0
    Attention(args, WARM_UP_TOKENS, device, getattr(torch, args.dtype)).call(arm, PASSES[1])()
    before, found = peak_mib(), {}
    for name in PASSES:  # forward needs less, so its peak is not hidden by an earlier one
        attention.call(arm, name)()
        peak = torch.cuda.max_memory_allocated() / 2**20 - held if cuda else peak_mib() - before
        found[name] = round(peak, 2)
    return found


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """The power of the length that ``values`` grow with, from FITTED_FROM on; None where fewer
    than two are above 0."""
    points = [
        (math.log(n), math.log(value))
        for n, value in zip(lengths, values, strict=True)
        if n >= FITTED_FROM and value > 0
    ]
    if len(points) < 2:
        return None
    return round(linear_regression(*zip(*points, strict=True)).slope, 2)


def crossing(lengths: Sequence[int], over: Sequence[float]) -> float | None:
    """Length from which NSA is faster, between two measured ones on a log-log line.

    ``over``: time of NSA over SDPA's. None: not up to the longest; 0: at all of them.
    """
    slower = [i for i, ratio in enumerate(over) if ratio > 1]
    if not slower:
        return 0.0
    last = slower[-1]
    if last == len(lengths) - 1:
        return None
    a, b = math.log(over[last]), math.log(over[last + 1])
    share = a / (a - b)
    low, high = (math.log(length) for length in lengths[last : last + 2])
    return round(math.exp(low + share * (high - low)))


def crossing_text(lengths: Sequence[int], found: float | None) -> str:
    if found is None:
        return f"not up to {lengths[-1]:,} tokens"
    return f"below {lengths[0]:,} tokens" if found == 0 else f"at about {found:,.0f} tokens"


def read_arguments() -> Any:
    """The children import torch through ``timing``; the parent must not before them."""
    import argparse

    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="smoke test: tiny, not written")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--threads", type=int, default=0, help="0: torch's default")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--kv-heads", type=int, default=4)
    made.add_argument("--child", nargs=2, metavar=("ARM", "LENGTH"), help=argparse.SUPPRESS)
    made.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.kv_heads < 1 or args.heads % args.kv_heads:
        made.error(f"got --heads {args.heads} --kv-heads {args.kv_heads}; expected a multiple")
    return args


def main() -> None:
    began, args = time.monotonic(), read_arguments()
    lengths = LENGTHS[:2] if args.quick else LENGTHS
    if args.check:
        return check(args)
    if args.child is not None:
        return print(json.dumps(child(args, args.child[0], int(args.child[1]))))
    run_child("--check")
    memory = {
        n: {arm: json.loads(run_child("--child", arm, str(n))) for arm in ARMS} for n in lengths
    }

    from timing import measure, prepare, print_table, ratios, spread, text, write_result

    # isort: split
    import torch

    device = prepare(args)
    rows, cases = [], []
    for length in lengths:
        attention = Attention(args, length, device, getattr(torch, args.dtype))
        for name in PASSES:
            seconds = measure(
                {arm: attention.call(arm, name) for arm in ARMS},
                device,
                repeats=2 if args.quick else 9,
                limit_s=LIMIT_S,
            )
            ms = {arm: spread(seconds[arm], 1e3) for arm in ARMS}
            over = ratios(seconds["nsa"], seconds["sdpa"])
            peaks = {arm: memory[length][arm][name] for arm in ARMS}
            cases.append(
                {"tokens": length, "pass": name}
                | {f"{arm}_ms": ms[arm] for arm in ARMS}
                | {f"{arm}_peak_mib": peaks[arm] for arm in ARMS}
                | {"nsa_over_sdpa": over}
            )
            rows.append(
                [name, f"{length:,}", *(text(ms[arm]) for arm in ARMS), text(over)]
                + [f"{peaks[arm]:.0f}" for arm in ARMS]
            )
    rows.sort(key=lambda row: row[0])
    head = ["pass", "tokens", "SDPA ms", "NSA ms", "NSA / SDPA", "SDPA MiB", "NSA MiB"]
    print_table(head, rows)
    summary = {name: summarise(name, cases, lengths) for name in PASSES}
    for name, found in summary.items():
        print(
            f"{name}: growth exponents (time, memory) SDPA {found['sdpa_time']}, "
            f"{found['sdpa_memory']}; NSA {found['nsa_time']}, {found['nsa_memory']}; NSA is "
            f"faster {crossing_text(lengths, found['crossing_tokens'])}"
        )
    write_result(
        "attention" if args.dtype == "float32" else f"attention_{args.dtype}",
        args,
        device,
        dtype=args.dtype,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_width=HEAD_WIDTH,
        settings=vars(attention.settings),
        fitted_from_tokens=FITTED_FROM,
        summary=summary,
        cases=cases,
        seconds_total=round(time.monotonic() - began, 1),
    )


def summarise(
    name: str, cases: Sequence[dict[str, Any]], lengths: Sequence[int]
) -> dict[str, float | None]:
    """Exponents of one pass, and where the two cross."""
    chosen = [case for case in cases if case["pass"] == name]
    over = [case["nsa_over_sdpa"]["median"] for case in chosen]
    found: dict[str, float | None] = {"crossing_tokens": crossing(lengths, over)}
    for arm in ARMS:
        times = [case[f"{arm}_ms"]["median"] for case in chosen]
        peaks = [case[f"{arm}_peak_mib"] for case in chosen]
        found |= {f"{arm}_time": exponent(lengths, times)}
        found |= {f"{arm}_memory": exponent(lengths, peaks)}
    return found


if __name__ == "__main__":
    main()
