"""What the benchmarked GPU can do at most, for every roofline: an H200's data sheet."""

from __future__ import annotations

FLOPS_PER_S = 989e12
"""bfloat16 and float16 with sums in float32, dense."""

SUSTAINED_FLOPS_PER_S = 600e12
"""What large products hold on to in practice: no data sheet's number, a second yardstick."""

BYTES_PER_S = 4.8e12
"""Of device memory."""

L2_BYTES = 50 * 2**20
L2_BYTES_PER_S = 5.5e12
"""Estimated: no data sheet gives it."""

FLUSH_BYTES = 2**28
"""Written before a timed call: five times the L2 cache."""
