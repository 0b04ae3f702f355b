"""One decoding step of NSA on full caches against dense attention over them, with CUDA graphs too.

NSA's step: scores of the compressed cache, choice of blocks, three branches, gates. What both need
(appending to the cache, projections) and what NSA needs once in d steps (phi of one block) is not
in it. Dense: SDPA's back-ends, and two matrix products that read each key once for its group; they
must agree with each other, and every graph's replay with what it recorded.

Shapes: B rows, H query heads, K key/value heads of G, T tokens, C compressed blocks, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import Arm, Call, Case, Unavailable, Work, agree, graphed, same_bits
from nsa_gpu_checks import BOUND
from nsa_gpu_inputs import Setting
from nsa_gpu_rivals import Peers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiny_onn_kernels.nsa import kernel, reference

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Step:
    """Random full caches: keys and values (B, K, T, D), compressed ones (B, K, C, D)."""

    def __init__(self, setting: Setting, rows: int, length: int, device: torch.device) -> None:
        self.setting, self.length = setting, length
        most = kernel.num_compressed(length, setting.block, setting.stride)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=setting.dtype)

        self.q_BHD = normal(rows, setting.heads, setting.width)
        self.cache = [normal(rows, setting.kv_heads, length, setting.width) for _ in range(2)]
        self.compressed = [normal(rows, setting.kv_heads, most, setting.width) for _ in range(2)]
        self.gate_BH3 = normal(rows, setting.heads, 3).sigmoid()
        self.time_B = torch.full((rows,), length - 1, device=device)
        self.count_B = torch.full((rows,), most, device=device)

    def cast(self, dtype: torch.dtype) -> Step:
        """The same numbers in another dtype."""
        other = object.__new__(Step)
        vars(other).update(vars(self))
        other.q_BHD, other.gate_BH3 = self.q_BHD.to(dtype), self.gate_BH3.to(dtype)
        other.cache = [t.to(dtype) for t in self.cache]
        other.compressed = [t.to(dtype) for t in self.compressed]
        return other

    def nsa(self, branches: Any = kernel, index_BKn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output (B, H, D) and the chosen blocks, which can be given."""
        setting, (q_BHD, time_B) = self.setting, (self.q_BHD, self.time_B)
        compressed_BHD, share_BKC = branches.decode_compressed(
            q_BHD, *self.compressed, self.count_B
        )
        if index_BKn is None:
            index_BKn = branches.choose_in_step(
                *(share_BKC, time_B, setting.block, setting.stride, setting.select_block),
                *(-(-self.length // setting.select_block), setting.count),
            )
        selected_BHD = branches.decode_selected(
            q_BHD, *self.cache, index_BKn, time_B, setting.select_block
        )
        window_BHD = branches.decode_window(q_BHD, *self.cache, time_B, setting.window)
        out_BHD = branches.combine(self.gate_BH3, compressed_BHD, selected_BHD, window_BHD)
        return out_BHD.to(q_BHD.dtype), index_BKn

    def check(self) -> dict[str, float]:
        """The same bits twice; the reference in float64 on the same choice of blocks."""
        (got_BHD, index_BKn), again = self.nsa(), self.nsa()
        same_bits("output and chosen blocks", (got_BHD, index_BKn), again)
        exact_BHD, _ = self.cast(torch.float64).nsa(reference, index_BKn)
        bound = BOUND[self.setting.dtype]
        return {"out": agree("decoding step", got_BHD, exact_BHD, bound)}

    def matmul(self) -> Tensor:
        """Softmax attention of each group by two products over the cache."""
        q_BKGD = self.q_BHD.unflatten(1, (self.setting.kv_heads, -1))
        scores_BKGT = q_BKGD @ self.cache[0].mT * self.setting.width**-0.5
        return (scores_BKGT.softmax(dim=-1) @ self.cache[1]).flatten(1, 2)

    def sdpa(self, backend: SDPBackend, notes: dict[str, str]) -> Callable[[], Tensor]:
        """One back-end, heads grouped where it takes them, else keys and values repeated before."""
        q_BH1D, groups = self.q_BHD[:, :, None], self.setting.heads // self.setting.kv_heads
        refusals, cache = [], self.cache
        for way in ("enable_gqa", "repeated keys and values"):
            if way != "enable_gqa":
                cache = [t.repeat_interleave(groups, dim=1) for t in cache]

            def attend(cache: list[Tensor] = cache) -> Tensor:
                gqa = q_BH1D.shape[1] != cache[0].shape[1]
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q_BH1D, *cache, enable_gqa=gqa)

            try:
                attend()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                refusals.append(f"{way}: {str(error).splitlines()[0]}")
                continue
            notes[backend.name] = way
            return attend
        raise Unavailable(" | ".join(refusals))


def decode_case(setting: Setting, rows: int, length: int, targets: Mapping[int, float]) -> Case:
    """One step of ``rows`` caches of ``length`` tokens."""

    def build(device: torch.device) -> Work:
        step, notes = Step(setting, rows, length, device), {}
        bound, peers = BOUND[setting.dtype], Peers(2 * BOUND[setting.dtype])
        makers: dict[str, Callable[[], Call]] = {"matmul": lambda: step.matmul}
        for name, backend in BACKENDS.items():
            makers[name] = partial(step.sdpa, backend, notes)
        makers = {name: partial(_checked, name, make, peers) for name, make in makers.items()}
        makers = {"nsa": lambda: step.nsa} | makers
        arms = {name: Arm(make, ours=name == "nsa") for name, make in makers.items()}
        for name, make in makers.items():
            graph = partial(_graph, f"{name} graph", make, bound)
            arms[f"{name} graph"] = Arm(graph, ours=name == "nsa", wrapped=True)
        ratios = {
            f"{name}{mode} over nsa{mode}": (f"{name}{mode}", f"nsa{mode}")
            for mode in ("", " graph")
            for name in makers
            if name != "nsa"
        }
        wanted = {"cudnn graph over nsa graph": targets[length]} if length in targets else {}
        return Work(
            arms,
            step.check,
            ratios,
            wanted,
            lambda s: {"sdpa": notes, "peers": peers.errors, "tbs": _rates(step, s)},
        )

    shapes = setting.shapes(length, rows)
    return Case(f"decode {setting.name} B={rows} {length}", shapes, build, limit_s=1.0)


def _checked(name: str, make: Callable[[], Call], peers: Peers) -> Call:
    """Dense attention of a step, ready once it agrees with its peers."""
    call = make()
    peers.join(name, ("out",), [call().flatten(1)])
    return call


def _graph(what: str, make: Callable[[], Call], bound: float) -> Call:
    """The call's graph, whose replays agree with the call itself."""
    call = make()

    def outputs() -> Sequence[Tensor]:
        got = call()
        return [got] if isinstance(got, Tensor) else got

    def compare(replayed: Sequence[Tensor]) -> None:
        (out, *index), (expected, *chosen) = replayed, outputs()
        agree(what, out, expected, bound)
        same_bits(f"{what}, chosen blocks", index, chosen)

    return graphed(outputs, compare)


def _rates(step: Step, seconds: Mapping[str, float]) -> dict[str, Any]:
    """TB/s of the keys and values that each must read."""
    setting, rows = step.setting, len(step.q_BHD)
    row_bytes = 2 * rows * setting.kv_heads * setting.width * step.q_BHD.itemsize
    few = setting.count * setting.select_block + setting.window
    read = {"nsa": row_bytes * (few + step.compressed[0].shape[2])}
    return {
        name: round(read.get(name.split()[0], row_bytes * step.length) / s / 1e12, 3)
        for name, s in seconds.items()
    }
