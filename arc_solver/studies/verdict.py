"""What can be told from a few seeds: spreads, paired differences with intervals, verdicts, power laws.

A difference between two arms has two sources of luck. The tasks: other ones would have been solved by one arm and not
by the other. The seeds: another would have made a better or a worse model, in all tasks at once. Both are paired: arms
have the same tasks, and the same seeds draw the same data and first weights. The interval holds both: a bootstrap over
tasks, to each draw of which the luck of the seeds is added, as a t distribution of their spread. What a seed and a task
have together, that one seed solves a task which another does not, is in both, and counted once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..rng import named_rng

RESAMPLES = 20_000
SURE = (2.5, 97.5)  # percent: the ends of an interval
MOST_SEEDS = 200  # of which it is asked whether they would tell


@dataclass(frozen=True, eq=False)
class Measured:
    """A metric of one arm.

    Attributes:
        values: by seed.
        tasks: by seed and task, of which `values` are the means; None: it is one value for a run.
    """

    values: Mapping[int, float]
    tasks: Mapping[int, Mapping[str, float]] | None = None

    @property
    def mean(self) -> float:
        return float(np.mean([*self.values.values()]))


@dataclass(frozen=True)
class Spread:
    """The standard deviation over seeds, with its 95% interval as of a normal distribution."""

    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Difference:
    """An arm against the first.

    Attributes:
        low, high: 95%; NaN where one seed alone says nothing about others.
        more_seeds: for each of both arms, until a difference like this could be told; 0: it is told; None: no number
            of seeds would, as the tasks are too few.
    """

    value: float
    low: float
    high: float
    verdict: str  # better, worse, cannot tell
    more_seeds: int | None

    @property
    def width(self) -> float:
        return math.inf if math.isnan(self.low) else self.high - self.low


def spread(measured: Measured) -> Spread | None:
    """None: one seed has no spread."""
    values = [*measured.values.values()]
    if len(values) < 2:
        return None
    value, degrees = float(np.std(values, ddof=1)), len(values) - 1
    chances = named_rng(0, "spread", degrees).chisquare(degrees, RESAMPLES)
    low, high = (value * math.sqrt(degrees / float(np.percentile(chances, end))) for end in reversed(SURE))
    return Spread(value, low, high, len(values))


def difference(ours: Measured, first: Measured, sign: int, shares_luck: bool = False) -> Difference:
    """What an arm has more than the first, by the seeds that both have.

    Args:
        sign: 1 where more is better, -1 where less is.
        shares_luck: whether a seed's runs share all their luck in both arms, as those that select differently among the
            same candidates do. Then one seed tells something too.
    """
    common = sorted(ours.values.keys() & first.values.keys())
    luck = _Luck.of(ours, first, common, shares_luck)
    if luck is None:
        return Difference(ours.mean - first.mean, math.nan, math.nan, "cannot tell", 2 - len(common))
    value = float(np.mean([ours.values[seed] - first.values[seed] for seed in common]))
    draws = luck.over_tasks(value) + luck.over_seeds()
    low, high = (float(end) for end in np.percentile(draws, SURE))
    told = low > 0 or high < 0
    verdict = ("better" if value * sign > 0 else "worse") if told else "cannot tell"
    return Difference(value, low, high, verdict, 0 if told else luck.more_seeds(value))


@dataclass(frozen=True, eq=False)
class _Luck:
    """The parts of the variance of a difference between the means of two arms."""

    changes_T: np.ndarray  # of each task, the mean over seeds; empty: the metric has no tasks
    of_seeds: float  # variance of one seed's difference that all tasks share
    of_both: float  # variance that a seed and a task have together, of one seed's difference, over all tasks
    seeds: int
    degrees: float  # of freedom of `of_seeds`

    @staticmethod
    def of(ours: Measured, first: Measured, seeds: Sequence[int], shares_luck: bool) -> "_Luck | None":
        """None: there are too few seeds."""
        if len(seeds) < 2 and not (seeds and shares_luck):
            return None
        apart, degrees = [ours.values[seed] - first.values[seed] for seed in seeds], max(1, len(seeds) - 1)
        variance = float(np.var(apart, ddof=1)) if len(seeds) > 1 else 0.0
        if not (ours.tasks and first.tasks):
            return _Luck(np.zeros(0), variance, 0.0, len(seeds), degrees)
        table_ST = _table(ours.tasks, seeds) - _table(first.tasks, seeds)
        both = _residual_variance(table_ST) / table_ST.shape[1]
        # Two seeds know too little of their own variance for anything to be taken from it. And what is left after a
        # subtraction is known less well than what it was taken from.
        of_seeds = max(0.0, variance - both) if len(seeds) > 2 else variance
        sure = degrees * of_seeds / variance if variance else degrees
        return _Luck(table_ST.mean(0), of_seeds, both, len(seeds), max(1.0, sure))

    def over_tasks(self, value: float) -> np.ndarray:
        """The difference in resamples of the tasks."""
        if not self.changes_T.size:
            return np.full(RESAMPLES, value)
        count = len(self.changes_T)
        values, counts = np.unique(self.changes_T.round(12), return_counts=True)
        draws_RD = named_rng(0, "paired bootstrap").multinomial(count, counts / count, RESAMPLES)
        return np.asarray(draws_RD @ values / count)

    def over_seeds(self) -> np.ndarray:
        """What other seeds would add to it."""
        scale = math.sqrt(self.of_seeds / self.seeds)
        return scale * named_rng(0, "seeds").standard_t(self.degrees, RESAMPLES)

    def more_seeds(self, value: float) -> int | None:
        count = len(self.changes_T)
        of_tasks = max(0.0, float(np.var(self.changes_T)) / count - self.of_both / self.seeds) if count else 0.0
        for seeds in range(self.seeds + 1, MOST_SEEDS + 1):
            variance = of_tasks + (self.of_seeds + self.of_both) / seeds
            if abs(value) > _quantile(self.degrees * seeds / self.seeds) * math.sqrt(variance):
                return seeds - self.seeds
        return None


def _table(tasks: Mapping[int, Mapping[str, float]], seeds: Iterable[int]) -> np.ndarray:
    return np.array([[value for _, value in sorted(tasks[seed].items())] for seed in seeds])


def _residual_variance(table_ST: np.ndarray) -> float:
    """Of one value of a table of seeds and tasks, beyond what its seed and its task have in all others."""
    seeds, tasks = table_ST.shape
    if seeds < 2 or tasks < 2:
        return 0.0
    rest = table_ST - table_ST.mean(0) - table_ST.mean(1, keepdims=True) + table_ST.mean()
    return float((rest**2).sum() / ((seeds - 1) * (tasks - 1)))


def _quantile(degrees: float) -> float:
    """The upper end of a t distribution's 95%, by Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5)."""
    z = 1.959964
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / degrees + g2 / degrees**2 + g3 / degrees**3


# ---- scaling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + scale * x ** -exponent.

    Attributes:
        exponent_interval, ten_times: 95% by a bootstrap over seeds; `ten_times` is y at ten times the largest x, with
            its interval.
    """

    floor: float
    scale: float
    exponent: float
    exponent_interval: tuple[float, float]
    ten_times: tuple[float, float, float]

    def at(self, x: float) -> float:
        return self.floor + self.scale * x**-self.exponent


def fit_power_law(points: Mapping[float, Sequence[float]]) -> PowerLaw:
    """The law that fits best, in squares. The floor is at least 0, as of a loss.

    Args:
        points: of each x the values of its seeds.
    """
    xs = np.array(sorted(points))
    means = np.array([np.mean(points[x]) for x in xs])
    floor, scale, exponent = _fit(xs, means)
    rng, drawn = named_rng(0, "power law"), []
    for _ in range(RESAMPLES // 20):
        again = np.array([rng.choice(points[x], len(points[x])).mean() for x in xs])
        drawn.append(_fit(xs, again))
    far = 10 * xs[-1]
    ends = [f + s * far**-e for f, s, e in drawn]
    low, high = np.percentile([e for _, _, e in drawn], SURE)
    below, above = np.percentile(ends, SURE)
    law = (floor, scale, exponent)
    at = floor + scale * far**-exponent
    return PowerLaw(*law, (float(low), float(high)), (float(at), float(below), float(above)))


def _fit(xs: np.ndarray, ys: np.ndarray) -> tuple[float, float, float]:
    """Floor, scale and exponent: of each exponent of a grid the best line in x ** -exponent, and of those the best."""
    best = (math.inf, 0.0, 0.0, 0.0)
    for exponent in np.geomspace(0.02, 4.0, 160):
        powers = xs**-exponent
        scale, floor = np.polyfit(powers, ys, 1)
        if floor < 0:
            scale, floor = float(powers @ ys / (powers @ powers)), 0.0
        error = float(((floor + scale * powers - ys) ** 2).sum())
        best = min(best, (error, float(floor), float(scale), float(exponent)))
    return best[1:]
