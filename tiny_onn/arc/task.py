"""The types of ARC data. ``Task`` has no place for test outputs: nothing built on it can leak."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Grid = np.ndarray
"""uint8 (H, W), 1 to 30 a side, values 0 to 9."""

MAX_SIDE = 30
NUM_COLORS = 10


@dataclass(frozen=True)
class Pair:
    """One input grid and its output grid."""

    input: Grid
    output: Grid


@dataclass(frozen=True)
class Task:
    """Demonstrations and test inputs. Test outputs have no field here, by construction."""

    id: str
    source: str
    demos: tuple[Pair, ...]
    test_inputs: tuple[Grid, ...]


@dataclass(frozen=True)
class TrainingTask(Task):
    """A task of a *training* split, whose test pairs may be learnt from or held out."""

    tests: tuple[Pair, ...]
