"""What NSA is measured against: dense attention, and public NSA kernels where they are at hand.

A rival is a function without arguments that sets up, raises Unavailable where it cannot run, and
returns what is Ready. Dense ones are given queries, keys and values alone, and must agree with the
first of them that runs.

Public kernels come from clones in the folder of ``--third-party`` (measured, never kept here), and
are compared with the same function of ours: mean pooling, compressed and selected branch, two
gates, no window (XunhaoLai's ops have none, FLA's needs flash-attn). XunhaoLai's
(native-sparse-attention-triton) at our l, d, l', n; FLA's (flash-linear-attention) at l = d = l',
all that it has, with 16 or more heads of a group.

Shapes: N tokens, B documents of T tokens, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_cases import NotAtHand, Unavailable, agree
from nsa_gpu_inputs import Documents
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiny_onn.model.packed_attention import torch_varlen
from tiny_onn_kernels.nsa import kernel

PROBED_TOKENS = 64
DENSE_NAMES, SPARSE_NAMES = ("out", "q", "k", "v"), ("out", "q", "k", "v", "gate")
COVERED_BOUND, NEAR_TIES_BOUND = 5e-2, 0.3
"""Of public NSA kernels, which round more often: where all blocks are chosen, and where near ties
may be chosen differently."""


class Ready(NamedTuple):
    """What passes are made of; packed: an output as (N, H, D)."""

    forward: Callable[[], Any]
    leaves: Sequence[Tensor]
    grad: Tensor
    packed: Callable[[Tensor], Tensor] = lambda out: out


def packed_results(ready: Ready, docs: Documents) -> list[Tensor]:
    """Output (N, H, D) and gradients in the shapes of ``docs``: of heads that were repeated the
    sum."""
    out = ready.forward()
    found = [ready.packed(out.detach())]
    for grad, leaf in zip(
        torch.autograd.grad(out, ready.leaves, ready.grad), docs.leaves, strict=False
    ):
        repeated = grad.shape != leaf.shape
        found.append(grad.unflatten(1, (leaf.shape[1], -1)).sum(dim=2) if repeated else grad)
    return found


class Peers:
    """Programs for one function of which none is the truth: all must agree with the first."""

    def __init__(self, bound: float) -> None:
        self.bound, self.first = bound, ("", [])
        self.errors: dict[str, float] = {}

    def join(self, name: str, names: Sequence[str], results: Sequence[Tensor]) -> None:
        """Raises Wrong."""
        if not self.first[0]:
            self.first = (name, results)
            return
        for what, a, b in zip(names, results, self.first[1], strict=True):
            title = f"{name} against {self.first[0]}, {what}"
            self.errors[title] = agree(title, a, b, self.bound)


def checked_dense(name: str, rival: Callable[[], Ready], docs: Documents, peers: Peers) -> Ready:
    """Dense attention, ready once it agrees with its peers."""
    ready = rival()
    peers.join(name, DENSE_NAMES, packed_results(ready, docs))
    return ready


def checked_sparse(
    rival: Callable[[Documents], Ready], docs: Documents, notes: dict[str, float]
) -> Ready:
    """A public NSA kernel, ready once it does what ours does without window.

    Outputs and gradients on documents so short that all blocks are chosen; at the measured length
    the output, where near ties may be chosen differently, within a wide bound.
    """
    setting, device = docs.setting, docs.grad_NHD.device
    short = Documents(setting, (setting.count * setting.select_block,), device)
    both = [packed_results(make(short), short) for make in (rival, ours_without_window)]
    for name, a, b in zip(SPARSE_NAMES, *both, strict=True):
        notes[f"all blocks, {name}"] = agree(f"all blocks chosen, {name}", a, b, COVERED_BOUND)
    ready = rival(docs)
    with torch.no_grad():
        got, expected = ready.forward(), ours_without_window(docs).forward()
    notes["relative RMS difference"] = agree("out", got, expected, NEAR_TIES_BOUND)
    return ready


def _batched(docs: Documents, *tensors: Tensor) -> list[Tensor]:
    """Views (B, H, T, D) of packed tensors."""
    shape = (len(docs.lengths), docs.lengths[0])
    return [t.unflatten(0, shape).transpose(1, 2) for t in tensors]


def _packed(out_BHTD: Tensor) -> Tensor:
    return out_BHTD.transpose(1, 2).flatten(0, 1)


def _refusal(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> str | None:
    """Why torch does not run ``call`` forward and backward; None if it does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.autograd.grad(call().sum(), leaves)
        except RuntimeError as error:
            reasons = [str(warning.message).splitlines()[0] for warning in caught]
            return "; ".join([str(error).splitlines()[0], *reasons])
    return None


def sdpa(docs: Documents, backend: SDPBackend, notes: dict[str, str]) -> Ready:
    """One back-end of SDPA: grouped heads where it takes them, or keys and values repeated before
    anything is timed; ``notes`` says which."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    leaves, groups = docs.leaves[:3], docs.setting.heads // docs.setting.kv_heads
    refusals = []
    for way in ("enable_gqa", "repeated keys and values"):
        if way != "enable_gqa":
            leaves = [leaves[0], *(t.detach().repeat_interleave(groups, 1) for t in leaves[1:])]
            leaves = [t.requires_grad_() for t in leaves]
        few = [t[:, :, :PROBED_TOKENS].detach().requires_grad_() for t in _batched(docs, *leaves)]
        why = _refusal(lambda few=few: attend(*few), few)
        if why is None:
            notes[backend.name] = way
            forward = partial(lambda leaves: attend(*_batched(docs, *leaves)), leaves)
            return Ready(forward, leaves, *_batched(docs, docs.grad_NHD), _packed)
        refusals.append(f"{way}: {why}")
    raise Unavailable(" | ".join(refusals))


def varlen(docs: Documents) -> Ready:
    """torch's variable-length attention, as the model calls it (it repeats keys and values)."""
    if not docs.grad_NHD.is_cuda:
        raise Unavailable("torch.nn.attention.varlen needs CUDA")
    try:
        attend = torch_varlen()
    except ImportError as error:
        raise Unavailable(f"torch.nn.attention.varlen: {error}") from error
    cu_B1 = torch.tensor([0, *docs.lengths], device=docs.grad_NHD.device).cumsum(0).int()
    lengths = (cu_B1, cu_B1, max(docs.lengths), max(docs.lengths))
    leaves = docs.leaves[:3]
    return Ready(lambda: attend(*leaves, *lengths, True), leaves, docs.grad_NHD)


def flash_attn(docs: Documents, module: str) -> Ready:
    """flash-attn 2 (``flash_attn``) or 3 (``flash_attn_interface``), if installed."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")
    attend = importlib.import_module(module).flash_attn_func
    shape = (len(docs.lengths), docs.lengths[0])

    def forward() -> Tensor:
        out = attend(*(t.unflatten(0, shape) for t in docs.leaves[:3]), causal=True)
        return out[0] if isinstance(out, tuple) else out  # 3 gives log-sum-exps too

    grad = docs.grad_NHD.unflatten(0, shape)
    return Ready(forward, docs.leaves[:3], grad, lambda out: out.flatten(0, 1))


def ours_without_window(docs: Documents) -> Ready:
    """Mean pooling, compressed and selected branch, two gates."""
    q_NHD, k_NKD, v_NKD, logits_NH3 = docs.leaves[:4]
    layout, count = docs.layout, docs.setting.count

    def forward() -> Tensor:
        pooled = [kernel.take_blocks(t, layout).mean(dim=1) for t in (k_NKD, v_NKD)]
        gates = logits_NH3.sigmoid()[..., None].unbind(dim=2)
        out_NHD, index_NKn = kernel.attend_compressed_and_choose(q_NHD, *pooled, layout, count)
        selected_NHD = kernel.selected_attention(q_NHD, k_NKD, v_NKD, index_NKn, layout)
        return gates[0] * out_NHD + gates[1] * selected_NHD

    return Ready(forward, docs.leaves[:4], docs.grad_NHD)


def _third_party(folder: Path | None, clone: str, module: str) -> Any:
    """``module`` of a clone somewhere below ``folder``."""
    if folder is None or not folder.is_dir():
        raise NotAtHand(f"not at hand: --third-party names no folder with a clone of {clone}")
    found = sorted(folder.glob(f"*/{module.split('.')[0]}"))
    if not found:
        raise NotAtHand(f"not at hand: no clone of {clone} in {folder}")
    if str(found[0].parent) not in sys.path:
        sys.path.append(str(found[0].parent))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{clone} cannot be imported: {error}") from error


def xunhao(docs: Documents, folder: Path | None) -> Ready:
    """XunhaoLai's ops, one after the other as that repository's module calls them."""
    module = "native_sparse_attention.ops"
    ops = _third_party(folder, "XunhaoLai/native-sparse-attention-triton", module)
    q_NHD, k_NKD, v_NKD, logits_NH3 = docs.leaves[:4]
    setting, longest = docs.setting, max(docs.lengths)
    cu_B1 = torch.tensor([0, *docs.lengths], device=q_NHD.device).cumsum(0).int()
    sizes = (setting.block, setting.stride)
    most = kernel.num_compressed(longest, *sizes)

    def forward() -> Tensor:
        k_MKD, compressed_cu_B1 = ops.avgpool_compress(k_NKD, None, cu_B1, *sizes, None)
        v_MKD, _ = ops.avgpool_compress(v_NKD, None, cu_B1, *sizes, None)
        blocks = (setting.select_block, setting.count)
        lengths = (cu_B1, compressed_cu_B1, longest, most)
        out_NHD, index_KNn = ops.compressed_attention(
            q_NHD, k_MKD, v_MKD, *sizes, *blocks, *lengths
        )
        selected_NHD = ops.topk_sparse_attention(
            q_NHD, k_NKD, v_NKD, index_KNn, setting.select_block, cu_B1
        )
        gates = logits_NH3.sigmoid()[..., None].unbind(dim=2)
        return gates[0] * out_NHD + gates[1] * selected_NHD

    return Ready(forward, docs.leaves[:4], docs.grad_NHD)


def fla(docs: Documents, folder: Path | None) -> Ready:
    """FLA's parallel_nsa without a window; ``docs`` has l = d = l'."""
    attend = _third_party(folder, "fla-org/flash-linear-attention", "fla.ops.nsa").parallel_nsa
    q_NHD, k_NKD, v_NKD, logits_NH3 = docs.leaves[:4]

    def forward() -> Tensor:  # one document, so no offsets
        gates = logits_NH3.sigmoid()[None].unbind(dim=-1)
        return attend(
            *(q_NHD[None], k_NKD[None], v_NKD[None]),
            g_cmp=gates[0],
            g_slc=gates[1],
            block_counts=docs.setting.count,
            block_size=docs.setting.select_block,
        )[0]

    return Ready(forward, docs.leaves[:4], docs.grad_NHD)


def as_fla(docs: Documents) -> Documents:
    """The same heads and tokens with l = d = l'."""
    long = docs.setting.select_block
    setting = replace(docs.setting, block=long, stride=long)
    return Documents(setting, docs.lengths, docs.grad_NHD.device)
