"""What is compared, for how long, and what each run is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tiny_onn.errors import UserError

OWN_KEYS = (
    *("budget", "seed", "out", "resume", "stage", "preset", "network", "init_from"),
    *("data.holdout", "data.track", "trainer.threads"),
    *("model.weights", "weights", "model.ffn", "ffn", "moe.expert_weights"),
)
"""Keys and groups that this experiment sets itself."""

HOLDOUT_OUTPUTS = 1000
"""More than there are: every hold-out output is decoded."""

EXPERTS, ONE_EXPERT = 8, 128
"""Experts of a block, as preset nano has them; hidden width of one: 16 more than there, so that
separate experts in the bytes of a shared weight have a width that fast products take."""


@dataclass(frozen=True)
class Arm:
    """One network. label: what the table calls it; words: key=value for train.py. pruned_by: how
    it is made from the trained weights of arm ``dense`` instead ("": it is trained)."""

    label: str
    words: tuple[str, ...] = ()
    pruned_by: str = ""


def _ffn(label: str, weights: str = "dense", *more: str) -> Arm:
    return Arm(label, ("model.ffn=dense", f"model.weights={weights}", *more))


def _experts(label: str, width: int, weights: str = "dense", shared: bool = False) -> Arm:
    kind = "shared_k24" if shared else "separate"
    words = (
        *("model.ffn=dynmoe", f"model.weights={weights}", f"moe.expert_weights={kind}"),
        *(f"moe.experts={EXPERTS}", f"moe.expert_width={width}"),
    )
    return Arm(label, words)


def _relu2(label: str, *more: str) -> Arm:
    return Arm(label, ("model.ffn=relu2_act24", "model.weights=dense", *more))


DENSE = "dense"
"""The arm that others are held against, and pruned from."""

WEIGHTS = {
    DENSE: _ffn("dense"),
    "magnitude": Arm("magnitude 2:4 after training", pruned_by="magnitude"),
    "wanda": Arm("Wanda 2:4 after training", pruned_by="wanda"),
    "s_ste": _ffn("S-STE", "s_ste"),
    "k24": _ffn("K-2:4", "k24"),
    "random": _ffn("random fixed 2:4", "random24"),
}
"""Part (b): one FFN, 2:4 in different ways."""

SHARING = {
    "shared-k24": _experts("8 experts, one weight", ONE_EXPERT, "k24", shared=True),
    "experts-bytes": _experts("8 experts, bytes of one shared weight", 24),
    "dense-bytes": _ffn("dense FFN, bytes of one shared weight", "dense", "model.ffn_width=192"),
    "dense-one": _ffn("dense FFN as wide as an expert", "dense", "model.ffn_width=128"),
    "experts": _experts("8 experts", ONE_EXPERT),
    "experts-k24": _experts("8 experts, each under masks", ONE_EXPERT, "k24"),
    "shared-k24-wide": _experts("8 experts, one wide weight", 684, "k24", shared=True),
    "dense-wide": _ffn("dense FFN, bytes of 8 experts", "dense", "model.ffn_width=1024"),
}
"""Part (c). Bytes of a block's matrices at bf16, 480 numbers a unit of hidden width: a shared
weight of 128 and 8 masks of a bit, 184,320; so have 8 separate experts of 24 and a dense FFN of
192. 8 separate experts of 128, 983,040; so has a dense FFN of 1024, and, but for 0.2%, a shared
weight of 684. One expert runs for a token, as preset nano has it."""

ACTIVATIONS = {
    # In its warm-up the sparse FFN is the dense one to the bit, and counts what 2:4 would drop.
    "relu2": _relu2("squared ReLU", "model.act24.activation_dense_warmup_steps=1000000000"),
    "relu2_act24": _relu2("squared ReLU, 2:4 activations"),
}
"""Part (d)."""

ARMS = {**WEIGHTS, **SHARING, **ACTIVATIONS}
"""In the order of the table."""

PARTS = {"weights": WEIGHTS, "sharing": SHARING, "activations": ACTIVATIONS}
"""What --arms takes for all arms of a part."""


@dataclass(frozen=True)
class Budget:
    """Either minutes of wall clock or optimizer steps, the same for every arm."""

    minutes: float | None = None
    steps: int | None = None

    @property
    def name(self) -> str:
        """ "10min" or "900steps"; it names files."""
        return f"{self.steps}steps" if self.minutes is None else f"{self.minutes:g}min"

    @property
    def word(self) -> str:
        """key=value for train.py."""
        if self.minutes is not None:
            return f"budget.minutes={self.minutes:g}"
        return f"budget.steps={self.steps}"

    @property
    def log_steps(self) -> int:
        """Optimizer steps between log lines: as the preset has it, but ten lines at least."""
        return 20 if self.steps is None else max(1, min(20, self.steps // 10))

    @property
    def observe_steps(self) -> int:
        """Optimizer steps between looks at the masks: a tenth of the run, or 50."""
        return 50 if self.steps is None else max(1, self.steps // 10)


@dataclass(frozen=True)
class Run:
    """One training (or pruning). tag: names the settings that differ from the preset's ("": none
    do); threads: of this run; jobs: how many runs share the machine, this one included."""

    arm: str
    budget: Budget
    seed: int
    tag: str = ""
    threads: int = 1
    jobs: int = 1

    @property
    def name(self) -> str:
        """Of its folder below runs/k24 and of its result file: all that decides a result."""
        arm = f"{self.arm}-{self.tag}" if self.tag else self.arm
        return f"{arm}_{self.budget.name}_{self.threads}x{self.jobs}_seed{self.seed}"

    @property
    def label(self) -> str:
        return label_of(self.arm, self.tag)

    def folder(self, root: Path) -> Path:
        return root / "runs" / "k24" / self.name

    def result_path(self, results: Path) -> Path:
        return results / f"k24_{self.name}.json"

    def words(self, extra: list[str]) -> list[str]:
        """key=value for train.py. Of equal keys the last one counts."""
        warmup = self.budget.steps is not None and ARMS[self.arm] is ACTIVATIONS["relu2_act24"]
        steps = (self.budget.steps or 0) // 10
        return [
            "stage=pretrain",
            "preset=nano",
            "network=dense",  # and beside it what the arm switches on
            "data.track=nano",
            "data.holdout=train_tests",
            f"trainer.holdout_decode={HOLDOUT_OUTPUTS}",
            "trainer.tensorboard=false",
            f"trainer.log_every_steps={self.budget.log_steps}",
            *([f"model.act24.activation_dense_warmup_steps={steps}"] if warmup else []),
            *ARMS[self.arm].words,
            *extra,
            self.budget.word,
            f"seed={self.seed}",
            f"trainer.threads={self.threads}",
            f"out=runs/k24/{self.name}",
        ]


def label_of(arm: str, tag: str) -> str:
    """What the table calls an arm with other settings."""
    label = ARMS[arm].label if arm in ARMS else arm
    return f"{label} ({tag})" if tag else label


def expand(text: str) -> str:
    """--arms with every part's name replaced by its arms'."""
    names = [name.strip() for name in text.split(",")]
    return ",".join(",".join(PARTS[name]) if name in PARTS else name for name in names)


def choose_budget(minutes: float | None, steps: int | None) -> Budget:
    """Exactly one of them is given.

    Raises:
        UserError: a number that is not finite and above 0.
    """
    name, value = ("--steps", steps) if minutes is None else ("--minutes", minutes)
    assert value is not None
    if not 0 < value < float("inf"):
        raise UserError(f"got {name} {value:g}; expected a number above 0; change it")
    return Budget(minutes=minutes) if minutes is not None else Budget(steps=steps)
