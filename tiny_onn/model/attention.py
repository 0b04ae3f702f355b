"""Full self-attention over packed documents: 3D RoPE, QK-norm, grouped-query heads.

Shapes: N tokens, B documents, C width, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.model.kv_cache import KVCache
from tiny_onn.model.nsa_plan import NsaPlan
from tiny_onn.model.packed_attention import Attend
from tiny_onn.model.rope import rotate


@dataclass
class AttentionContext:
    """What all blocks share in one forward: rotations and how to attend.

    Packed forward: ``attend`` is set (of a network with NSA a plan); with ``cache`` too it also
    fills the cache (prefill). Decoding step: ``attend`` is None, ``bias_B11T`` hides keys of the
    cache.
    """

    cos: Tensor
    sin: Tensor
    attend: Attend | NsaPlan | None = None
    cache: KVCache | None = None
    doc_N: Tensor | None = None
    column_N: Tensor | None = None
    bias_B11T: Tensor | None = None


def attend_cached(
    q_BHD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, bias_B11T: Tensor
) -> Tensor:
    """Full attention of one query a row to its cached keys: (B, H, D)."""
    out_BH1D = F.scaled_dot_product_attention(
        q_BHD.unsqueeze(2).to(keys_BKTD.dtype),
        keys_BKTD,
        values_BKTD,
        attn_mask=bias_B11T,
        enable_gqa=q_BHD.shape[1] != keys_BKTD.shape[1],
    )
    return out_BH1D.squeeze(2)


class FullAttention(nn.Module):
    """``project`` before and ``out`` after ``attend``: the block compiles around the middle."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_width: int, qk_norm: bool
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.query_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()

    def project(self, x_NC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: (N, H, D), (N, K, D), (N, K, D), one dtype."""
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        qkv_NXD = self.qkv(x_NC).unflatten(-1, (-1, self.head_width))
        q_NHD, k_NKD, v_NKD = qkv_NXD.split(sizes, dim=1)
        wide = q_NHD.dtype if q_NHD.dtype.itemsize > 4 else cos.dtype
        q_NHD = rotate(self.query_norm(q_NHD.to(wide)), cos, sin)
        k_NKD = rotate(self.key_norm(k_NKD.to(wide)), cos, sin)
        return q_NHD.to(v_NKD.dtype), k_NKD.to(v_NKD.dtype), v_NKD

    def attend(
        self, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, context: AttentionContext
    ) -> Tensor:
        """Packed attention, or one decoding step over the cache: (N, H, D)."""
        if context.attend is not None:
            if context.cache is not None:
                context.cache.fill(k_NKD, v_NKD, context.doc_N, context.column_N)
            attend = context.attend
            if isinstance(attend, NsaPlan):
                attend = attend.full
            return attend(q_NHD, k_NKD, v_NKD)
        keys, values = context.cache.append(k_NKD, v_NKD)
        return attend_cached(q_NHD, keys, values, context.bias_B11T)
