"""A masked weight as torch's semi-structured tensor, for sparse tensor cores, or as it is.

Back-ends: ``cusparselt`` and ``cutlass`` (torch.sparse.SparseSemiStructuredTensor*, CUDA only) and
``reference``, the masked dense weight. What a back-end cannot take is told in words; ``auto``
also times what it can take against the dense product, because few tokens or narrow layers lose:
one weight serves prefill and decoding, so sparse must win at both.

Whether a back-end runs on this GPU at all is found out by a product of one tile: CUTLASS's kernels
of torch refuse some architectures and say so themselves.

Shapes: (R, C) = (out_features, in_features), pruned along C.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.errors import BackendUnavailable, UserError
from tiny_onn.sparse.mask import TWO_FOUR
from tiny_onn.sparse.packed import ONE_TWO, refuse_violations, violations
from tiny_onn.sparse.pattern import refuse_nonfinite

log = logging.getLogger("tiny_onn")

Backend = Literal["auto", "reference", "cutlass", "cusparselt"]
SPARSE_BACKENDS = ("cusparselt", "cutlass")
TILES: dict[str, dict[torch.dtype, tuple[int, int]]] = {
    "cusparselt": {torch.float16: (16, 16), torch.bfloat16: (16, 16)},
    "cutlass": {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.float32: (32, 32)},
}
"""Multiples of rows and columns. int8 and float8 need scales, which a Linear does not have."""
TIMED_RUNS = 20
TIMED_TOKENS = (64, 4096)
"""Rows of a decoding step, and of a prefill."""
LEAST_GAIN = 1.05
"""How many times as fast as dense sparse must be at each of them: below, it may be noise."""


class Converted(NamedTuple):
    """weight: a SparseSemiStructuredTensor, or the dense one (reference), for F.linear; backend:
    the one chosen; refused: back-end -> why it was not."""

    weight: Tensor
    backend: str
    refused: dict[str, str]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sparse(weight: Tensor, backend: str) -> Tensor:
    """Packed by torch; the warning that its interface is a prototype is not the user's to mend."""
    kind = (
        torch.sparse.SparseSemiStructuredTensorCUTLASS
        if backend == "cutlass"
        else torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype")
        return kind.from_dense(weight.detach().contiguous())


@lru_cache(maxsize=64)
def _fails_on(device: torch.device, backend: str, dtype: torch.dtype) -> str | None:
    """Why a product of one tile fails on this device, in torch's words; None where it runs.

    Raises:
        torch.OutOfMemoryError: nothing was found out, and nothing is remembered.
    """
    rows, columns = TILES[backend][dtype]
    tile = torch.zeros(max(rows, 64), max(columns, 64), dtype=dtype, device=device)
    tile[:, ::4] = 1
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            product = F.linear(tile.new_ones(64, tile.shape[1]), _sparse(tile, backend))
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        return f"torch cannot run it here: {str(error).strip().splitlines()[0]}"
    wanted = tile.shape[1] // 4
    if not (product == wanted).all():
        return f"its product of ones is {float(product.flatten()[0])}, expected {wanted}"
    return None


def refusal(weight: Tensor, backend: str) -> str | None:
    """Why ``backend`` cannot take this weight; None where it can. Looks at no values but float32's,
    whose hardware pattern is 1:2.

    Raises:
        UserError: an unknown back-end.
    """
    if backend == "reference":
        return None
    if backend not in TILES:
        raise UserError(
            f"unknown sparse back-end {backend!r}; choose auto, reference, cutlass or cusparselt"
        )
    shape = tuple(weight.shape)
    if weight.dim() != 2:
        return f"takes matrices, got shape {shape}"
    tile = TILES[backend].get(weight.dtype)
    if tile is None:
        known = ", ".join(_name(dtype) for dtype in TILES[backend])
        return f"takes {known}, got {_name(weight.dtype)}; convert the weight to bfloat16"
    if not weight.numel() or any(size % least for size, least in zip(shape, tile, strict=True)):
        return f"takes {_name(weight.dtype)} in multiples of {tile[0]} x {tile[1]}, got {shape}"
    if weight.device.type != "cuda":
        return f"needs a CUDA device, got {weight.device.type}"
    if weight.dtype == torch.float32 and len(violations(weight, ONE_TWO)):
        return "takes float32 as 1:2, this weight is 2:4; convert it to bfloat16"
    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    return _fails_on(weight.device, backend, weight.dtype)


def _seconds(run: Callable[[], Tensor]) -> float:
    """Median time of a run on the current CUDA device, after warming up."""
    times = []
    for timed in [False] * 3 + [True] * TIMED_RUNS:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if timed:
            times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def convert_weight(
    weight: Tensor, backend: Backend = "auto", tokens: Sequence[int] = TIMED_TOKENS
) -> Converted:
    """The weight of a Linear in the form that ``backend`` multiplies.

    Packing happens here, once; the result is for inference and takes no gradient.

    Args:
        weight: (R, C), 2:4 along C already.
        backend: "auto" takes the fastest of those that can run and beat the dense one by 5% at
            each of ``tokens``; a name takes that one.
        tokens: numbers of rows that will be multiplied; only for "auto" on CUDA.

    Raises:
        BackendUnavailable: an explicit back-end that cannot take the weight.
        UserError: more than two nonzeros in a group, NaN, infinities, an unknown back-end.
    """
    if weight.is_floating_point():
        refuse_nonfinite(weight, TWO_FOUR, "the weight to convert")
    refuse_violations(weight, TWO_FOUR)
    dense = weight.detach()
    if backend != "auto":
        reason = refusal(weight, backend)
        if reason is not None:
            raise BackendUnavailable(
                f"sparse back-end {backend} {reason}; use reference, or auto to be told why"
            )
        chosen = dense if backend == "reference" else _sparse(dense, backend)
        return Converted(chosen, backend, {})
    refused = {name: refusal(weight, name) for name in SPARSE_BACKENDS}
    refused = {name: reason for name, reason in refused.items() if reason is not None}
    best = Converted(dense, "reference", refused)
    candidates = [name for name in SPARSE_BACKENDS if name not in refused]
    if candidates:
        with torch.cuda.device(weight.device):
            best = _fastest(dense, candidates, tokens, refused)
    why = "; ".join(f"{name}: {reason}" for name, reason in best.refused.items())
    log.info("sparse: %s for a weight of %s (auto) %s", best.backend, tuple(weight.shape), why)
    return best


def _fastest(
    dense: Tensor, candidates: list[str], tokens: Sequence[int], refused: dict[str, str]
) -> Converted:
    """The candidate that gains most where it gains least, or the dense weight."""
    weights = {"reference": dense} | {name: _sparse(dense, name) for name in candidates}
    gains: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.autocast(dense.device.type, enabled=False):
        for count in tokens:
            x = torch.randn(count, dense.shape[1], dtype=dense.dtype, device=dense.device)
            seconds = {
                name: _seconds(lambda x=x, weight=weight: F.linear(x, weight))
                for name, weight in weights.items()
            }
            for name in candidates:
                gains[name].append(seconds["reference"] / seconds[name])
    best = max(candidates, key=lambda name: min(gains[name]))
    if min(gains[best]) < LEAST_GAIN:
        best = "reference"
    rows = " and ".join(map(str, tokens))
    passed_over = {
        name: f"{' and '.join(f'{gain:.2f}' for gain in gains[name])} times as fast as dense at "
        f"{rows} rows, {best} was taken"
        for name in candidates
        if name != best
    }
    return Converted(weights[best], best, refused | passed_over)
