"""Three ways to learn from self-fed outputs: ours, and two that go back through the generation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import require, wake

from tiny_onn.arc.packing import Layout, SoftTokens, pack
from tiny_onn.arc.task import Pair
from tiny_onn.arc.tokens import encode_pair
from tiny_onn.config.load import load_config
from tiny_onn.losses.alignment import alignment_terms
from tiny_onn.model import tiny_onn
from tiny_onn.model.kv_cache import KVCache
from tiny_onn.model.tiny_onn import TinyONN, build_model
from tiny_onn.training.alignment_batch import align
from tiny_onn.training.excursions import ExcursionSettings, make_excursions, prompt_of


class Way:
    """The three ways to learn from self-fed outputs, on the same documents."""

    def __init__(
        self,
        device: Any,
        count: int,
        size: tuple[int, int],
        double: bool,
        asked: tuple[int, int] | None = None,
    ) -> None:

        torch.manual_seed(0)
        self.config = load_config(["preset=nano", "network=dense"]).model
        self.model = wake(build_model(self.config, count)).to(device).eval()
        self.model.use_backend("sdpa", device)
        if double:
            self.model.double()
        rng = np.random.default_rng(0)
        self.documents = [
            encode_pair(
                Pair(*(rng.integers(0, 10, s).astype(np.uint8) for s in (asked or size, size))),
                task=n,
            )
            for n in range(count)
        ]
        self.device = device

    def arms(self) -> dict[str, Any]:
        return {
            "decoupled": self.decoupled,
            "through the cache": self.through_the_cache,
            "recomputed": self.recomputed,
            "excursion": self.excursion,
        }

    def cache_mib(self) -> float:
        """Keys and values, float32, of prompts and outputs whole."""
        config, tokens = self.config, sum(len(d.tokens) for d in self.documents)
        return tokens * config.layers * 2 * config.kv_heads * config.head_width * 4 / 2**20

    def excursion(self) -> float:
        make_excursions(self.model, self.documents, ExcursionSettings())
        return 0.0

    def _back(self, loss: Any) -> float:
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        return float(loss.detach())

    def decoupled(self) -> float:
        """NLL of the truth on the self-fed prefixes, after its backward."""

        own = make_excursions(self.model, self.documents, ExcursionSettings())
        batch = align(self.documents, own)
        packed, rows_M = batch.batch.to(self.device), batch.rows_M.to(self.device)
        terms = alignment_terms(
            self.model(packed, rows_M).logits_MV,
            packed.targets_N[rows_M],
            batch.truth_M.to(self.device),
            batch.weight_M.to(self.device),
            batch.twin_M.to(self.device),
        )
        self._back(terms.excursion + terms.truth)
        return float(terms.excursion.detach())

    def through_the_cache(self) -> float:
        batch = pack([prompt_of(d) for d in self.documents]).to(self.device)
        tokens_BT, positions_BT3 = self._outputs()
        right, tiny_onn.KVCache = tiny_onn.KVCache, growing_cache()
        try:
            with torch.enable_grad():
                logits_BV, cache = TinyONN.prefill.__wrapped__(self.model, batch, 0)
                loss = logits_BV.new_zeros(())
                for t in range(tokens_BT.shape[1]):
                    target_B = tokens_BT[:, t]
                    loss = loss + F.cross_entropy(logits_BV, target_B, reduction="sum")
                    if t + 1 < tokens_BT.shape[1]:
                        fed_B, soft = mixture(logits_BV, target_B)
                        logits_BV = TinyONN.step.__wrapped__(
                            self.model, fed_B, positions_BT3[:, t], cache, soft
                        )
        finally:
            tiny_onn.KVCache = right
        return self._back(loss)

    def recomputed(self) -> float:
        prompts = pack([prompt_of(d) for d in self.documents]).to(self.device)
        tokens_BT, positions_BT3 = self._outputs()
        count, prompt = len(self.documents), len(prompts.tokens_N) // len(self.documents)
        fed: list[Any] = []  # (tokens_B, soft or None) of every step so far
        loss = torch.zeros((), device=self.device, dtype=self.model.head.weight.dtype)
        for t in range(tokens_BT.shape[1]):
            written = torch.stack([tokens for tokens, _ in fed], 1) if fed else tokens_BT[:, :0]
            batch = longer(prompts, written, positions_BT3[:, :t])
            rows = [
                (
                    soft.rows_S * (prompt + t) + prompt + number,
                    soft.probs_SV,
                )
                for number, (_, soft) in enumerate(fed)
                if soft is not None
            ]
            if rows:
                batch = with_soft(
                    batch,
                    SoftTokens(torch.cat([r for r, _ in rows]), torch.cat([p for _, p in rows])),
                )
            last_B = torch.arange(1, count + 1, device=self.device) * (prompt + t) - 1
            logits_BV = self.model(batch, last_B).logits_MV
            loss = loss + F.cross_entropy(logits_BV, tokens_BT[:, t], reduction="sum")
            fed.append(mixture(logits_BV, tokens_BT[:, t]))
        return self._back(loss)

    def _outputs(self) -> tuple[Any, Any]:
        """int64 (B, T) true output tokens with END and (B, T, 3) their places."""

        first = self.documents[0].prefix_len
        tokens = torch.from_numpy(np.stack([d.tokens[first:] for d in self.documents]))
        places = torch.from_numpy(np.stack([d.positions[first:] for d in self.documents]))
        return tokens.to(self.device), places.to(self.device)


def mixture(logits_BV: Any, target_B: Any) -> tuple[Any, Any]:
    """What feed=soft feeds in the true geometry, with its gradient: tokens, and mixtures where the
    truth is a colour (all rows alike here: the documents have one shape)."""
    if int(target_B[0]) >= 10:
        return target_B, None
    probs_BV = torch.nn.functional.pad(logits_BV[:, :10].softmax(-1), (0, 4))
    rows_B = torch.arange(len(target_B), device=target_B.device)
    return logits_BV[:, :10].argmax(-1), SoftTokens(rows_B, probs_BV)


def growing_cache() -> Any:
    """A cache of documents of one length that joins new keys on, so that a graph goes through."""

    class GrowingCache(KVCache):
        def fill(self, k_NKD: Any, v_NKD: Any, doc_N: Any, column_N: Any) -> None:
            for store, packed in ((self.keys, k_NKD), (self.values, v_NKD)):
                store.append(packed.unflatten(0, (len(self.lengths_B), -1)).transpose(1, 2))

        def start_step(self) -> None:
            self._call = 0

        def append(self, k_BKD: Any, v_BKD: Any) -> tuple[Any, Any]:
            call, self._call = self._call, self._call + 1
            self.keys[call] = torch.cat([self.keys[call], k_BKD.unsqueeze(2)], 2)
            self.values[call] = torch.cat([self.values[call], v_BKD.unsqueeze(2)], 2)
            return self.keys[call], self.values[call]

    return GrowingCache


def longer(prompts: Any, written_BT: Any, positions_BT3: Any) -> Any:
    """The packed prompts, of one length, each with ``written`` behind it."""
    count, steps = written_BT.shape
    prompt = len(prompts.tokens_N) // count
    tokens_BT = torch.cat([prompts.tokens_N.view(count, prompt), written_BT], 1)
    places_BT3 = torch.cat([prompts.positions_N3.view(count, prompt, 3), positions_BT3], 1)
    length = prompt + steps
    device = tokens_BT.device
    layout = Layout(
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32, device=device) * length,
        max_seqlen=length,
        prefix_lens=torch.full((count,), prompt, device=device),
        doc_N=torch.arange(count, device=device).repeat_interleave(length),
        lengths=(length,) * count,
        prefixes=(prompt,) * count,
    )
    return replace(
        prompts,
        tokens_N=tokens_BT.flatten(),
        positions_N3=places_BT3.flatten(0, 1),
        targets_N=torch.full((count * length,), -1, device=device),
        layout=layout,
    )


def with_soft(batch: Any, soft: Any) -> Any:
    return replace(batch, soft=soft)


def check() -> None:
    """In float64 all three ways find the same loss on the self-fed prefixes."""

    way = Way(torch.device("cpu"), 2, (7, 7), double=True)
    found = {name: run() for name, run in way.arms().items() if name != "excursion"}
    first = found["decoupled"]
    require(all(abs(v / first - 1) < 1e-6 for v in found.values()), f"losses differ: {found}")
