"""Reversible changes that keep a task's rule: 8 geometries x colour permutation x pair order.

An `Augmentation` is a value: `apply` it to a grid or a task, `undo` it on a predicted grid. A task under one
augmentation is a *view* of the task. A `ProblemAugmentation` makes another task, to train on: it changes only the
inputs or only the outputs, so that the rule becomes a new one.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from .tasks import COLOURS, MAX_SIDE, Grid, Pair, Task, freeze

GEOMETRIES = 8  # the dihedral group: geometry = 4 * transposed + quarter turns

IDENTITY_COLOURS = tuple(range(COLOURS))


@dataclass(frozen=True)
class Augmentation:
    """Transpose (if geometry >= 4), then geometry % 4 quarter turns; then colour c becomes colours[c].

    `order` holds the demonstrations' indexes in the order in which they are shown.
    """

    geometry: int = 0
    colours: tuple[int, ...] = IDENTITY_COLOURS
    order: tuple[int, ...] | None = None  # None = as given

    def apply(self, grid: Grid) -> Grid:
        turned = np.rot90(grid.T if self.geometry >= 4 else grid, self.geometry % 4)
        return freeze(np.array(self.colours, dtype=np.uint8)[turned])

    def undo(self, grid: Grid) -> Grid:
        original = np.argsort(self.colours).astype(np.uint8)[grid]
        turned = np.rot90(original, -(self.geometry % 4))
        return freeze(np.ascontiguousarray(turned.T if self.geometry >= 4 else turned))

    def apply_pair(self, pair: Pair) -> Pair:
        return Pair(self.apply(pair.input), self.apply(pair.output))

    def only(self, kinds: Collection[str]) -> "Augmentation":
        """What of it is of some kinds, "geometry", "colours" and "order"; the rest stays as it is in the task."""
        colours = self.colours if "colours" in kinds else IDENTITY_COLOURS
        order = self.order if "order" in kinds else None
        return Augmentation(self.geometry if "geometry" in kinds else 0, colours, order)

    def apply_task(self, task: Task) -> Task:
        order = self.order or range(len(task.train))
        train = tuple(self.apply_pair(task.train[i]) for i in order)
        return Task(task.id, train, tuple(self.apply(grid) for grid in task.test))


@dataclass(frozen=True)
class ColourPolicy:
    """Which colours may be permuted.

    keep_background: share of the augmentations in which colour 0 stays 0 (1.0: always).
    output_only: what happens to colours that the outputs have and no input has. "keep" leaves them as they are:
        nothing in a view's input could tell into what they were permuted.
    """

    keep_background: float = 0.8
    output_only: Literal["keep", "permute"] = "permute"


def output_only_colours(pairs: Sequence[Pair]) -> set[int]:
    """Colours that the outputs have and no input has."""
    inputs = {int(c) for pair in pairs for c in np.unique(pair.input)}
    return {int(c) for pair in pairs for c in np.unique(pair.output)} - inputs


def random_colours(rng: np.random.Generator, policy: ColourPolicy, pairs: Sequence[Pair]) -> tuple[int, ...]:
    """A permutation of the colours, uniform over those that the policy allows."""
    fixed = {0} if rng.random() < policy.keep_background else set()
    if policy.output_only == "keep":
        fixed |= output_only_colours(pairs)
    free = [c for c in range(COLOURS) if c not in fixed]
    colours = list(IDENTITY_COLOURS)
    for c, new in zip(free, rng.permutation(free), strict=True):
        colours[c] = int(new)
    return tuple(colours)


def random_augmentation(
    rng: np.random.Generator, policy: ColourPolicy, pairs: Sequence[Pair], geometry: int | None = None
) -> Augmentation:
    """An augmentation drawn uniformly: geometry (unless given), colours that the policy allows, order of `pairs`."""
    drawn = int(rng.integers(GEOMETRIES))
    order = tuple(int(i) for i in rng.permutation(len(pairs)))
    return Augmentation(drawn if geometry is None else geometry, random_colours(rng, policy, pairs), order)


def spread_augmentations(
    count: int, rng: np.random.Generator, policy: ColourPolicy, pairs: Sequence[Pair]
) -> list[Augmentation]:
    """`count` augmentations, even over the 8 geometries: their counts differ by one at most, for any `count`.

    The first is the task as it is, so one view alone is a plain question.
    """
    geometries = [0, *(int(g) for g in 1 + rng.permutation(GEOMETRIES - 1))]
    spread = [random_augmentation(rng, policy, pairs, geometries[i % GEOMETRIES]) for i in range(count)]
    return [Augmentation(), *spread[1:]] if count else []


@dataclass(frozen=True)
class Border:
    """`width` cells of one colour around a grid."""

    width: int
    colour: int

    def apply(self, grid: Grid) -> Grid:
        height, width = grid.shape
        framed = np.full((height + 2 * self.width, width + 2 * self.width), self.colour, dtype=np.uint8)
        framed[self.width : self.width + height, self.width : self.width + width] = grid
        return freeze(framed)


@dataclass(frozen=True)
class Upscale:
    """Every cell becomes a block of `rows` by `columns` cells."""

    rows: int
    columns: int

    def apply(self, grid: Grid) -> Grid:
        return freeze(grid.repeat(self.rows, axis=0).repeat(self.columns, axis=1))


@dataclass(frozen=True)
class Mirror:
    """A grid with its mirror image below (axis 0) or on its right (axis 1)."""

    axis: int

    def apply(self, grid: Grid) -> Grid:
        return freeze(np.concatenate((grid, np.flip(grid, self.axis)), self.axis))


Change = Augmentation | Border | Upscale | Mirror

CHANGES: Mapping[str, tuple[Change, ...]] = {  # what a problem augmentation is drawn from, by kind
    "geometry": tuple(Augmentation(geometry) for geometry in range(1, GEOMETRIES)),
    "border": tuple(Border(width, colour) for width in (1, 2, 3) for colour in range(COLOURS)),
    "upscale": tuple(Upscale(*factors) for factors in product((1, 2, 3), repeat=2) if factors != (1, 1)),
    "mirror": (Mirror(0), Mirror(1)),
}


@dataclass(frozen=True)
class ProblemAugmentation:
    """Makes a new task of a task: one change of all its inputs, or of all its outputs.

    The new task can be solved where the old one can: no change gives two grids the same image, so the old grids can be
    worked out from the new ones, and the rule between them still holds.
    """

    side: Literal["input", "output"]
    change: Change

    def apply_pair(self, pair: Pair) -> Pair:
        if self.side == "input":
            return Pair(self.change.apply(pair.input), pair.output)
        return Pair(pair.input, self.change.apply(pair.output))


def random_problem_augmentation(rng: np.random.Generator, pairs: Sequence[Pair]) -> ProblemAugmentation:
    """The side drawn uniformly, then the kind, then the change, among those that keep all of `pairs` within 30 by 30.

    There always is one: a geometry never makes a side longer. Give all the pairs of the task, the test's too.
    """
    side: Literal["input", "output"] = "input" if rng.random() < 0.5 else "output"
    shapes = [(pair.input if side == "input" else pair.output).shape for pair in pairs]
    largest = np.zeros(np.max(shapes, axis=0), dtype=np.uint8)  # if it fits after a change, then so do all the others
    kinds = [[change for change in kind if max(change.apply(largest).shape) <= MAX_SIDE] for kind in CHANGES.values()]
    fitting = [kind for kind in kinds if kind]
    drawn = fitting[rng.integers(len(fitting))]
    return ProblemAugmentation(side, drawn[rng.integers(len(drawn))])
