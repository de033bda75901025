"""The chance that a task is solved, and how chances are compared with what came of them."""

import math

import numpy as np
import pytest

from arc_solver.answers.chances import expected_solved, fit_coefficients, reliability, solved_chance
from arc_solver.answers.submission import wilson


def test_chances_rise_with_agreement_and_with_leave_one_out():
    grid = np.linspace(0, 1, 6)
    chances = np.array([[solved_chance(agreement, right) for right in grid] for agreement in grid])
    assert (chances > 0).all() and (chances < 1).all()
    assert (np.diff(chances, axis=0) > 0).all() and (np.diff(chances, axis=1) > 0).all()


def test_what_is_expected_is_the_sum_with_the_spread_of_independent_tasks():
    mean, low, high = expected_solved([0.5] * 100)
    assert mean == pytest.approx(50)
    assert (high - mean) == pytest.approx(1.96 * math.sqrt(100 * 0.25)) == pytest.approx(mean - low)
    assert expected_solved([]) == (0, 0, 0)
    assert expected_solved([0.99])[2] == 1, "not more than there are"
    # 95% of draws lie within.
    chances = np.random.default_rng(0).uniform(size=150)
    mean, low, high = expected_solved(chances.tolist())
    draws = (np.random.default_rng(1).uniform(size=(4000, 150)) < chances).sum(1)
    assert np.mean((draws >= low) & (draws <= high)) == pytest.approx(0.95, abs=0.015)


def test_bins_hold_every_task_once_and_what_came_of_it():
    judged = [(0.05, False), (0.1, True), (0.2, False), (0.95, True), (1.0, True)]
    bins = reliability(judged)
    assert [(x.tasks, x.solved) for x in bins] == [(2, 1), (1, 0), (2, 2)]
    assert [x.chance for x in bins] == pytest.approx([0.075, 0.2, 0.975])
    assert [(x.low, x.high) for x in bins] == [wilson(1, 2), wilson(0, 1), wilson(2, 2)]
    assert reliability([]) == []


def test_coefficients_are_found_again(monkeypatch):
    """Tasks drawn by known coefficients; the fit is as near to them as its number of tasks lets it be."""
    rng, true = np.random.default_rng(0), (-2.0, 4.0, 1.5)
    agreement, right = rng.uniform(size=(2, 20_000))
    monkeypatch.setattr("arc_solver.answers.chances.COEFFICIENTS", true)
    solved = [rng.uniform() < solved_chance(a, r) for a, r in zip(agreement, right, strict=True)]
    assert fit_coefficients(list(zip(agreement, right, solved, strict=True))) == pytest.approx(true, abs=0.2)
    assert all(map(math.isfinite, fit_coefficients([(0.0, 0.0, False), (1.0, 1.0, True)]))), "told apart perfectly"
