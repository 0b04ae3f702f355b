"""DynMoE against other ways to run the same experts, and against a dense FFN of equal cost.

    python exp/bench/moe.py [--quick] [--device cpu|cuda] [--threads N]

The same tokens, experts and choice of pairs for

- ours: what ops.experts=auto runs (grouped matrix products where the sizes allow them),
- our loop: the plain loop over experts behind the same gathers (ops.experts=loop),
- index_add loop: for every expert its tokens, two products, ``index_add``, as it is often written,
- all experts: dense einsums over every expert, weighted with zero where a pair is inactive,

and, of the same width and about the same number of active parameters a token, but another function:

- layer: the whole DynMoE module, gate included, on what its own gate chooses,
- dense FFN: SwiGLU as wide as the mean number of active experts together.

The first four and the layer are checked against float64 einsums, outputs and gradients, before
anything is timed. Ratios are taken round by round within one run: above 1, ours is faster.

Shapes: N tokens, E experts, C width, F hidden width of an expert, H = 2 F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from timing import (
    measure,
    parser,
    prepare,
    print_table,
    ratios,
    relative_error,
    require,
    spread,
    text,
    write_result,
)

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.config.schema import MoeConfig
from tiny_onn.model.dyn_moe import DynMoE
from tiny_onn.model.ffn import SwiGLU
from tiny_onn.ops import resolve_experts, run_experts

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
LIMIT_S = 12.0
"""Of one case, dtype and pass."""


class Case(NamedTuple):
    """load: "even"; "zipf", shares fall as rank^-1.2; "half dead", every other expert idle."""

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    active: float
    load: str = "even"


CASES = (
    Case("nano", 4096, 160, 128, 8, 2),
    Case("ARC, k = 2", 2048, 128, 128, 16, 2),
    Case("ARC, k = 8", 2048, 128, 128, 16, 8),
    Case("small", 2048, 512, 128, 64, 8),
    Case("nano, skewed", 4096, 160, 128, 8, 2, "zipf"),
    Case("nano, half dead", 4096, 160, 128, 8, 2, "half dead"),
)
QUICK = (Case("quick", 64, 32, 16, 4, 2), Case("quick, skewed", 64, 32, 16, 4, 2, "zipf"))

Function = Callable[..., Tensor]


def shares(case: Case) -> Tensor:
    """(E,) share of the tokens that each expert fires for."""
    weight_E = torch.ones(case.experts, dtype=torch.float64)
    if case.load == "zipf":
        weight_E = torch.arange(1, case.experts + 1, dtype=torch.float64) ** -1.2
    elif case.load == "half dead":
        weight_E[1::2] = 0
    return (case.active * weight_E / weight_E.sum()).clamp(max=1)


class Inputs(NamedTuple):
    """Leaves in float: x_NC, weight_NE, gate_up_EHC, down_ECF; mask_NE: bool; grad_NC."""

    x: Tensor
    weight: Tensor
    gate_up: Tensor
    down: Tensor
    mask: Tensor
    grad: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight, self.gate_up, self.down]

    def like(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as leaves of their own."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.leaves]
        return Inputs(*leaves, self.mask, self.grad.to(dtype))

    def run(self, function: Function) -> Tensor:
        return function(self.x, self.mask, self.weight, self.gate_up, self.down)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    mask_NE = (torch.rand(case.tokens, case.experts) < shares(case)).to(device)
    weight_NE = mask_NE / mask_NE.sum(dim=1, keepdim=True).clamp(min=1)
    x_NC = torch.randn(case.tokens, case.width, device=device)
    gate_up_EHC = torch.randn(case.experts, 2 * case.hidden, case.width, device=device)
    down_ECF = torch.randn(case.experts, case.width, case.hidden, device=device)
    inputs = Inputs(
        x_NC,
        weight_NE,
        gate_up_EHC * case.width**-0.5,
        down_ECF * case.hidden**-0.5,
        mask_NE,
        torch.randn(case.tokens, case.width, device=device),
    )
    return inputs.like(dtype)


def all_experts(x_NC: Tensor, mask_NE: Tensor, weight_NE: Tensor, gate_up: Tensor, down: Tensor):
    """Every expert on every token."""
    gate_NEF, up_NEF = torch.einsum("NC,EHC->NEH", x_NC, gate_up).chunk(2, dim=-1)
    hidden_NEF = F.silu(gate_NEF) * up_NEF * (weight_NE * mask_NE).unsqueeze(-1)
    return torch.einsum("NEF,ECF->NC", hidden_NEF, down)


def index_add_loop(
    x_NC: Tensor, mask_NE: Tensor, weight_NE: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Expert after expert; each adds its rows to the output."""
    out_NC = torch.zeros_like(x_NC)
    for expert in range(mask_NE.shape[1]):
        token_P = mask_NE[:, expert].nonzero().squeeze(1)
        gate_PF, up_PF = (x_NC[token_P] @ gate_up[expert].mT).chunk(2, dim=1)
        hidden_PF = F.silu(gate_PF) * up_PF * weight_NE[token_P, expert].unsqueeze(1)
        out_NC = out_NC.index_add(0, token_P, hidden_PF @ down[expert].mT)
    return out_NC


def by_backend(backend: str) -> Function:
    def run(*tensors: Tensor) -> Tensor:
        return run_experts(backend, *tensors)

    return run


def make_layer(case: Case, inputs: Inputs, dtype: torch.dtype, backend: str) -> DynMoE:
    """The module with the case's experts; its gate's thresholds let about ``active`` pass."""
    config = MoeConfig(
        experts=case.experts, expert_width=case.hidden, target_active=float(case.active)
    )
    layer = DynMoE(case.width, config, layer=0).to(inputs.x.device)
    with torch.no_grad():
        layer.experts.gate_up.copy_(inputs.gate_up)
        layer.experts.down.copy_(inputs.down)
    layer.experts.backend = backend
    return layer.to(dtype)


def both_ways(call: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and the gradients of the leaves."""
    out = call()
    return [out, *torch.autograd.grad(out, leaves, grad)]


def check(case: Case, inputs: Inputs, functions: dict[str, Function], layer: DynMoE) -> float:
    """Largest error of all, relative to float64."""
    dtype = inputs.x.dtype
    exact = inputs.like(torch.float64)
    expected = both_ways(lambda: exact.run(all_experts), exact.leaves, exact.grad)
    worst = 0.0
    for name, function in functions.items():
        found = both_ways(lambda f=function: inputs.run(f), inputs.leaves, inputs.grad)
        errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
        what = f"{name} {dtype} {case.name}: errors {[f'{e:.2g}' for e in errors]}"
        require(max(errors) <= TOLERANCE[dtype], f"{what}, expected at most {TOLERANCE[dtype]}")
        worst = max(worst, *errors)
    decision = layer.gate(inputs.x)
    chosen = Inputs(*inputs.leaves[:1], decision.weight_NE, *inputs.leaves[2:], decision.runs_NE,
                    inputs.grad).like(torch.float64)  # fmt: skip
    error = relative_error(layer(inputs.x), chosen.run(all_experts))
    what = f"layer {dtype} {case.name}: error {error:.2g}"
    require(error <= TOLERANCE[dtype], f"{what}, expected at most {TOLERANCE[dtype]}")
    return max(worst, error)


def bench(case: Case, dtype: torch.dtype, device: torch.device, quick: bool) -> dict[str, Any]:
    """Check and time one case: {pass: {arm: seconds}} and what was found beside them."""
    inputs = make_inputs(case, dtype, device)
    backend = resolve_experts("auto", device, dtype, case.width, case.hidden)
    functions = {
        "ours": by_backend(backend),
        "our loop": by_backend("loop"),
        "index_add loop": index_add_loop,
        "all experts": all_experts,
    }
    layer = make_layer(case, inputs, dtype, backend)
    error = check(case, inputs, functions, layer)
    dense = SwiGLU(case.width, round(case.active * case.hidden)).to(device).to(dtype)
    modules: dict[str, nn.Module] = {"layer": layer, "dense FFN": dense}
    calls: dict[str, Callable[[], Tensor]] = {
        **{name: lambda f=f: inputs.run(f) for name, f in functions.items()},
        **{name: lambda m=m: m(inputs.x) for name, m in modules.items()},
    }
    leaves: dict[str, list[Tensor]] = {
        **{name: inputs.leaves for name in functions},
        **{name: [inputs.x, *m.parameters()] for name, m in modules.items()},
    }
    passes = {
        "forward": {name: without_grad(call) for name, call in calls.items()},
        "forward + backward": {
            name: lambda n=name: both_ways(calls[n], leaves[n], inputs.grad) for name in calls
        },
    }
    return {
        "backend": backend,
        "error": error,
        "pairs": int(inputs.mask.sum()),
        "layer_pairs": int(layer.gate(inputs.x).runs_NE.sum()),
        "seconds": {
            name: measure(arms, device, 2 if quick else 9, limit_s=LIMIT_S)
            for name, arms in passes.items()
        },
    }


def without_grad(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def useful_gflops(case: Case, pairs: int, seconds: float, name: str) -> float:
    """Of the active pairs' three products (and their adjoints), a second."""
    factor = 6 if name == "forward" else 18
    return factor * case.width * case.hidden * pairs / seconds / 1e9


def main() -> None:
    args = parser(__doc__).parse_args()
    device = prepare(args)
    rows, cases = [], []
    for dtype in TOLERANCE:
        for case in QUICK if args.quick else CASES:
            found = bench(case, dtype, device, args.quick)
            kind = str(dtype).removeprefix("torch.")
            entry = {"dtype": kind, **case._asdict(), "backend": found["backend"]}
            entry |= {name: found[name] for name in ("error", "pairs", "layer_pairs")}
            for name, seconds in found["seconds"].items():
                ours = seconds["ours"]
                others = {arm: ratios(s, ours) for arm, s in seconds.items() if arm != "ours"}
                ms = {arm: spread(s, 1e3) for arm, s in seconds.items()}
                speed = useful_gflops(case, found["pairs"], 1e-3 * ms["ours"]["median"], name)
                entry[name] = {"ms": ms, "over_ours": others, "gflops": round(speed, 1)}
                rows.append(
                    [kind, case.name, name, text(ms["ours"]), f"{speed:.0f}"]
                    + [text(other) for other in others.values()]
                )
            cases.append(entry)
    arms = ["our loop", "index_add loop", "all experts", "layer", "dense FFN"]
    print_table(["dtype", "case", "pass", "ours ms", "GFLOP/s", *arms], rows)
    print("arms: times ours; above 1, ours is faster")
    write_result("moe", args, device, cases=cases)


if __name__ == "__main__":
    main()
