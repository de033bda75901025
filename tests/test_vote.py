import numpy as np
from conftest import grid

from arc_solver.config import VoteConfig
from arc_solver.predict import Candidate
from arc_solver.tasks import same_grid
from arc_solver.vote import NO_ANSWER, rank, vote

A, B, C = grid("1"), grid("2"), grid("33")


def candidates(*answers, test=0):
    return [Candidate(test, view, cells, log_probability) for view, (cells, log_probability) in enumerate(answers)]


def attempts(found, tests=1):
    return vote(found, tests, VoteConfig())


def test_most_votes_win_then_the_higher_mean_log_probability():
    ((first, second),) = attempts(candidates((C, -0.1), (A, -5), (B, -1), (A, -5), (B, -2)))
    assert same_grid(first, B)
    assert same_grid(second, A)
    ranked = rank(candidates((C, -0.1), (A, -5), (B, -1), (A, -5), (B, -2)), VoteConfig())
    assert [(r.votes, r.mean_log_probability) for r in ranked] == [(2, -1.5), (2, -5.0), (1, -0.1)]


def test_the_order_of_candidates_does_not_matter(rng):
    found = candidates(*((cells, -float(p)) for cells in (A, B, C) for p in rng.random(4)))
    expected = [r.grid.tolist() for r in rank(found, VoteConfig())]
    means = [r.mean_log_probability for r in rank(found, VoteConfig())]
    for _ in range(30):
        shuffled = [found[i] for i in rng.permutation(len(found))]
        assert [r.grid.tolist() for r in rank(shuffled, VoteConfig())] == expected
        assert [r.mean_log_probability for r in rank(shuffled, VoteConfig())] == means


def test_exact_ties_do_not_depend_on_the_order_either():
    for found in (candidates((A, -1), (B, -1)), candidates((B, -1), (A, -1))):
        ((first, second),) = attempts(found)
        assert (first.tolist(), second.tolist()) == ([[1]], [[2]])


def test_two_attempts_for_every_test_input():
    found = candidates((A, -1), (A, -1)) + candidates((B, -2), (C, -1), test=2)
    answers = attempts(found, tests=3)
    assert len(answers) == 3
    assert same_grid(*answers[0])
    assert same_grid(answers[0][0], A)
    assert all(same_grid(attempt, NO_ANSWER) for attempt in answers[1])
    assert not same_grid(*answers[2])


def test_grids_of_other_shape_with_the_same_cells_are_different():
    flat, tall = grid("11"), grid("1", "1")
    assert len(rank(candidates((flat, -1), (tall, -1)), VoteConfig())) == 2
    assert np.array_equal(NO_ANSWER, [[0]])
