"""Counting tasks: core knowledge about number (Chollet 2019, arXiv 1911.01547, section III.1.2), as endless ARC tasks.

A *rule* draws what is fixed in one task, a `Scene`, and returns a *maker*, which draws a pair of that task each time it
is called. Both draw from nothing but the generator they are given, and a maker keeps no state.

A grid is drawn as *labels* [H, W] (0 is background, i + 1 is object i or colour i), then painted with a palette. The
answers are unambiguous by construction: objects are 4-connected and their boxes a cell apart, so it does not matter
whether corners connect; what is ranked has no ties; and the background is the same in all pairs of a task.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..puzzles import COLOURS, Grid, Pair, freeze

Maker = Callable[[np.random.Generator], Pair]
CountingRule = Callable[[np.random.Generator], Maker]

MOST = 9  # the largest number to count
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def _shape(rows: str) -> np.ndarray:
    """_shape("10 11") is a corner: [2, 2] int."""
    return np.array([[int(cell) for cell in row] for row in rows.split()])


DICE = tuple(map(_shape, ("000 010 000", "100 000 001", "100 010 001", "101 000 101", "101 010 101", "101 101 101")))
# None is another one turned or mirrored, so that nobody can take two kinds for one.
SHAPES = tuple(map(_shape, ("11 11", "111", "10 11", "111 010", "010 111 010", "111 101 111")))


@dataclass(frozen=True)
class Scene:
    """What is fixed in one task."""

    background: int
    colours: tuple[int, ...]  # the other nine in random order; a rule gives the first few a meaning
    sides: tuple[int, int]  # smallest and largest of an input, before it grows because its content does not fit
    variant: int  # 0, 1 or 2: which of three kinds of answer

    def draw_size(self, rng: np.random.Generator) -> tuple[int, int]:
        return _between(rng, *self.sides), _between(rng, *self.sides)

    def any_colours(self, rng: np.random.Generator, count: int) -> list[int]:
        """A palette of the background and `count` other colours, which may repeat."""
        return [self.background, *rng.choice(self.colours, count).tolist()]


def _draw_scene(rng: np.random.Generator) -> Scene:
    background = 0 if rng.random() < 0.7 else _between(rng, 0, COLOURS - 1)
    colours = rng.permutation(np.delete(np.arange(COLOURS), background)).tolist()
    smallest = _between(rng, 3, 8)
    return Scene(background, tuple(colours), (smallest, smallest + _between(rng, 1, 4)), _between(rng, 0, 2))


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def _paint(labels: np.ndarray, palette: Sequence[int]) -> Grid:
    return freeze(np.array(palette, dtype=np.uint8)[labels])


def _full(height: int, width: int, colour: int) -> Grid:
    return freeze(np.full((height, width), colour, dtype=np.uint8))


def _blob(rng: np.random.Generator, cells: int) -> np.ndarray:
    """A random 4-connected shape of so many cells in its bounding box. [h, w] int, 0 or 1."""
    taken = [(0, 0)]
    while len(taken) < cells:
        (row, column), (down, right) = taken[rng.integers(len(taken))], STEPS[rng.integers(4)]
        if (row + down, column + right) not in taken:
            taken.append((row + down, column + right))
    rows, columns = np.transpose(taken) - np.min(taken, axis=0)[:, None]
    shape = np.zeros((rows.max() + 1, columns.max() + 1), dtype=int)
    shape[rows, columns] = 1
    return shape


def _placed(rng: np.random.Generator, scene: Scene, shapes: Sequence[np.ndarray]) -> np.ndarray:
    """Labels: the shapes, as objects that do not touch. The grid grows until all fit. [H, W]"""
    height, width = scene.draw_size(rng)
    while (labels := _try_to_place(rng, height, width, shapes)) is None:
        height, width = height + 1, width + 1
    return labels


def _try_to_place(rng: np.random.Generator, height: int, width: int, shapes: Sequence[np.ndarray]) -> np.ndarray | None:
    labels, blocked = np.zeros((height, width), dtype=int), np.zeros((height, width), dtype=bool)
    for i, shape in enumerate(shapes):
        h, w = shape.shape
        if h > height or w > width:
            return None
        free = np.argwhere(~sliding_window_view(blocked, shape.shape).any(axis=(2, 3)))
        if not len(free):
            return None
        row, column = free[rng.integers(len(free))]
        labels[row : row + h, column : column + w] = (i + 1) * shape
        blocked[max(row - 1, 0) : row + h + 1, max(column - 1, 0) : column + w + 1] = True
    return labels


def _speckled(rng: np.random.Generator, scene: Scene, counts: Sequence[int]) -> np.ndarray:
    """Labels: i + 1 in counts[i] cells, in disorder, and 0 in more cells than any of these. [H, W]"""
    height, width = scene.draw_size(rng)
    while height * width <= sum(counts) + max(counts):
        height, width = height + 1, width + 1
    labels = np.repeat(np.arange(len(counts) + 1), [height * width - sum(counts), *counts])
    return rng.permutation(labels).reshape(height, width)


def _counted_objects(scene: Scene, rng: np.random.Generator, most: int) -> tuple[Grid, int]:
    count = _between(rng, 1, most)
    labels = _placed(rng, scene, [_blob(rng, _between(rng, 1, 4)) for _ in range(count)])
    return _paint(labels, scene.any_colours(rng, count)), count


def count_objects_as_bar(scene: Scene, rng: np.random.Generator) -> Pair:
    """How many objects, 1 to 9: as a bar in a fixed colour."""
    shown, count = _counted_objects(scene, rng, MOST)
    return Pair(shown, _full(1, count, scene.colours[0]))


def number_as_dice_pattern(scene: Scene, rng: np.random.Generator) -> Pair:
    """How many objects, 1 to 6: as the face of a die, in a fixed colour."""
    shown, count = _counted_objects(scene, rng, len(DICE))
    return Pair(shown, _paint(DICE[count - 1], [scene.background, scene.colours[0]]))


def count_cells_of_colour(scene: Scene, rng: np.random.Generator) -> Pair:
    """How many cells have one fixed colour, among cells of other colours: as a bar in that colour."""
    wanted, *others = scene.colours
    counts = rng.integers(1, MOST + 1, size=_between(rng, 2, 4)).tolist()
    palette = [scene.background, wanted, *rng.permutation(others)[: len(counts) - 1].tolist()]
    return Pair(_paint(_speckled(rng, scene, counts), palette), _full(1, counts[0], wanted))


def difference_of_counts(scene: Scene, rng: np.random.Generator) -> Pair:
    """How many cells more one fixed colour has than another: as a bar in the first."""
    common, difference = _between(rng, 1, 5), _between(rng, 1, 5)
    labels = _speckled(rng, scene, (common + difference, common))
    return Pair(_paint(labels, [scene.background, *scene.colours[:2]]), _full(1, difference, scene.colours[0]))


def _ranked_colours(scene: Scene, rng: np.random.Generator) -> tuple[Grid, list[int]]:
    """A grid of 2 to 5 colours on the background, no two equally common; and these colours, commonest first."""
    counts = np.sort(1 + rng.permutation(MOST)[: _between(rng, 2, 5)])[::-1].tolist()
    ranking = rng.permutation(scene.colours)[: len(counts)].tolist()
    return _paint(_speckled(rng, scene, counts), [scene.background, *ranking]), ranking


def most_common_colour(scene: Scene, rng: np.random.Generator) -> Pair:
    """The commonest colour but the background, in a square of a fixed size."""
    shown, ranking = _ranked_colours(scene, rng)
    return Pair(shown, _full(scene.variant + 1, scene.variant + 1, ranking[0]))


def least_common_colour(scene: Scene, rng: np.random.Generator) -> Pair:
    """The rarest colour, in a square of a fixed size."""
    shown, ranking = _ranked_colours(scene, rng)
    return Pair(shown, _full(scene.variant + 1, scene.variant + 1, ranking[-1]))


def sort_colours_by_frequency(scene: Scene, rng: np.random.Generator) -> Pair:
    """All colours but the background in a row, from the commonest to the rarest; in variant 0 the other way round."""
    shown, ranking = _ranked_colours(scene, rng)
    return Pair(shown, freeze(np.array([ranking if scene.variant else ranking[::-1]], dtype=np.uint8)))


def bar_chart_of_colours(scene: Scene, rng: np.random.Generator) -> Pair:
    """An upright bar for each of 2 to 4 fixed colours, in a fixed order, as high as the colour has cells."""
    kinds = scene.variant + 2
    counts = rng.integers(1, MOST + 1, size=kinds)
    levels = np.arange(counts.max(), 0, -1)[:, None]
    bars = np.where(levels <= counts, np.arange(1, kinds + 1), 0)
    palette = [scene.background, *scene.colours[:kinds]]
    return Pair(_paint(_speckled(rng, scene, counts.tolist()), palette), _paint(bars, palette))


def _largest_first(rng: np.random.Generator) -> list[np.ndarray]:
    """2 to 6 blobs, the first with more cells than any other."""
    largest = _between(rng, 4, MOST)
    others = rng.integers(1, largest, size=_between(rng, 1, 5))
    return [_blob(rng, cells) for cells in (largest, *others)]


def keep_largest_object(scene: Scene, rng: np.random.Generator) -> Pair:
    """The grid with only the object that has the most cells."""
    blobs = _largest_first(rng)
    labels, palette = _placed(rng, scene, blobs), scene.any_colours(rng, len(blobs))
    return Pair(_paint(labels, palette), _paint(np.where(labels == 1, 1, 0), palette))


def crop_largest_object(scene: Scene, rng: np.random.Generator) -> Pair:
    """The object that has the most cells, in its bounding box."""
    blobs = _largest_first(rng)
    labels, palette = _placed(rng, scene, blobs), scene.any_colours(rng, len(blobs))
    return Pair(_paint(labels, palette), _paint(blobs[0], palette))


def colour_objects_by_size(scene: Scene, rng: np.random.Generator) -> Pair:
    """Objects of 1, 2 and 3 cells, all of them in every pair: each number of cells gets its fixed colour."""
    plain, *by_size = scene.colours
    sizes = [1, 2, 3, *rng.integers(1, 4, size=_between(rng, 0, 4))]
    labels = _placed(rng, scene, [_blob(rng, size) for size in sizes])
    shown = _paint(labels, [scene.background, *[plain] * len(sizes)])
    return Pair(shown, _paint(labels, [scene.background, *(by_size[size - 1] for size in sizes)]))


def crop_most_frequent_shape(scene: Scene, rng: np.random.Generator) -> Pair:
    """The shape that most objects have, whatever their colours: in a fixed colour."""
    most, kinds = _between(rng, 2, 3), rng.permutation(len(SHAPES))[: _between(rng, 2, 3)]
    repeats = [most, *rng.integers(1, most, size=len(kinds) - 1)]
    labels = _placed(rng, scene, [SHAPES[kind] for kind in np.repeat(kinds, repeats)])
    shown = _paint(labels, scene.any_colours(rng, sum(repeats)))
    return Pair(shown, _paint(SHAPES[kinds[0]], [scene.background, scene.colours[0]]))


def odd_or_even(scene: Scene, rng: np.random.Generator) -> Pair:
    """For each row, whether it has an odd or an even number of coloured cells: one of two fixed colours."""
    height, width = scene.draw_size(rng)
    odd = _yes_and_no(rng, height)
    rows = np.array([_dots(rng, width, 2 * _between(rng, 1, width // 2) - yes) for yes in odd])
    return Pair(_paint(rows, scene.any_colours(rng, 1)), _paint(odd[:, None], scene.colours[:2]))


def same_count_or_not(scene: Scene, rng: np.random.Generator) -> Pair:
    """For each row, whether left and right of a line have equally many coloured cells: one of two fixed colours."""
    line, *answers = scene.colours
    (height, _), half = scene.draw_size(rng), _between(rng, 2, 5)
    same = _yes_and_no(rng, height)
    left = rng.integers(0, half + 1, size=height)
    right = np.where(same, left, (left + rng.integers(1, half + 1, size=height)) % (half + 1))
    rows = np.array([[*_dots(rng, half, a), 2, *_dots(rng, half, b)] for a, b in zip(left, right, strict=True)])
    return Pair(_paint(rows, [scene.background, rng.choice(answers), line]), _paint(same[:, None], answers[:2]))


def _yes_and_no(rng: np.random.Generator, count: int) -> np.ndarray:
    """Ones and zeros with at least one of each, so that every pair shows what both mean. [count]"""
    return rng.permutation([0, 1, *rng.integers(0, 2, size=count - 2)])


def _dots(rng: np.random.Generator, width: int, count: int) -> np.ndarray:
    """`count` ones among zeros. [width]"""
    return np.where(rng.permutation(width) < count, 1, 0)


def _rule(draw_pair: Callable[[Scene, np.random.Generator], Pair]) -> CountingRule:
    return lambda rng: partial(draw_pair, _draw_scene(rng))


COUNTING_TASKS: Mapping[str, CountingRule] = {
    "count-objects-as-bar": _rule(count_objects_as_bar),
    "number-as-dice-pattern": _rule(number_as_dice_pattern),
    "count-cells-of-colour": _rule(count_cells_of_colour),
    "difference-of-counts": _rule(difference_of_counts),
    "most-common-colour": _rule(most_common_colour),
    "least-common-colour": _rule(least_common_colour),
    "sort-colours-by-frequency": _rule(sort_colours_by_frequency),
    "bar-chart-of-colours": _rule(bar_chart_of_colours),
    "keep-largest-object": _rule(keep_largest_object),
    "crop-largest-object": _rule(crop_largest_object),
    "colour-objects-by-size": _rule(colour_objects_by_size),
    "crop-most-frequent-shape": _rule(crop_most_frequent_shape),
    "odd-or-even": _rule(odd_or_even),
    "same-count-or-not": _rule(same_count_or_not),
}
