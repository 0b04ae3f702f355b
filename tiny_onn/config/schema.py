"""Every setting, typed and frozen. ``help`` metadata is what ``--help`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def key(default: Any, help: str) -> Any:
    """A config field with its one-line meaning."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataConfig:
    sources: list[str] = key(["arc1"], "arc1, arc2, or files in ARC or Kaggle challenges format")
    extra_dirs: list[str] = key([], "folders of ARC-format JSON, added as training tasks")
    ids: str | None = key(None, "file with one task id a line: only these tasks are used")
    track: Literal["all", "nano"] = key("all", "nano: tasks whose every pair has <= 192 tokens")
    learn: Literal["standard", "demos"] = key(
        "standard", "demos: demonstration pairs only, of training tasks too"
    )
    holdout: Literal["none", "train_tests", "demos"] = key(
        "none", "pairs kept aside: tests of training tasks, or a demonstration of every task"
    )
    context: Literal["pair", "demos"] = key("pair", "one pair a document, or demos then a query")
    views: Literal["all", "dihedral", "none"] = key("all", "augmentation: dihedral x colours")
    views_per_example: int = key(1000, "distinct views an example cycles through, at most")
    batch_tokens: int = key(6144, "tokens in a packed batch, over all devices")
    max_tokens: int = key(1863, "longest document; longer ones are dropped, counted and reported")
    workers: int = key(0, "data loader processes")
    loss_on_inputs: bool = key(False, "also learn to predict the input grid")


@dataclass(frozen=True)
class ModelConfig:
    width: int = key(128, "residual width")
    layers: int = key(4, "distinct transformer blocks")
    loops: int = key(1, "times the stack of blocks is applied (weights shared)")
    heads: int = key(4, "query heads")
    kv_heads: int = key(4, "key/value heads (GQA when fewer than heads)")
    head_width: int = key(32, "width of a head; even, at least 8")
    ffn_width: int = key(384, "hidden width of the SwiGLU FFN")
    mask: Literal["prefix", "causal"] = key(
        "prefix", "prefix: the query grid sees itself both ways, the output is causal"
    )
    attention: Literal["full"] = key("full", "attention module")
    ffn: Literal["dense"] = key("dense", "FFN module")
    qk_norm: bool = key(True, "RMSNorm on queries and keys")
    rope_base: float = key(100.0, "base of the 3D rotary frequencies")
    dropout: float = key(0.0, "residual dropout; attention has none")
    task_modulation: Literal["none", "film"] = key(
        "none", "film: the task scales and shifts every block's input, channel by channel"
    )
    vocab_size: int = key(14, "tokens: ten colours, start, newline, separator, end")


@dataclass(frozen=True)
class OptimConfig:
    matrices: Literal["muon", "adamw"] = key("muon", "optimizer of the weight matrices")
    muon_lr: float = key(0.02, "peak learning rate of Muon")
    adamw_lr: float = key(3e-3, "peak learning rate of AdamW")
    table_lr: float = key(3e-3, "peak learning rate of task and view vectors (AdamW)")
    muon_weight_decay: float = key(0.1, "decoupled weight decay of Muon's matrices")
    adamw_weight_decay: float = key(0.01, "decoupled weight decay of the AdamW rest")
    table_weight_decay: float = key(0.0, "decoupled weight decay of task and view vectors")
    warmup_share: float = key(0.02, "share of the budget spent warming up")
    decay_share: float = key(0.3, "share of the budget of the final linear decay")
    final_lr_share: float = key(0.0, "learning rate at the end, as a share of the peak")
    clip_norm: float = key(1.0, "gradient clipping norm (0: off)")
    ema_decay: float = key(0.0, "EMA of the weights, used for hold-out and saving (0: off)")


@dataclass(frozen=True)
class BudgetConfig:
    minutes: float | None = key(None, "wall-clock budget of training; the decay completes in it")
    epochs: float | None = key(None, "budget in epochs (exactly one of minutes, epochs, steps)")
    steps: int | None = key(None, "budget in optimizer steps")


@dataclass(frozen=True)
class TrainerConfig:
    accelerator: str = key("auto", "Lightning accelerator: auto, cpu, gpu")
    devices: int = key(1, "devices on each machine")
    nodes: int = key(1, "machines")
    strategy: str = key("auto", "Lightning strategy: auto, ddp, fsdp")
    precision: Literal["auto", "fp32", "bf16"] = key(
        "auto", "bf16: autocast, weights stay fp32; auto: bf16 where the hardware has it"
    )
    compile: bool = key(False, "torch.compile the model")
    threads: int = key(0, "CPU threads (0: torch's default)")
    log_every_steps: int = key(20, "steps between log lines")
    checkpoint_minutes: float = key(2.0, "minutes between resume checkpoints")
    checkpoint_steps: int = key(0, "steps between resume checkpoints (0: by minutes only)")
    holdout_share: float = key(0.0, "hold-out is measured every this share of the budget; 0: end")
    holdout_decode: int = key(64, "hold-out outputs decoded freely for exact match")
    progress: bool = key(True, "progress bar with loss, tokens/s and ETA")
    tensorboard: bool = key(True, "write TensorBoard logs beside the CSV")


@dataclass(frozen=True)
class OpsConfig:
    backend: Literal["auto", "reference", "sdpa", "flash", "varlen"] = key(
        "auto", "attention back-end, decided once when the model is built"
    )


@dataclass(frozen=True)
class PredictConfig:
    views: int | None = key(16, "views to vote over; null with predict.minutes chooses it")
    minutes: float | None = key(None, "time for prediction; the number of views follows from it")
    grammar: bool = key(True, "only legal rows, at most 30 a side")
    size_rule: bool = key(True, "fix the output size by the rule the demonstrations show")
    drop_input_copies: bool = key(True, "an output equal to its input is no candidate")
    vote: Literal["count", "count_then_likelihood", "sum_prob"] = key(
        "count_then_likelihood", "how candidates are ranked"
    )
    batch_tokens: int = key(49152, "cache tokens of a decoding batch")


@dataclass(frozen=True)
class Config:
    """``python train.py``."""

    stage: Literal["pretrain"] = key("pretrain", "training stage")
    preset: Literal["nano", "small", "base"] = key("nano", "size and recipe")
    seed: int = key(0, "seeds weights, data order and views")
    out: str = key("runs/${stage}-${preset}", "run folder")
    resume: bool = key(True, "go on from the run folder's resume checkpoint if there is one")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)


@dataclass(frozen=True)
class SubmitConfig:
    """``python submit.py``."""

    checkpoint: str = key("???", "run folder of a trained model (runs/x)")
    challenges: str = key(
        "arc1:evaluation", "challenges file, or arc1:evaluation, arc2:evaluation, arc1:training"
    )
    solutions: str | None = key(
        None, "solutions file or arc1:evaluation; read by the scorer only, after the submission"
    )
    track: Literal["all", "nano"] = key("all", "nano: only the tasks of track nano")
    ids: str | None = key(None, "file with one task id a line: only these tasks")
    out: str = key("${checkpoint}/submission", "folder for submission.json and report.html")
    seed: int = key(0, "seeds the choice of views")
    threads: int = key(0, "CPU threads (0: torch's default)")
    accelerator: str = key("auto", "auto, cpu, gpu")
    precision: Literal["auto", "fp32", "bf16"] = key("auto", "auto: fp32 on a CPU, else bf16")
    progress: bool = key(True, "print progress with ETA")
    predict: PredictConfig = field(default_factory=PredictConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)


@dataclass(frozen=True)
class InspectConfig:
    """``python -m tiny_onn.inspect``."""

    checkpoint: str = key("???", "run folder of a trained model (runs/x)")
    task: str | None = key(
        None, "task whose grids the selected blocks are drawn over; null: the longest pair's"
    )
    examples: int = key(256, "pairs of the run's data that the statistics are taken over, at most")
    out: str = key("${checkpoint}/figures", "folder for the PNGs")
    threads: int = key(0, "CPU threads (0: torch's default)")
