"""What ``python submit.py`` does: checkpoint and challenges in; submission, score and page out.

Everything that can be wrong with the settings is found before any work. Solutions are opened by
the scorer alone, and only once submission.json is on the disk.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tiny_onn.arc.report import AttemptInfo, render_report
from tiny_onn.arc.score import PACKAGED, Solutions, load_solutions, score_submission
from tiny_onn.arc.score_report import ScoreReport
from tiny_onn.arc.select import select_ids, select_track
from tiny_onn.arc.sources import load_challenges
from tiny_onn.arc.submission import (
    ATTEMPT_KEYS,
    BuildCounts,
    Submission,
    build_submission,
    write_submission,
)
from tiny_onn.arc.task import Task
from tiny_onn.clock import clock_text
from tiny_onn.config.schema import SubmitConfig
from tiny_onn.errors import UserError
from tiny_onn.files import ensure_writable_dir, write_output
from tiny_onn.inference.excursion import Precision
from tiny_onn.inference.predict import Prediction, check_predict, predict_tasks
from tiny_onn.inference.progress import ProgressPrinter
from tiny_onn.inference.vote import Candidate, rank, vote
from tiny_onn.model.checkpoint import Loaded, load_model
from tiny_onn.model.packed_weights import settle_products

SUBMISSION, PREDICTIONS, SCORE, REPORT = (
    "submission.json",
    "predictions.json",
    "score.json",
    "report.html",
)


def run_submit(config: SubmitConfig) -> int:
    """Predict, write submission.json and predictions.json; then score if asked; then the page.

    Returns:
        The exit status, 0.

    Raises:
        UserError: bad settings, checkpoint, challenges or folder, before any work; bad
            solutions, after the submission was written.
    """
    check_predict(config.predict)
    check_solutions(config.solutions)
    tasks = choose_tasks(config)
    loaded = load_model(config.checkpoint)
    device = choose_device(config.accelerator)
    precision = choose_precision(config.precision, device)
    ops = config.ops
    loaded.model.use_backend(
        ops.backend, device, precision, ops.experts, ops.nsa, ops.pattern24, ops.relu2_24
    )
    settle_products(loaded.model.to(device))
    out = ensure_writable_dir(config.out)
    if config.threads > 0:
        torch.set_num_threads(config.threads)

    prediction = _predict(config, tasks, loaded)
    attempts = {
        task_id: [vote(candidates, len(ATTEMPT_KEYS), config.predict.vote) for candidates in tests]
        for task_id, tests in prediction.candidates.items()
    }
    submission, counts = build_submission(tasks, attempts)
    for stale in (SCORE, REPORT):
        (out / stale).unlink(missing_ok=True)
    _write_json(out / PREDICTIONS, prediction_record(config, prediction, counts))
    write_submission(out / SUBMISSION, submission)
    print(prediction_lines(config, prediction, counts))
    print(f"submission: {out / SUBMISSION}")
    print(f"candidates: {out / PREDICTIONS}")

    score, truths, unscored = None, None, None
    if config.solutions is not None:
        try:
            score, truths = _score(config.solutions, submission, out)
        except UserError as error:  # the page is still worth having; told at the end
            unscored = error
    render_report(
        out / REPORT,
        tasks,
        submission,
        score=score,
        truths=truths,
        details=attempt_infos(config, prediction, counts),
        facts=run_facts(config, loaded, prediction, counts),
    )
    print(f"report:     {out / REPORT}")
    if unscored is not None:
        raise unscored
    return 0


def check_solutions(spec: str | None) -> None:
    """Refuse solutions that are not there, without opening them."""
    if spec is not None and spec not in PACKAGED and not Path(spec).exists():
        raise UserError(
            f"got solutions '{spec}', expected a solutions file or one of {', '.join(PACKAGED)}; "
            "check the name or path"
        )


def choose_tasks(config: SubmitConfig) -> list[Task]:
    """The challenges, filtered by track and ids.

    Raises:
        UserError: no challenges file, or nothing left of it.
    """
    loaded = load_challenges(config.challenges)
    tasks = select_track(loaded, config.track)
    if config.ids is not None:
        tasks = select_ids(tasks, config.ids)
    if not tasks:
        raise UserError(
            f"got zero tasks after filtering the {len(loaded)} of '{config.challenges}' by "
            f"track={config.track} and ids={config.ids}, expected at least one; loosen one of them"
        )
    return tasks


def choose_precision(precision: str, device: torch.device) -> Precision:
    """What ``auto`` means on ``device``.

    On a CPU a decoding step's attention took 0.9 ms in fp32 and 3.8 ms in bf16 (64 rows, 5 heads
    of 32, 140 tokens); on a GPU bf16 halves the memory traffic.
    """
    if precision == "auto":
        return "fp32" if device.type == "cpu" else "bf16"
    return precision


def choose_device(accelerator: str) -> torch.device:
    """auto: a CUDA device if there is one; cpu; gpu.

    Raises:
        UserError: another name, or gpu without one.
    """
    if accelerator not in ("auto", "cpu", "gpu"):
        raise UserError(f"got accelerator={accelerator}, expected auto, cpu or gpu; choose one")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "got accelerator=gpu, expected a CUDA device but torch sees none; use accelerator=cpu"
        )
    use_cuda = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def _predict(config: SubmitConfig, tasks: list[Task], loaded: Loaded) -> Prediction:
    num_outputs = sum(len(task.test_inputs) for task in tasks)
    limit = config.predict
    views = "views as time allows" if limit.views is None else f"up to {limit.views} views each"
    within = "" if limit.minutes is None else f", within {limit.minutes:g} minutes"
    print(f"predicting {len(tasks)} tasks, {num_outputs} outputs, {views}{within}", flush=True)
    printer = ProgressPrinter() if config.progress else None
    prediction = predict_tasks(
        loaded.model,
        tasks,
        {task_id: row for row, task_id in enumerate(loaded.task_ids)},
        config.predict,
        config.seed,
        context=loaded.config.data.context,
        max_tokens=loaded.config.data.max_tokens,
        precision=choose_precision(config.precision, next(loaded.model.parameters()).device),
        **({} if printer is None else {"report": printer}),
    )
    if printer is not None:
        printer.finish()
    return prediction


def _score(spec: str, submission: Submission, out: Path) -> tuple[ScoreReport, Solutions]:
    """Score the written submission against the solutions of its own tasks."""
    solutions = load_solutions(spec)
    truths = {task_id: grids for task_id, grids in solutions.items() if task_id in submission}
    score = score_submission(submission, solutions, set(submission))
    print(score.render())
    _write_json(out / SCORE, score.to_dict())
    print(f"score:      {out / SCORE}")
    return score, truths


def prediction_lines(config: SubmitConfig, prediction: Prediction, counts: BuildCounts) -> str:
    """What happened, for people: nothing that went wrong is left out."""
    stats = prediction.stats
    decoding = stats.seconds - stats.score_seconds
    rate = stats.new_tokens / decoding if decoding > 0 else 0.0
    fewest = stats.fewest_views
    fewer = f" (some tasks have only {fewest} different ones)" if fewest < stats.views else ""
    lines = [
        f"predicted {stats.num_outputs} outputs in {stats.views} views{fewer}: "
        f"{stats.num_prompts} decoded, {stats.new_tokens} tokens in {clock_text(decoding)}, "
        f"{rate:.0f} tokens/s",
        f"size rule fixed {stats.sized_outputs} of {stats.num_outputs} outputs; "
        f"copies of the input dropped: {stats.input_copies}",
        counts.render(),
    ]
    if config.predict.vote == "aug_score":
        asked = config.predict.score_views
        fewer = "" if stats.score_views == asked else f" of {asked} asked for"
        lines.append(
            f"read candidates anew in {stats.score_views} views{fewer}: "
            f"{clock_text(stats.score_seconds)}"
        )
    if stats.unknown_tasks:
        lines.append(
            f"note: {stats.unknown_tasks} tasks were not learnt in training and have no task "
            "vector; train with these challenges among data.sources"
        )
    for reason, count in stats.failures.items():
        lines.append(f"failed: {count} x {reason}")
    limit = config.predict.minutes
    rest = 0.0 if limit is None else 1 - stats.seconds / (limit * 60)
    if limit is not None and rest < 0:
        lines.append(
            f"note: took {stats.seconds / 60:.2f} minutes, more than predict.minutes={limit:g}: "
            "one view of everything takes longer"
        )
    elif limit is not None and stats.views == config.predict.views and rest > 0.2:
        lines.append(
            f"note: predict.views={config.predict.views} ended it before "
            f"predict.minutes={limit:g}; predict.views=null uses all the time"
        )
    if stats.discarded_prompts:
        lines.append(
            f"note: {stats.discarded_prompts} outputs of an unfinished round were discarded"
        )
    return "\n".join(lines)


def prediction_record(
    config: SubmitConfig, prediction: Prediction, counts: BuildCounts
) -> dict[str, Any]:
    """predictions.json: every candidate with its votes and log-likelihoods, best first."""
    return {
        "format": 1,
        "checkpoint": config.checkpoint,
        "challenges": config.challenges,
        "seed": config.seed,
        "predict": asdict(config.predict),
        "stats": prediction.stats.to_dict(),
        "fallbacks": counts.to_dict(),
        "tasks": {
            task_id: [
                {
                    "size_rule": size,
                    "candidates": [
                        _candidate_record(c) for c in rank(candidates, config.predict.vote)
                    ],
                }
                for candidates, size in zip(tests, prediction.sizes[task_id], strict=True)
            ]
            for task_id, tests in prediction.candidates.items()
        },
    }


def _candidate_record(candidate: Candidate) -> dict[str, Any]:
    return {
        "grid": candidate.grid.tolist(),
        "votes": candidate.count,
        "logprob_sum": round(candidate.logprob_sum, 4),
        "logprob_mean": round(candidate.logprob_mean, 4),
        "logprob_max": round(candidate.logprob_max, 4),
        "score": None if candidate.score is None else round(candidate.score, 4),
        "views": list(candidate.views),
        "logprobs": [round(logprob, 4) for logprob in candidate.logprobs],
    }


def attempt_infos(
    config: SubmitConfig, prediction: Prediction, counts: BuildCounts
) -> dict[str, list[list[AttemptInfo]]]:
    """Votes, views and likelihood behind each attempt, for the page."""
    reasons = {(f.task, f.test, f.attempt): f.reason for f in counts.fallbacks}
    infos: dict[str, list[list[AttemptInfo]]] = {}
    for task_id, tests in prediction.candidates.items():
        infos[task_id] = []
        views = prediction.num_views[task_id]
        for test, candidates in enumerate(tests):
            best = rank(candidates, config.predict.vote)
            infos[task_id].append(
                [
                    AttemptInfo(best[n].count, views, best[n].logprob_mean)
                    if n < len(best)
                    else AttemptInfo(0, views, None, reasons[(task_id, test, n)])
                    for n in range(len(ATTEMPT_KEYS))
                ]
            )
    return infos


def run_facts(
    config: SubmitConfig, loaded: Loaded, prediction: Prediction, counts: BuildCounts
) -> dict[str, str]:
    """Facts for the head of the page."""
    stats = prediction.stats
    return {
        "checkpoint": config.checkpoint,
        "commit": str(loaded.provenance.get("commit") or "unknown"),
        "challenges": config.challenges,
        "track": config.track,
        "seed": str(config.seed),
        "views": str(stats.views),
        "vote": config.predict.vote,
        "prediction": f"{stats.seconds / 60:.2f} minutes",
        "fallbacks": str(counts.num_fallbacks),
        "failed decodings": str(stats.num_failures),
    }


def _write_json(path: Path, value: Any) -> None:
    write_output(path, json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n")
