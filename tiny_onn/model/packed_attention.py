"""Attention over packed documents: one reference, and the back-ends that must agree with it.

A query sees the keys of its own document that are not later than itself, and, with
``prefix_lens_B``, the whole prefix if it lies in the prefix (prefix-LM: Raffel et al.,
arXiv 1910.10683, figure 3). Causal attention is the case of prefix length 0.

Shapes: N tokens, B documents, H query heads, K key/value heads (H a multiple of K), D head
width, S tokens of the padded copy that only the SDPA path makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_WASTE = 0.15
"""A group of documents is closed when padding it would add more than this share."""

HIDDEN_SCORE = -1e30
"""Added to the score of a key that a query must not see (finite, so that nothing turns NaN)."""

SHORT_TOKENS = 256
"""Groups of documents up to this long attend by batched matrix products on a CPU."""

SHORT_DTYPES = (torch.bfloat16, torch.float16)
"""... in these dtypes: in float32 torch's kernel is as fast (exp/bench/short_attention.py)."""


@dataclass(frozen=True)
class DocumentSpans:
    """What attention needs to know of a packed batch.

    cu_seqlens_B1: int32 (B+1,) offsets; prefix_lens_B: int64 (B,), 0 for causal documents.
    ``lengths`` and ``prefixes`` are the same as Python numbers, so that nothing synchronises.
    """

    cu_seqlens_B1: Tensor
    prefix_lens_B: Tensor
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_NHD, k_NKD, v_NKD) -> out_NHD for one batch: what a back-end's ``plan`` returns."""


def _visible(length: int, prefix: int, device: torch.device) -> Tensor:
    index = torch.arange(length, device=device)
    return (index[None, :] <= index[:, None]) | (
        (index[None, :] < prefix) & (index[:, None] < prefix)
    )


def plan_reference(spans: DocumentSpans) -> Attend:
    """Dense masked softmax, document by document, in the input's dtype (float64 included)."""

    def attend(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        outputs, start = [], 0
        groups = q_NHD.shape[1] // k_NKD.shape[1]
        for length, prefix in zip(spans.lengths, spans.prefixes, strict=True):
            document = slice(start, start + length)
            q, k, v = (t[document].transpose(0, 1) for t in (q_NHD, k_NKD, v_NKD))
            k, v = (t.repeat_interleave(groups, dim=0) for t in (k, v))
            scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
            hidden = ~_visible(length, prefix, q.device)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            outputs.append((weights @ v).transpose(0, 1))
            start += length
        return torch.cat(outputs)

    return attend


def group_documents(lengths: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Split documents, in their order, into runs (first, last + 1, longest) of similar length.

    Documents of one length share a run without any padding; a run is closed when padding it
    to its longest document would waste more than PADDING_WASTE.
    """
    runs, first, total = [], 0, 0
    longest = 0
    for i, length in enumerate(lengths):
        grown = max(longest, length)
        if i > first and grown * (i + 1 - first) > (1 + PADDING_WASTE) * (total + length):
            runs.append((first, i, longest))
            first, total, grown = i, 0, length
        longest, total = grown, total + length
    runs.append((first, len(lengths), longest))
    return runs


class _Gather(torch.autograd.Function):
    """rows[index], where ``inverse`` says which output row holds each input row's only real copy.

    The copies made for padding receive no gradient, so the adjoint is a gather too, not the
    slow index_add of plain indexing.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Ungather(torch.autograd.Function):
    """rows[inverse] for distinct row numbers; rows left out (padding) get gradient zero.

    Plain indexing would sort and add in its backward.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.size = rows.shape[0]
        return rows.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        padded = grad.new_zeros((ctx.size, *grad.shape[1:]))
        return padded.index_copy_(0, inverse, grad), None


class _ShortAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + bias) v for many short documents, as batched matrix products.

    Vaswani et al., arXiv 1706.03762, equation 1, and its adjoint. Softmax in float32 at least.
    On a CPU in bfloat16, 3 to 4 times faster than torch's flash kernel at 30 to 160 tokens
    (exp/bench/short_attention.py), whose tiles are mostly empty there. q, k, v: (B, H, L, D);
    bias: (B or 1, 1, L, L).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        count, heads, length, width = q.shape
        q = (q * width**-0.5).contiguous().flatten(0, 1)
        k, v = (t.contiguous().flatten(0, 1) for t in (k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).view(count, heads, length, length) + bias
        weights = torch.softmax(scores, dim=-1).to(q.dtype).flatten(0, 1)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v).view(count, heads, length, width)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, weights = ctx.saved_tensors
        shape, width = grad.shape, q.shape[-1]
        grad = grad.contiguous().view_as(v)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_q = torch.bmm(grad_scores, k).mul_(width**-0.5)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
        return grad_q.view(shape), grad_k.view(shape), grad_v.view(shape), None


def plan_sdpa(spans: DocumentSpans) -> Attend:
    """Groups of documents of similar length, padded together (fast on a CPU, works anywhere).

    Padding exists only in here: tokens are gathered to (documents, longest), masked and taken
    back. Documents sorted by length pad least. Groups of at most SHORT_TOKENS on a CPU run as
    batched matrix products, longer ones through torch SDPA.
    """
    device = spans.cu_seqlens_B1.device
    runs = group_documents(spans.lengths)
    starts = [0]
    for length in spans.lengths:
        starts.append(starts[-1] + length)
    index, inverse, masks, shapes, offset = [], [], [], [], 0
    lengths = torch.tensor(spans.lengths)
    prefixes = torch.tensor(spans.prefixes)
    begins = torch.tensor(starts[:-1])
    for first, last, longest in runs:
        column = torch.arange(longest)
        real = column[None, :] < lengths[first:last, None]
        index.append((begins[first:last, None] + column * real).flatten())
        inverse.append(offset + real.flatten().nonzero().squeeze(1))
        prefix = prefixes[first:last, None, None]
        visible = (column[None, :] <= column[:, None])[None] | (
            (column[None, None, :] < prefix) & (column[None, :, None] < prefix)
        )
        uniform = bool(real.all())
        causal_only = uniform and int(prefixes[first:last].max()) <= 1
        mask = None
        if device.type == "cpu" and longest <= SHORT_TOKENS:
            hidden = ~(visible & real[:, None, :]).unsqueeze(1)
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, HIDDEN_SCORE)
        elif not causal_only:
            mask = (visible & real[:, None, :]).unsqueeze(1).to(device)
        masks.append(mask)
        shapes.append((last - first, longest))
        offset += (last - first) * longest
    index_S = torch.cat(index).to(device)
    inverse_N = torch.cat(inverse).to(device)
    unpadded = index_S.numel() == inverse_N.numel()

    def attend(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        gqa = q_NHD.shape[1] != k_NKD.shape[1]
        if not unpadded:
            q_NHD, k_NKD, v_NKD = (
                _Gather.apply(t, index_S, inverse_N) for t in (q_NHD, k_NKD, v_NKD)
            )
        outputs, start = [], 0
        for (count, longest), mask in zip(shapes, masks, strict=True):
            rows = slice(start, start + count * longest)
            q, k, v = (
                t[rows].unflatten(0, (count, longest)).transpose(1, 2)
                for t in (q_NHD, k_NKD, v_NKD)
            )
            if mask is not None and mask.is_floating_point() and q.dtype not in SHORT_DTYPES:
                mask = mask.to(q.dtype)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
            elif mask is not None and mask.is_floating_point():
                if gqa:
                    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
                out = _ShortAttention.apply(q, k, v, mask)
            else:
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
                )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            start += count * longest
        out_SHD = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return out_SHD if unpadded else _Ungather.apply(out_SHD, inverse_N)

    return attend


def _split_rows(spans: DocumentSpans) -> tuple[Tensor, Tensor]:
    """Row numbers of prefix tokens and of the rest, both in packed order."""
    device = spans.cu_seqlens_B1.device
    total = sum(spans.lengths)
    start_B = spans.cu_seqlens_B1[:-1].long()
    lengths_B = spans.cu_seqlens_B1.diff().long()
    doc_N = torch.repeat_interleave(
        torch.arange(len(spans.lengths), device=device), lengths_B, output_size=total
    )
    in_prefix_N = torch.arange(total, device=device) - start_B[doc_N] < spans.prefix_lens_B[doc_N]
    order = torch.argsort(in_prefix_N.logical_not().to(torch.uint8), stable=True)
    count = sum(spans.prefixes)
    return order[:count], order[count:]


def _cumulative(lens_B: Tensor) -> Tensor:
    return F.pad(lens_B.cumsum(0), (1, 0)).to(torch.int32)


def plan_varlen(spans: DocumentSpans, varlen: Callable[..., Tensor]) -> Attend:
    """Two variable-length calls make prefix-LM exact without a mask.

    The prefix attends to itself both ways; the rest attends causally to the whole document,
    aligned at the bottom right (query i of the rest sees ``prefix + i + 1`` keys). ``varlen``
    takes (q, k, v, cu_q, cu_k, max_q, max_k, causal) in half precision on CUDA.
    """
    prefix_rows, rest_rows = _split_rows(spans)
    lengths_B = spans.cu_seqlens_B1.diff().long()
    cu_prefix = _cumulative(spans.prefix_lens_B)
    cu_rest = _cumulative(lengths_B - spans.prefix_lens_B)
    cu_all = spans.cu_seqlens_B1
    longest = max(spans.lengths)
    longest_prefix = max(spans.prefixes)
    longest_rest = max(n - p for n, p in zip(spans.lengths, spans.prefixes, strict=True))
    has_prefix, has_rest = longest_prefix > 0, longest_rest > 0

    def attend(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        if not has_prefix:
            return varlen(q_NHD, k_NKD, v_NKD, cu_all, cu_all, longest, longest, True)
        q, k, v = (_Ungather.apply(t, prefix_rows) for t in (q_NHD, k_NKD, v_NKD))
        prefix_out = varlen(q, k, v, cu_prefix, cu_prefix, longest_prefix, longest_prefix, False)
        out_NHD = torch.zeros_like(q_NHD).index_copy(0, prefix_rows, prefix_out)
        if has_rest:
            rest = _Ungather.apply(q_NHD, rest_rows)
            rest_out = varlen(rest, k_NKD, v_NKD, cu_rest, cu_all, longest_rest, longest, True)
            out_NHD = out_NHD.index_copy(0, rest_rows, rest_out)
        return out_NHD

    return attend


def beside_filler(attend: Attend, num_tokens: int, filler: int) -> Attend:
    """``attend`` over the first ``num_tokens`` rows; the ``filler`` rows after them get zeros."""

    def filled(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        out_NHD = attend(q_NHD[:num_tokens], k_NKD[:num_tokens], v_NKD[:num_tokens])
        return F.pad(out_NHD, (0, 0, 0, 0, 0, filler))

    return filled


def torch_varlen() -> Callable[..., Tensor]:
    """torch's own variable-length attention (torch >= 2.10, CUDA) in ``plan_varlen``'s form."""
    from torch.nn.attention.varlen import varlen_attn

    has_window = "window_size" in inspect.signature(varlen_attn).parameters

    def call(q, k, v, cu_q, cu_k, max_q, max_k, causal):
        gqa = q.shape[1] // k.shape[1]
        if gqa > 1:
            k, v = (t.repeat_interleave(gqa, dim=1) for t in (k, v))
        option = {"window_size": (-1, 0 if causal else -1)} if has_window else {"is_causal": causal}
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **option)

    return call
