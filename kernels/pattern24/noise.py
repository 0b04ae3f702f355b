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


def philox(seed: Tensor, counter_N: Tensor) -> Tensor:
    """(4, N) int64, each in [0, 2^32): the block of every counter.

    Args:
        seed: int64, () or (N,); both its words are the key.
        counter_N: int64; its low word is the first of the block's counter, its high word the
            second, the others are 0 (as Triton's ``randint4x``).
    """
    zero = counter_N.new_zeros(())
    words = [counter_N & LOW, (counter_N >> 32) & LOW, zero, zero]
    key = [seed & LOW, (seed >> 32) & LOW]
    for _ in range(ROUNDS):
        # int64 wraps around, the lower 64 bits of a product are right. Words 1 and 3 are masked
        # only where they end: what stands above their 32 bits is cut off with the next xor.
        low_N, other_low_N = words[0] * FACTORS[0], words[2] * FACTORS[1]
        high_N = ((low_N >> 32) ^ words[3]).bitwise_xor_(key[1]).bitwise_and_(LOW)
        other_high_N = ((other_low_N >> 32) ^ words[1]).bitwise_xor_(key[0]).bitwise_and_(LOW)
        words = [other_high_N, other_low_N, high_N, low_N]
        key = [(k + step) & LOW for k, step in zip(key, KEY_STEPS, strict=True)]
    return torch.stack(words).bitwise_and_(LOW)


def six_numbers(word_4N: Tensor) -> Tensor:
    """(6, N) of 21 bits each: the upper ones of the four words, and what is left of two and two."""
    upper_4N = word_4N >> 11
    left_2N = ((word_4N[::2] & 0x7FF) << 10) | (word_4N[1::2] & 0x3FF)
    return torch.cat([upper_4N, left_2N])


def uniform(number: Tensor, dtype: torch.dtype) -> Tensor:
    """(n + 1/2) / 2^21 of 21 bits n: exact in float32, never 0 or 1."""
    return number.to(dtype).add_(0.5).mul_(2.0**-21)


def gumbel(num_groups: int, seed: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, 6): the noise of every group's patterns, in float32 or float64.

    Group g has the block of the counter offset + g, whose 128 bits make six numbers.
    """
    counter_G = offset + torch.arange(num_groups, device=seed.device)
    uniform_6G = uniform(six_numbers(philox(seed, counter_G)), dtype)
    return uniform_6G.log_().neg_().log_().neg_().T
