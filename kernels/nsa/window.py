"""The sliding-window branch: the w visible tokens nearest to the query.

Shapes: N tokens, H query heads, K key/value heads, D head width, E value width.
"""

from __future__ import annotations

from torch import Tensor

from tiny_onn_kernels.nsa.layout import NsaLayout
from tiny_onn_kernels.nsa.tile_attention import (
    attend_in_tiles,
    full_precision,
)


def window_attention(q_NHD: Tensor, k_NKD: Tensor, v_NKE: Tensor, layout: NsaLayout) -> Tensor:
    """Attention of packed documents within ``layout.window`` keys, the query's own among them.

    Which these are: :mod:`tiny_onn_kernels.nsa.layout`. Returns (N, H, E) in the queries' dtype.
    Peak memory grows as N * (w + tile) * H.
    """
    row_SC, visible_SCR = layout.window_keys
    with full_precision(q_NHD):
        out_NHE, _ = attend_in_tiles(
            q_NHD,
            k_NKD,
            v_NKE,
            layout.tiles,
            row_SC,
            visible_SCR,
        )
    return out_NHE
