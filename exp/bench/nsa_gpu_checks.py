"""What must hold of NSA's kernels before anything of them is timed.

A small batch against the reference in float64; at the measured size the same bits twice, full
attention where a branch must be it, and the two ways round of the selected branch, which no
reference can check there, against each other.

Shapes: N tokens, B documents of T tokens, H query heads, K key/value heads, D head width, n chosen
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import Wrong, agree, same_bits
from nsa_gpu_inputs import Documents, Setting
from timing import relative_error
from torch import Tensor

from tiny_onn_kernels.nsa import kernel, kernel_selected_plan, reference

BOUND = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Relative RMS error, unless the reference itself, in the same dtype, is off by half as much; twice
that where both sides are rounded."""

NOISY = 5.0
"""Times BOUND for gradients of phi: sums over all tokens, in bfloat16 off by 1.2e-2 themselves."""

WIDE_WINDOW_TOKENS = 8192
"""Longest document on which the window kernel is also asked for full attention."""

NAMES = ("out", "q", "k", "v", "gate", "phi_k.position", "phi_k.inner", "phi_k.outer")
NAMES += ("phi_v.position", "phi_v.inner", "phi_v.outer")

WAYS = {"queries first": False, "keys first": True}


def output_and_gradients(docs: Documents, branches: Any, index_NKn: Tensor | None) -> list[Tensor]:
    """As NAMES says, and the chosen blocks, which can be given."""
    out_NHD, index_NKn = docs.attend(branches, index_NKn)
    grads = torch.autograd.grad(out_NHD, docs.leaves, docs.grad_NHD)
    return [out_NHD.detach(), *grads, index_NKn]


def agree_all(
    what: str, names: Sequence[str], got: Sequence[Tensor], expected: Sequence[Tensor]
) -> dict[str, float]:
    """Relative RMS errors of what is rounded on both sides, by name; raises Wrong."""
    errors = {}
    for name, a, b in zip(names, got, expected, strict=True):
        bound = BOUND[a.dtype] * (NOISY if name.startswith("phi") else 2)
        errors[name] = agree(f"{what}, {name}", a, b, bound)
    return errors


_checked: dict[str, dict[str, float] | Wrong] = {}


def check_setting(setting: Setting, device: torch.device) -> dict[str, float]:
    """Errors of output and gradients against the reference in float64, on the kernels' choice of
    blocks; once a setting and process. Raises Wrong, every time."""
    if setting.name not in _checked:
        try:
            _checked[setting.name] = _compare(setting, device)
        except Wrong as error:
            _checked[setting.name] = error
    found = _checked[setting.name]
    if isinstance(found, Wrong):
        raise Wrong(*found.args)
    return found


def _compare(setting: Setting, device: torch.device) -> dict[str, float]:
    docs = Documents(setting, setting.checked, device)
    *got, index_NKn = output_and_gradients(docs, kernel, None)
    *exact, _ = output_and_gradients(docs.cast(torch.float64), reference, index_NKn)
    *eager, _ = output_and_gradients(docs, reference, index_NKn)
    errors = {}
    for name, a, b, c in zip(NAMES, got, exact, eager, strict=True):
        bound = max(BOUND[setting.dtype], 2 * relative_error(c, b))
        errors[f"{setting.name} {name}"] = agree(f"{name} of {setting.checked} tokens", a, b, bound)
    return errors


def check_documents(docs: Documents) -> dict[str, float]:
    """At the measured size: finite, the same bits twice, and where a branch must be full attention
    it is; keys first and queries first agree where slices are many or documents long; whether
    gradients have the same bits is recorded."""
    found, layout = {}, docs.layout
    q_NHD, k_NKD, v_NKD, *_ = docs.leaves
    with torch.no_grad():
        first, second = (docs.attend() for _ in range(2))
        same_bits("output and chosen blocks", first, second)
        index_NKn = first[1]
        del first, second
        length, bound = docs.lengths[0], 2 * BOUND[docs.setting.dtype]  # both are rounded
        covered = length <= docs.setting.count * docs.setting.select_block
        full_NHD = None
        if covered or length <= WIDE_WINDOW_TOKENS:
            full_NHD = full_attention(docs)
        if covered:
            out_NHD = kernel.selected_attention(q_NHD, k_NKD, v_NKD, index_NKn, layout)
            found["selected is full"] = agree("selected, all blocks", out_NHD, full_NHD, bound)
        if length <= WIDE_WINDOW_TOKENS:
            wide = docs.lay_out(length, q_NHD.device)
            out_NHD = kernel.window_attention(q_NHD, k_NKD, v_NKD, wide)
            found["window is full"] = agree("window of w = T", out_NHD, full_NHD, bound)
        del full_NHD
    grads = [torch.autograd.grad(docs.complete(), docs.leaves, docs.grad_NHD) for _ in range(2)]
    if not all(bool(torch.isfinite(t).all()) for t in grads[0]):
        raise Wrong("gradients: not finite")
    equal = [torch.equal(a, b) for a, b in zip(*grads, strict=True)]
    del grads
    found["gradients with the same bits twice"] = sum(equal) / len(equal)
    if goes_both_ways(docs) and (num_slices(docs) > 1 or length >= docs.setting.ways_from):
        found |= compare_ways(docs, index_NKn)
    return found


def full_attention(docs: Documents) -> Tensor:
    """Causal attention of documents of one length by torch, any back-end: (N, H, D)."""
    setting, shape = docs.setting, (len(docs.lengths), docs.lengths[0])
    q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in docs.leaves[:3])
    gqa = setting.heads != setting.kv_heads
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(0, 1)


def num_slices(docs: Documents) -> int:
    """Of the tokens, one after the other where the selected branch goes keys first."""
    q_NHD, _, v_NKD = docs.leaves[:3]
    return -(
        -len(q_NHD) // kernel_selected_plan.tokens_of_a_slice(q_NHD, v_NKD, docs.setting.count)
    )


@contextmanager
def keys_first(wanted: bool) -> Iterator[None]:
    """The selected branch block by block, or token by token, whatever would move less."""
    before = kernel_selected_plan.KEYS_FIRST_SHARE
    kernel_selected_plan.KEYS_FIRST_SHARE = math.inf if wanted else 0.0
    try:
        yield
    finally:
        kernel_selected_plan.KEYS_FIRST_SHARE = before


def goes_both_ways(docs: Documents) -> bool:
    """Whether keys first is possible: not with blocks that are too wide for a program."""
    with keys_first(True):
        return kernel_selected_plan.goes_keys_first(*docs.leaves[:3], docs.setting.select_block)


def compare_ways(docs: Documents, index_NKn: Tensor) -> dict[str, float]:
    """The selected branch on that choice of blocks, keys first held against queries first: output
    and gradients; slices: of keys first. Raises Wrong, also where there is one way alone.

    Both have their keys' gradients by keys, but only keys first cuts the tokens into slices.
    """
    if not goes_both_ways(docs):
        raise Wrong("keys first: not possible with blocks of this width")
    both, leaves = [], docs.leaves[:3]
    for wanted in WAYS.values():
        with keys_first(wanted):
            out_NHD = kernel.selected_attention(*leaves, index_NKn, docs.layout)
            both.append([out_NHD.detach(), *torch.autograd.grad(out_NHD, leaves, docs.grad_NHD)])
            del out_NHD
    errors = agree_all("keys first against queries first", NAMES[:4], *both[::-1])
    found = {f"keys first, {name}": error for name, error in errors.items()}
    return found | {"keys first, slices": float(num_slices(docs))}
