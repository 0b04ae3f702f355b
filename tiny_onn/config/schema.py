"""Every setting, typed and frozen. ``help`` metadata is what ``--help`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tiny_onn.config.key import key
from tiny_onn.config.schema_24 import ActSparse24Config, K24Config


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
    batch_tokens: int = key(
        6144, "tokens in a packed batch, over all devices; stage=eavi adds its excursions"
    )
    max_tokens: int = key(1863, "longest document; longer ones are dropped, counted and reported")
    workers: int = key(0, "data loader processes")
    loss_on_inputs: bool = key(False, "also learn to predict the input grid")


@dataclass(frozen=True)
class DeepEmbedConfig:
    keys: list[str] = key(
        [], "what scales every FFN: any of token, ngram, patch, task, which add up; []: nothing"
    )
    form: Literal["1x", "4x", "v7a"] = key(
        "4x", "scales the FFN's 1x: output, 4x: hidden layer, v7a: hidden layer, with the input"
    )
    store: Literal["dense", "memmap"] = key(
        "dense", "token, ngram and patch tables in memory, or in files read by rows"
    )
    dtype: Literal["fp32", "bf16"] = key("fp32", "numbers of the memmap store's files")
    ngram: int = key(3, "tokens of an n-gram, 2 to 4: 210, 3,150 or 47,250 rows")
    patch: Literal["causal", "prefix"] = key(
        "causal", "five cells not after the cell; prefix: all nine where the grid is seen whole"
    )
    rank: int = key(
        0, "token, ngram and patch rows hold this many numbers times a learned basis (0: full)"
    )
    task_rank: int = key(16, "numbers a task and layer hold, times a learned basis")
    mix_rank: int = key(32, "form v7a: a row is a square matrix of this many columns")


@dataclass(frozen=True)
class ModelConfig:
    width: int = key(128, "residual width")
    layers: int = key(4, "distinct transformer blocks")
    loops: int = key(1, "times the stack of blocks is applied (weights shared)")
    heads: int = key(4, "query heads")
    kv_heads: int = key(4, "key/value heads (GQA when fewer than heads)")
    head_width: int = key(32, "width of a head; even, at least 8")
    ffn_width: int = key(
        384, "hidden width of the SwiGLU FFN; squared ReLU: 1.5 times that, to 64 (from 512: 128)"
    )
    mask: Literal["prefix", "causal"] = key(
        "prefix", "prefix: the query grid sees itself both ways, the output is causal"
    )
    attention: Literal["full", "nsa"] = key(
        "full", "attention module: full, or Native Sparse Attention (nsa.*)"
    )
    ffn: Literal["dense", "dynmoe", "relu2", "relu2_act24"] = key(
        "dense", "FFN: SwiGLU, its experts (moe.*), squared ReLU, or that with 2:4 activations"
    )
    weights: Literal["dense", "k24", "s_ste", "random24"] = key(
        "dense",
        "FFN and experts: dense, or 2:4 by learnt masks (k24.*); FFN only: soft threshold, or "
        "fixed random masks (random24)",
    )
    qk_norm: bool = key(True, "RMSNorm on queries and keys")
    rope_base: float = key(100.0, "base of the 3D rotary frequencies")
    dropout: float = key(0.0, "residual dropout; attention has none")
    task_modulation: Literal["none", "film"] = key(
        "none", "film: the task scales and shifts every block's input, channel by channel"
    )
    vocab_size: int = key(14, "tokens: ten colours, start, newline, separator, end")
    deep_embed: DeepEmbedConfig = field(default_factory=DeepEmbedConfig)
    act24: ActSparse24Config = field(default_factory=ActSparse24Config)


@dataclass(frozen=True)
class MoeConfig:
    """DynMoE: read where model.ffn=dynmoe."""

    experts: int = key(8, "experts of a block")
    expert_width: int = key(128, "hidden width of one SwiGLU expert")
    every: int = key(1, "every n-th block has experts, counted back from the last; 1: all blocks")
    target_active: float = key(2.0, "mean number of active experts a token that SDL drives to")
    none_active: Literal["skip", "top1"] = key(
        "skip", "token below every threshold: no FFN update, or the nearest expert"
    )
    combine: Literal["mean", "gated"] = key(
        "mean", "mean of active experts, or their sum weighted by similarity above threshold"
    )
    sparsity_weight: float = key(0.1, "weight of SDL's sparsity term (0: off)")
    diversity_weight: float = key(0.01, "weight of SDL's diversity term (0: off)")
    expert_weights: Literal["separate", "shared_k24"] = key(
        "separate", "shared_k24: experts have one weight and differ by their 2:4 masks"
    )


@dataclass(frozen=True)
class ResetConfig:
    """Rebirth of idle experts: read where model.ffn=dynmoe."""

    window_steps: int = key(50, "optimizer steps of a counting window (0: no resets)")
    min_share: float = key(0.005, "an expert active for a smaller share of the tokens is idle")
    patience: int = key(2, "idle windows in a row after which an expert is reborn")
    max_experts: int = key(2, "experts of a block reborn at once, at most")
    warmup_steps: int = key(50, "steps over which a reborn expert's learning rate rises")
    until_share: float = key(0.7, "share of the budget after which nothing is reborn")


@dataclass(frozen=True)
class NsaConfig:
    """Native Sparse Attention: read where model.attention=nsa."""

    block: int = key(32, "tokens that a compressed key stands for (l)")
    stride: int = key(16, "tokens between compressed keys (d); divides both block lengths")
    select_block: int = key(32, "tokens of a block that is chosen and read in full (l')")
    select_count: int = key(8, "blocks a token reads in full, the 3 forced ones included (n)")
    window: int = key(128, "keys of the sliding window (w)")
    every: int = key(
        1, "every n-th block has NSA, counted back from the last, the others full attention; 1: all"
    )
    kv: Literal["shared", "per_branch"] = key(
        "shared", "one key and value a token for all branches, or one for each as in the paper"
    )


@dataclass(frozen=True)
class OptimConfig:
    matrices: Literal["muon", "adamw"] = key("muon", "optimizer of the weight matrices")
    muon_lr: float = key(0.02, "peak learning rate of Muon")
    adamw_lr: float = key(3e-3, "peak learning rate of AdamW")
    table_lr: float = key(3e-3, "peak learning rate of task and view vectors (AdamW)")
    muon_weight_decay: float = key(0.1, "decoupled weight decay of Muon's matrices")
    adamw_weight_decay: float = key(0.01, "decoupled weight decay of the AdamW rest")
    table_weight_decay: float = key(0.0, "decoupled weight decay of task and view vectors")
    pattern_lr: float = key(0.01, "peak learning rate of what chooses 2:4 masks (AdamW, no decay)")
    deep_embed_lr: float = key(3e-3, "peak learning rate of DeepEmbed's rows")
    deep_embed_weight_decay: float = key(
        0.1, "decoupled decay of a touched DeepEmbed row towards the identity"
    )
    warmup_share: float = key(0.02, "share of the budget spent warming up")
    decay_share: float = key(0.3, "share of the budget of the final linear decay")
    final_lr_share: float = key(0.0, "learning rate at the end, as a share of the peak")
    clip_norm: float = key(1.0, "gradient clipping norm (0: off)")
    ema_decay: float = key(0.0, "EMA of the weights, used for hold-out and saving (0: off)")


@dataclass(frozen=True)
class EaviConfig:
    """EAVI: read where stage=eavi."""

    feed: Literal["soft", "sample", "greedy", "single"] = key(
        "greedy", "what is fed: q itself, a draw, its likeliest; single: true tokens, some drawn"
    )
    single_share: float = key(0.25, "feed=single: share of the true colours that are replaced")
    geometry: Literal["truth", "free"] = key(
        "truth", "truth: rows and end of the true grid, own colours; free: its own rows and end"
    )
    temperature: float = key(1.0, "temperature of what is fed (0: greedy)")
    excursions_per_document: int = key(
        1, "self-fed outputs of one document; above 1: feed=sample or single"
    )
    share_start: float = key(0.25, "share of the documents that take an excursion, at the start")
    share_end: float = key(0.25, "the same at the end of the budget; linear between the two")
    excursion_weight: float = key(0.5, "weight of the truth's NLL on self-fed prefixes")
    truth_weight: float = key(1.0, "weight of the truth's NLL on true prefixes")
    divergence_weight: float = key(
        0.0, "weight of KL(p on the true prefix || p on the self-fed one)"
    )


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
        "auto",
        "attention back-end, decided once when the model is built (flash: NSA's windows too)",
    )
    experts: Literal["auto", "loop", "grouped_mm", "triton"] = key(
        "auto", "how experts run: one after the other, as one grouped product, or by our kernels"
    )
    nsa: Literal["auto", "reference", "triton"] = key(
        "auto", "how NSA's branches run: in PyTorch, or by Triton kernels (auto: on CUDA)"
    )
    pattern24: Literal["auto", "torch", "triton"] = key(
        "auto", "how k24's masks are drawn (auto: by our kernels where they were measured faster)"
    )
    relu2_24: Literal["auto", "torch", "triton"] = key(
        "auto", "how relu2_act24 packs and multiplies (auto: as for pattern24)"
    )


@dataclass(frozen=True)
class PredictConfig:
    views: int | None = key(16, "views to vote over; null with predict.minutes chooses it")
    minutes: float | None = key(None, "time for prediction; the number of views follows from it")
    grammar: bool = key(True, "only legal rows, at most 30 a side")
    size_rule: bool = key(True, "fix the output size by the rule the demonstrations show")
    drop_input_copies: bool = key(True, "an output equal to its input is no candidate")
    vote: Literal["count", "count_then_likelihood", "sum_prob", "aug_score"] = key(
        "aug_score", "how candidates are ranked; aug_score: by likelihood in score_views views"
    )
    score_views: int = key(8, "vote=aug_score: views that every candidate is read in")
    batch_tokens: int = key(49152, "cache tokens of a decoding batch")


@dataclass(frozen=True)
class Config:
    """``python train.py``."""

    stage: Literal["pretrain", "eavi"] = key("pretrain", "training stage")
    preset: Literal["nano", "small", "base"] = key("nano", "size and recipe")
    network: Literal["sparse", "sparse_long", "dense"] = key(
        "sparse", "which parts it has: sets model.attention, model.ffn and model.deep_embed"
    )
    seed: int = key(0, "seeds weights, data order and views")
    init_from: str | None = key(None, "run folder whose weights this run begins with")
    out: str = key("runs/${stage}-${preset}-${network}", "run folder")
    resume: bool = key(True, "go on from the run folder's resume checkpoint if there is one")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    nsa: NsaConfig = field(default_factory=NsaConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    reset: ResetConfig = field(default_factory=ResetConfig)
    k24: K24Config = field(default_factory=K24Config)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eavi: EaviConfig = field(default_factory=EaviConfig)
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
class ConvertConfig:
    """``python -m tiny_onn.convert``."""

    checkpoint: str = key("???", "run folder of a model trained with weights=k24 (runs/x)")
    out: str | None = key(
        None, "folder for the packed checkpoint; null: CHECKPOINT/packed, or CHECKPOINT/unpacked"
    )
    backend: Literal["auto", "reference", "cutlass", "cusparselt"] = key(
        "auto", "what multiplies packed weights; auto: the fastest on this machine's device"
    )
    dtype: Literal["keep", "bf16", "fp16"] = key(
        "keep",
        "of the packed values; keep: the checkpoint's, which predicts the same bits; fp16: not for "
        "sparse tensor cores",
    )
    unpack: bool = key(False, "the way back: a packed checkpoint as a dense one, masks applied")


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
