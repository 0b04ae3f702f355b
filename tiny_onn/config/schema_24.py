"""Settings of 2:4 sparsity: activations, and masks of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tiny_onn.config.key import key


@dataclass(frozen=True)
class ActSparse24Config:
    """2:4 activations: read where model.ffn=relu2_act24 (tiny_onn/sparse/activation.py)."""

    activation_sparse_method: Literal["naive", "mvue", "soft_threshold"] = key(
        "naive", "activations: the 2 largest of 4, an unbiased draw of 2, or a soft threshold"
    )
    activation_dense_warmup_steps: int = key(
        1000, "optimizer steps with dense activations before the switch"
    )
    dx_direct_sparse: bool = key(
        True, "input gradient from what the forward's mask left: exact; false: as dW1's operand"
    )
    gradient_sparse_method: Literal["naive", "mvue"] = key(
        "naive", "operands of the weight gradients, along tokens: 2 largest of 4, or unbiased draw"
    )
    split_ratio: float = key(
        0.95, "share of the features, the sparsest, whose weight gradients are 2:4; others: dense"
    )
    split_by: Literal["nonzeros", "dropped", "random"] = key(
        "nonzeros", "sparsest: fewest nonzeros, fewest that 2:4 would drop; random: a control"
    )
    permute_tokens: bool = key(True, "group tokens in a fixed random order for weight gradients")
    permute_seed: int = key(0, "seeds that order")
    keep_forward_mask: bool = key(
        True, "what the forward dropped has no gradient; false: gradients of dense activations"
    )


@dataclass(frozen=True)
class K24Config:
    """K-2:4, masks learnt by pattern Gumbel-Softmax: read where model.weights=k24.

    weight_grad says where gradients go. Muon's orthogonal updates also move weights that have none.
    """

    logits: Literal["additive", "free"] = key(
        "additive", "of the six patterns: kappa x what a pattern keeps of the score, or six numbers"
    )
    kappa_start: float = key(1.0, "scale of the logits at the start: 35% of samples are the best")
    kappa_end: float = key(16.0, "scale of the logits at the end: 92% of samples are the best")
    tau_start: float = key(5.0, "temperature of the mask's gradient at the start")
    tau_middle: float = key(1.0, "temperature where the second phase begins")
    tau_end: float = key(0.1, "temperature at the end")
    phase_split: float = key(0.5, "share of the schedule at which tau's second phase begins")
    schedule_steps: int = key(
        0, "optimizer steps over which kappa and tau move (0: the whole budget, or its minutes)"
    )
    momentum: float = key(0.99, "of the average input size, an optimizer step")
    act_stat: Literal["l1", "l2"] = key("l1", "input size: mean |x|, or root mean square (Wanda)")
    alpha_init_std: float | None = key(
        None, "spread of alpha (or free logits) at the start; null: 1 in shared experts, else 0.1"
    )
    alpha_rank: int = key(0, "alpha is a product of this rank (0: a number a weight and agent)")
    weight_grad: Literal["masked", "straight", "score"] = key(
        "masked",
        "what learns: kept weights; straight: all, as if kept; score: all, through their score too",
    )
    div_kernel: Literal["dot", "overlap"] = key(
        "dot", "experts that share a weight draw other patterns, or keep other entries (overlap)"
    )
    div_coef: float = key(0.1, "weight of that diversity loss, of shared experts only (0: off)")
    reset_interval: int = key(
        0, "optimizer steps between soft resets of the average input size (0: none)"
    )
    reset_ratio: float = key(0.9, "share by which a soft reset moves it to the batch's")
    reset_kl: float = key(
        0.0,
        "a reset needs a step, of those at its interval, that moves predictions by this KL in nats",
    )
    revive_window: int = key(
        0, "optimizer steps after which weights no agent has selected are revived (0: never)"
    )
    revive_share: float = key(0.1, "share of those weights that is revived")
    until_share: float = key(0.7, "share of the budget after which nothing is reset or revived")
