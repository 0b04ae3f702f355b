"""Batched greedy decoding with a KV cache, by default under the grammar of output grids.

Prompts are decoded shortest first in batches of ``batch_tokens`` cache tokens. Finished outputs
leave their batch.

The log-likelihood of an output is the sum of the model's own log-probabilities of its tokens: the
softmax over all 14 tokens *before* the grammar masks any. Forced structure tokens and END
contribute theirs too, so that an output the model finds badly shaped scores badly.

Shapes: B outputs being written, V vocabulary, G prompts of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tiny_onn.arc.packing import pack
from tiny_onn.arc.task import Grid
from tiny_onn.arc.tokens import START, Document, GridDecodeError, decode_grid
from tiny_onn.inference.excursion import Precision, autocast, excursion
from tiny_onn.inference.grammar import MAX_NEW_TOKENS, OutputState, output_length
from tiny_onn.inference.size_rule import Size

LEAVE_SHARE = 0.25
"""Finished outputs leave once they are this share of the batch."""

CUDA_CHECK_STEPS = 16
"""Steps between looks at what is finished; on CUDA every look waits for the device."""


class Decoder(Protocol):
    """What decoding asks of a model (an ``nn.Module``)."""

    def prefill(self, batch: Any, max_new_tokens: int) -> tuple[Tensor, Any]: ...

    def step(self, tokens_B: Tensor, positions_B3: Tensor, cache: Any) -> Tensor: ...


@dataclass(frozen=True)
class Generation:
    """One decoded output.

    grid: None if ``tokens`` spell none; failure says why. tokens: int64 (T,) with END, if it came.
    logprob: summed log-probability in nats (see the module's docstring).
    """

    grid: Grid | None
    tokens: np.ndarray
    logprob: float
    failure: str | None = None


def expected_new_tokens(prompt: Document, size: Size | None) -> int:
    """Exact with a fixed size; else as many tokens as the query's own grid takes."""
    if size is not None:
        return output_length(size)
    query = len(prompt.tokens) - int(np.flatnonzero(prompt.tokens == START)[-1])
    return min(query, MAX_NEW_TOKENS)


def plan_batches(
    prompts: Sequence[Document], sizes: Sequence[Size | None], batch_tokens: int
) -> list[list[int]]:
    """Indices of the prompts, shortest first, cut so that no batch's cache exceeds its budget.

    A prompt that exceeds ``batch_tokens`` alone gets a batch of its own.
    """
    room = [expected_new_tokens(p, s) for p, s in zip(prompts, sizes, strict=True)]
    total = [len(p.tokens) + r for p, r in zip(prompts, room, strict=True)]
    batches: list[list[int]] = []
    longest_prompt = longest_room = 0
    for i in sorted(range(len(prompts)), key=lambda i: (total[i], room[i], i)):
        prompt_with_i = max(longest_prompt, len(prompts[i].tokens))
        room_with_i = max(longest_room, room[i])
        if batches and (len(batches[-1]) + 1) * (prompt_with_i + room_with_i) <= batch_tokens:
            batches[-1].append(i)
            longest_prompt, longest_room = prompt_with_i, room_with_i
        else:
            batches.append([i])
            longest_prompt, longest_room = len(prompts[i].tokens), room[i]
    return batches


def generate(
    model: Decoder,
    prompts: Sequence[Document],
    sizes: Sequence[Size | None] | None = None,
    *,
    grammar: bool = True,
    batch_tokens: int = 16384,
    precision: Precision = "fp32",
) -> list[Generation]:
    """Decode every prompt greedily, in the order given.

    Args:
        model: an ``nn.Module`` with ``prefill`` and ``step``; runs on its own device.
        prompts: documents that end in the query's SEP.
        sizes: (height, width) an output must have, or None; needs ``grammar``.
        grammar: False lets the model write anything; what is no grid becomes a failure.
        batch_tokens: cache tokens of a batch (longest prompt plus expected output, times rows).
        precision: bf16 autocast or fp32.
    """
    done: dict[int, Generation] = {}
    for indices, generations in generate_batches(
        model, prompts, sizes, grammar=grammar, batch_tokens=batch_tokens, precision=precision
    ):
        done.update(zip(indices, generations, strict=True))
    return [done[i] for i in range(len(prompts))]


def generate_batches(
    model: Decoder,
    prompts: Sequence[Document],
    sizes: Sequence[Size | None] | None = None,
    *,
    grammar: bool = True,
    batch_tokens: int = 16384,
    precision: Precision = "fp32",
) -> Iterator[tuple[list[int], list[Generation]]]:
    """:func:`generate`, batch by batch: indices of the prompts and their generations."""
    chosen = [None] * len(prompts) if sizes is None else list(sizes)
    assert grammar or not any(chosen), "a fixed size needs the grammar"
    for indices in plan_batches(prompts, chosen, batch_tokens):
        with excursion(model) as device, autocast(device, precision):
            batch = _BatchDecoder(
                model, [prompts[i] for i in indices], [chosen[i] for i in indices], grammar, device
            )
            generations = batch.run()
        yield indices, generations


class _BatchDecoder:
    """One batch from its prompts to its generations. ``alive_B`` maps rows to prompts."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Document],
        sizes: Sequence[Size | None],
        grammar: bool,
        device: torch.device,
    ) -> None:
        self.model = model
        self.check_steps = CUDA_CHECK_STEPS if device.type == "cuda" else 1
        self.most_tokens = max(output_length(s) if s else MAX_NEW_TOKENS for s in sizes)
        batch = pack(prompts).to(device)
        self.alive_B = torch.tensor(batch.order, device=device)
        self.state = OutputState([sizes[i] for i in batch.order], grammar, device)
        self.tokens_GT = torch.full((len(prompts), self.most_tokens), -1, device=device)
        self.logprob_G = torch.zeros(len(prompts), dtype=torch.float64, device=device)
        self.logits_BV, self.cache = model.prefill(batch, self.most_tokens)

    def run(self) -> list[Generation]:
        for step in range(self.most_tokens):
            self._write(step)
            check = (step + 1) % self.check_steps == 0
            if step + 1 == self.most_tokens or (check and not self._let_finished_leave()):
                break
            self.logits_BV = self.model.step(self.tokens_B, self.positions_B3, self.cache)
        return self._collect()

    def _write(self, step: int) -> None:
        """Choose every row's token number ``step`` and note it, with its likelihood."""
        tokens_B = self.tokens_B = self.state.choose(self.logits_BV)
        self.positions_B3 = self.state.positions()
        logprob_BV = self.logits_BV.double().log_softmax(dim=-1)
        logprob_B = logprob_BV.gather(-1, tokens_B[:, None]).squeeze(-1)
        open_B = ~self.state.done_B
        self.logprob_G.index_add_(0, self.alive_B, torch.where(open_B, logprob_B, 0.0))
        self.tokens_GT[self.alive_B, step] = torch.where(open_B, tokens_B, -1)
        self.state.advance(tokens_B)

    def _let_finished_leave(self) -> bool:
        """Drop finished rows once they are many; False when none is left to write."""
        done_B = self.state.done_B
        finished = int(done_B.sum())
        if finished == len(done_B):
            return False
        if finished >= LEAVE_SHARE * len(done_B):
            index_B = torch.nonzero(~done_B).squeeze(-1)
            self.state.keep(index_B)
            self.cache.keep(index_B)
            self.alive_B = self.alive_B[index_B]
            self.tokens_B, self.positions_B3 = self.tokens_B[index_B], self.positions_B3[index_B]
        return True

    def _collect(self) -> list[Generation]:
        tokens_GT, logprob_G = self.tokens_GT.cpu().numpy(), self.logprob_G.tolist()
        return [
            _finish(row[row >= 0], logprob)
            for row, logprob in zip(tokens_GT, logprob_G, strict=True)
        ]


def _finish(tokens: np.ndarray, logprob: float) -> Generation:
    if not np.isfinite(logprob):
        return Generation(None, tokens, logprob, "the model's logits are not finite")
    try:
        return Generation(decode_grid(tokens), tokens, logprob)
    except GridDecodeError as error:
        return Generation(None, tokens, logprob, str(error))
