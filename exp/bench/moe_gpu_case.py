"""One case of the experts' GPU benchmark: its inputs, checks, arms, and what is read beside times.

Shapes: N tokens, E experts, C width, F hidden width of an expert, P active pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gpu_cases import Arm, Case, Work, agree, graphed, same_bits

# isort: split
import torch
from gpu_stopwatch import Stopwatch
from moe import Function, Inputs, both_ways, without_grad
from moe_gpu_arms import index_add_loop, make_inputs, makers, with_tokens
from moe_gpu_profile import compilations, count_launches, time_kernels
from moe_gpu_report import GROUPED, PASSES, RIVALS
from moe_gpu_roofline import Sizes, kernel_work, least_work, total_us, useful_flops
from torch import Tensor

from tiny_onn_kernels.moe import kernel, reference

BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the relative RMS error."""

OUTPUTS = ("y", "dx", "dweight", "dgate_up", "ddown")
NEVER_SLOWER, AT_SMALL = 1.0, 1.3
EXTRA_TOKENS = 13
"""Of another batch, for which nothing may be compiled."""

PLACES = {
    "hidden_rows": ("hidden_rows",),
    "expert_product": ("expert_product (down)", "expert_product (dx)"),
    "sum_rows": ("sum_rows (y)", "sum_rows (dx)"),
    "hidden_gradient": ("hidden_gradient",),
    "add_parts": ("add_parts",),
    "matrix_gradient": ("matrix_gradient (down)", "matrix_gradient (gate_up)"),
    "count_pairs": ("count_pairs",),
    "place_pairs": ("place_pairs",),
    "map_tiles": ("map_tiles",),
}
"""Our kernels by what each launch in forward and backward pass is for, in order."""


class Spec(NamedTuple):
    """active: mean number of experts a token; load: as ``make_inputs`` takes it; goal: how many
    times faster than grouped_mm we want to be, if at all; graph: replays of CUDA graphs too;
    kernels: time each kernel."""

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    active: int
    load: str = "even"
    dtype: torch.dtype = torch.bfloat16
    goal: float | None = NEVER_SLOWER
    graph: bool = False
    kernels: bool = False


def make_case(spec: Spec, third_party: Path | None, limit_s: float) -> Case:
    shapes = spec._asdict() | {"dtype": str(spec.dtype).removeprefix("torch.")}
    for name in ("name", "goal", "graph", "kernels"):
        del shapes[name]

    def build(device: torch.device) -> Work:
        return Experts(spec, third_party, device).work()

    return Case(spec.name, shapes, build, memory=True, limit_s=limit_s)


def detached(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


class Experts:
    """A case on its device."""

    def __init__(self, spec: Spec, third_party: Path | None, device: torch.device) -> None:
        self.spec, self.makers = spec, makers(third_party)
        shape = (spec.tokens, spec.width, spec.hidden, spec.experts, spec.active, spec.load)
        self.inputs = make_inputs(*shape, spec.dtype, device)
        mask_NE, item = self.inputs.mask, spec.dtype.itemsize
        pairs, live = int(mask_NE.sum()), int(mask_NE.any(dim=0).sum())
        self.sizes = Sizes(*shape[:4], pairs=pairs, live=live, itemsize=item)
        self.saved = kernel.saves_inner(self.inputs.x, self.inputs.gate_up)
        self.watch = Stopwatch(device, time.perf_counter)
        self.expected: list[Tensor] = []
        self.calls: dict[str, Callable[[], Any]] = {}
        self.found: dict[str, Any] = {"errors": {}}

    def work(self) -> Work:
        ratios, targets = {}, {}
        for name in RIVALS:
            for kind in PASSES:
                title = f"{name} / ours, {kind}"
                ratios[title] = (f"{name}, {kind}", f"ours, {kind}")
                if name in GROUPED and self.spec.goal is not None:
                    targets[title] = self.spec.goal
        return Work(self._arms(), self.check, ratios, targets, self.derive)

    def _arms(self) -> dict[str, Arm]:
        arms = {}
        for name in self.makers:
            for kind in PASSES:
                arms[f"{name}, {kind}"] = Arm(partial(self._make, name, kind), ours=name == "ours")
        if self.spec.graph:  # only what waits for nothing can be recorded
            for name in ("ours", "all experts"):
                for kind in PASSES:
                    make = partial(self._make_graph, name, kind)
                    arms[f"{name}, {kind}, graph"] = Arm(make, ours=name == "ours", wrapped=True)
        arms["ours, norms"] = Arm(lambda: self._keep("ours, norms", self._norms), ours=True)
        return arms

    def _call(self, function: Function, kind: str, inputs: Inputs | None = None) -> Any:
        """The function once, its gradients too where ``kind`` is "both"."""
        inputs = self.inputs if inputs is None else inputs
        call = partial(inputs.run, function)
        if kind == "forward":
            return [without_grad(call)()]
        return both_ways(call, inputs.leaves, inputs.grad)

    def _compare(self, what: str, got: list[Tensor]) -> dict[str, float]:
        """Relative RMS errors, and the largest error over the largest number; of y alone, or of
        all outputs."""
        errors = {}
        for name, a, b in zip(OUTPUTS, detached(got), self.expected, strict=False):
            errors[name] = agree(f"{what}, {name}", a, b, BOUND[self.spec.dtype])
            errors[f"{name}, largest"] = float((a.double() - b).abs().max() / b.abs().max())
        return {name: float(f"{error:.3g}") for name, error in errors.items()}

    def check(self) -> dict[str, float]:
        """Ours against a loop in float64; the rivals' turn comes when their arms are made."""
        exact = self.inputs.like(torch.float64)
        self.expected = detached(self._call(index_add_loop, "both", exact))
        with compilations() as names:
            got, seconds = self.watch.wall(lambda: self._call(kernel.expert_ffn, "both"))
        self.found["first_call"] = {"s": round(seconds, 3), "kernels": len(names)}
        errors = self._compare("ours", got)
        same_bits("ours", detached(got), detached(self._call(kernel.expert_ffn, "both")))
        self._compare("ours, forward alone", self._call(kernel.expert_ffn, "forward"))
        wanted = reference.expert_pair_norms(
            exact.x, exact.mask, exact.gate_up, exact.down, exact.grad
        )
        for name, a, b in zip(wanted._fields, self._norms(), wanted, strict=True):
            errors[f"norms, {name}"] = agree(f"norms, {name}", a, b, BOUND[self.spec.dtype])
        return errors

    def _norms(self) -> reference.PairNorms:
        x, _, gate_up, down, mask, grad = self.inputs
        return kernel.expert_pair_norms(x, mask, gate_up, down, grad)

    def _keep(self, arm: str, call: Callable[[], Any]) -> Callable[[], Any]:
        self.calls[arm] = call
        return call

    def _make(self, name: str, kind: str) -> Callable[[], Any]:
        """A call of that program, compared with float64 first."""
        call = partial(self._call, self.makers[name](), kind)
        self.found["errors"][f"{name}, {kind}"] = self._compare(name, call())
        return self._keep(f"{name}, {kind}", call)

    def _make_graph(self, name: str, kind: str) -> Callable[[], Any]:
        own = self.inputs.like(self.spec.dtype)  # the same memory, but leaves of no other graph
        call = partial(self._call, self.makers[name](), kind, own)
        replay = graphed(call, partial(self._compare, f"{name}, graph"))
        return self._keep(f"{name}, {kind}, graph", replay)

    def derive(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Rates from the times; then what takes calls of its own."""
        rates: dict[str, Any] = {}
        for kind in PASSES:
            backward = kind == "both"
            least_us = least_work(self.sizes, backward).bound_us
            kernels_us = total_us(kernel_work(self.sizes, self.saved, backward).values())
            for arm, value in seconds.items():
                if f", {kind}" not in arm:
                    continue
                rates[arm] = {
                    "tflops": round(useful_flops(self.sizes, backward) / value / 1e12, 2),
                    "of_least": round(1e-6 * least_us / value, 4),
                }
                if arm.startswith("ours"):
                    rates[arm]["of_kernels"] = round(1e-6 * kernels_us / value, 4)
        most = int(self.inputs.mask.sum(dim=1).max())
        found = self.found | {
            "pairs": self.sizes.pairs,
            "most_experts_of_a_token": most,
            "on_gpu": self.watch.cuda,
            "saved": self.saved,
            "rates": rates,
        }
        if "ours, norms" in seconds and "ours, both" in seconds:
            found["norms_over_both"] = round(seconds["ours, norms"] / seconds["ours, both"], 4)
        diagnoses = {"new_tokens": self._new_tokens, "back_to_back_ms": self._back_to_back}
        if self.watch.cuda:
            diagnoses["launches"] = self._launches
            if self.spec.kernels:
                diagnoses["kernels_us"] = self._kernels
        for name, diagnose in diagnoses.items():
            try:
                found[name] = diagnose(seconds)
            except Exception as error:  # whatever a profiler does: no reason to lose the times
                found[f"{name}_failed"] = f"{type(error).__name__}: {error}"[:300]
        return found

    def _timed(self, seconds: Mapping[str, float]) -> dict[str, Callable[[], Any]]:
        return {arm: self.calls[arm] for arm in seconds if not arm.endswith("graph")}

    def _new_tokens(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Wall time of the first and the second call with another number of tokens than before."""
        inputs, found = self._another_batch(), {}
        for name in self.makers:
            if f"{name}, both" not in seconds:
                continue
            call = partial(self._call, self.makers[name](), "both", inputs)
            with compilations() as names:
                first_s = self.watch.wall(call)[1]
            again_s = self.watch.wall(call)[1]
            found[name] = {
                "tokens": len(inputs.x),
                "first_ms": round(1e3 * first_s, 3),
                "again_ms": round(1e3 * again_s, 3),
                "compiled": names,
            }
        return found

    def _another_batch(self) -> Inputs:
        """A few tokens more; or less, where more would no longer keep gate and up for the backward
        pass, which then is another kernel and rightly compiled."""
        for extra in (EXTRA_TOKENS, -EXTRA_TOKENS):
            inputs = with_tokens(self.inputs, self.spec.tokens + extra)
            if kernel.saves_inner(inputs.x, inputs.gate_up) == self.saved:
                return inputs
        raise AssertionError(f"{self.spec.tokens} tokens: both neighbours save otherwise")

    def _back_to_back(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Wall time of a call among many without a pause: launches hide nowhere, L2 stays warm."""
        found = {}
        for arm in seconds:
            calls = max(2, min(50, int(0.1 / seconds[arm])))
            call = self.calls[arm]

            def repeated(call: Callable[[], Any] = call, calls: int = calls) -> None:
                for _ in range(calls):
                    call()

            found[arm] = round(1e3 * self.watch.wall(repeated)[1] / calls, 4)
        return found

    def _launches(self, seconds: Mapping[str, float]) -> dict[str, dict[str, int]]:
        return {arm: count_launches(call) for arm, call in self._timed(seconds).items()}

    def _kernels(self, seconds: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Microseconds of each kernel of ours, forward and backward, with its bound."""
        bounds = kernel_work(self.sizes, self.saved)
        times = time_kernels(self.calls["ours, both"], 10, PLACES)
        found = {name: {"us": us} for name, us in times.items()}
        for name in found.keys() & bounds.keys():
            found[name]["bound_us"] = round(bounds[name].bound_us, 2)
        return found
