"""Where NSA's time goes, kernel by kernel beside its roofline, and which way round selection pays.

The roofline is that of kernels/nsa/README.md: products at 600 TFLOP/s, bytes at 4.8 TB/s (device
memory; at 5.5 TB/s where keys come from the L2 cache), the larger of the two times. Products are
those that a kernel makes, so 7 for the 2 of a forward pass where it makes weights again for queries
and for keys.

Shapes: N tokens, H query heads, K key/value heads, D head width, M compressed blocks, n chosen
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from gpu_cases import Arm, Case, Work, agree
from nsa_gpu_inputs import BOUND, Documents, Setting, check_documents, check_setting, passes

from tiny_onn_kernels.nsa import kernel, kernel_band, kernel_select, kernel_selected_plan
from tiny_onn_kernels.nsa.select import overlap_taps

TFLOPS, MEMORY_TBS, L2_TBS = 600.0, 4.8, 5.5
CHECKED_GROUP_TOKENS = 300
Makers = dict[str, Callable[[], Callable[[], Any]]]


def _kernels(docs: Documents) -> Makers:
    """Forward and backward of each part of the complete function, by name."""
    setting, layout = docs.setting, docs.layout
    q_NHD, k_NKD, v_NKD, logits_NH3, *phi = docs.leaves
    with torch.no_grad():
        k_MKD, v_MKD = (t.requires_grad_() for t in docs.compressed())
        compressed_NHD, index_NKn = kernel.attend_compressed_and_choose(
            q_NHD, k_MKD, v_MKD, layout, setting.count
        )
        _, lse_NH = kernel_band.band(q_NHD, k_MKD, v_MKD, *layout.compressed_range)
    branches_NHD = [torch.randn_like(compressed_NHD).requires_grad_() for _ in range(3)]
    q, lse = q_NHD.detach(), lse_NH.detach()
    sizes = (layout.tile, layout.block, layout.stride, layout.select_block)
    times = (layout.time_N, layout.end_N, *layout.compressed_range)
    parts: dict[str, tuple[Callable[[], Any], list[torch.Tensor], torch.Tensor]] = {
        "phi": (
            lambda: torch.stack(docs.compressed()),
            [k_NKD, v_NKD, *phi],
            torch.randn_like(torch.stack([k_MKD, v_MKD])),
        ),
        "compressed": (
            lambda: kernel.compressed_attention(q_NHD, k_MKD, v_MKD, layout)[0],
            [q_NHD, k_MKD, v_MKD],
            docs.grad_NHD,
        ),
        "selected": (
            lambda: kernel.selected_attention(q_NHD, k_NKD, v_NKD, index_NKn, layout),
            [q_NHD, k_NKD, v_NKD],
            docs.grad_NHD,
        ),
        "window": (
            lambda: kernel.window_attention(q_NHD, k_NKD, v_NKD, layout),
            [q_NHD, k_NKD, v_NKD],
            docs.grad_NHD,
        ),
        "gates": (
            lambda: kernel.combine(logits_NH3.sigmoid(), *branches_NHD),
            [logits_NH3, *branches_NHD],
            docs.grad_NHD,
        ),
    }
    made: Makers = {}
    for name, part in parts.items():
        makers = passes(*part)
        made |= {f"{name} {word}": makers[word] for word in ("forward", "backward")}
    made["choose"] = lambda: (
        lambda: kernel_select.choose(
            *(q, k_MKD.detach(), lse, layout.tiles.blocks.first_row_M),
            *(*times, *sizes, layout.most_select_blocks, setting.count),
        )
    )
    made["inverse index"] = lambda: lambda: kernel.invert_index(index_NKn, layout)
    return made


def auto_goes_keys_first(setting: Setting) -> bool:
    """What the selected branch does when nobody asks."""
    q_NHD, k_NKD = (
        torch.empty(1, heads, setting.width, dtype=setting.dtype, device="meta")
        for heads in (setting.heads, setting.kv_heads)
    )
    return kernel_selected_plan.goes_keys_first(q_NHD, k_NKD, k_NKD, setting.select_block)


def roofline(setting: Setting, length: int) -> dict[str, tuple[float, float, float]]:
    """Operations, bytes and TB/s of each kernel on one document: computed, not measured."""
    size = 2 if setting.dtype == torch.bfloat16 else 4
    heads, kv_heads, width = setting.heads, setting.kv_heads, setting.width
    blocks = kernel.num_compressed(length, setting.block, setting.stride)
    tokens = range(length)
    seen = {  # pairs of a token and a key
        "compressed": sum(length - i * setting.stride - setting.block + 1 for i in range(blocks)),
        "selected": sum(min(setting.count * setting.select_block, t + 1) for t in tokens),
        "window": sum(min(setting.window, t + 1) for t in tokens),
    }
    rows = {"compressed": blocks, "selected": length, "window": length}
    queries, found = size * length * heads * width, {}
    for name, pairs in seen.items():
        keys = size * rows[name] * kv_heads * width
        product = 2.0 * heads * width * pairs
        found[f"{name} forward"] = (2 * product, 2.0 * (queries + keys), MEMORY_TBS)
        # q, o, do read and dq written, then q and do once more; keys and their gradients
        found[f"{name} backward"] = (7 * product, 6.0 * queries + 6.0 * keys, MEMORY_TBS)
    _, weights = overlap_taps(setting.block, setting.stride, setting.select_block)
    again = len(weights) / (setting.select_block // setting.stride)
    found["choose"] = (
        again * found["compressed forward"][0] / 2,
        queries + size * blocks * kv_heads * width,
        MEMORY_TBS,
    )
    product, groups = found["selected forward"][0] / 2, heads // kv_heads
    if auto_goes_keys_first(setting):  # rows of queries, outputs and gradients, for every pair
        pairs = kv_heads * sum(min(setting.count, t // setting.select_block + 1) for t in tokens)
        row = float(size * groups * width * pairs)
        found["selected forward"] = (2 * product, 3 * row, MEMORY_TBS)
        found["selected backward"] = (5 * product, 4 * row, MEMORY_TBS)
    else:  # keys again for every token and group
        read = 2.0 * size * seen["selected"] * kv_heads * width
        found["selected forward"] = (2 * product, read, L2_TBS)
        found["selected backward"] = (7 * product, read, L2_TBS)
    return found


def against_roofline(
    setting: Setting, length: int, seconds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Achieved TFLOP/s and TB/s of each kernel, its floor in ms and how much of it is reached."""
    found = {}
    for name, (operations, moved, rate) in roofline(setting, length).items():
        if name not in seconds:
            continue
        floor_s = max(operations / TFLOPS, moved / rate) / 1e12
        found[name] = {
            "tflops": round(operations / seconds[name] / 1e12, 2),
            "tbs": round(moved / seconds[name] / 1e12, 3),
            "of": "L2" if rate == L2_TBS else "memory",
            "bound": "products" if operations / TFLOPS > moved / rate else "bytes",
            "floor_ms": round(floor_s * 1e3, 4),
            "reached": round(floor_s / seconds[name], 3),
        }
    return found


def kernel_case(setting: Setting, length: int) -> Case:
    """Every kernel of one document."""

    def build(device: torch.device) -> Work:
        docs = Documents(setting, (length,), device)
        return Work(
            arms={name: Arm(make, ours=True) for name, make in _kernels(docs).items()},
            check=lambda: check_setting(setting, device) | check_documents(docs),
            derive=lambda seconds: against_roofline(setting, length, seconds),
        )

    name = f"kernels {setting.name} {length}"
    return Case(name, setting.shapes(length, 1), build, limit_s=2.0)


@contextmanager
def keys_first(wanted: bool) -> Iterator[None]:
    """The selected branch block by block, or token by token, whatever would move less."""
    before = kernel_selected_plan.KEYS_FIRST_SHARE
    kernel_selected_plan.KEYS_FIRST_SHARE = math.inf if wanted else 0.0
    try:
        yield
    finally:
        kernel_selected_plan.KEYS_FIRST_SHARE = before


WAYS = {"queries first": False, "keys first": True}


def group_case(setting: Setting, groups: int, length: int) -> Case:
    """The selected branch both ways round, as many query heads in groups of ``groups``."""
    heads = max(groups, setting.heads // 4)
    setting = replace(
        setting, name=f"{setting.name} G={groups}", heads=heads, kv_heads=heads // groups
    )

    def selected(docs: Documents, index_NKn: torch.Tensor) -> Callable[[], torch.Tensor]:
        tensors = docs.leaves[:3]
        return lambda: kernel.selected_attention(*tensors, index_NKn, docs.layout)

    def choice(docs: Documents) -> torch.Tensor:
        with torch.no_grad():
            return docs.attend()[1]

    def build(device: torch.device) -> Work:
        docs = Documents(setting, (length,), device)

        def check() -> dict[str, float]:
            small = Documents(setting, (min(length, CHECKED_GROUP_TOKENS),), device)
            index_NKn, both = choice(small), []
            for wanted in WAYS.values():
                with keys_first(wanted):
                    out_NHD = selected(small, index_NKn)()
                    grads = torch.autograd.grad(out_NHD, small.leaves[:3], small.grad_NHD)
                both.append([out_NHD, *grads])
            bound = 2 * BOUND[setting.dtype]  # both are rounded
            names = ("out", "q", "k", "v")
            return {
                name: agree(f"{name}, keys first and queries first", a, b, bound)
                for name, a, b in zip(names, *both, strict=True)
            }

        index_NKn = choice(docs)
        forward = selected(docs, index_NKn)
        makers = passes(forward, docs.leaves[:3], docs.grad_NHD)
        arms = {
            f"{way} {word}": Arm(_held_to(wanted, makers[word]), ours=True)
            for way, wanted in WAYS.items()
            for word in ("forward", "forward+backward")
        }
        ratios = {
            f"{word}, queries first over keys first": tuple(f"{way} {word}" for way in WAYS)
            for word in ("forward", "forward+backward")
        }
        auto = {"auto": "keys first" if auto_goes_keys_first(setting) else "queries first"}
        return Work(arms, check, ratios, derive=lambda seconds: auto)

    return Case(f"keys first {setting.name} {length}", setting.shapes(length, 1), build, True, 2.0)


def _held_to(wanted: bool, make: Callable[[], Callable[[], Any]]) -> Any:
    """``make``, its call always one way round."""

    def made() -> Callable[[], Any]:
        call = make()

        def held() -> Any:
            with keys_first(wanted):
                return call()

        return held

    return made
