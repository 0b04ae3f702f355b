"""The assembled network: embedding, blocks (looped if asked), norm, untied head.

Shapes: N tokens of a packed batch, M rows whose logits are wanted, B documents, C width,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tiny_onn.config.check_network import (
    check_k24,
    check_model,
    check_moe,
    check_nsa,
    hidden_width,
)
from tiny_onn.config.schema import ModelConfig, MoeConfig, NsaConfig
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.model.attention import AttentionContext, FullAttention
from tiny_onn.model.attention_plan import plan_attention
from tiny_onn.model.block import Block
from tiny_onn.model.deep_embed import DeepEmbed, DeltaOf, InputMix
from tiny_onn.model.dyn_moe import DynMoE, Routing, RoutingLog
from tiny_onn.model.embedding import Embedding
from tiny_onn.model.experts import Experts
from tiny_onn.model.ffn import (
    ActSparse24MLP,
    SquaredReLU,
    SwiGLU,
    act24_layers,
    kernels_cannot,
)
from tiny_onn.model.k24_parts import K24Parts, sparse_parts
from tiny_onn.model.kv_cache import KVCache
from tiny_onn.model.nsa import NativeSparseAttention
from tiny_onn.model.nsa_cache import NsaCache
from tiny_onn.model.nsa_plan import NsaPlan
from tiny_onn.model.packed_attention import Attend
from tiny_onn.model.packed_weights import refuse_device
from tiny_onn.model.rope import Rope3D
from tiny_onn.model.token_context import PackedTokens, TokenHistory
from tiny_onn.ops import (
    resolve_attention,
    resolve_experts,
    resolve_nsa,
    resolve_pattern24,
    resolve_relu2_24,
)
from tiny_onn.sparse.activation_packed import takes_packed
from tiny_onn.sparse.k24_layer import K24Linear, PatternMask
from tiny_onn.sparse.masked_linear import MaskedLinear


@dataclass
class ModelOutput:
    """logits_MV: float32 (M, V), or the parameters' dtype if wider. routing: what each layer of
    experts did, in the order in which they ran (a looped block again in every round)."""

    logits_MV: Tensor
    routing: tuple[Routing, ...] = ()


class TinyONN(nn.Module):
    """Packed documents in, next-token logits out. Build it with :func:`build_model`."""

    def __init__(
        self,
        config: ModelConfig,
        num_tasks: int,
        moe: MoeConfig,
        nsa: NsaConfig,
        k24: K24Config,
    ) -> None:
        super().__init__()
        self.config, self.moe, self.nsa = config, moe, nsa
        self.sparse = sparse_parts(config.weights, k24)
        self.k24 = self.sparse if isinstance(self.sparse, K24Parts) else None
        self.packed: dict[str, Any] | None = None  # of weights that convert.py packed: how
        self.num_tasks = num_tasks
        self.embedding = Embedding(config.vocab_size, config.width, num_tasks)
        self.rope = Rope3D(config.head_width, config.rope_base)
        deep = config.deep_embed
        mixes = bool(deep.keys) and deep.form == "v7a"
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                self._attention(layer),
                self._ffn(layer),
                film=config.task_modulation == "film",
                dropout=config.dropout,
                mix=InputMix(config.width, deep.mix_rank, hidden_width(config)) if mixes else None,
                scale_output=deep.form == "1x",
            )
            for layer in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.attention_backend = "sdpa"
        self._initialise()
        # Drawn after all other weights, which are those of the same seed without it.
        self.deep_embed = DeepEmbed(config, num_tasks) if deep.keys else None
        for pattern, _ in self.masked_weights:
            pattern.reset_parameters()
        for module in self.blocks.modules():
            if isinstance(module, MaskedLinear):
                module.prepare()

    def _ffn(self, layer: int) -> SwiGLU | SquaredReLU | DynMoE:
        config, moe = self.config, self.moe
        if config.ffn == "dynmoe" and (config.layers - 1 - layer) % moe.every == 0:
            return DynMoE(config.width, moe, layer, self.k24)
        if config.ffn == "relu2":
            return SquaredReLU(config.width, hidden_width(config), self.sparse)
        if config.ffn == "relu2_act24":
            return ActSparse24MLP(config.width, hidden_width(config), config.act24)
        return SwiGLU(config.width, config.ffn_width, self.sparse)

    @property
    def expert_layers(self) -> list[DynMoE]:
        """The blocks' FFNs that have experts, first to last."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, DynMoE)]

    @property
    def masked_weights(self) -> list[tuple[PatternMask, nn.Parameter]]:
        """The 2:4 masks and the weights that wear them, first to last; none with dense weights."""
        found: list[tuple[PatternMask, nn.Parameter]] = []
        for module in self.blocks.modules():
            if isinstance(module, K24Linear):
                found.append((module.pattern, module.weight))
            elif isinstance(module, Experts) and module.gate_up_pattern is not None:
                assert module.down_pattern is not None
                found.append((module.gate_up_pattern, module.gate_up))
                found.append((module.down_pattern, module.down))
        return found

    @property
    def sparse_attention_layers(self) -> list[NativeSparseAttention]:
        """The blocks' attentions that are NSA, first to last."""
        layers = [block.attention for block in self.blocks]
        return [layer for layer in layers if isinstance(layer, NativeSparseAttention)]

    def _attention(self, layer: int) -> FullAttention | NativeSparseAttention:
        config = self.config
        sizes = (config.width, config.heads, config.kv_heads, config.head_width)
        if config.attention == "nsa" and (config.layers - 1 - layer) % self.nsa.every == 0:
            return NativeSparseAttention(*sizes, config.qk_norm, self.nsa)
        return FullAttention(*sizes, config.qk_norm)

    def _initialise(self) -> None:
        """Normal weights of variance 1/fan_in; residual outputs shrunk by the depth."""
        depth = 2 * self.config.layers * self.config.loops
        for name, parameter in self.named_parameters():
            if not name.startswith("blocks.") or parameter.dim() < 2 or "film" in name:
                continue
            # Gates, phi, mix and masks start in ways of their own.
            if any(part in name for part in (".gate.", ".compress_", ".mix.", "pattern.")):
                continue
            std = parameter.shape[-1] ** -0.5
            if name.endswith(("attention.out.weight", "ffn.down.weight", "experts.down")):
                std /= math.sqrt(depth)
            nn.init.normal_(parameter, std=std)
        nn.init.zeros_(self.head.weight)

    def use_backend(
        self,
        backend: str,
        device: torch.device | str,
        precision: str = "bf16",
        experts: str = "auto",
        nsa: str = "auto",
        pattern24: str = "auto",
        relu2_24: str = "auto",
        tokens: int = 0,
    ) -> TinyONN:
        """Decide how attention, experts and 2:4 parts run on ``device`` (:mod:`tiny_onn.ops`).

        ``tokens``: of a training batch on one device, which "auto" of relu2_24 goes by; 0: few.
        """
        if self.packed is not None:
            refuse_device(self.packed["backend"], device)
        self.attention_backend = resolve_attention(backend, device, precision)
        dtype = self.head.weight.dtype
        if dtype == torch.float32 and precision == "bf16":
            dtype = torch.bfloat16
        if self.expert_layers:
            width, hidden = self.config.width, self.moe.expert_width
            chosen = resolve_experts(experts, device, dtype, width, hidden)
            for layer in self.expert_layers:
                layer.experts.backend = chosen
        if self.sparse_attention_layers:
            chosen = resolve_nsa(nsa, device, dtype)
            for layer in self.sparse_attention_layers:
                layer.backend = chosen
        if self.masked_weights:
            size = max(weight.numel() for _, weight in self.masked_weights)
            chosen = resolve_pattern24(pattern24, device, self.head.weight.dtype, size)
            for pattern, _ in self.masked_weights:
                pattern.backend = chosen
        packing = act24_layers(self)
        if packing:
            hidden = hidden_width(self.config)
            operations = 2 * tokens * hidden * self.config.width
            cannot = kernels_cannot(self.config)
            chosen = resolve_relu2_24(relu2_24, device, dtype, operations, cannot)
            packed = chosen == "triton" and takes_packed(hidden, device, dtype)
            for layer in packing:
                layer.backend, layer.takes_packed = chosen, packed
        return self

    @torch.compiler.disable
    def plan_attention(self, batch: Any) -> Attend | NsaPlan:
        """How this batch's documents attend, by the chosen back-end (filler rows do not).

        Work of the host, on documents' lengths, once a batch: nothing to compile.
        """
        kernels = any(layer.backend == "triton" for layer in self.sparse_attention_layers)
        return plan_attention(batch, self.config, self.nsa, self.attention_backend, kernels)

    def hidden(
        self,
        batch: Any,
        rows_M: Tensor | None = None,
        cache: KVCache | None = None,
        routing: RoutingLog | None = None,
        num_rows: int | None = None,
    ) -> Tensor:
        """Last hidden states of a packed batch at ``rows_M`` (default all N), before the norm.

        ``num_rows`` says how many of ``rows_M`` are real, where filler follows them.
        """
        deltas = self._deltas(batch, cache)  # first: reading tables on disk begins here
        layout = batch.layout
        cos, sin = self.rope(batch.positions_N3)
        context = AttentionContext(cos, sin, attend=self.plan_attention(batch))
        if cache is not None:
            context.cache, context.doc_N = cache, layout.doc_N
            context.column_N = _columns(layout)
        x_NC, task_BC = self.embedding(
            batch.tokens_N, layout.doc_N, batch.task_B, batch.view_B, batch.soft
        )
        self._count_rows(sum(layout.lengths))
        *earlier, last = list(zip(self.blocks, deltas, strict=True)) * self.config.loops
        for block, delta_of in earlier:
            x_NC = block(x_NC, task_BC, layout.doc_N, context, delta_of=delta_of, routing=routing)
        block, delta_of = last
        if rows_M is not None:
            self._count_rows(len(rows_M) if num_rows is None else num_rows)
        return block(x_NC, task_BC, layout.doc_N, context, rows_M, delta_of, routing)

    def _count_rows(self, num_rows: int) -> None:
        """Tell the masks how many rows of the coming FFNs' inputs are no filler."""
        if self.k24 is not None:
            self.k24.state.num_rows = num_rows

    def _deltas(self, batch: Any, cache: KVCache | None) -> Sequence[DeltaOf | None]:
        """DeepEmbed's delta for every block; a cache also learns which tokens keys may look at."""
        if self.deep_embed is None:
            return [None] * len(self.blocks)
        layout = batch.layout
        column_N = _columns(layout)
        whole_N = None
        if self.config.deep_embed.patch == "prefix":
            whole_N = column_N < layout.prefix_lens[layout.doc_N]
        tokens = PackedTokens(batch.tokens_N, batch.positions_N3, column_N, whole_N)
        if cache is not None:
            cache.history = TokenHistory(tokens, layout.doc_N, cache.lengths_B, cache.capacity)
        return self.deep_embed(tokens, batch.task_B, layout.doc_N)

    def _step_deltas(
        self, tokens_B: Tensor, positions_B3: Tensor, doc_B: Tensor, cache: KVCache
    ) -> Sequence[DeltaOf | None]:
        """As :meth:`_deltas`, of the tokens that a decoding step feeds."""
        if self.deep_embed is None:
            return [None] * len(self.blocks)
        assert cache.history is not None, "prefill fills the history"
        cache.history.append(tokens_B, positions_B3)
        return self.deep_embed(cache.history, cache.task_B, doc_B)

    def compile_blocks(self) -> TinyONN:
        """torch.compile the per-token parts of every block (about 20 s at the first use)."""
        for block in self.blocks:
            block.compile_parts()
        return self

    def logits(self, x_MC: Tensor) -> Tensor:
        logits_MV = self.head(self.norm(x_MC))
        return logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()

    def forward(
        self, batch: Any, rows_M: Tensor | None = None, num_rows: int | None = None
    ) -> ModelOutput:
        """Next-token logits at ``rows_M`` of the packed batch (all N rows by default).

        ``num_rows`` says how many of ``rows_M`` are real, where filler follows them.
        """
        log = RoutingLog()
        logits_MV = self.logits(self.hidden(batch, rows_M, routing=log, num_rows=num_rows))
        num_tokens = sum(batch.layout.lengths)
        routing = [replace(entry, num_rows=num_tokens) for entry in log.entries]
        if routing and rows_M is not None:  # experts are in the last block, if anywhere
            num_rows = len(rows_M) if num_rows is None else num_rows
            routing[-1] = replace(routing[-1], num_rows=num_rows)
        return ModelOutput(logits_MV, tuple(routing))

    @torch.no_grad()
    def prefill(self, batch: Any, max_new_tokens: int) -> tuple[Tensor, KVCache]:
        """Run packed prompts once; returns (logits_BV of each last token, cache).

        The cache has room for ``max_new_tokens`` more tokens of every document.
        """
        layout = batch.layout
        lengths_B = layout.cu_seqlens.diff().long()
        capacity = layout.max_seqlen + max_new_tokens
        if self.config.attention == "nsa":
            cache = NsaCache(layout.lengths, lengths_B, capacity, self.nsa)
        else:
            cache = KVCache(lengths_B, layout.max_seqlen, capacity)
        cache.task_B, cache.view_B = batch.task_B, batch.view_B
        last_B = layout.cu_seqlens[1:].long() - 1
        return self.logits(self.hidden(batch, last_B, cache)), cache

    @torch.no_grad()
    def step(
        self, tokens_B: Tensor, positions_B3: Tensor, cache: KVCache, soft: Any | None = None
    ) -> Tensor:
        """Feed one token to every row of the cache; returns the next token's logits_BV.

        ``soft``: rows whose token is a mixture (see :class:`tiny_onn.arc.packing.SoftTokens`).
        """
        cos, sin = self.rope(positions_B3)
        bias_B11T = cache.start_step()
        context = AttentionContext(cos, sin, cache=cache, bias_B11T=bias_B11T)
        doc_B = torch.arange(len(tokens_B), device=tokens_B.device)
        deltas = self._step_deltas(tokens_B, positions_B3, doc_B, cache)
        x_BC, task_BC = self.embedding(tokens_B, doc_B, cache.task_B, cache.view_B, soft)
        for _ in range(self.config.loops):
            for block, delta_of in zip(self.blocks, deltas, strict=True):
                x_BC = block(x_BC, task_BC, doc_B, context, delta_of=delta_of)
        cache.finish_step()
        return self.logits(x_BC)


def _columns(layout: Any) -> Tensor:
    """int64 (N,) place of every token in its document (filler rows go on after the last one)."""
    begin_B = layout.cu_seqlens[:-1].long()
    return torch.arange(len(layout.doc_N), device=begin_B.device) - begin_B[layout.doc_N]


def build_model(
    config: ModelConfig,
    num_tasks: int,
    moe: MoeConfig | None = None,
    nsa: NsaConfig | None = None,
    k24: K24Config | None = None,
) -> TinyONN:
    """The network ``config`` describes, with ``num_tasks`` task vectors, on the CPU.

    ``moe`` describes the experts where ``config.ffn`` is dynmoe, ``nsa`` the attention where
    ``config.attention`` is nsa, ``k24`` the masks where ``config.weights`` is k24 (None: the
    defaults).

    Raises:
        UserError: see ``check_model``, ``check_moe``, ``check_nsa`` and ``check_k24`` in
            :mod:`tiny_onn.config.check_network`.
    """
    moe, nsa, k24 = moe or MoeConfig(), nsa or NsaConfig(), k24 or K24Config()
    check_model(config)
    check_moe(moe, config)
    check_nsa(nsa, config)
    check_k24(k24, config, moe)
    return TinyONN(config, num_tasks, moe, nsa, k24)
