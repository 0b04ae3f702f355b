"""2:4 sparse products on a GPU against dense ones, packing included.

    python exp/bench/sparse24_gpu.py [--quick] [--minutes M] [--only TEXT] [--list]

Three questions, at the shapes of the presets and of a sweep:

- weights once: y = x W^T of a trained W, packed beforehand (what a converted model does),
- weights anew: the same with the pattern drawn (kernels/pattern24) and packed in every call,
- activations: y = 2:4(ReLU^2(h)) W, packed in every call (kernels/relu2_24), against dense ReLU^2.

Sparse products are torch's: CUTLASS and cuSPARSELt through SparseSemiStructuredTensor. Where a
product alone is timed, its operands are packed already: what packing costs is the difference. Each
arm is compared with a float32 product of the same masked operand before it is timed. At the end
stands, for each question, the smallest product from which on sparse wins, or that none does, and
the line for kernels/break_even.py, by which ops.pattern24=auto and ops.relu2_24=auto choose: of
what they choose between, the model's own modules forward and backward by both back-ends, masks of
float32 weights and FFNs in bfloat16.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gpu_cases import Arm, Case, Unavailable, Work, Wrong, agree

# isort: split
import torch
import torch.nn.functional as nn_functional
from gpu_run import run
from sparse24_gpu_report import ACTIVATIONS, ANEW, DRAWN, ONCE, SQUARED, report
from sparse24_gpu_training import Step, ffn_training, mask_training
from torch import Tensor
from torch.sparse import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from tiny_onn_kernels.pattern24 import kernel as pattern24_kernel
from tiny_onn_kernels.pattern24 import reference as pattern24_reference
from tiny_onn_kernels.relu2_24 import kernel as relu2_24_kernel
from tiny_onn_kernels.relu2_24 import reference as relu2_24_reference

BOUND = 1e-2
"""Of products, and of drawn weights: logarithms are rounded otherwise than torch's, so of millions
of groups a few with two equally good patterns get the other one."""

TRAINING_BOUND = 2e-2
"""Of both back-ends in bfloat16, which round in other places."""

LIMIT_S = 2.0
Pack = Callable[[Tensor], Tensor]


class Spec(NamedTuple):
    """tokens T; the product is (T, inner) by (inner, outer)."""

    question: str
    name: str
    tokens: int
    inner: int
    outer: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def shapes(self) -> dict[str, Any]:
        return {
            "T": self.tokens,
            "inner": self.inner,
            "outer": self.outer,
            "dtype": str(self.dtype),
        }


FFN = (
    ("base", 24576, 768, 3072, 4608),
    ("small", 8192, 256, 768, 1152),
    ("nano", 4096, 160, 448, 768),
)
"""Tokens of a batch, width, hidden width of SwiGLU, and of ReLU^2 (1.5 times it, up to 128)."""

SWEEP = (1024, 2048, 4096, 8192)


def make_specs() -> list[Spec]:
    """The presets first."""
    found = []
    for name, tokens, width, hidden, squared in FFN:
        for question in (ONCE, ANEW):
            found.append(Spec(question, f"{name}, gate and up", tokens, width, 2 * hidden))
            found.append(Spec(question, f"{name}, down", tokens, hidden, width))
        found.append(Spec(ACTIVATIONS, name, tokens, squared, width))
    for size in SWEEP:
        for question in (ONCE, ANEW, ACTIVATIONS):
            found.append(Spec(question, f"square {size}", size, size, size))
    for tokens in (64, 512):
        found.append(Spec(ONCE, f"{tokens} tokens of 4096", tokens, 4096, 4096))
    return found


QUICK = tuple(
    Spec(question, "tiny", 64, 64, 32, torch.float16) for question in (ONCE, ANEW, ACTIVATIONS)
)


def cutlass(dense: Tensor) -> Tensor:
    return _packed(SparseSemiStructuredTensorCUTLASS, dense)


def cusparselt(dense: Tensor) -> Tensor:
    return _packed(SparseSemiStructuredTensorCUSPARSELT, dense)


def _packed(backend: Any, dense: Tensor) -> Tensor:
    """By torch; raises Unavailable where this shape or machine does not allow it."""
    if dense.device.type != "cuda":
        raise Unavailable("sparse products need a CUDA device")
    config = backend._DTYPE_SHAPE_CONSTRAINTS[dense.dtype]
    if dense.shape[0] % config.sparse_min_rows or dense.shape[1] % config.sparse_min_cols:
        raise Unavailable(
            f"{backend.BACKEND} takes multiples of {config.sparse_min_rows} x "
            f"{config.sparse_min_cols}, got {tuple(dense.shape)}"
        )
    return backend.from_dense(dense)


PACKERS: Mapping[str, Pack] = {"CUTLASS": cutlass, "cuSPARSELt": cusparselt}


def from_kernel(packed: relu2_24_reference.Packed24, shape: torch.Size) -> Tensor:
    """CUTLASS's operand out of relu2_24's: only the words of the codes change their order."""
    return SparseSemiStructuredTensorCUTLASS(
        shape,
        packed=packed.values,
        meta=relu2_24_reference.cutlass_metadata(packed.codes),
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )


def _both(name: str, step: Step) -> dict[str, Arm]:
    return {
        f"{name} in training": Arm(lambda: lambda: step("triton"), ours=True),
        f"{name} in training, PyTorch": Arm(lambda: lambda: step("torch")),
    }


def _check_both(name: str, step: Step) -> dict[str, float]:
    """Of the result and the first gradient, which are the same by both back-ends."""
    pairs = zip(step("triton")[:2], step("torch")[:2], strict=True)
    errors = [agree(f"{name} in training", a.float(), b.float(), TRAINING_BOUND) for a, b in pairs]
    return {f"{name} in training": max(errors)}


def weights_case(spec: Spec) -> Case:
    """y = x W^T."""

    def build(device: torch.device) -> Work:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=spec.dtype)

        x_TI, weight_OI = normal(spec.tokens, spec.inner), normal(spec.outer, spec.inner)
        score_OI = weight_OI.float().abs()
        options = (8.0, 1.0, torch.tensor(5, device=device))
        kept_OI, _ = pattern24_kernel.pattern24(weight_OI, score_OI, *options)

        def dense() -> Tensor:
            return nn_functional.linear(x_TI, weight_OI)

        def drawn() -> Tensor:
            return pattern24_kernel.pattern24(weight_OI, score_OI, *options)[0]

        def once(pack: Pack) -> Callable[[], Callable[[], Tensor]]:
            def make() -> Callable[[], Tensor]:
                sparse_OI = pack(kept_OI)
                return lambda: nn_functional.linear(x_TI, sparse_OI)

            return make

        def anew(pack: Pack) -> Callable[[], Callable[[], Tensor]]:
            def make() -> Callable[[], Tensor]:
                pack(kept_OI)  # or Unavailable
                return lambda: nn_functional.linear(x_TI, pack(drawn()))

            return make

        make = once if spec.question == ONCE else anew
        arms = {"dense": Arm(lambda: dense)}
        step = mask_training(spec.outer, spec.inner, device) if spec.question == ANEW else None
        if step is not None:
            arms["dense, masked"] = Arm(lambda: lambda: nn_functional.linear(x_TI, drawn()), True)
            arms["pattern24"] = Arm(lambda: drawn, ours=True)
            arms |= _both("pattern24", step)
        arms |= {name: Arm(make(pack)) for name, pack in PACKERS.items()}

        def check() -> dict[str, float]:
            with torch.no_grad():
                want_OI, _ = pattern24_reference.pattern24(weight_OI, score_OI, *options)
            found = {"pattern24": agree("pattern24", kept_OI.float(), want_OI.float(), BOUND)}
            if step is not None:
                found |= _check_both("pattern24", step)
            return found | _check_products(once, kept_OI, x_TI @ kept_OI.T)

        return Work(arms, check, _ratios(arms), derive=_rates(spec))

    return Case(f"{spec.question}: {spec.name}", spec.shapes, build, limit_s=LIMIT_S)


def activations_case(spec: Spec) -> Case:
    """y = 2:4(ReLU^2(h)) W."""

    def build(device: torch.device) -> Work:
        h_TI = torch.randn(spec.tokens, spec.inner, device=device, dtype=spec.dtype)
        weight_IO = torch.randn(spec.inner, spec.outer, device=device, dtype=spec.dtype)
        kept_TI = relu2_24_kernel.relu2_24_dense(h_TI)

        def dense() -> Tensor:
            return torch.relu(h_TI).square() @ weight_IO

        def product(pack: Pack) -> Callable[[], Callable[[], Tensor]]:
            def make() -> Callable[[], Tensor]:
                sparse_TI = pack(kept_TI)
                return lambda: sparse_TI @ weight_IO

            return make

        def ours() -> Callable[[], Tensor]:
            cutlass(kept_TI)  # or Unavailable
            return lambda: from_kernel(relu2_24_kernel.relu2_24(h_TI), h_TI.shape) @ weight_IO

        def cslt() -> Callable[[], Tensor]:
            cusparselt(kept_TI)
            return lambda: cusparselt(relu2_24_kernel.relu2_24_dense(h_TI)) @ weight_IO

        arms = {
            "dense": Arm(lambda: dense),
            "dense product": Arm(lambda: lambda: kept_TI @ weight_IO),
            "relu2_24": Arm(lambda: lambda: relu2_24_kernel.relu2_24(h_TI), ours=True),
            "relu2_24_dense": Arm(lambda: lambda: relu2_24_kernel.relu2_24_dense(h_TI), ours=True),
            "CUTLASS": Arm(ours),
            "cuSPARSELt": Arm(cslt),
        }
        arms |= {f"{name} product": Arm(product(pack)) for name, pack in PACKERS.items()}
        step = ffn_training(*spec[2:], device)
        arms |= _both("relu2_24", step)

        def check() -> dict[str, float]:
            got, want = (m.relu2_24(h_TI) for m in (relu2_24_kernel, relu2_24_reference))
            if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                raise Wrong("relu2_24: not bit for bit the reference's")
            found = _check_both("relu2_24", step)
            return found | _check_products(product, kept_TI, kept_TI @ weight_IO)

        return Work(arms, check, _ratios(arms), derive=_rates(spec))

    return Case(f"{spec.question}: {spec.name}", spec.shapes, build, limit_s=LIMIT_S)


def _check_products(
    make: Callable[[Pack], Callable[[], Callable[[], Tensor]]], kept: Tensor, want: Tensor
) -> dict[str, float]:
    """Each back-end's product of the masked operand, and at most two kept of each group."""
    found = {"kept": float((kept.reshape(-1, 4) != 0).sum(dim=1).max())}
    if found["kept"] > 2:
        raise Wrong(f"a group keeps {found['kept']:.0f}")
    for name, pack in PACKERS.items():
        try:
            got = make(pack)()()
        except (Unavailable, RuntimeError):
            continue  # the arm says why
        found[name] = agree(f"{name} product", got.float(), want.float(), BOUND)
    return found


def _ratios(arms: Mapping[str, Arm]) -> dict[str, tuple[str, str]]:
    pairs = {f"dense / {name}": ("dense", name) for name in PACKERS}
    for name in PACKERS:
        if f"{name} product" in arms:
            pairs[f"dense / {name}, product"] = ("dense product", f"{name} product")
    for ratio, name in ((DRAWN, "pattern24"), (SQUARED, "relu2_24")):
        if f"{name} in training" in arms:
            pairs[ratio] = (f"{name} in training, PyTorch", f"{name} in training")
    return pairs


def _rates(spec: Spec) -> Callable[[Mapping[str, float]], dict[str, Any]]:
    """TFLOP/s as if every product were dense; of arms that have one."""
    operations = 2 * spec.tokens * spec.inner * spec.outer

    def derive(seconds: Mapping[str, float]) -> dict[str, Any]:
        rates = {
            name: round(operations / s / 1e12, 2) for name, s in seconds.items() if "24" not in name
        }
        weights = spec.inner * spec.outer
        return {
            "question": spec.question,
            "gflop": operations / 1e9,
            "weights": weights,
            "tflops": rates,
        }

    return derive


def make_cases(args: Namespace) -> Sequence[Case]:
    specs = QUICK if args.quick else make_specs()
    return [
        activations_case(spec) if spec.question == ACTIVATIONS else weights_case(spec)
        for spec in specs
    ]


if __name__ == "__main__":
    sources = ("kernels/*.py", "kernels/*24/*.py", "exp/bench/sparse24*.py", "tiny_onn/*/*.py")
    sys.exit(run("sparse24_gpu", __doc__, make_cases, report, minutes=3.0, sources=sources))
