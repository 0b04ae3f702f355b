"""One decoding step: a query of each row on that row's cache, reading what the branches need only.

The query is the row's last token and sees all before it: e(t) = t, whatever the prompt's prefix
was. Shapes: B rows, H query heads in K groups of G, T tokens of room, C compressed blocks, n
chosen blocks, J selectable blocks, D head width, E value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiny_onn_kernels.nsa.layout import token_visible, window_bounds
from tiny_onn_kernels.nsa.tile_attention import (
    full_precision,
    tile_attention,
    wide_dtype,
)


def _attend(
    q_BHD: Tensor, k_BKXD: Tensor, v_BKXE: Tensor, visible: Tensor, want_share: bool = False
) -> tuple[Tensor, Tensor]:
    """(B, H, E) and the group's weights (B, K, X); visible: bool, broadcast to (B, K, X)."""
    dtype, kv_heads = wide_dtype(q_BHD.dtype), k_BKXD.shape[1]
    q_BK1GD = q_BHD.to(dtype).unflatten(1, (kv_heads, 1, -1))
    with full_precision(q_BHD):
        out, share = tile_attention(
            q_BK1GD, k_BKXD.to(dtype), v_BKXE.to(dtype), visible.unsqueeze(-1), want_share
        )
    return out.flatten(1, 3).to(q_BHD.dtype), share.squeeze(-1) if want_share else share


def decode_compressed(
    q_BHD: Tensor, k_BKCD: Tensor, v_BKCE: Tensor, count_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The compressed branch on the first ``count_B`` blocks of each row; C is at least 1.

    Returns (B, H, E), 0 for a row without blocks, and p_cmp summed over each group, (B, K, C).
    """
    number_C = torch.arange(k_BKCD.shape[2], device=k_BKCD.device)
    visible_B1C = (number_C < count_B[:, None])[:, None]
    return _attend(q_BHD, k_BKCD, v_BKCE, visible_B1C, want_share=True)


def decode_selected(
    q_BHD: Tensor,
    k_BKTD: Tensor,
    v_BKTE: Tensor,
    index_BKn: Tensor,
    time_B: Tensor,
    select_block: int,
) -> Tensor:
    """The selected branch: reads n l' keys of each row and group; (B, H, E).

    index_BKn: chosen blocks, -1 for none; time_B: int64 the query's token number t.
    """
    offset_L = torch.arange(select_block, device=index_BKn.device)
    time_BKX = (index_BKn[..., None] * select_block + offset_L).flatten(2)
    chosen_BKX = (index_BKn >= 0).repeat_interleave(select_block, dim=2)
    visible_BKX = token_visible(time_B[:, None, None], time_BKX) & chosen_BKX
    place_BKX1 = time_BKX.clamp(min=0, max=k_BKTD.shape[2] - 1).unsqueeze(-1)
    k_BKXD, v_BKXE = (
        t.gather(2, place_BKX1.expand(-1, -1, -1, t.shape[-1])) for t in (k_BKTD, v_BKTE)
    )
    return _attend(q_BHD, k_BKXD, v_BKXE, visible_BKX)[0]


def decode_window(
    q_BHD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, time_B: Tensor, window: int
) -> Tensor:
    """The window branch: reads w keys of each row; (B, H, E). time_B as above."""
    first_B, stop_B = window_bounds(time_B, torch.zeros_like(time_B), window)
    time_BX = first_B[:, None] + torch.arange(window, device=time_B.device)
    visible_B1X = (time_BX < stop_B[:, None])[:, None]
    place_B1X1 = time_BX.clamp(max=k_BKTD.shape[2] - 1)[:, None, :, None]
    k_BKXD, v_BKXE = (
        t.gather(2, place_B1X1.expand(-1, t.shape[1], -1, t.shape[-1])) for t in (k_BKTD, v_BKTE)
    )
    return _attend(q_BHD, k_BKXD, v_BKXE, visible_B1X)[0]
