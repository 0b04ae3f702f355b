"""Which blocks a token reads in full: scores of the compressed branch, mapped and ranked.

Shapes: N tokens, K key/value heads, C compressed blocks, J selectable blocks, n chosen ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn_kernels.nsa.layout import block_visible

NUM_LOCAL = 2
"""Blocks always chosen that end with the query's own."""

NUM_FORCED = 1 + NUM_LOCAL
"""Blocks always chosen: the document's first, and the local ones."""


def overlap_taps(block: int, stride: int, select_block: int) -> tuple[int, list[int]]:
    """Equation 9: first tap and weights that map compressed blocks to a selectable one.

    Selectable block j scores sum over m < l'/d, n < l/d of p_cmp[(l'/d)(j + 1) - 1 - m - n], that
    is p_cmp[(l'/d) j + first + u] weights[u]: each compressed block counts by the tokens it shares
    with block j, divided by d. (The paper's printed index (l'/d) j - m - n, read from 0, is off by
    l'/d - 1 blocks.) l, d, l' = 32, 16, 64: first -1, weights 1, 2, 2, 2, 1.
    """
    ratio, depth = select_block // stride, block // stride
    num_taps = ratio + depth - 1
    return 1 - depth, [min(u + 1, ratio, depth, num_taps - u) for u in range(num_taps)]


def block_scores(
    share_NKC: Tensor, block: int, stride: int, select_block: int, num_blocks: int
) -> Tensor:
    """Importance (N, K, J) of ``num_blocks`` selectable blocks, from p_cmp summed over the group.

    The leading sizes may be any. Compressed blocks out of range count as 0.
    """
    first, weights = overlap_taps(block, stride, select_block)
    step, num_taps, count = select_block // stride, len(weights), share_NKC.shape[-1]
    needed = step * (num_blocks - 1) + num_taps
    padded = F.pad(share_NKC, (-first, max(0, needed + first - count)))[..., :needed]
    windows = padded.unfold(-1, num_taps, step)
    return (windows * windows.new_tensor(weights)).sum(dim=-1)


def choose_blocks(
    score_NKJ: Tensor, time_N: Tensor, end_N: Tensor, select_block: int, count: int
) -> Tensor:
    """The ``count`` blocks each token reads, one set for a group: int64 (N, K, n), -1 for none.

    Always block 0, the token's own and the one before it; then the best of the blocks that begin
    at or before ``end_N``. Scores are ranked in float32, ties go to the earlier block. No
    gradient: phi learns through the compressed branch only.

    Args:
        score_NKJ: finite, at least 0; time_N, end_N: int64 token number and last visible token.
        select_block: l'; count: n, at least NUM_FORCED.
    """
    assert count >= NUM_FORCED, f"{count} blocks hold no {NUM_FORCED} forced ones"
    num_blocks = score_NKJ.shape[-1]
    number_J = torch.arange(num_blocks, device=score_NKJ.device)
    own_N1 = (time_N // select_block)[:, None]
    forced_NJ = (number_J == 0) | ((number_J <= own_N1) & (number_J > own_N1 - NUM_LOCAL))
    score_NKJ = score_NKJ.detach().float().masked_fill(forced_NJ[:, None], torch.inf)
    # The bits of numbers of at least 0 rank as the numbers do; below them the block, reversed.
    rank_NKJ = score_NKJ.view(torch.int32).long().bitwise_left_shift_(32)
    rank_NKJ = rank_NKJ.bitwise_or_(num_blocks - 1 - number_J)
    candidate_N1J = block_visible(end_N[:, None, None], number_J, select_block)
    rank_NKJ = rank_NKJ.masked_fill_(~candidate_N1J, -1)
    best_NKn = rank_NKJ.topk(min(count, num_blocks), dim=-1).values
    index_NKn = (num_blocks - 1) - (best_NKn & 0xFFFFFFFF)
    index_NKn = index_NKn.masked_fill_(best_NKn < 0, -1)
    return F.pad(index_NKn, (0, count - index_NKn.shape[-1]), value=-1)
