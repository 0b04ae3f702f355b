"""Checks that a type cannot express: settings that must fit together, for each command.

The network's parts have theirs in check_network.py, single numbers in ranges.py.
"""

from __future__ import annotations

from pathlib import Path

from tiny_onn.config.check_network import (
    check_k24,
    check_model,
    check_moe,
    check_nsa,
    check_reset,
)
from tiny_onn.config.ranges import check_group
from tiny_onn.config.schema import (
    BudgetConfig,
    Config,
    ConvertConfig,
    InspectConfig,
    OptimConfig,
    SubmitConfig,
)
from tiny_onn.errors import UserError

EXCLUSIVE = {
    "budget": ("minutes", "epochs", "steps"),
    "predict": ("views", "minutes"),
}
"""Group -> keys of which a later layer's choice replaces an earlier layer's."""


def _check_row_files(config: Config) -> None:
    """What training refuses with DeepEmbed tables on disk."""
    if config.model.deep_embed.store != "memmap":
        return
    processes = config.trainer.devices * config.trainer.nodes
    if processes > 1:
        raise UserError(
            f"got model.deep_embed.store=memmap with trainer.devices={config.trainer.devices} and "
            f"trainer.nodes={config.trainer.nodes}; expected one process, which alone writes the "
            "files; use store=dense or one device"
        )
    if config.trainer.strategy == "fsdp":
        raise UserError(
            "got model.deep_embed.store=memmap with trainer.strategy=fsdp, which shards what is in "
            "memory only; expected one whole process; use trainer.strategy=auto or store=dense"
        )
    if config.optim.ema_decay > 0:
        raise UserError(
            f"got model.deep_embed.store=memmap with optim.ema_decay={config.optim.ema_decay}; "
            "expected 0, for rows on disk are not averaged; give optim.ema_decay=0 or store=dense"
        )


def check_budget(budget: BudgetConfig) -> None:
    """Exactly one budget, in its range.

    Raises:
        UserError: none, several, zero, negative or infinite.
    """
    names = EXCLUSIVE["budget"]
    given = {n: getattr(budget, n) for n in names if getattr(budget, n) is not None}
    if len(given) != 1:
        got = " and ".join(f"budget.{n}={v}" for n, v in given.items()) or "no budget"
        raise UserError(
            f"got {got}; expected exactly one of budget.minutes, budget.epochs, budget.steps; "
            "give one, such as budget.minutes=30"
        )
    check_group("budget", budget)


def check_schedule(optim: OptimConfig) -> None:
    """Numbers in their ranges; warm-up and decay shares that fit into one run.

    Raises:
        UserError: a number out of range, or shares that overlap.
    """
    check_group("optim", optim)
    if optim.warmup_share + optim.decay_share > 1:
        raise UserError(
            f"got optim.warmup_share={optim.warmup_share} and optim.decay_share="
            f"{optim.decay_share}; expected at most 1 together; lower one of them"
        )


def check_train(config: Config) -> None:
    """What training needs of a configuration, loaded or made in Python.

    Ranges of the other groups are held on loading.

    Raises:
        UserError: the first thing that does not fit.
    """
    check_model(config.model)
    check_moe(config.moe, config.model)
    check_reset(config.reset, config.moe, config.model)
    check_nsa(config.nsa, config.model)
    check_k24(config.k24, config.model, config.moe)
    check_budget(config.budget)
    check_schedule(config.optim)
    _check_row_files(config)
    if not config.data.sources and not config.data.extra_dirs:
        raise UserError(
            "got data.sources=[] and data.extra_dirs=[]; expected at least one of them to name "
            "tasks; give one, such as data.sources=[arc1]"
        )
    if config.data.loss_on_inputs and config.model.mask != "causal":
        raise UserError(
            f"got data.loss_on_inputs=true and model.mask={config.model.mask}, under which an "
            "input token sees its own target; expected a causal mask; give model.mask=causal"
        )
    check_text("out", config.out, "a folder, such as out=runs/x")
    if config.init_from is not None:
        check_text("init_from", config.init_from, "a run folder, such as init_from=runs/x")
        begin, out = Path(config.init_from).resolve(), Path(config.out).resolve()
        if begin in (out, out / "checkpoint"):
            raise UserError(
                f"got out={config.out} and init_from={config.init_from}, the same folder; expected "
                "another one to write to, for the first run's checkpoint would be overwritten; "
                "choose another out"
            )
        if config.model.deep_embed.store == "memmap":
            raise UserError(
                "got init_from with model.deep_embed.store=memmap; expected tables in memory, for "
                "those on disk are not taken over; give model.deep_embed.store=dense"
            )
    if config.stage == "eavi":
        check_eavi(config)


def check_eavi(config: Config) -> None:
    """What stage eavi asks for beyond the rest.

    Raises:
        UserError: no weights to begin with, or settings that do not fit together.
    """
    eavi = config.eavi
    check_group("eavi", eavi)
    if config.init_from is None:
        raise UserError(
            "got stage=eavi without init_from; expected the run folder of a trained model, whose "
            "own outputs this stage learns from; give init_from=runs/x"
        )
    drawn = eavi.feed == "single" or (eavi.feed == "sample" and eavi.temperature > 0)
    if eavi.excursions_per_document > 1 and not drawn:
        raise UserError(
            f"got eavi.excursions_per_document={eavi.excursions_per_document} with eavi.feed="
            f"{eavi.feed} and eavi.temperature={eavi.temperature}, which are all the same; "
            "expected one; give eavi.feed=sample for different ones"
        )
    if eavi.feed == "single" and eavi.geometry == "free":
        raise UserError(
            "got eavi.feed=single with eavi.geometry=free; expected the true geometry, for its "
            "tokens are the truth's but some; give eavi.geometry=truth"
        )
    if not eavi.excursion_weight and not eavi.divergence_weight:
        raise UserError(
            "got eavi.excursion_weight=0 and eavi.divergence_weight=0, which learn nothing from "
            "excursions; expected one above 0; raise one, or give stage=pretrain"
        )
    if not eavi.truth_weight and min(eavi.share_start, eavi.share_end) < 1:
        raise UserError(
            f"got eavi.truth_weight=0 with eavi.share_start={eavi.share_start} and eavi.share_end="
            f"{eavi.share_end}, so that some documents teach nothing; expected both shares 1 "
            "without the truth's weight; raise eavi.truth_weight"
        )
    if config.data.loss_on_inputs:
        raise UserError(
            "got stage=eavi with data.loss_on_inputs=true; expected false, for excursions are of "
            "outputs only; leave it out"
        )
    if config.trainer.strategy == "fsdp":
        raise UserError(
            "got stage=eavi with trainer.strategy=fsdp, whose processes would have to write "
            "outputs of equal length; expected whole models; give trainer.strategy=ddp"
        )


def check_submit(config: SubmitConfig) -> None:
    """Everything ``submit.py`` needs beyond types and ranges.

    Raises:
        UserError: the first thing that does not fit.
    """
    check_text("checkpoint", config.checkpoint, "a run folder, such as checkpoint=runs/x")
    check_text("challenges", config.challenges, "a file, or arc1:evaluation")
    check_text("out", config.out, "a folder, such as out=runs/x/submission")
    if config.predict.views is None and config.predict.minutes is None:
        raise UserError(
            "got predict.views=null and predict.minutes=null; expected one of them; "
            "give one, such as predict.views=16"
        )


def check_inspect(config: InspectConfig) -> None:
    """What ``python -m tiny_onn.inspect`` needs beyond types and ranges.

    Raises:
        UserError: no checkpoint or folder.
    """
    check_text("checkpoint", config.checkpoint, "a run folder, such as checkpoint=runs/x")
    check_text("out", config.out, "a folder, such as out=runs/x/figures")


def check_convert(config: ConvertConfig) -> None:
    """What ``python -m tiny_onn.convert`` needs beyond types.

    Raises:
        UserError: no checkpoint, or settings that unpacking does not read.
    """
    check_text("checkpoint", config.checkpoint, "a run folder, such as checkpoint=runs/x")
    if config.unpack and (config.backend != "auto" or config.dtype != "keep"):
        raise UserError(
            f"got unpack=true with backend={config.backend} and dtype={config.dtype}; expected "
            "neither, for weights come back in the type they were packed in; leave them out"
        )


def check_text(name: str, value: str, expected: str) -> None:
    """Raises UserError if ``value`` is blank."""
    if not value.strip():
        raise UserError(f"got {name}= (empty); expected {expected}; name it")
