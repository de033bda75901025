"""Candidates -> two attempts. Arithmetic only: no model, no randomness, no order of the candidates matters."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .config import VoteConfig
from .predict import Candidate
from .tasks import Attempts, Grid, GridKey, freeze, grid_key

NO_ANSWER: Grid = freeze(np.zeros((1, 1), dtype=np.uint8))  # the attempt where there is no candidate at all


@dataclass(frozen=True, eq=False)
class Ranked:
    """A distinct grid among the candidates of one test input."""

    grid: Grid
    votes: int  # views that answered it
    mean_log_probability: float  # over those views, nats


def rank(candidates: Sequence[Candidate], config: VoteConfig) -> list[Ranked]:
    """The distinct grids of one test input, best first: most votes, then the higher mean log-probability."""
    assert config.rule == "votes", config.rule
    found: dict[GridKey, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        found[grid_key(candidate.grid)].append(candidate)
    ranked = []
    for same in found.values():
        values = sorted(candidate.log_probability for candidate in same)  # sorted: a sum depends on the order
        ranked.append(Ranked(same[0].grid, len(same), sum(values) / len(values)))
    return sorted(ranked, key=lambda r: (-r.votes, -r.mean_log_probability, grid_key(r.grid)))


def vote(candidates: Sequence[Candidate], tests: int, config: VoteConfig) -> list[Attempts]:
    """Two attempts for each of `tests` test inputs; they differ wherever there are two distinct candidates."""
    attempts = []
    for t in range(tests):
        ranked = rank([candidate for candidate in candidates if candidate.test == t], config)
        grids = [r.grid for r in ranked[:2]] or [NO_ANSWER]
        attempts.append((grids[0], grids[-1]))
    return attempts
