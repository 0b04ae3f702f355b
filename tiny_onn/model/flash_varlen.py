"""The only importer of flash-attn (optional package, CUDA)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def flash_varlen() -> Callable[..., Tensor]:
    """flash-attn's variable-length function, of version 2 or else 4, in ``plan_varlen``'s form, and
    in ``plan_window_varlen``'s.

    Raises ImportError where flash-attn is not installed.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # version 4 alone leaves the package's own names out
        from flash_attn.cute import flash_attn_varlen_func

    def call(q, k, v, cu_q, cu_k, max_q, max_k, causal, window=None):
        seen = {} if window is None else {"window_size": (window - 1, 0)}
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            causal=causal,
            **seen,
        )
        return out[0] if isinstance(out, tuple) else out  # version 4 adds the log-sum-exp

    return call
