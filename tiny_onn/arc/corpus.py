"""What is learnt from: sources -> overlaps removed -> selection -> examples, with a leak report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tiny_onn.arc.leak_report import Exclusion, LeakReport, SourceCount, hash_corpus, hash_tasks
from tiny_onn.arc.overlap import remove_overlaps
from tiny_onn.arc.select import check_ids, in_nano_track, read_ids
from tiny_onn.arc.sources import PACKAGED_FILES, load_extra_dir, load_packaged, load_source
from tiny_onn.arc.task import Grid, Pair, Task, TrainingTask
from tiny_onn.arc.tokens import longest_orientation
from tiny_onn.config.schema import DataConfig
from tiny_onn.errors import UserError

MIN_DEMOS_TO_HOLD_OUT = 3


@dataclass(frozen=True)
class Example:
    """A pair to learn from: row of its task, the pair, and a key such as ``0a1b2c3d/demo/0``."""

    task: int
    pair: Pair
    key: str


@dataclass(frozen=True)
class Corpus:
    """The data of a run.

    task_ids: one a row of the task table; tasks: the same rows, without answers and without
    held-out demonstrations; examples: what is learnt from; holdout: pairs kept aside, never
    among the examples; report: see :class:`LeakReport`.
    """

    task_ids: tuple[str, ...]
    examples: tuple[Example, ...]
    holdout: tuple[Example, ...]
    tasks: tuple[Task, ...]
    report: LeakReport

    def holdout_tasks(self) -> list[Task]:
        """The tasks with held-out pairs, whose inputs take the place of the test inputs."""
        inputs: dict[int, list[Grid]] = {}
        for example in self.holdout:
            inputs.setdefault(example.task, []).append(example.pair.input)
        return [replace(self.tasks[row], test_inputs=tuple(grids)) for row, grids in inputs.items()]

    def holdout_answers(self) -> dict[str, tuple[Grid, ...]]:
        """Task id -> outputs, in the order of :meth:`holdout_tasks`' test inputs."""
        answers: dict[str, list[Grid]] = {}
        for example in self.holdout:
            answers.setdefault(self.task_ids[example.task], []).append(example.pair.output)
        return {task_id: tuple(grids) for task_id, grids in answers.items()}


def build_corpus(data: DataConfig, seed: int = 0) -> Corpus:
    """Load, clean and select what ``data`` asks for. The result does not depend on ``seed``.

    Raises:
        UserError: bad sources or ids, or nothing left to learn from.
    """
    loaded = [task for source in data.sources for task in load_source(source)]
    for folder in data.extra_dirs:
        loaded += load_extra_dir(folder)
    if not loaded:
        raise UserError("got no data.sources and no data.extra_dirs; expected at least one source")
    tasks, excluded = remove_overlaps(loaded, _protected(data, loaded))
    tasks = _select(tasks, data, excluded)
    examples, holdout, shown_tasks = [], [], []
    for row, task in enumerate(tasks):
        learn, keep, shown = _split_pairs(task, data)
        shown_tasks.append(shown)
        examples += _fitting(row, shown, learn, data, excluded)
        holdout += _fitting(row, shown, keep, data, excluded)
    if not examples:
        raise UserError(
            f"got no pair to learn from out of {len(loaded)} tasks (left out: "
            f"{_summary(excluded)}), expected at least one; change data.track, data.ids, "
            "data.max_tokens or data.sources"
        )
    return Corpus(
        task_ids=tuple(task.id for task in tasks),
        examples=tuple(examples),
        holdout=tuple(holdout),
        tasks=tuple(shown_tasks),
        report=_report(loaded, shown_tasks, examples, holdout, excluded),
    )


def _protected(data: DataConfig, loaded: Sequence[Task]) -> list[Task]:
    """Evaluation splits that training tasks from elsewhere must not give away."""
    elsewhere = {task.source for task in loaded if isinstance(task, TrainingTask)} - {
        "arc1:training"
    }
    if not elsewhere:
        return []
    return [
        task
        for name in PACKAGED_FILES
        if name not in data.sources
        for task in load_packaged(name, ("evaluation",))
    ]


def _select(tasks: list[Task], data: DataConfig, excluded: list[Exclusion]) -> list[Task]:
    ids = None
    if data.ids is not None:
        ids = set(read_ids(data.ids))
        check_ids(sorted(ids), {task.id for task in tasks}, data.ids)
    kept = []
    for task in tasks:
        if ids is not None and task.id not in ids:
            excluded.append(Exclusion(task.id, task.source, "not in data.ids"))
        elif data.track == "nano" and not in_nano_track(task):
            excluded.append(Exclusion(task.id, task.source, "not in track nano"))
        else:
            kept.append(task)
    if not kept:
        raise UserError(
            f"got zero tasks after filtering {len(tasks)} by data.ids={data.ids} and "
            f"data.track={data.track}, expected at least one; loosen one of them"
        )
    return kept


NamedPair = tuple[str, Pair]


def _split_pairs(task: Task, data: DataConfig) -> tuple[list[NamedPair], list[NamedPair], Task]:
    """(pairs to learn, pairs to hold out, the task as it is shown: without either's answers)."""
    demos = [(f"{task.id}/demo/{n}", pair) for n, pair in enumerate(task.demos)]
    tests: list[NamedPair] = []
    if isinstance(task, TrainingTask):
        tests = [(f"{task.id}/test/{n}", pair) for n, pair in enumerate(task.tests)]
    keep: list[NamedPair] = []
    if data.holdout == "demos" and len(demos) >= MIN_DEMOS_TO_HOLD_OUT:
        keep = [demos.pop()]
    shown = Task(task.id, task.source, tuple(pair for _, pair in demos), task.test_inputs)
    if data.holdout == "train_tests":
        return demos, tests, shown
    return demos + (tests if data.learn == "standard" else []), keep, shown


def _fitting(
    row: int, task: Task, pairs: list[NamedPair], data: DataConfig, excluded: list[Exclusion]
) -> list[Example]:
    """Examples of those pairs that make a document of at most ``data.max_tokens``."""
    fitting = []
    for key, pair in pairs:
        length, reason = longest_orientation(pair), f"longer than {data.max_tokens} tokens"
        if data.context == "demos":
            others = [longest_orientation(demo) for demo in task.demos if demo is not pair]
            reason = f"longer than {data.max_tokens} tokens with a demonstration, or has none"
            length += min(others, default=data.max_tokens)
        if length <= data.max_tokens:
            fitting.append(Example(row, pair, key))
        else:
            excluded.append(Exclusion(task.id, task.source, reason, key))
    return fitting


def _summary(excluded: Sequence[Exclusion]) -> str:
    counts = Counter(exclusion.reason for exclusion in excluded)
    return ", ".join(f"{number} {reason}" for reason, number in counts.items()) or "nothing"


def _report(
    loaded: Sequence[Task],
    shown: Sequence[Task],
    examples: Sequence[Example],
    holdout: Sequence[Example],
    excluded: Sequence[Exclusion],
) -> LeakReport:
    by_source: dict[str, list[Task]] = {}
    for task in loaded:
        by_source.setdefault(task.source, []).append(task)
    used = Counter(task.source for task in shown)
    learned = Counter((shown[e.task].source, e.key.split("/")[-2]) for e in examples)
    held = Counter(shown[e.task].source for e in holdout)
    sources = {}
    for name, members in by_source.items():
        answered = [task for task in members if isinstance(task, TrainingTask)]
        num_answers = sum(len(task.tests) for task in answered)
        sources[name] = SourceCount(
            tasks=len(members),
            demos=sum(len(task.demos) for task in members),
            tests_with_answer=num_answers,
            tests_without_answer=sum(len(task.test_inputs) for task in members) - num_answers,
            tasks_used=used[name],
            demos_learned=learned[name, "demo"],
            tests_learned=learned[name, "test"],
            held_out=held[name],
            sha256=hash_tasks(members),
        )
    named = [
        (f"{kind} {e.key}", e.pair)
        for kind, es in (("learn", examples), ("hold", holdout))
        for e in es
    ]
    return LeakReport(
        sources=sources,
        excluded=tuple(excluded),
        num_tasks=len(shown),
        num_examples=len(examples),
        num_holdout=len(holdout),
        corpus_sha256=hash_corpus(shown, named),
    )
