"""How the documents of a packed batch attend: planned once a batch, by the chosen back-end."""

from __future__ import annotations

from typing import Any

import torch

from tiny_onn.config.schema import ModelConfig, NsaConfig
from tiny_onn.model.flash_varlen import flash_varlen
from tiny_onn.model.nsa_plan import NsaPlan, plan_nsa
from tiny_onn.model.packed_attention import (
    Attend,
    DocumentSpans,
    beside_filler,
    plan_reference,
    plan_sdpa,
    plan_varlen,
    torch_varlen,
)
from tiny_onn.model.window_varlen import plan_window_varlen


def document_spans(layout: Any, mask: str) -> DocumentSpans:
    """Where the layout's documents begin, and what of each is seen whole under ``mask``."""
    causal = mask == "causal"
    prefix_lens_B = torch.zeros_like(layout.prefix_lens) if causal else layout.prefix_lens
    prefixes = (0,) * len(layout.lengths) if causal else layout.prefixes
    return DocumentSpans(layout.cu_seqlens, prefix_lens_B, layout.lengths, prefixes)


def plan_documents(spans: DocumentSpans, backend: str) -> Attend:
    """Full attention within documents, by a name that ``ops.resolve_attention`` gave."""
    if backend == "reference":
        return plan_reference(spans)
    if backend == "sdpa":
        return plan_sdpa(spans)
    return plan_varlen(spans, flash_varlen() if backend == "flash" else torch_varlen())


def plan_attention(
    batch: Any, config: ModelConfig, nsa: NsaConfig, backend: str, kernels: bool
) -> Attend | NsaPlan:
    """How ``batch``'s documents attend (filler rows do not).

    Args:
        backend: of full attention, and of NSA's window where it is flash.
        kernels: whether NSA runs by the Triton kernels, which need more of the plan.
    """
    spans = document_spans(batch.layout, config.mask)
    num_tokens = sum(spans.lengths)
    filler = len(batch.tokens_N) - num_tokens
    sparse = config.attention == "nsa"

    def plan_full(spans: DocumentSpans) -> Attend:
        return plan_documents(spans, backend)

    def plan_window(spans: DocumentSpans) -> Attend:
        return plan_window_varlen(spans, nsa.window, flash_varlen())

    attend = None
    if not sparse or nsa.every > 1:
        attend = plan_full(spans)
        attend = beside_filler(attend, num_tokens, filler) if filler else attend
    if not sparse:
        return attend
    window = plan_window if backend == "flash" else None
    plan = plan_nsa(spans, nsa, plan_full, filler, attend, window)
    if kernels:
        plan.compute_for_kernels()
    return plan
