"""Candidates -> two attempts. Arithmetic only: no model, no randomness, no order of the candidates matters.

A *rule* gives each candidate of a test input a score, and the best two are the attempts. What rules weigh: in how many
views a candidate is the greedy answer, and how probable all views find it, also those that answered something else.
In a view where it was not scored a candidate counts as probable as in the mean of the views where it was.

A *prior* is what outputs of real tasks practically never do. It only puts candidates behind the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import exp, fsum, inf

import numpy as np

from ..config import VoteConfig
from ..puzzles import Attempts, Grid, Task, freeze, grid_key
from .candidates import Candidate, Predictions

NO_ANSWER: Grid = freeze(np.zeros((1, 1), dtype=np.uint8))  # the attempt where there is no candidate at all

Score = tuple[float, ...]  # higher is better; what comes later decides where all before is equal


@dataclass(frozen=True, eq=False)
class Ranked:
    """A candidate and how it was judged."""

    candidate: Candidate
    broken_priors: int
    score: Score

    @property
    def grid(self) -> Grid:
        return self.candidate.grid

    @property
    def votes(self) -> int:
        """Views of which it is the greedy answer."""
        return len(self.candidate.views)

    @property
    def log_probability(self) -> float:
        """The sum over all views, nats."""
        return _product(self.candidate)


def choose_attempts(predictions: Predictions, task: Task, config: VoteConfig) -> list[Attempts]:
    """Two attempts for each test input; they differ wherever there are two candidates."""
    attempts = []
    for test in range(len(task.test)):
        grids = [ranked.grid for ranked in rank(predictions, task, test, config)[:2]] or [NO_ANSWER]
        attempts.append((grids[0], grids[-1]))
    return attempts


def rank(predictions: Predictions, task: Task, test: int, config: VoteConfig) -> list[Ranked]:
    """The candidates for one test input, best first. Where a rule finds two equal, the grids themselves decide."""
    rivals = Predictions(predictions.geometries, tuple(predictions.for_test(test)))
    keys = {grid_key(candidate.grid) for candidate in rivals.candidates}
    assert len(keys) == len(rivals.candidates), f"task {task.id}, test input {test}: a grid is there twice"
    breaks = [prior for name, prior in PRIORS.items() if getattr(config, name)]
    ranked = [
        Ranked(c, sum(broken(c.grid, task, test) for broken in breaks), RULES[config.rule](c, rivals))
        for c in rivals.candidates
    ]
    return sorted(ranked, key=lambda r: (r.broken_priors, tuple(-part for part in r.score), grid_key(r.grid)))


# ---- rules ---------------------------------------------------------------------------------------------------------


def _votes(candidate: Candidate, _: Predictions) -> Score:
    """Most views; then the higher mean log-probability over these views, or over those whose search found it."""
    return len(candidate.views), _mean(_in(candidate.views or candidate.searched, candidate))


def _product_of_experts(candidate: Candidate, _: Predictions) -> Score:
    """The product of its probabilities under all views (Franzen et al. 2025, "Product of Experts with LLMs").

    Those scored in every view come first: the mean of a few views, maybe those that answered it, flatters.
    """
    return _scored_everywhere(candidate), _product(candidate)


def _mean_probability(candidate: Candidate, _: Predictions) -> Score:
    """The mean of its probabilities under the views; those scored in every view come first."""
    mean = _mean([exp(p) for p in _known(candidate)])
    return _scored_everywhere(candidate), mean, _product(candidate)  # hopeless ones all have a mean of 0


def _hierarchical(candidate: Candidate, rivals: Predictions) -> Score:
    """One vote for each geometry, shared out as its views answered (after marc: Akyurek et al. 2024, arXiv 2411.07279).

    So a geometry that was asked under more colours than another counts no more.
    """
    return _shares(candidate, rivals), _product(candidate)


def _probmul(candidate: Candidate, _: Predictions) -> Score:
    """The product, and for each view that found it 3 nats more than its log-probability there.

    It is `score_full_probmul_3` of the ARChitects (Kaggle 2024, 2025), less what they add to all candidates alike.
    """
    return (fsum(3 + p for p in _in(_found(candidate), candidate)) + _product(candidate),)


def _kgmon(candidate: Candidate, _: Predictions) -> Score:
    """Views that found it, plus its mean log-probability under all views: `score_kgmon` of NVARC (Kaggle 2025)."""
    return (len(_found(candidate)) + _mean(_known(candidate)),)


def _hierarchical_kgmon(candidate: Candidate, rivals: Predictions) -> Score:
    """The same with each geometry's one vote in the place of its views."""
    return (_shares(candidate, rivals) + _mean(_known(candidate)),)


RULES: dict[str, Callable[[Candidate, Predictions], Score]] = {
    "votes": _votes,
    "product": _product_of_experts,
    "mean-probability": _mean_probability,
    "hierarchical": _hierarchical,
    "probmul": _probmul,
    "kgmon": _kgmon,
    "hierarchical-kgmon": _hierarchical_kgmon,
}


def _known(candidate: Candidate) -> list[float]:
    return [p for p in candidate.log_probabilities if p is not None]


def _in(views: Sequence[int], candidate: Candidate) -> list[float]:
    return [p for v in views if (p := candidate.log_probabilities[v]) is not None]


def _found(candidate: Candidate) -> list[int]:
    """Views that answered it, or whose search found it."""
    return sorted({*candidate.views, *candidate.searched})


def _scored_everywhere(candidate: Candidate) -> bool:
    return None not in candidate.log_probabilities


def _product(candidate: Candidate) -> float:
    """The sum of log-probabilities over all views, nats, those not known taken to be as the mean of the others."""
    known = _known(candidate)
    return fsum(known) * (len(candidate.log_probabilities) / len(known)) if known else -inf


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values) if values else -inf  # fsum: rounded once, so in any order the same


def _shares(candidate: Candidate, rivals: Predictions) -> float:
    """The part of each geometry's answers that it is, summed over the geometries."""

    def answers(geometry: int, of: Sequence[Candidate]) -> int:
        return sum(rivals.geometries[v] == geometry for c in of for v in c.views)

    asked = {rivals.geometries[v] for v in candidate.views}
    return float(sum(Fraction(answers(g, [candidate]), answers(g, rivals.candidates)) for g in asked))


# ---- priors --------------------------------------------------------------------------------------------------------
# No test output of ARC-AGI-1's training tasks breaks one: the first applies to 396 of 416, the second to 292.


def _is_monochrome(grid: Grid, task: Task, test: int) -> bool:
    """Of one colour, as no demonstration's output is."""
    return _one_colour(grid) and not any(_one_colour(pair.output) for pair in task.train)


def _has_odd_shape(grid: Grid, task: Task, test: int) -> bool:
    """Not the test input's shape times what all demonstrations' shapes are multiplied by, 1 x 1 or a larger factor."""
    factors = {
        tuple(divmod(after, before) for before, after in zip(pair.input.shape, pair.output.shape, strict=True))
        for pair in task.train
    }
    if len(factors) > 1:
        return False
    (down, down_rest), (right, right_rest) = factors.pop()
    height, width = task.test[test].shape
    return not (down_rest or right_rest) and grid.shape != (down * height, right * width)


PRIORS: dict[str, Callable[[Grid, Task, int], bool]] = {
    "monochrome_prior": _is_monochrome,
    "shape_prior": _has_odd_shape,
}


def _one_colour(grid: Grid) -> bool:
    return bool((grid == grid[0, 0]).all())
