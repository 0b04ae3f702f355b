"""Checks of the network's parts and of the rebirth of its experts, beyond types."""

from __future__ import annotations

import math

from tiny_onn.config.ranges import check_group
from tiny_onn.config.schema import ModelConfig, MoeConfig, NsaConfig, ResetConfig
from tiny_onn.config.schema_24 import K24Config
from tiny_onn.errors import UserError

VOCAB_SIZE = 14

NUM_FORCED_BLOCKS = 3
"""Blocks that NSA always reads: the document's first, the token's own, the one before it."""

DEEP_EMBED_KEYS = ("token", "ngram", "patch", "task")
"""What may stand in model.deep_embed.keys; all but task can live in files."""


def check_model(model: ModelConfig) -> None:
    """Numbers in their ranges; widths and heads that fit together.

    Raises:
        UserError: a number out of range, heads that cannot be shared out, an odd head, another
            vocabulary.
    """
    check_group("model", model)
    if model.heads % model.kv_heads:
        raise UserError(
            f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}; expected "
            "heads to be a multiple of kv_heads; change one of them"
        )
    if model.head_width % 2:
        raise UserError(
            f"got model.head_width={model.head_width}; expected an even number, at least 8; "
            f"use {model.head_width + 1}"
        )
    if model.vocab_size != VOCAB_SIZE:
        raise UserError(
            f"got model.vocab_size={model.vocab_size}; expected {VOCAB_SIZE} (ten colours, start, "
            "newline, separator, end); leave it out"
        )
    check_deep_embed(model)
    check_act24(model)


def hidden_width(model: ModelConfig) -> int:
    """Hidden width of the FFN that is not of experts.

    Squared ReLU has no gate, so at equal parameters it is 1.5 times as wide as SwiGLU: the nearest
    multiple of 128 (64 where ffn_width is below 512, the least that CUTLASS's 2:4 products take),
    the smaller of two as near.
    """
    if not model.ffn.startswith("relu2"):
        return model.ffn_width
    align = 128 if model.ffn_width >= 512 else 64
    return max(1, -(-(3 * model.ffn_width - align) // (2 * align))) * align


def check_act24(model: ModelConfig) -> None:
    """Numbers in their ranges, and a width, if it is read, that groups of four divide.

    Raises:
        UserError: a number out of range, a width not divisible by 4.
    """
    check_group("model.act24", model.act24)
    if model.ffn == "relu2_act24" and model.ffn_width % 4:
        raise UserError(
            f"got model.ffn_width={model.ffn_width} with model.ffn=relu2_act24; expected a "
            f"multiple of 4 for 2:4 sparsity; use {-(-model.ffn_width // 4) * 4}"
        )


def check_deep_embed(model: ModelConfig) -> None:
    """Keys that exist, and a store, form and ranks that fit them.

    Raises:
        UserError: an unknown or repeated key, files with nothing to hold, a patch that would see
            later cells, a rank that is none.
    """
    config = model.deep_embed
    check_group("model.deep_embed", config)
    written = f"[{','.join(map(str, config.keys))}]"
    for name in config.keys:
        if name not in DEEP_EMBED_KEYS or config.keys.count(name) > 1:
            raise UserError(
                f"got model.deep_embed.keys={written}; expected different ones of "
                f"{', '.join(DEEP_EMBED_KEYS)}; mend {name}"
            )
    filed = [name for name in config.keys if name != "task"]
    if config.store == "memmap" and not filed:
        raise UserError(
            f"got model.deep_embed.store=memmap with keys={written}; expected token, ngram or "
            "patch among them (task rows stay in memory); use store=dense"
        )
    if "patch" in config.keys and config.patch == "prefix" and model.mask != "prefix":
        raise UserError(
            f"got model.deep_embed.patch=prefix with model.mask={model.mask}, under which a cell "
            "may not look at later ones; expected patch=causal; give that, or model.mask=prefix"
        )
    width = deep_embed_width(model)
    for name, rank in (("rank", config.rank), ("task_rank", config.task_rank)):
        used = bool(filed) if name == "rank" else "task" in config.keys
        if used and rank > width:
            raise UserError(
                f"got model.deep_embed.{name}={rank}; expected at most {width}, the width of a "
                f"row in form {config.form}; lower it"
            )


def deep_embed_width(model: ModelConfig) -> int:
    """Numbers that a row of a DeepEmbed table stands for, in every layer."""
    if model.deep_embed.form == "v7a":
        return model.deep_embed.mix_rank**2
    return model.width if model.deep_embed.form == "1x" else hidden_width(model)


def check_moe(moe: MoeConfig, model: ModelConfig) -> None:
    """Numbers in their ranges, and experts, if it has any, that fit each other and the model.

    Raises:
        UserError: a number out of range, more active experts than there are, a form of
            DeepEmbed that experts cannot have, a fallback that could do nothing.
    """
    check_group("moe", moe)
    if model.ffn != "dynmoe":
        return
    if moe.target_active > moe.experts:
        raise UserError(
            f"got moe.target_active={moe.target_active} with moe.experts={moe.experts}; expected "
            f"at most the number of experts; lower it, or give moe.experts="
            f"{math.ceil(moe.target_active)}"
        )
    deep = model.deep_embed
    if deep.keys and deep.form != "1x":
        raise UserError(
            f"got model.deep_embed.form={deep.form} with model.ffn=dynmoe, whose experts have no "
            "hidden layer in common; expected model.deep_embed.form=1x; use it, or model.ffn=dense"
        )
    if moe.combine == "gated" and moe.none_active == "top1":
        raise UserError(
            "got moe.none_active=top1 with moe.combine=gated, which weights an expert below its "
            "threshold with 0; expected moe.none_active=skip; use it, or moe.combine=mean"
        )


def check_reset(reset: ResetConfig, moe: MoeConfig, model: ModelConfig) -> None:
    """Numbers in their ranges, and an idle share that a healthy expert, if any, is well above.

    Raises:
        UserError: a number out of range, or experts at their target share that count as idle.
    """
    check_group("reset", reset)
    if model.ffn != "dynmoe":
        return
    fair = moe.target_active / moe.experts
    if reset.window_steps and reset.min_share >= fair:
        raise UserError(
            f"got reset.min_share={reset.min_share}; expected less than moe.target_active / "
            f"moe.experts = {fair:.3g}, or healthy experts are reborn; use {fair / 20:.2g}"
        )


def check_nsa(nsa: NsaConfig, model: ModelConfig) -> None:
    """Numbers in their ranges; if read, blocks that fit the stride, and room for the forced ones.

    Raises:
        UserError: a number out of range, a stride that does not divide a block, too few blocks.
    """
    check_group("nsa", nsa)
    if model.attention != "nsa":
        return
    for name in ("block", "select_block"):
        length = getattr(nsa, name)
        if length % nsa.stride:
            fitting = -(-length // nsa.stride) * nsa.stride
            raise UserError(
                f"got nsa.{name}={length} with nsa.stride={nsa.stride}; expected a multiple of the "
                f"stride; use nsa.{name}={fitting}, or another stride"
            )
    if nsa.select_count < NUM_FORCED_BLOCKS:
        raise UserError(
            f"got nsa.select_count={nsa.select_count}; expected at least {NUM_FORCED_BLOCKS} (the "
            "document's first block, the token's own and the one before it are always read); use "
            f"nsa.select_count={NUM_FORCED_BLOCKS} or more"
        )


def check_k24(k24: K24Config, model: ModelConfig, moe: MoeConfig) -> None:
    """Numbers in their ranges and, if weights are 2:4, widths in groups of four and masks that can
    do what is asked of them.

    Raises:
        UserError: a number out of range, a width that 4 does not divide, experts that share a
            weight without masks or with equal ones, a rank or revival that cannot be.
    """
    check_group("k24", k24)
    experts = model.ffn == "dynmoe"
    shared = experts and moe.expert_weights == "shared_k24"
    if model.weights != "k24":
        if shared:
            raise UserError(
                f"got moe.expert_weights=shared_k24 with model.weights={model.weights}; expected "
                "k24, whose masks are all that experts with one weight differ by; give "
                "model.weights=k24"
            )
        _check_fixed24(model)
        return
    _refuse_two_sparse_operands(model)
    widths = {"model.width": model.width}
    if not experts or moe.every > 1:
        widths["model.ffn_width"] = hidden_width(model)
    if experts:
        widths["moe.expert_width"] = moe.expert_width
    _check_fours(widths, model)
    if shared and k24.alpha_init_std == 0:
        raise UserError(
            "got k24.alpha_init_std=0 with moe.expert_weights=shared_k24; expected above 0, for "
            "experts that start equal stay equal; leave it out"
        )
    smallest = min(widths.values())
    if k24.logits == "additive" and k24.alpha_rank > smallest:
        raise UserError(
            f"got k24.alpha_rank={k24.alpha_rank}; expected at most {smallest}, the least width of "
            "a matrix; lower it, or give 0 for all of alpha"
        )
    if k24.alpha_rank and k24.alpha_init_std == 0:
        raise UserError(
            f"got k24.alpha_init_std=0 with k24.alpha_rank={k24.alpha_rank}; expected above 0, for "
            "two factors of zeros have no gradient; leave it out"
        )
    if k24.logits == "free" and (k24.alpha_rank or k24.weight_grad == "score"):
        given = f"alpha_rank={k24.alpha_rank}" if k24.alpha_rank else "weight_grad=score"
        raise UserError(
            f"got k24.{given} with k24.logits=free, which has neither alphas nor a score; expected "
            "additive logits; leave it out, or give k24.logits=additive"
        )
    if k24.revive_window and (k24.alpha_rank or k24.logits == "free"):
        given = "k24.logits=free" if k24.logits == "free" else f"k24.alpha_rank={k24.alpha_rank}"
        raise UserError(
            f"got k24.revive_window={k24.revive_window} with {given}, which have no number of a "
            "single weight's that could start anew; expected additive logits of full rank; give "
            "k24.revive_window=0"
        )
    if k24.reset_kl and not k24.reset_interval:
        raise UserError(
            f"got k24.reset_kl={k24.reset_kl} without k24.reset_interval; expected how often steps "
            "are looked at; give k24.reset_interval=100"
        )


def _check_fixed24(model: ModelConfig) -> None:
    """2:4 weights without learnt masks: an FFN that can have them, in groups of four."""
    if model.weights == "dense":
        return
    _refuse_two_sparse_operands(model)
    if model.ffn == "dynmoe":
        raise UserError(
            f"got model.weights={model.weights} with model.ffn=dynmoe; expected an FFN without "
            "experts, which only learnt masks fit; give model.weights=k24, or model.ffn=dense"
        )
    _check_fours({"model.width": model.width, "model.ffn_width": hidden_width(model)}, model)


def _refuse_two_sparse_operands(model: ModelConfig) -> None:
    if model.ffn == "relu2_act24":
        raise UserError(
            f"got model.ffn=relu2_act24 with model.weights={model.weights}; expected one of them, "
            "for a sparse product takes one 2:4 operand; use model.ffn=relu2, or "
            "model.weights=dense"
        )


def _check_fours(widths: dict[str, int], model: ModelConfig) -> None:
    for name, width in widths.items():
        if width % 4:
            raise UserError(
                f"got {name}={width} with model.weights={model.weights}, whose masks keep two "
                f"weights of every four in a row; expected a multiple of 4; use "
                f"{width + -width % 4}"
            )
