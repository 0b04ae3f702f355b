"""What ``python -m tiny_onn.inspect`` does: a checkpoint in, PNGs out.

The statistics are taken over the pairs that the run learnt from (and those it held out), which
its own configuration names: no answer of an evaluation task is among them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from tiny_onn.arc.corpus import Corpus, Example, build_corpus
from tiny_onn.arc.tokens import Document
from tiny_onn.config.keys import suggestion
from tiny_onn.config.schema import InspectConfig
from tiny_onn.errors import UserError
from tiny_onn.files import ensure_writable_dir
from tiny_onn.inference.prompt import encode_query
from tiny_onn.inspect.branches import chosen_blocks, gate_stats
from tiny_onn.inspect.experts import expert_stats
from tiny_onn.model.checkpoint import Loaded, load_model

LOAD, KINDS, GATES, BLOCKS = (
    "expert_load.png",
    "expert_tokens.png",
    "nsa_gates.png",
    "nsa_blocks.png",
)


def run_inspect(config: InspectConfig) -> int:
    """Write the figures that the checkpoint has parts for; a line for each, or for its absence.

    Returns:
        The exit status, 0.

    Raises:
        UserError: no matplotlib, bad checkpoint, data, task or folder, before any figure.
    """
    require_plots()
    loaded = load_model(config.checkpoint)
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    loaded.model.use_backend("auto", "cpu", "fp32")
    corpus = build_corpus(loaded.config.data, loaded.config.seed)
    example = choose_example(corpus, config.task)
    out = ensure_writable_dir(config.out)
    examples = spread_evenly((*corpus.examples, *corpus.holdout), config.examples)
    documents = [encode(loaded, corpus, each) for each in examples]
    print(*draw_experts(loaded, documents, out), sep="\n", flush=True)
    task_id = corpus.task_ids[example.task]
    document = encode(loaded, corpus, example)
    print(*draw_nsa(loaded, documents, document, task_id, out), sep="\n", flush=True)
    return 0


def require_plots() -> None:
    """Raises UserError without matplotlib, which is an optional extra."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "got no matplotlib, which draws the figures; expected the optional extra 'plots'; "
            "pip install '.[plots]' in the repository, or pip install matplotlib"
        )


def choose_example(corpus: Corpus, task_id: str | None) -> Example:
    """The longest pair of the task (of all tasks for None), the first of several.

    Raises:
        UserError: the checkpoint was not trained on such a task.
    """
    if task_id is not None and task_id not in corpus.task_ids:
        raise UserError(
            f"unknown task '{task_id}'; expected one of the {len(corpus.task_ids)} that the "
            "checkpoint learnt; "
            + suggestion(task_id, corpus.task_ids, f"try {corpus.task_ids[0]}")
        )
    found = [
        example
        for example in (*corpus.examples, *corpus.holdout)
        if task_id is None or corpus.task_ids[example.task] == task_id
    ]
    if not found:
        raise UserError(
            f"got task={task_id}, of which no pair fits data.max_tokens; expected a task with a "
            f"pair that was learnt; try {corpus.task_ids[corpus.examples[0].task]}"
        )
    return max(found, key=lambda example: example.pair.input.size + example.pair.output.size)


def spread_evenly(examples: Sequence[Example], most: int) -> list[Example]:
    """At most ``most`` of them, from all parts of the sequence."""
    count = min(most, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def encode(loaded: Loaded, corpus: Corpus, example: Example) -> Document:
    """The pair as it is given, in the formulation that the model was trained on."""
    task = corpus.tasks[example.task]
    rows = {task_id: row for row, task_id in enumerate(loaded.task_ids)}
    data = loaded.config.data
    return encode_query(
        task,
        example.pair,
        row=rows.get(task.id, -1),
        context=data.context,
        max_tokens=data.max_tokens,
    )


def draw_experts(loaded: Loaded, documents: Sequence[Document], out: Path) -> list[str]:
    """Two figures; the lines that say so."""
    from tiny_onn.inspect import figures

    stats = expert_stats(loaded.model, documents)
    if stats is None:
        return [f"no expert figures: its FFN has no experts (model.ffn={loaded.config.model.ffn})"]
    load = figures.save(figures.draw_load(stats), out / LOAD)
    kinds = figures.save(figures.draw_kinds(stats), out / KINDS)
    return [
        f"expert load by layer ({stats.num_dead} of {stats.num_experts} dead): {load}",
        f"experts by colour and structure token: {kinds}",
    ]


def draw_nsa(
    loaded: Loaded, documents: Sequence[Document], document: Document, task_id: str, out: Path
) -> list[str]:
    """Two figures; the lines that say so, or why not."""
    from tiny_onn.inspect import figures

    config = loaded.config
    gates = gate_stats(loaded.model, documents)
    if gates is None:
        return [f"no NSA figures: attention is full (model.attention={config.model.attention})"]
    lines = [f"gates by branch: {figures.save(figures.draw_gates(gates), out / GATES)}"]
    nsa = config.nsa
    choice = chosen_blocks(
        loaded.model, document, nsa.select_block, causal=config.model.mask == "causal"
    )
    if choice is None:
        covered = nsa.select_count * nsa.select_block
        return [
            *lines,
            f"no figure of selected blocks: the longest document of task {task_id} has "
            f"{len(document.tokens)} tokens, and NSA reads up to {covered} (nsa.select_count x "
            "nsa.select_block) in full without choosing",
        ]
    path = figures.save(figures.draw_choice(choice, f"task {task_id}"), out / BLOCKS)
    return [*lines, f"selected blocks over the grids of task {task_id}: {path}"]
