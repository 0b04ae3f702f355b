"""Keys and values of the tokens decoded so far, one row a document.

Shapes: B documents, K key/value heads, T tokens of room, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.model.token_context import TokenHistory

GROWTH = 64
"""Tokens of room added when the buffers are full."""


class KVCache:
    """Per attention call (block and loop) rotated keys and values, (B, K, T, D) each.

    Rows may hold different numbers of tokens (``lengths_B``). Room grows by GROWTH tokens up to
    ``capacity``, and a step reads no further than the longest row. ``history`` holds the tokens
    themselves, for a model whose DeepEmbed keys look back at them.

    Args:
        lengths_B: int64 (B,) tokens of each prompt; longest: their maximum.
        capacity: most tokens a row may ever hold.
    """

    def __init__(self, lengths_B: Tensor, longest: int, capacity: int) -> None:
        self.lengths_B = lengths_B.clone()
        self.longest = longest
        self.capacity = capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.task_B = self.view_B = lengths_B
        self.history: TokenHistory | None = None
        self._room = min(longest + GROWTH, capacity)
        self._call = 0
        self._slot_BK = lengths_B  # rows of the flat (B K T, D) buffers that a step writes

    def fill(self, k_NKD: Tensor, v_NKD: Tensor, doc_N: Tensor, column_N: Tensor) -> None:
        """Append one attention call's prompt keys and values (packed) to the cache."""
        for store, packed in ((self.keys, k_NKD), (self.values, v_NKD)):
            buffer = packed.new_zeros(len(self.lengths_B), self._room, *packed.shape[1:])
            buffer[doc_N, column_N] = packed
            store.append(buffer.transpose(1, 2).contiguous())

    def start_step(self) -> Tensor | None:
        """Begin a decoding step; returns a bias on scores (B, 1, 1, T), -inf for hidden keys.

        Additive, because SDPA would turn a boolean mask into such a bias in every layer anew.

        Raises:
            IndexError: a row's capacity is used up.
        """
        self._begin_step()
        return self._hidden_bias()

    def _begin_step(self) -> None:
        if self.longest >= self.capacity:
            raise IndexError(
                f"KV cache of {self.capacity} tokens is full; prefill with more max_new_tokens"
            )
        if self.longest >= self._room:
            more = min(GROWTH, self.capacity - self._room)
            for store in (self.keys, self.values):
                for call, buffer in enumerate(store):  # one by one: never a second copy of all
                    store[call] = F.pad(buffer, (0, 0, 0, more))
            self._room += more
        self._call = 0
        keys = self.keys[0]
        num_heads = keys.shape[1]
        head_BK = torch.arange(len(keys) * num_heads, device=keys.device)
        self._slot_BK = head_BK * self._room + self.lengths_B.repeat_interleave(num_heads)

    def _hidden_bias(self) -> Tensor:
        keys = self.keys[0]
        column_T = torch.arange(self.longest + 1, device=keys.device)
        hidden_BT = column_T[None, :] > self.lengths_B[:, None]
        bias_BT = torch.zeros(hidden_BT.shape, dtype=keys.dtype, device=keys.device)
        return bias_BT.masked_fill_(hidden_BT, -torch.inf)[:, None, None, :]

    def append(self, k_BKD: Tensor, v_BKD: Tensor) -> tuple[Tensor, Tensor]:
        """Write this step's key and value of the next attention call; returns what it may see."""
        keys, values = self.keys[self._call], self.values[self._call]
        self._call += 1
        for store, new in ((keys, k_BKD), (values, v_BKD)):
            rows = new.to(store.dtype).reshape(-1, store.shape[-1])
            store.view(-1, store.shape[-1]).index_copy_(0, self._slot_BK, rows)
        return keys[:, :, : self.longest + 1], values[:, :, : self.longest + 1]

    def finish_step(self) -> None:
        self.lengths_B += 1
        self.longest += 1

    def keep(self, index_B: Tensor) -> None:
        """Keep only these rows, in this order (finished documents leave the batch)."""
        self.lengths_B = self.lengths_B[index_B]
        self.task_B, self.view_B = self.task_B[index_B], self.view_B[index_B]
        if self.history is not None:
            self.history.keep(index_B)
        if len(index_B):
            self.longest = int(self.lengths_B.max())
        self._room = min(self.longest + GROWTH, self._room)
        for store in (self.keys, self.values):
            for call, buffer in enumerate(store):
                store[call] = buffer[index_B, :, : self._room]
