"""What is compared: students of the same teachers at equal steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tiny_onn.config.schema import OptimConfig
from tiny_onn.config.schema_24 import K24Config

REVIVE_STEPS, RESET_STEPS = 100, 100


@dataclass(frozen=True)
class Arm:
    """label: what the table calls it. options: changes of K24Config's defaults. pattern_lr: of what
    chooses masks. given: the student has the teachers' matrix and learns masks alone. draw, rare:
    of the teachers (see make_teachers)."""

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    student: Literal["k24", "random", "true", "separate", "shared", "soft_threshold"] = "k24"
    pattern_lr: float = OptimConfig().pattern_lr
    given: bool = False
    draw: Literal["independent", "distinct"] = "independent"
    rare: bool = False

    def config(self, steps: int) -> K24Config:
        return K24Config(**{"schedule_steps": steps, **self.options})


def kappa(start: float, end: float) -> dict[str, float]:
    return {"kappa_start": start, "kappa_end": end}


OFF = {"div_coef": 0.0}

ARMS = {
    "shared": Arm("one dense matrix", student="shared"),
    "separate": Arm("four dense matrices", student="separate"),
    "true": Arm("the teachers' masks, fixed", student="true"),
    "random": Arm("random masks, fixed", student="random"),
    "soft-threshold": Arm("Kaleidoscope's soft thresholds (not 2:4)", student="soft_threshold"),
    "k24": Arm("K-2:4, defaults"),
    "kappa1": Arm("kappa 1 throughout, tau annealed", kappa(1, 1)),
    "kappa16": Arm("kappa 16 throughout", kappa(16, 16)),
    "kappa4": Arm("kappa 1 to 4", kappa(1, 4)),
    "kappa64": Arm("kappa 1 to 64", kappa(1, 64)),
    "tau1": Arm("tau 1 throughout", {"tau_start": 1.0, "tau_middle": 1.0, "tau_end": 1.0}),
    "no-div": Arm("no diversity loss", OFF),
    "div1": Arm("diversity 1 (dot)", {"div_coef": 1.0}),
    "overlap": Arm("diversity 0.1 (overlap)", {"div_kernel": "overlap"}),
    "overlap1": Arm("diversity 1 (overlap)", {"div_kernel": "overlap", "div_coef": 1.0}),
    "free": Arm("six free logits", {"logits": "free"}),
    "l2": Arm("activity l2", {"act_stat": "l2"}),
    "std0": Arm("alphas start equal", {"alpha_init_std": 0.0}),
    "std0-no-div": Arm("alphas start equal, no diversity loss", {"alpha_init_std": 0.0, **OFF}),
    "std01": Arm("alphas start at 0.1", {"alpha_init_std": 0.1}),
    "rank8": Arm("alpha of rank 8", {"alpha_rank": 8}),
    "straight": Arm("weight gradient straight", {"weight_grad": "straight"}),
    "score": Arm("weight gradient score", {"weight_grad": "score"}),
    "lr003": Arm("pattern lr 0.003", pattern_lr=0.003),
    "lr03": Arm("pattern lr 0.03", pattern_lr=0.03),
    "lr1": Arm("pattern lr 0.1", pattern_lr=0.1),
    "score-lr03": Arm("score, pattern lr 0.03", {"weight_grad": "score"}, pattern_lr=0.03),
    "score-std01": Arm(
        "score, alphas start at 0.1", {"weight_grad": "score", "alpha_init_std": 0.1}
    ),
    "score-std01-lr03": Arm(
        "score, alphas start at 0.1, pattern lr 0.03",
        {"weight_grad": "score", "alpha_init_std": 0.1},
        pattern_lr=0.03,
    ),
    "free-straight": Arm("free logits, straight", {"logits": "free", "weight_grad": "straight"}),
    "free-lr03": Arm("free logits, pattern lr 0.03", {"logits": "free"}, pattern_lr=0.03),
    "reset": Arm("soft reset of activity every 100 steps", {"reset_interval": RESET_STEPS}),
    "revive": Arm("revival every 100 steps", {"revive_window": REVIVE_STEPS}),
    "rare-l1": Arm("rare features, activity l1", rare=True),
    "rare-l2": Arm("rare features, activity l2", {"act_stat": "l2"}, rare=True),
    "distinct": Arm("distinct teachers, diversity 0.1 (dot)", draw="distinct"),
    "distinct-no-div": Arm("distinct teachers, no diversity loss", OFF, draw="distinct"),
    "distinct-div1": Arm(
        "distinct teachers, diversity 1 (dot)", {"div_coef": 1.0}, draw="distinct"
    ),
    "given": Arm("matrix given", given=True),
    "given-no-div": Arm("matrix given, no diversity loss", OFF, given=True),
    "given-free": Arm("matrix given, six free logits", {"logits": "free"}, given=True),
    "given-kappa1": Arm("matrix given, kappa 1 throughout", kappa(1, 1), given=True),
    "given-lr1": Arm("matrix given, pattern lr 0.1", pattern_lr=0.1, given=True),
}
"""In the order of the table; those after ``k24`` change what their labels name."""

MAIN = ("shared", "separate", "true", "random", "k24")
