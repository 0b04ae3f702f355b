"""The only importer of flash-attn (optional package, CUDA)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def flash_varlen() -> Callable[..., Tensor]:
    """flash-attn's variable-length function in ``plan_varlen``'s form.

    Raises ImportError where flash-attn is not installed.
    """
    from flash_attn import flash_attn_varlen_func

    def call(q, k, v, cu_q, cu_k, max_q, max_k, causal):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=causal)

    return call
