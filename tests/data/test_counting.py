"""Every rule's answer is worked out a second time, from the grids alone and with scipy's labelling of objects."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.ndimage import find_objects, label

from arc_solver.data.counting import COUNTING_TASKS
from arc_solver.puzzles.tasks import COLOURS, MAX_SIDE, Grid, Pair, grid_key, same_grid
from arc_solver.rng import named_rng

SEEDS = range(12)
CORNERS = np.ones((3, 3))  # corner neighbours are connected too
DICE = ["....#....", "#.......#", "#...#...#", "#.#...#.#", "#.#.#.#.#", "#.##.##.#"]

OBJECT_TASKS = (
    *("count-objects-as-bar", "number-as-dice-pattern", "keep-largest-object", "crop-largest-object"),
    *("colour-objects-by-size", "crop-most-frequent-shape"),
)

every_rule = pytest.mark.parametrize("task_id", COUNTING_TASKS)


def draw(task_id: str, seed: int, count: int = 30) -> list[Pair]:
    """Pairs of one task."""
    maker = COUNTING_TASKS[task_id](named_rng(seed, "task"))
    rng = named_rng(seed, "pairs")
    return [maker(rng) for _ in range(count)]


def tasks(task_id: str) -> Iterator[tuple[list[Pair], int]]:
    """Some tasks of a rule: pairs, and the background, which is what most cells of the inputs are."""
    for seed in SEEDS:
        pairs = draw(task_id, seed)
        yield pairs, Counter(int(c) for pair in pairs for c in pair.input.ravel()).most_common(1)[0][0]


def only(colours: set[int]) -> int:
    """The one colour of a task that has a meaning."""
    assert len(colours) == 1, colours
    return colours.pop()


def cells(grid: Grid) -> set[int]:
    return {int(c) for c in grid.ravel()}


def painted(mask: np.ndarray, colour: int, background: int) -> np.ndarray:
    return np.where(mask, colour, background)


def objects(grid: Grid, background: int) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    """Labels, number of cells of each object, and each object's shape in its box."""
    labels, count = label(grid != background, CORNERS)
    shapes = [labels[box] == i + 1 for i, box in enumerate(find_objects(labels))]
    return labels, [int((labels == i + 1).sum()) for i in range(count)], shapes


def colours_by_count(grid: Grid, background: int) -> list[tuple[int, int]]:
    """(colour, cells) from the commonest, background left out; never a tie."""
    ranking = Counter(int(c) for c in grid.ravel() if c != background).most_common()
    assert len({count for _, count in ranking}) == len(ranking), ranking
    return ranking


@every_rule
def test_pairs_are_legal_and_read_only(task_id):
    for seed in range(60):
        for pair in draw(task_id, seed, count=5):
            for grid in (pair.input, pair.output):
                assert grid.dtype == np.uint8
                assert grid.ndim == 2
                assert 1 <= min(grid.shape) <= max(grid.shape) <= MAX_SIDE
                assert grid.max() < COLOURS
                assert not grid.flags.writeable


@every_rule
def test_inputs_stay_about_twelve_wide(task_id):
    sides = [max(pair.input.shape) for seed in range(60) for pair in draw(task_id, seed, count=5)]
    assert max(sides) <= 16
    assert np.mean(np.array(sides) > 12) < 0.05
    assert len(set(sides)) >= 6


@every_rule
def test_pairs_depend_on_the_generators_alone(task_id):
    def keys(pairs: list[Pair]) -> list[tuple[bytes, bytes]]:
        return [(grid_key(pair.input), grid_key(pair.output)) for pair in pairs]

    assert keys(draw(task_id, 1)) == keys(draw(task_id, 1))
    assert keys(draw(task_id, 1)) != keys(draw(task_id, 2))
    maker = COUNTING_TASKS[task_id](named_rng(1, "task"))
    maker(named_rng(0, "a pair before"))
    rng = named_rng(1, "pairs")
    assert keys([maker(rng) for _ in range(30)]) == keys(draw(task_id, 1)), "a maker keeps no state"


@every_rule
def test_a_task_is_not_trivial(task_id):
    for seed in SEEDS:
        pairs = draw(task_id, seed)
        assert len({grid_key(pair.input) for pair in pairs}) == len(pairs)
        assert len({grid_key(pair.output) for pair in pairs}) >= 4


@every_rule
def test_tasks_of_a_rule_differ_in_their_background(task_id):
    assert len({background for _, background in tasks(task_id)}) >= 2


@pytest.mark.parametrize("task_id", OBJECT_TASKS)
def test_objects_are_the_same_whether_corners_connect_or_not(task_id):
    for pairs, background in tasks(task_id):
        for pair in pairs:
            labels, count = label(pair.input != background, CORNERS)
            assert label(pair.input != background)[1] == count
            for i in range(count):
                assert len(cells(pair.input[labels == i + 1])) == 1, "an object has one colour"


def test_count_objects_as_bar():
    counts = set()
    for pairs, background in tasks("count-objects-as-bar"):
        colour = only({c for pair in pairs for c in cells(pair.output)})
        for pair in pairs:
            count = label(pair.input != background, CORNERS)[1]
            assert same_grid(pair.output, np.full((1, count), colour))
            counts.add(count)
    assert counts == set(range(1, 10))


def test_number_as_dice_pattern():
    counts = set()
    for pairs, background in tasks("number-as-dice-pattern"):
        colour = only({c for pair in pairs for c in cells(pair.output)} - {background})
        for pair in pairs:
            count = label(pair.input != background, CORNERS)[1]
            mask = np.array([spot == "#" for spot in DICE[count - 1]]).reshape(3, 3)
            assert same_grid(pair.output, painted(mask, colour, background))
            assert mask.sum() == count
            counts.add(count)
    assert counts == set(range(1, 7))


def test_count_cells_of_colour():
    for pairs, background in tasks("count-cells-of-colour"):
        colour = only({c for pair in pairs for c in cells(pair.output)})
        for pair in pairs:
            assert same_grid(pair.output, np.full((1, (pair.input == colour).sum()), colour))
            assert len(cells(pair.input) - {background, colour}) >= 1, "something else to look past"


def test_difference_of_counts():
    for pairs, background in tasks("difference-of-counts"):
        more = only({c for pair in pairs for c in cells(pair.output)})
        fewer = only({c for pair in pairs for c in cells(pair.input)} - {background, more})
        for pair in pairs:
            difference = int((pair.input == more).sum()) - int((pair.input == fewer).sum())
            assert same_grid(pair.output, np.full((1, difference), more))


@pytest.mark.parametrize(("task_id", "rank"), [("most-common-colour", 0), ("least-common-colour", -1)])
def test_common_colours(task_id, rank):
    sides = set()
    for pairs, background in tasks(task_id):
        side = only({side for pair in pairs for side in pair.output.shape})
        for pair in pairs:
            ranking = colours_by_count(pair.input, background)
            assert same_grid(pair.output, np.full((side, side), ranking[rank][0]))
            assert (pair.input == background).sum() > ranking[0][1], "the background would be an answer"
        sides.add(side)
    assert sides == {1, 2, 3}


def test_sort_colours_by_frequency():
    steps = set()
    for pairs, background in tasks("sort-colours-by-frequency"):
        found = set()
        for pair in pairs:
            ranking = [colour for colour, _ in colours_by_count(pair.input, background)]
            found |= {step for step in (1, -1) if pair.output.tolist() == [ranking[::step]]}
        steps.add(only(found))
    assert steps == {1, -1}


def test_bar_chart_of_colours():
    for pairs, background in tasks("bar-chart-of-colours"):
        order = only({tuple(pair.output[-1].tolist()) for pair in pairs})
        for pair in pairs:
            counts = Counter(pair.input.ravel().tolist())
            assert counts.keys() == {background, *order}
            assert pair.output.shape[0] == max(counts[colour] for colour in order)
            for column, colour in zip(pair.output.T.tolist(), order, strict=True):
                empty = len(column) - counts[colour]
                assert column == [background] * empty + [colour] * counts[colour]


def largest(pair: Pair, background: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Where the object with the most cells is, its shape and its colour; never a tie."""
    labels, sizes, shapes = objects(pair.input, background)
    assert sizes.count(max(sizes)) == 1
    assert len(sizes) >= 2
    i = sizes.index(max(sizes))
    return labels == i + 1, shapes[i], only(cells(pair.input[labels == i + 1]))


def test_keep_largest_object():
    for pairs, background in tasks("keep-largest-object"):
        for pair in pairs:
            where, _, colour = largest(pair, background)
            assert same_grid(pair.output, painted(where, colour, background))


def test_crop_largest_object():
    for pairs, background in tasks("crop-largest-object"):
        for pair in pairs:
            _, shape, colour = largest(pair, background)
            assert same_grid(pair.output, painted(shape, colour, background))


def test_colour_objects_by_size():
    for pairs, background in tasks("colour-objects-by-size"):
        colours: dict[int, set[int]] = {1: set(), 2: set(), 3: set()}
        for pair in pairs:
            labels, sizes, _ = objects(pair.input, background)
            assert set(sizes) == {1, 2, 3}, "one pair would not tell every colour"
            for i, size in enumerate(sizes):
                colours[size] |= cells(pair.output[labels == i + 1])
            assert ((pair.output == background) == (labels == 0)).all()
        assert len({only(found) for found in colours.values()}) == 3


def test_crop_most_frequent_shape():
    for pairs, background in tasks("crop-most-frequent-shape"):
        colour = only({c for pair in pairs for c in cells(pair.output)} - {background})
        for pair in pairs:
            kinds = [(shape.shape, shape.tobytes()) for shape in objects(pair.input, background)[2]]
            (winner, most), (_, second) = Counter(kinds).most_common(2)
            assert most > second
            mask = np.frombuffer(winner[1], dtype=bool).reshape(winner[0])
            assert same_grid(pair.output, painted(mask, colour, background))


def test_the_shapes_to_tell_apart_differ_when_turned_and_mirrored():
    seen = {}
    for pairs, background in tasks("crop-most-frequent-shape"):
        for shape in (shape for pair in pairs for shape in objects(pair.input, background)[2]):
            views = [np.rot90(mirrored, turns) for mirrored in (shape, shape.T) for turns in range(4)]
            canonical = min((view.shape, view.tobytes()) for view in views)
            assert seen.setdefault(canonical, grid_key(shape)) == grid_key(shape)
    assert len(seen) == 6


def meanings(answers: list[tuple[bool, int]]) -> tuple[int, int]:
    """The colours that stand for yes and for no."""
    yes, no = (only({colour for said, colour in answers if said is wanted}) for wanted in (True, False))
    assert yes != no
    return yes, no


def test_odd_or_even():
    for pairs, background in tasks("odd-or-even"):
        answers = []
        for pair in pairs:
            assert pair.output.shape == (len(pair.input), 1)
            odd = ((pair.input != background).sum(axis=1) % 2 == 1).tolist()
            assert set(odd) == {True, False}, "one pair would not tell both colours"
            answers += zip(odd, pair.output[:, 0].tolist(), strict=True)
        meanings(answers)


def test_same_count_or_not():
    for pairs, background in tasks("same-count-or-not"):
        answers = []
        middle = only({int(c) for pair in pairs for c in pair.input[:, pair.input.shape[1] // 2]})
        for pair in pairs:
            assert pair.output.shape == (len(pair.input), 1)
            half = pair.input.shape[1] // 2
            assert middle not in cells(pair.input[:, :half]) | cells(pair.input[:, half + 1 :])
            left, right = pair.input[:, :half] != background, pair.input[:, half + 1 :] != background
            same = (left.sum(axis=1) == right.sum(axis=1)).tolist()
            assert set(same) == {True, False}, "one pair would not tell both colours"
            answers += zip(same, pair.output[:, 0].tolist(), strict=True)
        meanings(answers)
