"""A paired comparison of two sets of results: won, lost, bootstrap interval, sign test."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..rng import named_rng

RESAMPLES = 10_000

Outputs = Mapping[tuple[str, int], Sequence[bool]]  # task id, number of the run -> whether each test output is solved


@dataclass(frozen=True)
class PairedDifference:
    """What one of two ways of solving solves beside the other, in test outputs."""

    won: int  # solved by this one only
    lost: int  # solved by the other only
    interval: tuple[float, float]  # 95%, of won - lost
    p: float  # of a sign test over tasks: how often chance alone splits those that differ so unevenly

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.won - self.lost:+d} ({low:+.0f} to {high:+.0f})"


def paired_difference(ours: Outputs, other: Outputs) -> PairedDifference:
    """Compares two sets of results on the same test outputs, of one run or several.

    The interval is of a paired bootstrap over task ids, and the sign test counts a task once, by what it wins in all
    runs: the outputs of a task stand or fall together, in one run as in another.

    A resample draws as many tasks as there are. Their differences are few whole numbers, so it is drawn as how often
    each of them comes up.
    """
    assert ours.keys() == other.keys()
    changes: dict[str, list[int]] = defaultdict(list)
    for key, outputs in ours.items():
        changes[key[0]] += [int(a) - int(b) for a, b in zip(outputs, other[key], strict=True)]
    steps = [step for task in changes.values() for step in task]
    nets = [sum(task) for task in changes.values()]
    values, counts = np.unique(nets, return_counts=True)
    draws_RD = named_rng(0, "paired bootstrap").multinomial(len(changes), counts / len(changes), RESAMPLES)
    low, high = np.percentile(draws_RD @ values, [2.5, 97.5])
    p = sign_test(sum(net > 0 for net in nets), sum(net < 0 for net in nets))
    return PairedDifference(steps.count(1), steps.count(-1), (float(low), float(high)), p)


def sign_test(won: int, lost: int) -> float:
    """The exact two-sided p of so uneven a split, or a more uneven one, of fair coins (McNemar's test, exactly)."""
    as_uneven = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * as_uneven / 2 ** (won + lost))
