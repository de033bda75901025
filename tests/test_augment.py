from collections import Counter

import numpy as np
import pytest
from conftest import flip_task, grid, random_grid

from arc_solver.augment import (
    GEOMETRIES,
    Augmentation,
    ColourPolicy,
    output_only_colours,
    random_augmentation,
    random_colours,
    spread_augmentations,
)
from arc_solver.tasks import Pair, grid_key, same_grid


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
