"""The KV cache of NSA: besides keys and values, the compressed ones, grown block by block.

Shapes: B documents, K key/value heads, T tokens of room, C compressed blocks of room, L = l tokens
of a block, D head width, P = D / 2 rotated pairs; in the prompt N packed tokens, M blocks; R rows
that complete a block in this step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tiny_onn.config.schema import NsaConfig
from tiny_onn.model.kv_cache import KVCache
from tiny_onn.ops import nsa

Compress = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(raw keys (M, L, K, D), values (M, L, K, D), cos (M, 1, P), sin) -> compressed (M, K, D) each."""


@dataclass
class _CompressedCall:
    """One attention call's compressed keys and values, (B, K, C, D), and the last l tokens that the
    next ones are made of, token t at place t mod l: raw keys and values (B, L, K, D), rotations
    (B, L, P)."""

    keys: Tensor
    values: Tensor
    tail_keys: Tensor
    tail_values: Tensor
    tail_cos: Tensor
    tail_sin: Tensor


class NsaCache(KVCache):
    """A :class:`KVCache` that also holds what the compressed branch reads.

    A compressed key is computed once, in the step that brings its block's last token.

    Args:
        lengths: tokens of each prompt, as numbers; lengths_B: int64 (B,) the same.
        capacity: most tokens a row may ever hold.
        settings: of the blocks with NSA; with ``every`` above 1 the others read whole rows.
    """

    def __init__(
        self, lengths: tuple[int, ...], lengths_B: Tensor, capacity: int, settings: NsaConfig
    ) -> None:
        super().__init__(lengths_B, max(lengths), capacity)
        self.settings = settings
        self.lengths = list(lengths)
        self.count_B = lengths_B
        self._compressed_calls: list[_CompressedCall] = []
        self._next_call = 0
        self._most = 1
        self._done_R = self._done_number_R = self._done_place_RL = lengths_B

    def reads_all(self, num_tokens: int) -> bool:
        """Whether ``num_tokens`` cover every row, this step's token included."""
        return self.longest + 1 <= num_tokens

    def fill_compressed(
        self,
        compressed: tuple[Tensor, Tensor],
        raw_k_NKD: Tensor,
        v_NKD: Tensor,
        cos_N1P: Tensor,
        sin_N1P: Tensor,
        layout: nsa.NsaLayout,
    ) -> None:
        """Append one attention call's compressed keys and values (M, K, D) of the prompts, and
        their last tokens' raw keys, values and rotations."""
        block, blocks = self.settings.block, layout.compressed
        room = max(1, nsa.num_compressed(self.capacity, block, self.settings.stride))
        buffers = []
        for packed in compressed:
            shape = (len(self.lengths), packed.shape[1], room, packed.shape[2])
            buffer = packed.new_zeros(shape)
            buffer[blocks.doc_M, :, blocks.number_M] = packed[: len(blocks.doc_M)]
            buffers.append(buffer)
        last_B1 = layout.length_B[:, None] - 1
        place_L = torch.arange(block, device=last_B1.device)
        time_BL = last_B1 - (last_B1 - place_L) % block  # below 0: read by no complete block
        row_BL = layout.start_B[:, None] + time_BL.clamp(min=0)
        tails = (t[row_BL] for t in (raw_k_NKD, v_NKD, cos_N1P[:, 0], sin_N1P[:, 0]))
        self._compressed_calls.append(_CompressedCall(*buffers, *tails))

    def start_step(self) -> Tensor | None:
        """As :meth:`KVCache.start_step`; None where nothing reads a whole row."""
        self._begin_step()
        settings, after = self.settings, [n + 1 for n in self.lengths]
        block, stride = settings.block, settings.stride
        device = self.lengths_B.device
        done = [r for r, n in enumerate(after) if n >= block and (n - block) % stride == 0]
        self._done_R = torch.tensor(done, dtype=torch.long, device=device)
        first_R = self.lengths_B[self._done_R] + 1 - block
        self._done_number_R = first_R // stride
        self._done_place_RL = (first_R[:, None] + torch.arange(block, device=device)) % block
        self.count_B = ((self.lengths_B + 1 - block + stride) // stride).clamp(min=0)
        self._most = max(1, nsa.num_compressed(max(after), block, stride))
        self._next_call = 0
        whole = max(settings.select_count * settings.select_block, settings.window)
        return self._hidden_bias() if settings.every > 1 or self.reads_all(whole) else None

    def append_compressed(
        self,
        raw_k_BKD: Tensor,
        v_BKD: Tensor,
        cos_B1P: Tensor,
        sin_B1P: Tensor,
        compress: Compress,
    ) -> tuple[Tensor, Tensor]:
        """Take in this step's token; returns the next attention call's compressed keys and values,
        (B, K, C, D), of which each row may see ``count_B``."""
        call = self._compressed_calls[self._next_call]
        self._next_call += 1
        place_B = self.lengths_B % self.settings.block
        row_B = torch.arange(len(place_B), device=place_B.device)
        news = (raw_k_BKD, v_BKD, cos_B1P[:, 0], sin_B1P[:, 0])
        tails = (call.tail_keys, call.tail_values, call.tail_cos, call.tail_sin)
        for tail, new in zip(tails, news, strict=True):
            tail[row_B, place_B] = new.to(tail.dtype)
        if len(self._done_R):
            done_R1, place_RL = self._done_R[:, None], self._done_place_RL
            cos_R1P, sin_R1P = (
                t[self._done_R, place_RL[:, 0]].unsqueeze(1) for t in (call.tail_cos, call.tail_sin)
            )
            blocks = (t[done_R1, place_RL] for t in (call.tail_keys, call.tail_values))
            new_keys, new_values = compress(*blocks, cos_R1P, sin_R1P)
            call.keys[self._done_R, :, self._done_number_R] = new_keys.to(call.keys.dtype)
            call.values[self._done_R, :, self._done_number_R] = new_values.to(call.values.dtype)
        return call.keys[:, :, : self._most], call.values[:, :, : self._most]

    def finish_step(self) -> None:
        super().finish_step()
        self.lengths = [n + 1 for n in self.lengths]

    def keep(self, index_B: Tensor) -> None:
        super().keep(index_B)
        self.lengths = [self.lengths[i] for i in index_B.tolist()]
        self._compressed_calls = [
            _CompressedCall(*(getattr(call, field.name)[index_B] for field in fields(call)))
            for call in self._compressed_calls
        ]
