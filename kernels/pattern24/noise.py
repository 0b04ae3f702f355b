"""Gumbel noise from counters: Philox-4x32-10 in PyTorch, the same bits as Triton's.

Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.

Shapes: N counters, G groups, 6 patterns.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
ROUNDS = 10
FACTORS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _multiply(factor: int, word_N: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product of two words; int64 wraps around, its bits are right."""
    product_N = word_N * factor
    return (product_N >> 32) & LOW, product_N & LOW


def philox(seed: Tensor, counter_N: Tensor) -> Tensor:
    """(4, N) int64, each in [0, 2^32): the block of every counter.

    Args:
        seed: int64, () or (N,); both its words are the key.
        counter_N: int64; its low word is the first of the block's counter, its high word the
            second, the others are 0 (as Triton's ``randint4x``).
    """
    words = [counter_N & LOW, (counter_N >> 32) & LOW, *counter_N.new_zeros(2, *counter_N.shape)]
    key = [seed & LOW, (seed >> 32) & LOW]
    for _ in range(ROUNDS):
        high, low = _multiply(FACTORS[0], words[0])
        other_high, other_low = _multiply(FACTORS[1], words[2])
        words = [other_high ^ words[1] ^ key[0], other_low, high ^ words[3] ^ key[1], low]
        key = [(k + step) & LOW for k, step in zip(key, KEY_STEPS, strict=True)]
    return torch.stack(words)


def uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """(n + 1/2) / 2^23 with the upper 23 bits n: exact in float32, never 0 or 1."""
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23


def gumbel(num_groups: int, seed: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, 6): the noise of every group's patterns, in float32 or float64.

    Group g has the blocks of the counters offset + 2 g (patterns 0 to 3) and offset + 2 g + 1
    (patterns 4 and 5; two words go unused).
    """
    counter_G = offset + 2 * torch.arange(num_groups, device=seed.device)
    words_6G = torch.cat([philox(seed, counter_G), philox(seed, counter_G + 1)[:2]])
    return -torch.log(-torch.log(uniform(words_6G, dtype))).T
