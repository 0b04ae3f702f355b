"""Views: the eight dihedral transforms times permutations of the colours, all invertible.

Two views can show the same grids: permuting absent colours changes nothing, and a symmetric
grid looks the same turned. A :class:`ViewSpace` counts and numbers the *different* contents
exactly, without enumerating them: contents of two dihedrals are the same up to colours when
they agree after naming the movable colours in order of appearance, so one class of such
dihedrals times the injections of present colours into movable ones gives each content once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import perm
from typing import Literal

import numpy as np

from tiny_onn.arc.task import NUM_COLORS, Grid, Pair, Task

NUM_DIHEDRALS = 8
SAME_COLORS = tuple(range(NUM_COLORS))
ViewMode = Literal["all", "dihedral", "none"]


@dataclass(frozen=True, slots=True)
class View:
    """Turn by ``dihedral`` (0 to 7), then map colour c to ``colors[c]``.

    Dihedral k + 4t: transpose if t is 1, then k quarter turns counterclockwise. ``colors`` is a
    bijection of 0..9 with ``colors[0] == 0``.
    """

    dihedral: int = 0
    colors: tuple[int, ...] = SAME_COLORS

    def __post_init__(self) -> None:
        assert 0 <= self.dihedral < NUM_DIHEDRALS, self.dihedral
        assert self.colors[0] == 0 and sorted(self.colors) == list(SAME_COLORS), self.colors


IDENTITY = View()


def swaps_sides(dihedral: int) -> bool:
    """Whether height and width trade places."""
    return (dihedral % 4) % 2 == (dihedral < 4)


def turn(dihedral: int, grid: Grid) -> Grid:
    """The grid (a view of its memory) turned by a dihedral index."""
    return _TURNS[dihedral](grid)


def unturn(dihedral: int, grid: Grid) -> Grid:
    """Inverse of :func:`turn`."""
    return _TURNS[_INVERSES[dihedral]](grid)


_TURNS = (  # np.rot90(grid or grid.T, k), without its overhead
    lambda grid: grid,
    lambda grid: grid.T[::-1],
    lambda grid: grid[::-1, ::-1],
    lambda grid: grid.T[:, ::-1],
    lambda grid: grid.T,
    lambda grid: grid[::-1],
    lambda grid: grid.T[::-1, ::-1],
    lambda grid: grid[:, ::-1],
)
_INVERSES = (0, 3, 2, 1, 4, 5, 6, 7)


def apply(view: View, grid: Grid) -> Grid:
    """The grid as ``view`` shows it; uint8, contiguous."""
    return np.array(view.colors, dtype=np.uint8)[turn(view.dihedral, grid)]


def invert(view: View, grid: Grid) -> Grid:
    """Exact inverse of :func:`apply`."""
    original = np.argsort(view.colors).astype(np.uint8)
    return original[unturn(view.dihedral, grid)]


def apply_pair(view: View, pair: Pair) -> Pair:
    """Both grids under the same view."""
    return Pair(apply(view, pair.input), apply(view, pair.output))


def fixed_colors(task: Task) -> frozenset[int]:
    """Colour 0, and the colours that occur in demonstration outputs but in no input."""
    inputs = _colors([demo.input for demo in task.demos] + list(task.test_inputs))
    return frozenset({0} | (_colors([demo.output for demo in task.demos]) - inputs))


def _colors(grids: Sequence[Grid]) -> set[int]:
    if not grids:
        return set()
    counts = np.bincount(np.concatenate([grid.ravel() for grid in grids]), minlength=NUM_COLORS)
    return set(np.flatnonzero(counts).tolist())


class ViewSpace:
    """All different contents that views can make of ``grids``, numbered 0 to size - 1.

    Args:
        grids: what is shown together (a pair, or a task's demonstrations and test inputs).
        fixed: colours that must not move; 0 is always among them.
        mode: "all", "dihedral" (colours stay) or "none" (the identity alone).
    """

    def __init__(
        self, grids: Sequence[Grid], fixed: frozenset[int], mode: ViewMode = "all"
    ) -> None:
        self.movable = tuple(c for c in range(1, NUM_COLORS) if c not in fixed)
        self._recolor = mode == "all"
        dihedrals = range(1) if mode == "none" else range(NUM_DIHEDRALS)
        self._present: dict[int, tuple[int, ...]] = {}
        classes: dict[bytes, list[int]] = {}
        for dihedral in dihedrals:
            turned = [turn(dihedral, grid) for grid in grids]
            cells = np.concatenate([grid.ravel() for grid in turned])
            self._present[dihedral] = self._movable_in_order(cells)
            shapes = bytes(side for grid in turned for side in grid.shape)
            classes.setdefault(shapes + self._canonical(dihedral, cells), []).append(dihedral)
        self.classes = tuple(tuple(members) for members in classes.values())
        num_present = len(self._present[0])
        self.recolorings = perm(len(self.movable), num_present) if self._recolor else 1
        self.size = len(self.classes) * self.recolorings

    def _movable_in_order(self, cells: np.ndarray) -> tuple[int, ...]:
        colors, first = np.unique(cells, return_index=True)
        ordered = colors[np.argsort(first)].tolist()
        return tuple(c for c in ordered if c in self.movable)

    def _canonical(self, dihedral: int, cells: np.ndarray) -> bytes:
        """Cells with the movable colours named in order of appearance; the rest keep theirs."""
        if not self._recolor:
            return cells.tobytes()
        names = np.arange(NUM_COLORS, dtype=np.uint8)
        for rank, color in enumerate(self._present[dihedral]):
            names[color] = NUM_COLORS + rank
        return names[cells].tobytes()

    @cached_property
    def identity_index(self) -> int:
        """The number of the content that the identity shows."""
        number, left = 0, list(self.movable)
        if self._recolor:
            for color in self._present[0]:
                number = number * len(left) + left.index(color)
                left.remove(color)
        return number  # dihedral 0 is always in class 0

    def view(self, index: int, pick: int = 0) -> View:
        """A view that shows content ``index``; ``pick`` chooses among equivalent dihedrals."""
        members, number = self.classes[index // self.recolorings], index % self.recolorings
        dihedral = members[pick % len(members)]
        if not self._recolor:
            return View(dihedral)
        present, left = self._present[dihedral], list(self.movable)
        choices = []
        for base in range(len(left) - len(present) + 1, len(left) + 1):
            number, choice = divmod(number, base)
            choices.append(choice)
        colors = list(SAME_COLORS)
        for color, choice in zip(present, reversed(choices), strict=True):
            colors[color] = left.pop(choice)
        absent = [c for c in self.movable if c not in present]
        # what is left over goes to the absent colours, unmoved wherever that is possible
        moved = [c for c in absent if c not in left]
        free = [c for c in left if c not in absent]
        for color, target in zip(moved, free, strict=True):
            colors[color] = target
        return View(dihedral, tuple(colors))

    def dihedrals(self, indices: np.ndarray, picks: np.ndarray) -> np.ndarray:
        """The dihedral of ``view(index, pick)`` for arrays of both."""
        table = np.array(self.classes)  # classes are cosets of one subgroup: of equal size
        return table[indices // self.recolorings, picks % table.shape[1]]

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 indices of min(count, size) different contents, in random order.

        Every round shows each class of dihedrals once, so a short draw covers all orientations.
        """
        num_classes = len(self.classes)
        rounds = min(-(-count // num_classes), self.recolorings)
        numbers = np.stack(
            [rng.choice(self.recolorings, rounds, replace=False) for _ in range(num_classes)]
        )
        numbers += np.arange(num_classes)[:, None] * self.recolorings
        return rng.permuted(numbers.T, axis=1).ravel()[:count]


def sample_views(task: Task, count: int, rng: np.random.Generator) -> list[View]:
    """The identity and up to ``count - 1`` more views, no two showing the same content.

    Content is what the views make of all demonstrations and test inputs together. Fewer come
    back when the task has fewer different contents.
    """
    grids = [grid for demo in task.demos for grid in (demo.input, demo.output)]
    space = ViewSpace(grids + list(task.test_inputs), fixed_colors(task))
    views = [IDENTITY]
    for number, index in enumerate(space.draw(count, rng).tolist()):
        if index != space.identity_index:
            views.append(space.view(index, number))
    return views[:count]


class ViewSampler:
    """The view of every example in every epoch: deterministic in (seed, example, epoch).

    An example goes through up to ``max_views`` different contents, each once, before it starts
    again; any epoch is directly accessible.

    Args:
        examples: of each example the pairs shown together, its task's :func:`fixed_colors` and
            the task's inputs. Colours of the pairs' outputs that occur in none of those inputs
            are fixed too (the answer of a training task may bring new ones).
        seed: decides the order of each example's views.
        mode, max_views: see :class:`ViewSpace` and above.
    """

    def __init__(
        self,
        examples: Sequence[tuple[Sequence[Pair], frozenset[int], Sequence[Grid]]],
        seed: int,
        mode: ViewMode = "all",
        max_views: int = 1000,
    ) -> None:
        assert max_views > 0, max_views
        self._spaces: list[tuple[ViewSpace, np.ndarray, int]] = []
        dihedrals = []
        for number, (pairs, fixed, inputs) in enumerate(examples):
            fixed = fixed | (_colors([pair.output for pair in pairs]) - _colors(inputs))
            grids = [grid for pair in pairs for grid in (pair.input, pair.output)]
            space = ViewSpace(grids, fixed, mode)
            rng = np.random.default_rng([seed, number])
            indices, pick = space.draw(max_views, rng), int(rng.integers(NUM_DIHEDRALS))
            self._spaces.append((space, indices.astype(np.int32), pick))
            dihedrals.append(space.dihedrals(indices, pick + np.arange(len(indices))))
        self._counts = np.array([len(indices) for _, indices, _ in self._spaces])
        self._starts = np.cumsum(self._counts) - self._counts
        self._dihedrals = np.concatenate(dihedrals).astype(np.uint8)

    def view(self, example: int, epoch: int) -> View:
        """The view in which example number ``example`` is seen in ``epoch``."""
        space, indices, pick = self._spaces[example]
        slot = epoch % len(indices)
        return space.view(int(indices[slot]), pick + slot)

    def dihedrals(self, epoch: int) -> np.ndarray:
        """uint8: the dihedral of every example's view in ``epoch``, without making the views."""
        return self._dihedrals[self._starts + epoch % self._counts]
