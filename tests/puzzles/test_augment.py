from collections import Counter

import numpy as np
import pytest
from toys import flip_task, grid, random_grid

from arc_solver.puzzles.augment import (
    CHANGES,
    GEOMETRIES,
    Augmentation,
    Border,
    Change,
    ColourPolicy,
    Mirror,
    ProblemAugmentation,
    Upscale,
    output_only_colours,
    random_augmentation,
    random_colours,
    random_problem_augmentation,
    spread_augmentations,
)
from arc_solver.puzzles.tasks import MAX_SIDE, Grid, Pair, grid_key, same_grid
from arc_solver.rng import named_rng

ALL_CHANGES = [change for kind in CHANGES.values() for change in kind]


@pytest.mark.parametrize("geometry", range(GEOMETRIES))
def test_undo_inverts_apply(geometry, rng):
    for _ in range(20):
        augmentation = Augmentation(geometry, tuple(int(c) for c in rng.permutation(10)))
        cells = random_grid(rng)
        assert same_grid(augmentation.undo(augmentation.apply(cells)), cells)
        assert same_grid(augmentation.apply(augmentation.undo(cells)), cells)


def test_the_geometries_are_the_dihedral_group():
    """Eight different changes of an asymmetric, non-square grid; any two in a row are one of the eight."""
    cells = grid("012", "345")
    views = {grid_key(Augmentation(g).apply(cells)) for g in range(GEOMETRIES)}
    assert len(views) == 8
    for a in range(GEOMETRIES):
        for b in range(GEOMETRIES):
            assert grid_key(Augmentation(b).apply(Augmentation(a).apply(cells))) in views


def test_known_geometries():
    cells = grid("12", "34", "56")
    assert same_grid(Augmentation(1).apply(cells), grid("246", "135"))  # a quarter turn, counter-clockwise
    assert same_grid(Augmentation(4).apply(cells), grid("135", "246"))  # transposed
    assert same_grid(Augmentation(0, (0, 2, 1, *range(3, 10))).apply(cells), grid("21", "34", "56"))


def test_undo_on_all_arc_tasks(arc, rng):
    for found in arc.values():
        for task in found.tasks:
            augmentation = random_augmentation(rng, ColourPolicy(0.5), task.train)
            view = augmentation.apply_task(task)
            assert [grid_key(augmentation.undo(g)) for g in view.test] == [grid_key(g) for g in task.test]
            assert augmentation.order is not None
            for shown, i in zip(view.train, augmentation.order, strict=True):
                assert same_grid(augmentation.undo(shown.input), task.train[i].input)
                assert same_grid(augmentation.undo(shown.output), task.train[i].output)


def test_colour_policy(rng):
    pairs = [Pair(grid("01"), grid("05")), Pair(grid("12"), grid("50"))]
    assert output_only_colours(pairs) == {5}
    for _ in range(50):
        kept = random_colours(rng, ColourPolicy(1.0, "keep"), pairs)
        assert kept[0] == 0
        assert kept[5] == 5
        assert sorted(kept) == list(range(10))
    free = [random_colours(rng, ColourPolicy(0.0, "permute"), pairs) for _ in range(2000)]
    for c in range(10):  # every colour goes everywhere, about equally often
        counts = Counter(colours[c] for colours in free)
        assert len(counts) == 10
        assert max(counts.values()) < 2 * min(counts.values())


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 9, 16, 21, 40])
def test_spread_is_even_for_any_count(count, rng):
    task = flip_task(rng)
    views = spread_augmentations(count, rng, ColourPolicy(), task.train)
    assert len(views) == count
    counts = [Counter(view.geometry for view in views)[g] for g in range(GEOMETRIES)]
    assert max(counts) - min(counts) <= 1
    if count:
        assert views[0] == Augmentation()


def test_pair_order_is_a_permutation(rng):
    task = flip_task(rng, demonstrations=4)
    orders = {random_augmentation(rng, ColourPolicy(), task.train).order for _ in range(300)}
    assert len(orders) == 24
    assert np.array_equal(sorted(next(iter(orders)) or ()), range(4))


def recovered(change: Change, changed: Grid) -> Grid:
    """The grid that was changed: if there is a way back for every grid, no two of them can become the same."""
    height, width = changed.shape
    match change:
        case Augmentation():
            return change.undo(changed)
        case Border(thickness, _):
            return changed[thickness : height - thickness, thickness : width - thickness]
        case Upscale(rows, columns):
            return changed[::rows, ::columns]
        case Mirror(0):
            return changed[: height // 2]
        case Mirror(1):
            return changed[:, : width // 2]
    raise AssertionError(change)


@pytest.mark.parametrize("change", ALL_CHANGES, ids=str)
def test_changes_of_a_problem_can_be_undone(change, rng):
    for _ in range(20):
        cells = random_grid(rng, largest=10)
        changed = change.apply(cells)
        assert same_grid(recovered(change, changed), cells)
        assert changed.dtype == np.uint8
        assert not changed.flags.writeable


@pytest.mark.parametrize("change", ALL_CHANGES, ids=str)
def test_changes_of_a_problem_keep_different_grids_different(change):
    grids = [grid("012", "345"), grid("012", "346"), grid("912", "345"), grid("01", "23", "45"), grid("012345")]
    grids += [grid("0"), grid("00"), grid("0", "0"), grid("000", "000", "000")]
    assert len({grid_key(change.apply(cells)) for cells in grids}) == len(grids)


def test_the_changes_of_a_problem_all_differ():
    """And none leaves an asymmetric, non-square grid as it is."""
    cells = grid("012", "345")
    changed = {grid_key(change.apply(cells)) for change in ALL_CHANGES}
    assert len(changed) == len(ALL_CHANGES) == 7 + 30 + 8 + 2
    assert grid_key(cells) not in changed


def test_known_changes_of_a_problem():
    cells = grid("123", "456")
    assert same_grid(Border(1, 7).apply(cells), grid("77777", "71237", "74567", "77777"))
    assert same_grid(Border(2, 0).apply(grid("12")), grid("000000", "000000", "001200", "000000", "000000"))
    assert same_grid(Upscale(2, 1).apply(cells), grid("123", "123", "456", "456"))
    assert same_grid(Upscale(1, 3).apply(cells), grid("111222333", "444555666"))
    assert same_grid(Mirror(0).apply(cells), grid("123", "456", "456", "123"))
    assert same_grid(Mirror(1).apply(cells), grid("123321", "456654"))


def test_a_problem_augmentation_changes_one_side():
    pair = Pair(grid("12"), grid("3", "4"))
    new = ProblemAugmentation("input", Mirror(1)).apply_pair(pair)
    assert same_grid(new.input, grid("1221"))
    assert new.output is pair.output
    new = ProblemAugmentation("output", Augmentation(4)).apply_pair(pair)
    assert new.input is pair.input
    assert same_grid(new.output, grid("34"))


def drawn_problems(pairs: list[Pair], count: int = 2000) -> list[ProblemAugmentation]:
    rng = named_rng(0, "problems")
    return [random_problem_augmentation(rng, pairs) for _ in range(count)]


def drawn_kinds(problems: list[ProblemAugmentation]) -> Counter[str]:
    return Counter(kind for problem in problems for kind, changes in CHANGES.items() if problem.change in changes)


def test_problem_augmentations_are_drawn_evenly():
    drawn = drawn_problems([Pair(grid("12"), grid("3", "4"))])
    assert drawn == drawn_problems([Pair(grid("12"), grid("3", "4"))])
    assert set(drawn) == {ProblemAugmentation(side, c) for side in ("input", "output") for c in ALL_CHANGES}
    for counts in (drawn_kinds(drawn), Counter(problem.side for problem in drawn)):
        assert max(counts.values()) < 1.3 * min(counts.values())


def test_problem_augmentations_stay_within_the_size_limit():
    def blank(height: int, width: int) -> Grid:
        return np.zeros((height, width), dtype=np.uint8)

    for side in (29, 30):  # a border would make 31 or 32
        full = drawn_problems([Pair(blank(side, side), blank(side, side))])
        assert {problem.change for problem in full} == set(CHANGES["geometry"])
    one_side = drawn_problems([Pair(blank(30, 30), blank(1, 1))])
    assert {p.change for p in one_side if p.side == "input"} == set(CHANGES["geometry"])
    assert {p.change for p in one_side if p.side == "output"} == set(ALL_CHANGES)
    wide = drawn_problems([Pair(blank(15, 30), blank(15, 30))])
    assert {problem.change for problem in wide} == {*CHANGES["geometry"], Upscale(2, 1), Mirror(0)}
    # The height of one pair and the width of another decide.
    mixed = [Pair(blank(15, 2), blank(15, 2)), Pair(blank(2, 28), blank(2, 28))]
    assert {problem.change for problem in drawn_problems(mixed)} == {
        *CHANGES["geometry"],
        *(Border(1, colour) for colour in range(10)),
        Upscale(2, 1),
        Mirror(0),
    }
    for problem in drawn_problems(mixed):
        for pair in map(problem.apply_pair, mixed):
            assert max(pair.input.shape + pair.output.shape) <= MAX_SIDE


def test_a_task_under_an_augmentation_is_still_that_task(rng):
    task = flip_task(rng)
    assert Augmentation(3).apply_task(task).id == task.id
    assert len(Augmentation(3).apply_task(task).train) == len(task.train)


def test_colours_that_only_outputs_have_are_known_from_the_pairs(rng):
    pairs = [Pair(grid("12"), grid("15"))]
    kept = [random_augmentation(rng, ColourPolicy(1.0, "keep"), pairs).colours[5] for _ in range(20)]
    assert set(kept) == {5}
