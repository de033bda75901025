"""How likely a task is solved, from what a run knows without its solution.

Two things tell: how many of the views agree on the first attempt, and how often the adapter answered a held-out
demonstration exactly before it was learnt. A logistic regression makes a chance of them. Its coefficients were fitted
on the development tasks with the bundled model (docs/test-time.md), by `bin/solve --reliability RUN_DIR [...] --fit`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .submission import wilson

# Of the logit: a constant, and what agreement and leave-one-out accuracy add, both 0 to 1.
COEFFICIENTS = -2.35, 5.38, 0.79
BINS = 5  # of equal width


def solved_chance(agreement: float, leave_one_out: float) -> float:
    """The chance that all test outputs of a task are solved by its two attempts.

    Args:
        agreement: share of the views that gave the first attempt; of several test inputs, the least.
        leave_one_out: share of held-out outputs that were answered exactly; 0 without adaptation.
    """
    constant, of_agreement, of_leave_one_out = COEFFICIENTS
    return 1 / (1 + math.exp(-constant - of_agreement * agreement - of_leave_one_out * leave_one_out))


def fit_coefficients(known: Sequence[tuple[float, float, bool]], ridge: float = 0.01) -> tuple[float, ...]:
    """The coefficients under which what came of some tasks is likeliest, by Newton's method.

    Args:
        known: agreement, leave-one-out accuracy, and whether the task is solved.
        ridge: of a penalty on their squares, without which tasks that can be told apart perfectly have no solution.
    """
    x = np.array([(1.0, agreement, leave_one_out) for agreement, leave_one_out, _ in known])
    y, w = np.array([float(solved) for *_, solved in known]), np.zeros(3)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        curvature = (x.T * (p * (1 - p))) @ x + ridge * np.eye(3)
        w = w - np.linalg.solve(curvature, x.T @ (p - y) + ridge * w)
    return tuple(float(value) for value in w)


@dataclass(frozen=True)
class Bin:
    """Tasks whose chances are alike."""

    tasks: int
    chance: float  # mean of what was predicted
    solved: int
    low: float  # Wilson's 95% interval of the share that is solved
    high: float

    @property
    def share(self) -> float:
        return self.solved / self.tasks


def reliability(judged: Iterable[tuple[float, bool]]) -> list[Bin]:
    """Chances in bins of equal width, those without a task left out. `judged`: the chance, and whether it is solved."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for chance, solved in judged:
        bins[min(BINS - 1, int(chance * BINS))].append((chance, solved))
    found = []
    for members in filter(None, bins):
        right, count = sum(solved for _, solved in members), len(members)
        found.append(Bin(count, sum(chance for chance, _ in members) / count, right, *wilson(right, count)))
    return found


def expected_solved(chances: Sequence[float]) -> tuple[float, float, float]:
    """How many are expected to be solved, with a 95% interval, if the chances are right and independent."""
    mean = sum(chances)
    half = 1.96 * math.sqrt(sum(p * (1 - p) for p in chances))
    return mean, max(0.0, mean - half), min(float(len(chances)), mean + half)
