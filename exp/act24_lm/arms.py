"""What is compared: FFNs of one small language model, at equal parameters and equal steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tiny_onn.config.schema_24 import ActSparse24Config

SWIGLU_HIDDEN, RELU2_HIDDEN = 344, 512
"""132,096 and 131,072 weights a layer at width 128."""

WARMUP_SHARE = 0.1
"""Of the steps, with dense activations, unless an arm says otherwise."""


@dataclass(frozen=True)
class Arm:
    """label: what the table calls it; ffn: swiglu, relu2 or relu2_act24; options: changes of
    ActSparse24Config's defaults; warmup_share: of the steps."""

    label: str
    ffn: str = "relu2_act24"
    options: dict[str, Any] = field(default_factory=dict)
    warmup_share: float = WARMUP_SHARE

    def config(self, steps: int) -> ActSparse24Config:
        return ActSparse24Config(
            **{"activation_dense_warmup_steps": int(self.warmup_share * steps), **self.options}
        )


ARMS = {
    "swiglu": Arm("SwiGLU", "swiglu"),
    "relu2": Arm("dense ReLU²", "relu2"),
    "act24": Arm("2:4: naive, split 95%, permuted, masked, direct dX"),
    "mvue": Arm("activations by mvue", options={"activation_sparse_method": "mvue"}),
    "soft": Arm(
        "activations by soft_threshold", options={"activation_sparse_method": "soft_threshold"}
    ),
    "gradient-mvue": Arm("weight gradients by mvue", options={"gradient_sparse_method": "mvue"}),
    "split0": Arm("split 0: exact weight gradients", options={"split_ratio": 0.0}),
    "split100": Arm("split 100%: no dense feature", options={"split_ratio": 1.0}),
    "split-random": Arm("split 95%, dense features at random", options={"split_by": "random"}),
    "split-dropped": Arm("split 95% by what 2:4 would drop", options={"split_by": "dropped"}),
    "no-permutation": Arm("tokens in their order", options={"permute_tokens": False}),
    "split100-no-permutation": Arm(
        "split 100%, tokens in their order", options={"split_ratio": 1.0, "permute_tokens": False}
    ),
    "no-mask": Arm("forward mask not kept", options={"keep_forward_mask": False}),
    "dx-split": Arm("dX from the feature-wise operand", options={"dx_direct_sparse": False}),
    "no-warmup": Arm("no dense warm-up", warmup_share=0.0),
}
"""In the order of the table. ``act24`` is the default; those after it change one thing of it, but
the one with both its split and its permutation off."""

MAIN = ("swiglu", "relu2", "act24", "mvue", "soft")
