"""NSA's Triton kernels on a GPU against dense attention and public NSA kernels, within a budget.

    python exp/bench/nsa_gpu.py [--minutes 5] [--only TEXT] [--again] [--list] [--quick]
                                [--third-party DIR]

complete: forward, backward, both and peak memory of the whole function, one document of 1k to 64k
tokens in the paper's shape (64/4 heads of 128, l, d, l', n, w = 32, 16, 64, 16, 512) and packed
documents of 1k to 8k in ARC's (16/2 heads of 64, 32, 16, 32, 8, 128), against SDPA's back-ends
FLASH_ATTENTION (FA2 class) and CUDNN_ATTENTION (FA3 class), flash-attn where it is installed, and
torch's varlen for packed documents. kernels: each kernel beside its roofline. keys first: which way
round the selected branch pays, by heads of a group. decode: one step on full caches. xunhao, fla:
public kernels, from clones in DIR. compiled: the same function by torch.compile. Targets are those
of nsa.md, section 6. bfloat16, random data, everything checked before it is timed: ours against a
reference and itself (nsa_gpu_checks.py), graphs' replays and what torch.compile made against ours,
dense rivals against each other, public NSA kernels against ours.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Arm, Call, Case, Unavailable, Work, graphed
from gpu_run import run
from nsa_gpu_checks import (
    BOUND,
    NAMES,
    agree_all,
    check_documents,
    check_setting,
    output_and_gradients,
)
from nsa_gpu_decode import BACKENDS, decode_case
from nsa_gpu_inputs import (
    ARC,
    PAPER,
    PASSES,
    TINY,
    TINY_ARC,
    Documents,
    Setting,
    passes,
)
from nsa_gpu_kernels import group_case, kernel_case
from nsa_gpu_report import report
from nsa_gpu_rivals import (
    Peers,
    Ready,
    as_fla,
    checked_dense,
    checked_sparse,
    fla,
    flash_attn,
    ours_without_window,
    sdpa,
    varlen,
    xunhao,
)

from tiny_onn_kernels.nsa import kernel

BOTH = PASSES[2]
ARC_TOKENS = 65536
GRAPH_TOKENS = 8192
"""Longest document whose training step is also recorded in a CUDA graph: there launches count."""

K = 1024
TARGETS = {
    "flash": {4 * K: 0.8, 8 * K: 1.47, 16 * K: 2.54, 32 * K: 4.23, 64 * K: 6.55},
    "cudnn": {4 * K: 0.5, 8 * K: 0.9, 16 * K: 1.5, 32 * K: 2.6, 64 * K: 4.0},
    "xunhao": {2 * K: 1.3, 4 * K: 1.5, 8 * K: 2.0, 16 * K: 2.0, 32 * K: 2.0, 64 * K: 2.0},
    "decode": {4 * K: 1.5, 8 * K: 2.4, 16 * K: 3.6, 32 * K: 5.0, 64 * K: 5.8},
}
"""Rival's time over ours, forward+backward (decode: cuDNN's over ours, in CUDA graphs), at least,
by tokens of the document, in the paper's shape."""


def complete_case(setting: Setting, length: int, num_documents: int) -> Case:
    """The complete function against dense attention."""

    def build(device: torch.device) -> Work:
        docs, notes = Documents(setting, (length,) * num_documents, device), {}
        ours = passes(docs.complete, docs.leaves, docs.grad_NHD)
        peers = Peers(2 * BOUND[setting.dtype])
        rivals = {n: functools.partial(sdpa, docs, b, notes) for n, b in BACKENDS.items()}
        extra = {
            "flash-attn 2": functools.partial(flash_attn, docs, "flash_attn"),
            "flash-attn 3": functools.partial(flash_attn, docs, "flash_attn_interface"),
        }
        if num_documents > 1:
            extra["varlen"] = functools.partial(varlen, docs)

        def checked(dense: Mapping[str, Callable[[], Ready]]) -> dict[str, Callable[[], Ready]]:
            return {
                n: functools.partial(checked_dense, n, rival, docs, peers)
                for n, rival in dense.items()
            }

        arms = {f"nsa {word}": Arm(make, ours=True) for word, make in ours.items()}
        arms |= _arms(checked(rivals), PASSES) | _arms(checked(extra), (BOTH,))
        if length <= GRAPH_TOKENS:
            graph = functools.partial(_graph, docs)
            arms[f"nsa {BOTH} graph"] = Arm(graph, ours=True, wrapped=True)
        ratios = {
            f"{word}, {name} over nsa": (f"{name} {word}", f"nsa {word}")
            for name in (*rivals, *extra)
            for word in PASSES
        }
        for name in rivals if length <= GRAPH_TOKENS else ():
            ratios[f"{BOTH}, {name} over nsa graph"] = (f"{name} {BOTH}", f"nsa {BOTH} graph")
        targets = {
            f"{BOTH}, {name} over nsa": TARGETS[name][length]
            for name in rivals
            if setting is PAPER and length in TARGETS[name]
        }
        product = 2 * setting.heads * setting.width * num_documents * length * (length + 1) / 2
        flops = dict(zip(PASSES, (2 * product, 5 * product, 7 * product), strict=True))
        return Work(
            arms,
            lambda: check_setting(setting, device) | check_documents(docs),
            ratios,
            targets,
            lambda seconds: {
                "sdpa": notes,
                "peers": peers.errors,
                "dense tflops": _tflops(rivals, flops, seconds),
            },
        )

    name = f"complete {setting.name} {length}"
    return Case(name, setting.shapes(length, num_documents), build, memory=True, limit_s=4.0)


def _graph(docs: Documents) -> Call:
    """A training step in a CUDA graph, whose replays agree with the step itself."""
    own = docs.cast(docs.setting.dtype)  # the same memory, but leaves of no other graph

    def step(of: Documents) -> Any:
        return torch.autograd.grad(of.complete(), of.leaves, of.grad_NHD)

    def compare(got: Any) -> None:
        agree_all("graph", NAMES[1:], got, step(docs))

    return graphed(functools.partial(step, own), compare)


def _arms(rivals: Mapping[str, Callable[[], Ready]], words: tuple[str, ...]) -> dict[str, Arm]:
    """Passes of rivals, each set up once."""
    arms = {}
    for name, rival in rivals.items():
        ready = functools.cache(rival)
        for word in words:
            arms[f"{name} {word}"] = Arm(functools.partial(_one_pass, ready, word))
    return arms


def _one_pass(ready: Callable[[], Ready], word: str) -> Call:
    forward, leaves, grad, _ = ready()
    return passes(forward, leaves, grad)[word]()


def _tflops(
    rivals: Mapping[str, Any], flops: Mapping[str, float], seconds: Mapping[str, float]
) -> dict[str, float]:
    """What dense attention reaches: whether the rival is a good one."""
    names = [(f"{name} {word}", word) for name in rivals for word in PASSES]
    return {
        name: round(flops[word] / seconds[name] / 1e12, 1)
        for name, word in names
        if name in seconds
    }


def third_party_case(name: str, setting: Setting, length: int, folder: Path | None) -> Case:
    """A public repository's kernels and the same function of ours."""

    def build(device: torch.device) -> Work:
        docs = Documents(setting, (length,), device)
        if name == "fla":
            docs = as_fla(docs)
        words, notes = (PASSES[0], BOTH), {}
        public = {"xunhao": xunhao, "fla": fla}[name]
        theirs = functools.partial(
            checked_sparse, functools.partial(public, folder=folder), docs, notes
        )
        ready = functools.cache(functools.partial(ours_without_window, docs))
        arms = {f"nsa {w}": Arm(functools.partial(_one_pass, ready, w), ours=True) for w in words}
        arms |= _arms({name: theirs}, words)
        ratios = {f"{w}, {name} over nsa": (f"{name} {w}", f"nsa {w}") for w in words}
        wanted = TARGETS.get(name, {})
        targets = {f"{BOTH}, {name} over nsa": wanted[length]} if length in wanted else {}
        check = functools.partial(check_setting, setting, device)
        return Work(arms, check, ratios, targets, lambda seconds: notes)

    shapes = setting.shapes(length, 1)
    return Case(f"{name} {setting.name} {length}", shapes, build, memory=True, limit_s=3.0)


def compiled_case(setting: Setting, length: int) -> Case:
    """The complete function by torch.compile, which merges what lies between the kernels."""

    def build(device: torch.device) -> Work:
        docs = Documents(setting, (length,), device)

        def compiled() -> Call:
            if device.type != "cuda":
                raise Unavailable("torch.compile does not reach into the interpreter")
            attend = torch.compile(docs.attend, fullgraph=True)
            compare_compiled(docs, attend)
            return passes(lambda: attend()[0], docs.leaves, docs.grad_NHD)[BOTH]()

        eager = passes(docs.complete, docs.leaves, docs.grad_NHD)[BOTH]
        arms = {
            f"nsa {BOTH}": Arm(eager, ours=True),
            f"nsa {BOTH} compiled": Arm(compiled, ours=True, wrapped=True),
        }
        ratios = {"eager over compiled": tuple(arms)}
        return Work(arms, lambda: check_documents(docs), ratios)

    return Case(f"compiled {setting.name} {length}", setting.shapes(length, 1), build, limit_s=2.0)


def compare_compiled(docs: Documents, attend: Callable[[], Any]) -> dict[str, float]:
    """Output and gradients of ``attend`` against the kernels' on its choice of blocks, which other
    roundings before may change where two nearly tie. Raises Wrong."""
    out_NHD, index_NKn = attend()
    got = [out_NHD.detach(), *torch.autograd.grad(out_NHD, docs.leaves, docs.grad_NHD)]
    *expected, _ = output_and_gradients(docs, kernel, index_NKn)
    return agree_all("compiled", NAMES, got, expected)


def make_cases(args: argparse.Namespace) -> list[Case]:
    """What is wanted most comes first, since a budget may end the run anywhere."""
    paper, arc = (TINY, TINY_ARC) if args.quick else (PAPER, ARC)
    lengths = (48,) if args.quick else tuple(K * n for n in (8, 64, 4, 16, 32, 2, 1))
    in_arc = (24,) if args.quick else tuple(K * n for n in (8, 4, 2, 1))
    third = (48,) if args.quick else tuple(K * n for n in (8, 16, 4, 32, 64, 2))
    arc_tokens = 48 if args.quick else ARC_TOKENS
    groups, rows = ((2,), (1, 3)) if args.quick else ((8, 4, 16, 2, 1), (1, 16))
    folder = args.third_party
    return [
        *(complete_case(paper, n, 1) for n in lengths),
        *(kernel_case(paper, n) for n in lengths[:2]),
        *(decode_case(paper, b, n, TARGETS["decode"]) for n in sorted(lengths)[-5:] for b in rows),
        *(complete_case(arc, n, arc_tokens // n) for n in in_arc),
        *(group_case(paper, g, lengths[0]) for g in groups),
        *(third_party_case("xunhao", paper, n, folder) for n in third),
        *(group_case(arc, g, lengths[0]) for g in groups),
        *(third_party_case("fla", paper, n, folder) for n in third[:2]),
        kernel_case(arc, in_arc[0]),
        compiled_case(paper, lengths[0]),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--third-party", type=Path, metavar="DIR", help="folder of clones")


if __name__ == "__main__":
    sys.exit(
        run(
            "nsa_gpu",
            __doc__,
            make_cases,
            report,
            minutes=5,
            sources=(
                *("kernels/*.py", "kernels/nsa/*.py", "exp/bench/nsa_gpu*.py"),
                "tiny_onn/model/packed_attention.py",
            ),
            add_options=add_options,
        )
    )
