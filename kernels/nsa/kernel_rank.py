"""The n best blocks of running tiles of scores, in registers and the same in any order.

A rank is one int64: the bits of the float32 score above (those of numbers of at least 0 rank as the
numbers do), the block's number, reversed, below. So ties go to the earlier block and no two ranks
are equal. Forced blocks score +inf; blocks that begin after the last visible token rank -1.

Shapes: B tokens, J selectable blocks of a tile, N best ones kept, a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_best(
    best_BN, score_BJ, block_J, own_B, end_B,
    NUM_LOCAL: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The best of ``best_BN`` and a tile; own_B: each token's block, end_B: its last visible token
    (below 0: no block may be chosen)."""
    own_B1 = own_B[:, None]
    local_BJ = (block_J[None, :] <= own_B1) & (block_J[None, :] > own_B1 - NUM_LOCAL)
    forced_BJ = local_BJ | (block_J == 0)[None, :]
    score_BJ = tl.where(forced_BJ, float("inf"), score_BJ.to(tl.float32))
    rank_BJ = score_BJ.to(tl.int32, bitcast=True).to(tl.int64) << 32
    rank_BJ = rank_BJ | (0x7FFFFFFF - block_J)[None, :].to(tl.int64)
    candidate_BJ = (block_J * SELECT_BLOCK)[None, :] <= end_B[:, None]
    rank_BJ = tl.where(candidate_BJ, rank_BJ, -1)
    pair_BN2 = tl.join(best_BN, tl.topk(rank_BJ, BLOCK_N))
    return tl.topk(tl.reshape(pair_BN2, (BLOCK_B, 2 * BLOCK_N)), BLOCK_N)


@triton.jit
def store_best(
    INDEX, row_B, real_B, best_BN, COUNT: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Numbers of the COUNT best blocks, -1 for none, to rows of INDEX."""
    index_BN = tl.where(best_BN < 0, -1, 0x7FFFFFFF - (best_BN & 0x7FFFFFFF))
    place_N = tl.arange(0, BLOCK_N)
    mask_BN = real_B[:, None] & (place_N < COUNT)[None, :]
    tl.store(INDEX + row_B[:, None] * COUNT + place_N[None, :], index_BN, mask=mask_BN)
