"""Native Sparse Attention (Yuan et al., arXiv 2502.11089) in the place of full attention.

Three branches share the queries: compressed blocks, chosen blocks read in full, a sliding window;
each head and token weighs them by sigmoid gates. What each branch computes stands in
``kernels/nsa/README.md``, and so does who sees whom: in the prefix of a document (``mask=prefix``)
every branch looks both ways, by replacing a token by its last visible one.

Keys are compressed un-rotated, then normalised and rotated to the position of their block's first
token: averages of rotated keys would cancel the high frequencies.

Shapes: N tokens, M compressed blocks, C width, H query heads, K key/value heads, D head width,
L = l tokens of a block; E keys of a token that stay whole (1 shared by the selected and the
window branch, or 2), F values (1 shared by all branches, or 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.config.schema import NsaConfig
from tiny_onn.model.attention import AttentionContext, attend_cached
from tiny_onn.model.nsa_cache import NsaCache
from tiny_onn.model.nsa_plan import NsaPlan
from tiny_onn.model.rope import rotate
from tiny_onn.ops import nsa, nsa_branches

POSITION_STD = 0.02
"""Standard deviation of the intra-block position encoding at the start."""


class BlockCompressor(nn.Module):
    """phi: l tokens of a head to one (equation 7); mean pooling at the start.

    Shared by the heads; its hidden width is the head's.
    """

    def __init__(self, block: int, head_width: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(block, 1, head_width) * POSITION_STD)
        self.inner = nn.Linear(block * head_width, head_width, bias=False)
        self.outer = nn.Linear(head_width, head_width, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, blocks_MLKD: Tensor) -> Tensor:
        return nsa.compress(blocks_MLKD, self.position, self.inner.weight, self.outer.weight)

    def packed(self, x_NKD: Tensor, layout: nsa.NsaLayout) -> Tensor:
        """Every block of packed documents, (M, K, D): the same as ``forward``, in less time."""
        return nsa.compress_packed(
            x_NKD, layout, self.position, self.inner.weight, self.outer.weight
        )


class NativeSparseAttention(nn.Module):
    """``project`` before and ``out`` after ``attend``, as :class:`FullAttention`.

    Gates start at one half. ``backend`` is a name that :func:`tiny_onn.ops.resolve_nsa` gave;
    "reference" runs anywhere. ``watch``, where set, is called by every packed forward with the
    gates (N, H, 3) of the compressed, selected and window branch, and the chosen blocks (N, K, n)
    or None where no document needed a choice; both detached.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        qk_norm: bool,
        settings: NsaConfig,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.settings = settings
        self.branches = 1 if settings.kv == "shared" else 3
        self.qkv = nn.Linear(width, (heads + 2 * self.branches * kv_heads) * head_width, bias=False)
        self.gate = nn.Linear(width, 3 * heads)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.compress_key = BlockCompressor(settings.block, head_width)
        self.compress_value = BlockCompressor(settings.block, head_width)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.query_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()
        self.compressed_key_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()
        self.backend = "reference"
        self.watch: Callable[[Tensor, Tensor | None], None] | None = None

    def project(
        self, x_NC: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Rotated queries (N, H, D); the compressed branch's keys, raw (N, K, D); rotated keys
        (N, E, K, D); values (N, F, K, D), all of one dtype; gates (N, H, 3)."""
        sizes = (self.heads, self.branches * self.kv_heads, self.branches * self.kv_heads)
        qkv_NXD = self.qkv(x_NC).unflatten(-1, (-1, self.head_width))
        q_NHD, k_NXD, v_NXD = qkv_NXD.split(sizes, dim=1)
        wide = q_NHD.dtype if q_NHD.dtype.itemsize > 4 else cos.dtype
        whole_NXD = k_NXD if self.branches == 1 else k_NXD[:, self.kv_heads :]
        q_NHD = rotate(self.query_norm(q_NHD.to(wide)), cos, sin)
        whole_NXD = rotate(self.key_norm(whole_NXD.to(wide)), cos, sin)
        return (
            q_NHD.to(v_NXD.dtype),
            k_NXD if self.branches == 1 else k_NXD[:, : self.kv_heads],
            whole_NXD.to(v_NXD.dtype).unflatten(1, (-1, self.kv_heads)),
            v_NXD.unflatten(1, (-1, self.kv_heads)),
            self.gate(x_NC).sigmoid().unflatten(-1, (self.heads, 3)),
        )

    def compress(
        self, raw_k_MLKD: Tensor, v_MLKD: Tensor, cos_M1P: Tensor, sin_M1P: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compressed keys, rotated to their blocks' first positions, and values: (M, K, D)."""
        k_MKD = self._rotate_compressed(self.compress_key(raw_k_MLKD), cos_M1P, sin_M1P)
        return k_MKD.to(raw_k_MLKD.dtype), self.compress_value(v_MLKD).to(v_MLKD.dtype)

    def _rotate_compressed(self, k_MKD: Tensor, cos_M1P: Tensor, sin_M1P: Tensor) -> Tensor:
        wide = k_MKD.dtype if k_MKD.dtype.itemsize > 4 else cos_M1P.dtype
        return rotate(self.compressed_key_norm(k_MKD.to(wide)), cos_M1P, sin_M1P)

    def attend(
        self,
        q_NHD: Tensor,
        raw_k_NKD: Tensor,
        k_NEKD: Tensor,
        v_NFKD: Tensor,
        gate_NH3: Tensor,
        context: AttentionContext,
    ) -> Tensor:
        """Packed attention by ``context.attend``'s plan, or one decoding step: (N, H, D)."""
        projected = (q_NHD, raw_k_NKD, k_NEKD, v_NFKD, gate_NH3)
        if context.attend is None:
            return self._decode(*projected, context)
        num_filler = context.attend.num_filler
        if not num_filler:
            return self._attend_packed(*projected, context)
        num_tokens = len(q_NHD) - num_filler
        out_NHD = self._attend_packed(*(t[:num_tokens] for t in projected), context)
        return F.pad(out_NHD, (0, 0, 0, 0, 0, num_filler))

    def _whole(self, k_NEKD: Tensor, v_NFKD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the selected and the window branch: two pairs, or one for both."""
        if self.branches == 1:
            return [(k_NEKD.squeeze(1), v_NFKD.squeeze(1))]
        return [(k_NEKD[:, 0], v_NFKD[:, 1]), (k_NEKD[:, 1], v_NFKD[:, 2])]

    def _attend_packed(
        self,
        q_NHD: Tensor,
        raw_k_NKD: Tensor,
        k_NEKD: Tensor,
        v_NFKD: Tensor,
        gate_NH3: Tensor,
        context: AttentionContext,
    ) -> Tensor:
        plan: NsaPlan = context.attend
        layout, index_NKn = plan.layout, None
        v_NKD = v_NFKD.squeeze(1) if self.branches == 1 else v_NFKD[:, 0]
        first_M = layout.compressed_rows_ML[:, 0]
        k_MKD = self._rotate_compressed(
            self.compress_key.packed(raw_k_NKD, layout), context.cos[first_M], context.sin[first_M]
        )
        v_MKD = self.compress_value.packed(v_NKD, layout)
        compressed = (k_MKD.to(raw_k_NKD.dtype), v_MKD.to(v_NKD.dtype))
        pairs = self._whole(k_NEKD, v_NFKD)
        if context.cache is not None:
            for k_NKD, v_whole_NKD in pairs:
                context.cache.fill(k_NKD, v_whole_NKD, context.doc_N, context.column_N)
            rotations = (context.cos, context.sin)
            context.cache.fill_compressed(compressed, raw_k_NKD, v_NKD, *rotations, layout)
        branches = nsa_branches(self.backend)
        if plan.selected.layout is None:
            compressed_NHD, _ = branches.compressed_attention(q_NHD, *compressed, layout)
        else:
            compressed_NHD, index_NKn = branches.attend_compressed_and_choose(
                q_NHD, *compressed, layout, self.settings.select_count
            )
        chosen = () if index_NKn is None else (index_NKn,)
        selected_NHD = plan.selected.attend(branches.selected_attention, q_NHD, *pairs[0], *chosen)
        known_NHD = selected_NHD if plan.window_known else None
        window_NHD = plan.window.attend(
            branches.window_attention, q_NHD, *pairs[-1], known_NHD=known_NHD
        )
        if self.watch is not None:
            self.watch(gate_NH3.detach(), index_NKn)
        out_NHD = nsa.combine(gate_NH3, compressed_NHD, selected_NHD, window_NHD)
        return out_NHD.to(q_NHD.dtype)

    def _decode(
        self,
        q_BHD: Tensor,
        raw_k_BKD: Tensor,
        k_BEKD: Tensor,
        v_BFKD: Tensor,
        gate_BH3: Tensor,
        context: AttentionContext,
    ) -> Tensor:
        """One step over the cache: (B, H, D). Reads compressed + n l' + w keys of each row."""
        cache: NsaCache = context.cache
        settings, time_B = self.settings, cache.lengths_B
        seen = [cache.append(k, v) for k, v in self._whole(k_BEKD, v_BFKD)]
        compressed = cache.append_compressed(
            raw_k_BKD, v_BFKD[:, 0], context.cos, context.sin, self.compress
        )
        branches = nsa_branches(self.backend)
        compressed_BHD, share_BKC = branches.decode_compressed(q_BHD, *compressed, cache.count_B)
        reads_all = cache.reads_all(settings.select_count * settings.select_block)
        if reads_all:
            selected_BHD = attend_cached(q_BHD, *seen[0], context.bias_B11T)
        else:
            index_BKn = branches.choose_in_step(
                share_BKC,
                time_B,
                settings.block,
                settings.stride,
                settings.select_block,
                cache.longest // settings.select_block + 1,
                settings.select_count,
            )
            selected_BHD = branches.decode_selected(
                q_BHD, *seen[0], index_BKn, time_B, settings.select_block
            )
        if not cache.reads_all(settings.window):
            window_BHD = branches.decode_window(q_BHD, *seen[-1], time_B, settings.window)
        elif reads_all and len(seen) == 1:
            window_BHD = selected_BHD
        else:
            window_BHD = attend_cached(q_BHD, *seen[-1], context.bias_B11T)
        out_BHD = nsa.combine(gate_BH3, compressed_BHD, selected_BHD, window_BHD)
        return out_BHD.to(q_BHD.dtype)
