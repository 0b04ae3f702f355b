"""What is compared, for how long, and what each run is called."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from tiny_onn.errors import UserError

OWN_KEYS = (
    *("budget", "seed", "out", "resume", "stage", "preset", "network"),
    *("data.holdout", "data.track", "trainer.threads"),
)
"""Keys and groups that this experiment sets itself."""

HOLDOUT_OUTPUTS = 1000
"""More than there are: every hold-out output is decoded."""


@dataclass(frozen=True)
class Arm:
    """One network. label: what the table calls it; words: key=value for train.py."""

    label: str
    words: tuple[str, ...]


def _arm(
    label: str, attention: str = "full", ffn: str = "dense", keys: str = "", *more: str
) -> Arm:
    """Every switch is set, so that no preset decides what an arm is."""
    switches = (
        f"model.attention={attention}",
        f"model.ffn={ffn}",
        f"model.deep_embed.keys=[{keys}]",
        "model.deep_embed.form=1x",  # the only one that experts can have: one form for all arms
    )
    return Arm(label, (*switches, *more))


_ALL = ("nsa", "dynmoe", "token,task")

ARMS = {
    "dense": _arm("dense"),
    "nsa": _arm("+NSA", attention="nsa"),
    "dynmoe": _arm("+DynMoE", ffn="dynmoe"),
    "deepembed-task": _arm("+DeepEmbed(task)", keys="task"),
    "deepembed-token": _arm("+DeepEmbed(token)", keys="token"),
    "all": _arm("all", *_ALL),
    "all-no-reset": _arm("all, reset off", *_ALL, "reset.window_steps=0"),
    "all-no-sdl": _arm("all, SDL off", *_ALL, "moe.sparsity_weight=0", "moe.diversity_weight=0"),
}
"""In the order of the table. Sizes (experts, blocks, ranks) are the preset's."""


@dataclass(frozen=True)
class Budget:
    """Either minutes of wall clock or training tokens, the same for every arm."""

    minutes: float | None = None
    tokens: int | None = None

    @property
    def name(self) -> str:
        """ "10min" or "2.5Mtok"; exact, for it names files."""
        if self.minutes is not None:
            return f"{self.minutes:g}min"
        assert self.tokens is not None
        return f"{self.tokens / 1e6:.6f}".rstrip("0").rstrip(".") + "Mtok"

    def word(self, batch_tokens: int) -> str:
        """key=value for train.py. Tokens become steps: all arms see the same batches, which are
        nearly full, so a run trains on a few percent fewer tokens than asked for."""
        if self.minutes is not None:
            return f"budget.minutes={self.minutes:g}"
        assert self.tokens is not None
        return f"budget.steps={ceil(self.tokens / batch_tokens)}"


@dataclass(frozen=True)
class Run:
    """One training. tag: names the settings that differ from the preset's ("": none do);
    threads: of this run; jobs: how many runs share the machine, this one included."""

    arm: str
    budget: Budget
    seed: int
    tag: str = ""
    threads: int = 2
    jobs: int = 1

    @property
    def name(self) -> str:
        """Of its folder below runs/ablation and of its result file: all that decides a result,
        so that none under other circumstances passes for it."""
        arm = f"{self.arm}-{self.tag}" if self.tag else self.arm
        return f"{arm}_{self.budget.name}_{self.threads}x{self.jobs}_seed{self.seed}"

    @property
    def label(self) -> str:
        return label_of(self.arm, self.tag)

    def result_path(self, folder: Path) -> Path:
        return folder / f"ablation_{self.name}.json"

    def words(self, extra: list[str], batch_tokens: int) -> list[str]:
        """key=value for train.py. Of equal keys the last one counts."""
        return [
            "stage=pretrain",
            "preset=nano",
            "network=dense",  # and beside it what the arm switches on
            "data.track=nano",
            "data.holdout=train_tests",
            f"trainer.holdout_decode={HOLDOUT_OUTPUTS}",
            "trainer.tensorboard=false",
            *ARMS[self.arm].words,
            *extra,
            self.budget.word(batch_tokens),
            f"seed={self.seed}",
            f"trainer.threads={self.threads}",
            f"out=runs/ablation/{self.name}",
        ]


def label_of(arm: str, tag: str) -> str:
    """What the table calls an arm with other settings."""
    label = ARMS[arm].label if arm in ARMS else arm
    return f"{label} ({tag})" if tag else label


def choose_budget(minutes: float | None, tokens: float | None) -> Budget:
    """Minutes unless tokens are given; at most one of them is.

    Raises:
        UserError: a number that is not finite and above 0, or tokens that are not whole.
    """
    name, value = ("--tokens", tokens) if minutes is None else ("--minutes", minutes)
    assert value is not None
    if not 0 < value < float("inf"):
        raise UserError(f"got {name} {value:g}; expected a number above 0; change it")
    if minutes is not None:
        return Budget(minutes=minutes)
    if value != int(value):
        raise UserError(f"got --tokens {value:g}; expected a whole number, such as 3e6; change it")
    return Budget(tokens=int(value))
