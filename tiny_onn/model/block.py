"""One pre-norm transformer block, optionally modulated by the task. N tokens, C width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_onn.model.attention import AttentionContext, FullAttention
from tiny_onn.model.deep_embed import DeltaOf, InputMix, scale
from tiny_onn.model.dyn_moe import DynMoE, RoutingLog
from tiny_onn.model.ffn import ActSparse24MLP, SquaredReLU, SwiGLU
from tiny_onn.model.nsa import NativeSparseAttention


class TaskFilm(nn.Module):
    """Scale and shift of a normalised input from the task vector (FiLM, arXiv 1709.07871).

    Linear without bias, zero at the start: an unknown task (zero vector) is never modulated.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 4 * width, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, task_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Two (B, 2C) tensors, for attention and the FFN: scale and shift side by side."""
        return self.project(task_BC).chunk(2, dim=-1)


def modulate(x_NC: Tensor, film_B2C: Tensor | None, doc_N: Tensor) -> Tensor:
    """x * (1 + scale) + shift, with the scale and shift of each token's document."""
    if film_B2C is None:
        return x_NC
    scale_NC, shift_NC = film_B2C.index_select(0, doc_N).chunk(2, dim=-1)
    return x_NC * (1 + scale_NC) + shift_NC


class Block(nn.Module):
    """``enter`` and ``leave`` are dense per-token mathematics around the attention itself.

    They are the parts that ``compile_parts`` hands to torch.compile (dynamic in N), because
    attention over ragged documents would be recompiled for every batch. Experts run on ragged
    rows too, 2:4 masks are drawn once a step and watched on the host, and 2:4
    activations have a backward of their own that counts what it drops: a block with one of these
    compiles ``settle``, what of ``leave`` comes before its FFN.

    DeepEmbed's delta is looked up between the two, so that a table on disk is read while
    attention runs. It scales the FFN's hidden layer (form 4x; of ``mix``, form v7a, what that
    makes of it), or, with ``scale_output``, the FFN's output (form 1x, the one for experts).
    """

    def __init__(
        self,
        width: int,
        attention: FullAttention | NativeSparseAttention,
        ffn: SwiGLU | SquaredReLU | DynMoE,
        film: bool,
        dropout: float,
        mix: InputMix | None = None,
        scale_output: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(width)
        self.ffn = ffn
        self.film = TaskFilm(width) if film else None
        self.dropout = dropout
        self.mix = mix
        self.scale_output = scale_output

    def compile_parts(self) -> None:
        self.enter = torch.compile(self.enter, dynamic=True)
        if not isinstance(self.ffn, DynMoE | ActSparse24MLP) and not self.ffn.masked:
            self.leave = torch.compile(self.leave, dynamic=True)
        else:
            self.settle = torch.compile(self.settle, dynamic=True)

    def enter(
        self, x_NC: Tensor, film_B2C: Tensor | None, doc_N: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        """Queries, keys, values (and gates) of the normalised, modulated input."""
        return self.attention.project(
            modulate(self.attention_norm(x_NC), film_B2C, doc_N), cos, sin
        )

    def settle(
        self, x_NC: Tensor, attended_NHD: Tensor, film_B2C: Tensor | None, doc_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The stream after attention's update, and the FFN's normalised, modulated input."""
        update = self.attention.out(attended_NHD.flatten(1))
        x_NC = x_NC + F.dropout(update, self.dropout, self.training)
        return x_NC, modulate(self.ffn_norm(x_NC), film_B2C, doc_N)

    def leave(
        self,
        x_NC: Tensor,
        attended_NHD: Tensor,
        film_B2C: Tensor | None,
        doc_N: Tensor,
        delta_NX: Tensor | None = None,
        routing: RoutingLog | None = None,
    ) -> Tensor:
        """Both residual updates, once attention is done; ``delta_NX`` is DeepEmbed's."""
        x_NC, inner_NC = self.settle(x_NC, attended_NHD, film_B2C, doc_N)
        update = self._feed_forward(inner_NC, delta_NX, routing)
        return x_NC + F.dropout(update, self.dropout, self.training)

    def _feed_forward(
        self, x_NC: Tensor, delta_NX: Tensor | None, routing: RoutingLog | None
    ) -> Tensor:
        if isinstance(self.ffn, DynMoE):
            update = self.ffn(x_NC, routing)
        elif delta_NX is None or self.scale_output:
            update = self.ffn(x_NC)
        else:
            return self.ffn(x_NC, delta_NX if self.mix is None else self.mix(x_NC, delta_NX))
        return update if delta_NX is None else scale(update, delta_NX)

    def forward(
        self,
        x_NC: Tensor,
        task_BC: Tensor,
        doc_N: Tensor,
        context: AttentionContext,
        rows_M: Tensor | None = None,
        delta_of: DeltaOf | None = None,
        routing: RoutingLog | None = None,
    ) -> Tensor:
        """x_NC -> (N, C), or (M, C) at ``rows_M``: the last block skips rows nobody reads.

        ``delta_of`` gives DeepEmbed's delta of those rows; it is asked after attention. What
        experts did is added to ``routing`` where that is given.
        """
        films = (None, None) if self.film is None else self.film(task_BC)
        projected = self.enter(x_NC, films[0], doc_N, context.cos, context.sin)
        attended_NHD = self.attention.attend(*projected, context)
        if rows_M is not None:
            x_NC, attended_NHD, doc_N = (
                t.index_select(0, rows_M) for t in (x_NC, attended_NHD, doc_N)
            )
        delta_NX = None if delta_of is None else delta_of(rows_M)
        # A compiled ``leave`` never sees the log, which says nothing of a dense FFN.
        log = routing if isinstance(self.ffn, DynMoE) else None
        return self.leave(x_NC, attended_NHD, films[1], doc_N, delta_NX, log)
