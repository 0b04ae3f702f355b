"""One student trained, measured and written down.

Loss: mean squared error over the rows of all agents, in units of the irreducible error of one dense
matrix, plus ``k24.div_coef`` times the overlap of the masks' distributions. New rows every step.
AdamW (0.9, 0.95) without decay; the matrix at WEIGHT_LR, what chooses masks at the arm's
``pattern_lr``; both rise and fall as a run's do (optim.warmup_share, optim.decay_share). Schedule,
noise, activity, resets and revival are the product's (training/k24_control.py).

Shapes: A agents, B rows of each, O outputs, I inputs.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from teachers_arms import Arm
from teachers_students import K24Student, build_student
from teachers_task import Teachers, make_teachers, recovery
from torch import Tensor, nn

from tiny_onn.config.schema import OptimConfig
from tiny_onn.sparse.k24_diversity import mask_overlap
from tiny_onn.training.k24_control import K24Control
from tiny_onn.training.optim import BETAS, EPS

SIZE, AGENTS, ROWS = 64, 4, 32
WEIGHT_LR = 3e-3
LOGS = 50


def lr_scale(progress: float) -> float:
    """Of the peak rates, by the share of the steps that is done: up, flat, linearly down to 0."""
    optim = OptimConfig()
    rise = progress / optim.warmup_share
    fall = (1 - progress) / optim.decay_share
    return min(1.0, rise, fall)


class Watch:
    """Evaluates a student now and then."""

    def __init__(self, student: nn.Module, teachers: Teachers) -> None:
        self.student, self.teachers = student, teachers
        self.rows: list[dict[str, Any]] = []
        self.unit = teachers.irreducible()
        self._before: Tensor | None = None

    @torch.no_grad()
    def look(self, step: int, x_ABI: Tensor) -> None:
        """After ``step`` steps. flips: share of the entries whose mask is another than when this
        was called last. agreement: of the step's drawn patterns with the likeliest ones."""
        student, teachers = self.student.eval(), self.teachers
        weight, _ = student(x_ABI)
        mask_AOI = student.masks()
        entries, groups = recovery(mask_AOI, teachers.mask_AOI)
        flips = None
        if self._before is not None:
            flips = float((mask_AOI != self._before).float().mean())
        self._before = mask_AOI
        row = {
            "step": step,
            "loss": teachers.loss(weight) / self.unit,
            "entries": entries,
            "groups": groups,
            "overlap": float(mask_overlap(mask_AOI)),
            "flips": flips,
        }
        if isinstance(student, K24Student) and student.pattern.agreement is not None:
            row["agreement"] = float(student.pattern.agreement)
        self.rows.append(row)
        student.train()


def train(arm: Arm, seed: int, steps: int) -> dict[str, Any]:
    """Everything the table is made of."""
    torch.manual_seed(seed)
    config = arm.config(steps)
    teachers = make_teachers(seed, SIZE, SIZE, AGENTS, arm.draw, arm.rare)
    student = build_student(arm, config, teachers).train()
    groups = [{"params": [student.weight], "peak": WEIGHT_LR}]
    if student.patterns():
        groups.append({"params": student.patterns(), "peak": arm.pattern_lr})
    if arm.given:
        del groups[0]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    draws = torch.Generator().manual_seed(seed + 1)
    every, done = max(1, steps // LOGS), 0.0
    control = None
    if isinstance(student, K24Student):
        control = K24Control(config, seed, every, share=lambda: done)
        control.attach(student)
    watch = Watch(student, teachers)
    watch.look(0, teachers.draw(1, draws)[0])
    began = time.monotonic()
    for step in range(steps):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_scale((step + 1) / (steps + 1))
        if control is not None:
            control.begin_step(step)
        x_ABI, y_ABO = teachers.draw(ROWS, draws)
        weight, overlap = student(x_ABI)
        loss = (torch.bmm(x_ABI, weight.transpose(1, 2)) - y_ABO).square().mean() / watch.unit
        if overlap is not None:
            loss = loss + config.div_coef * overlap
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if control is not None:
            control.end_step(optimizer, step)
        if (step + 1) % every == 0 or step + 1 == steps:
            watch.look(step + 1, x_ABI)
    last = watch.rows[-1]
    return {
        "seed": seed,
        "steps": steps,
        "seconds": round(time.monotonic() - began, 2),
        "loss": last["loss"],
        "entries": last["entries"],
        "groups": last["groups"],
        "overlap": last["overlap"],
        "teachers_overlap": float(mask_overlap(teachers.mask_AOI)),
        "irreducible": watch.unit,
        "irreducible_of_power": watch.unit / teachers.power(),
        "revived": control.revived if control is not None else None,
        "resets": control.resets if control is not None else None,
        "history": watch.rows,
        "settings": {
            **asdict(arm),
            "k24": asdict(config) if control is not None else None,
            "size": SIZE,
            "agents": AGENTS,
            "rows_an_agent": ROWS,
            "weight_lr": WEIGHT_LR,
        },
    }
