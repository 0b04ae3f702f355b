"""Where NSA's time goes, kernel by kernel beside its roofline, and which way round selection pays.

The roofline is the larger of two times, of products and of bytes (of device memory, or where keys
come from it of the L2 cache), at the peaks of gpu_roofline.py; beside it that of
kernels/nsa/README.md, with the products' sustained rate instead. Products are those that a kernel
makes, so 7 for the 2 of a forward pass where it makes weights again for queries and for keys.

Shapes: N tokens, H query heads, K key/value heads, D head width, M compressed blocks, n chosen
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_cases import Arm, Case, Work
from gpu_roofline import BYTES_PER_S, FLOPS_PER_S, L2_BYTES_PER_S, SUSTAINED_FLOPS_PER_S
from nsa_gpu_checks import WAYS, check_documents, check_setting, compare_ways, keys_first
from nsa_gpu_inputs import Documents, Setting, passes

from tiny_onn_kernels.nsa import kernel, kernel_band, kernel_select, kernel_selected_plan
from tiny_onn_kernels.nsa.select import overlap_taps

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
    """Operations, bytes and bytes/s of each kernel on one document: computed, not measured."""
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
        found[f"{name} forward"] = (2 * product, 2.0 * (queries + keys), BYTES_PER_S)
        # q, o, do read and dq written, then q and do once more; keys and their gradients
        found[f"{name} backward"] = (7 * product, 6.0 * queries + 6.0 * keys, BYTES_PER_S)
    _, weights = overlap_taps(setting.block, setting.stride, setting.select_block)
    again = len(weights) / (setting.select_block // setting.stride)
    found["choose"] = (
        again * found["compressed forward"][0] / 2,
        queries + size * blocks * kv_heads * width,
        BYTES_PER_S,
    )
    product, groups = found["selected forward"][0] / 2, heads // kv_heads
    if auto_goes_keys_first(setting):  # rows of queries, outputs and gradients, for every pair
        pairs = kv_heads * sum(min(setting.count, t // setting.select_block + 1) for t in tokens)
        row = float(size * groups * width * pairs)
        found["selected forward"] = (2 * product, 3 * row, BYTES_PER_S)
        found["selected backward"] = (5 * product, 4 * row, BYTES_PER_S)
    else:  # keys again for every token and group
        read = 2.0 * size * seen["selected"] * kv_heads * width
        found["selected forward"] = (2 * product, read, L2_BYTES_PER_S)
        found["selected backward"] = (7 * product, read, L2_BYTES_PER_S)
    return found


def against_roofline(
    setting: Setting, length: int, seconds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Achieved TFLOP/s and TB/s of each kernel, its floor in ms and how much of it is reached; both
    again with products at the sustained rate."""
    found = {}
    for name, (operations, moved, rate) in roofline(setting, length).items():
        if name not in seconds:
            continue
        products_s, bytes_s = operations / FLOPS_PER_S, moved / rate
        floor_s = max(products_s, bytes_s)
        sustained_s = max(operations / SUSTAINED_FLOPS_PER_S, bytes_s)
        found[name] = {
            "tflops": round(operations / seconds[name] / 1e12, 2),
            "tbs": round(moved / seconds[name] / 1e12, 3),
            "of": "L2" if rate == L2_BYTES_PER_S else "memory",
            "bound": "products" if products_s > bytes_s else "bytes",
            "floor_ms": round(floor_s * 1e3, 4),
            "reached": round(floor_s / seconds[name], 3),
            "sustained_ms": round(sustained_s * 1e3, 4),
            "sustained_reached": round(sustained_s / seconds[name], 3),
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


def group_case(setting: Setting, groups: int, length: int) -> Case:
    """The selected branch both ways round, as many query heads in groups of ``groups``."""
    heads = max(groups, setting.heads // 4)
    setting = replace(
        setting, name=f"{setting.name} G={groups}", heads=heads, kv_heads=heads // groups
    )

    def build(device: torch.device) -> Work:
        docs = Documents(setting, (length,), device)
        with torch.no_grad():
            index_NKn = docs.attend()[1]
        leaves = docs.leaves[:3]
        forward = partial(kernel.selected_attention, *leaves, index_NKn, docs.layout)
        makers = passes(forward, leaves, docs.grad_NHD)
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
        check = partial(compare_ways, docs, index_NKn)
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
