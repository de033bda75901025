"""What can be told from a few seeds: spreads, paired differences with intervals, verdicts, power laws.

A difference between two arms has two sources of luck. The tasks: other ones would have been solved by one arm and not
by the other. The seeds: another would have made a better or a worse model, in all tasks at once. Both are paired: arms
have the same tasks, and the same seeds draw the same data and first weights. The interval holds both: a bootstrap over
tasks, to each draw of which the luck of the seeds is added, all of it as wide as a t distribution is with the degrees
of freedom that the sum has. What a seed and a task have together, that one seed solves a task which another does not,
is in the spread of both, and counted once. Of few seeds the means may be alike by chance: no interval is narrower than
that of the tasks alone, in which all of what both have together is.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import NormalDist

import numpy as np

from ..rng import named_rng

RESAMPLES = 20_000
GRID = 20_000  # points of a density
NORMAL = NormalDist()
FOLLOWS = 4.0  # times the variance that seeds leave: points that are no farther from a law follow it
EXPONENTS = (0.02, 4.0)  # among which that of a power law is sought
NOTHING = 1e-18  # a variance that is only rounding
SURE = (2.5, 97.5)  # percent: the ends of an interval
NORMAL_END = NORMAL.inv_cdf(SURE[1] / 100)  # where a normal distribution has the upper one
MOST_SEEDS = 200  # of which it is asked whether they would tell


@dataclass(frozen=True, eq=False)
class Measured:
    """A metric of one arm, by seed and task."""

    tasks: Mapping[int, Mapping[str, float]]

    @cached_property
    def values(self) -> Mapping[int, float]:
        """By seed: the mean over its tasks."""
        return {seed: sum(of.values()) / len(of) for seed, of in self.tasks.items()}

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
    low, high = (value * math.sqrt(degrees) / float(end) for end in _chi(np.array(SURE[::-1]) / 100, degrees))
    return Spread(value, low, high, len(values))


def difference(ours: Measured, first: Measured, sign: int, shares_luck: bool = False) -> Difference:
    """What an arm has more than the first, by the seeds that both have.

    Args:
        sign: 1 where more is better, -1 where less is.
        shares_luck: whether a seed's runs share all their luck in both arms, as those that select differently among the
            same candidates do. What they differ by is then of the tasks alone, and one seed tells something too.
    """
    common = sorted(ours.values.keys() & first.values.keys())
    luck = _Luck.of(ours, first, common, shares_luck)
    if luck is None:
        return Difference(ours.mean - first.mean, math.nan, math.nan, "cannot tell", 2 - len(common))
    value = float(np.mean([ours.values[seed] - first.values[seed] for seed in common]))
    low, high = luck.interval(value)
    told = low > 0 or high < 0
    verdict = ("better" if value * sign > 0 else "worse") if told else "cannot tell"
    return Difference(value, low, high, verdict, 0 if told else luck.more_seeds(value))


@dataclass(frozen=True, eq=False)
class _Luck:
    """The parts of the variance of a difference between the means of two arms.

    The variance of one seed's difference over seeds has that of a seed and a task together in it, and so has the
    variance over tasks: it is taken from the latter. Degrees of freedom of their sum are Satterthwaite's.
    """

    changes_T: np.ndarray  # of each task, the mean over seeds; empty: not all seeds have the same
    of_means: float  # variance over tasks, of the mean over so many seeds
    of_tasks: float  # what the tasks alone make of that
    of_seeds: float  # variance of one seed's difference
    seeds: int

    @staticmethod
    def of(ours: Measured, first: Measured, seeds: Sequence[int], shares_luck: bool) -> "_Luck | None":
        """None: there are too few seeds."""
        if len(seeds) < 2 and not (seeds and shares_luck):
            return None
        apart = [ours.values[seed] - first.values[seed] for seed in seeds]
        of_seeds = 0.0 if shares_luck else float(np.var(apart, ddof=1))
        table_ST = _differences(ours, first, seeds)
        if table_ST is None:
            return _Luck(np.zeros(0), 0.0, 0.0, of_seeds, len(seeds))
        changes_T = table_ST.mean(0)
        # Two seeds know too little of what a seed and a task have together.
        both = 0.0 if shares_luck or len(seeds) < 3 else _residual_variance(table_ST) / len(seeds)
        of_means = float(np.var(changes_T))
        of_tasks = max(0.0, of_means - both)
        if not of_tasks and of_seeds < NOTHING:  # as of a task in each seed, another one each time: that is luck too
            of_tasks = of_means
        count = len(changes_T)
        return _Luck(changes_T, of_means / count, of_tasks / count, of_seeds, len(seeds))

    def interval(self, value: float) -> tuple[float, float]:
        """Between which ends the difference would have been with other tasks and seeds, in 95% of cases."""
        over_tasks, scale = self._over_tasks(value), math.sqrt(self.of_seeds / self.seeds)
        of_tasks = over_tasks * math.sqrt(self.of_tasks / self.of_means) if self.of_means else over_tasks
        if self.seeds == 2:  # of which Satterthwaite's rule believes too much
            draws = of_tasks + scale * _evenly(RESAMPLES, 1.0)
        else:
            draws = self._quantile(self.seeds) / NORMAL_END * (of_tasks + scale * _evenly(RESAMPLES, math.inf))
        lows, highs = np.percentile([draws, over_tasks], SURE, axis=1)
        return value + float(min(lows)), value + float(max(highs))

    def _over_tasks(self, value: float) -> np.ndarray:
        """How far resamples of the tasks are from the difference."""
        count = len(self.changes_T)
        if not self.of_means:
            return np.zeros(RESAMPLES)
        values, counts = np.unique(self.changes_T.round(12), return_counts=True)
        draws_RD = named_rng(0, "paired bootstrap").multinomial(count, counts / count, RESAMPLES)
        return np.asarray(draws_RD @ values / count) - value

    def _quantile(self, seeds: int) -> float:
        """Of the t distribution that an interval has with so many seeds."""
        parts = [(self.of_tasks, len(self.changes_T) - 1), (self.of_seeds / seeds, seeds - 1)]
        known = [(variance, degrees) for variance, degrees in parts if variance]
        total = sum(variance for variance, _ in known)
        degrees = total**2 / sum(variance**2 / degrees for variance, degrees in known) if known else 1.0
        return float(_t(np.array([SURE[1] / 100]), degrees)[0])

    def more_seeds(self, value: float) -> int | None:
        def tells(seeds: int) -> bool:
            of_means = self.of_tasks + (self.of_means - self.of_tasks) * self.seeds / seeds
            whole = self._quantile(seeds) * math.sqrt(self.of_tasks + self.of_seeds / seeds)
            return abs(value) > max(whole, NORMAL_END * math.sqrt(of_means))  # as `interval` has them

        enough = bisect_left(range(self.seeds + 1, MOST_SEEDS + 1), True, key=tells)
        return enough + 1 if self.seeds + 1 + enough <= MOST_SEEDS else None


@cache
def _evenly(count: int, degrees: float) -> np.ndarray:
    """So many draws of a t distribution, evenly spread; with infinite degrees of freedom it is the normal one."""
    chances = (np.arange(count) + 0.5) / count
    quantiles = [NORMAL.inv_cdf(chance) for chance in chances] if math.isinf(degrees) else _t(chances, degrees)
    return named_rng(0, "seeds").permutation(quantiles)


def _differences(ours: Measured, first: Measured, seeds: Sequence[int]) -> np.ndarray | None:
    """By seed and task; None: runs have different ones."""
    pairs = [(ours.tasks[seed], first.tasks[seed]) for seed in seeds]
    names = sorted(pairs[0][0])
    if any(sorted(tasks) != names for pair in pairs for tasks in pair):
        return None
    return np.array([[mine[name] - other[name] for name in names] for mine, other in pairs])


def _residual_variance(table_ST: np.ndarray) -> float:
    """Of one value of a table of seeds and tasks, beyond what its seed and its task have in all others."""
    seeds, tasks = table_ST.shape
    if seeds < 2 or tasks < 2:
        return 0.0
    rest = table_ST - table_ST.mean(0) - table_ST.mean(1, keepdims=True) + table_ST.mean()
    return float((rest**2).sum() / ((seeds - 1) * (tasks - 1)))


def _t(chances: np.ndarray, degrees: float) -> np.ndarray:
    """Quantiles of a t distribution: with t = sqrt(degrees) tan(a) its density in a is a power of the cosine."""
    angles = _middles(-np.pi / 2, np.pi / 2)
    return np.asarray(math.sqrt(degrees) * np.tan(_quantiles(chances, angles, np.cos(angles) ** (degrees - 1))))


def _chi(chances: np.ndarray, degrees: int) -> np.ndarray:
    """Quantiles of a chi distribution, the root of chi-square."""
    roots = _middles(0, math.sqrt(degrees) + 10)
    return _quantiles(chances, roots, roots ** (degrees - 1) * np.exp(-(roots**2) / 2))


def _middles(low: float, high: float) -> np.ndarray:
    """Of the parts of a range that a density is looked at in."""
    return low + (high - low) * (np.arange(GRID) + 0.5) / GRID


def _quantiles(chances: np.ndarray, grid: np.ndarray, density: np.ndarray) -> np.ndarray:
    """Of a density on a grid, which need not be normalised."""
    below = np.cumsum(density) - density / 2
    return np.interp(chances, below / density.sum(), grid)


# ---- scaling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + scale * x ** -exponent.

    Attributes:
        exponent_interval, ten_times: 95%; `ten_times` is y at ten times the largest x, with its interval.
        foretold: what the other points say of the largest x, with its interval, and what was measured there; None:
            they are too few.
    """

    floor: float
    scale: float
    exponent: float
    exponent_interval: tuple[float, float]
    ten_times: tuple[float, float, float]
    foretold: tuple[float, float, float, float] | None

    def at(self, x: float) -> float:
        return self.floor + self.scale * x**-self.exponent


def fit_power_law(points: Mapping[float, Sequence[float]]) -> PowerLaw:
    """The law that fits best, in squares. The floor is at least 0, as of a loss.

    The intervals hold the luck of the seeds, and how far the points lie from the law, but not that another law may
    hold beyond the points.

    Args:
        points: of each x the values of its seeds.
    """
    xs = np.array(sorted(points))
    floor, scale, exponent = _fit(xs, _means(points, xs))
    drawn = _drawn(points, xs)
    low, high = np.percentile([e for _, _, e in drawn], SURE)
    foretold = None
    if len(xs) > 3:
        rest = xs[:-1]
        foretold = (
            *_at(xs[-1], _fit(rest, _means(points, rest)), _drawn(points, rest)),
            float(np.mean(points[xs[-1]])),
        )
    ten_times = _at(10 * xs[-1], (floor, scale, exponent), drawn)
    return PowerLaw(floor, scale, exponent, (float(low), float(high)), ten_times, foretold)


Law = tuple[float, float, float]  # floor, scale, exponent


def _means(points: Mapping[float, Sequence[float]], xs: np.ndarray) -> np.ndarray:
    return np.array([np.mean(points[x]) for x in xs])


def _drawn(points: Mapping[float, Sequence[float]], xs: np.ndarray) -> list[Law]:
    """Laws through points that are drawn about the law: as far from it as seeds let the means be, or as they are if
    that is farther."""
    floor, scale, exponent = _fit(xs, _means(points, xs))
    law = floor + scale * xs**-exponent
    misfit = float(((_means(points, xs) - law) ** 2).sum()) / max(1, len(xs) - 3)
    several = [(len(points[x]) - 1, float(np.var(points[x], ddof=1))) for x in xs if len(points[x]) > 1]
    of_seeds = sum(n * variance for n, variance in several) / max(1, sum(n for n, _ in several))
    known = np.array([of_seeds / len(points[x]) for x in xs])
    follows = misfit <= FOLLOWS * known.max()
    degrees = sum(n for n, _ in several) if follows and several else max(1, len(xs) - 3)
    scales = np.sqrt(known if follows else np.full(len(xs), misfit))
    rng = named_rng(0, "power law")
    # One scale for a draw: how large it really is, is known as well as its degrees of freedom say.
    spreads = np.sqrt(degrees / rng.chisquare(degrees, RESAMPLES // 40))
    return [_fit(xs, law + spread * scales * rng.standard_normal(len(xs))) for spread in spreads]


def _at(x: float, law: Law, drawn: Sequence[Law]) -> tuple[float, float, float]:
    """A law's value, with the interval of those that were drawn."""
    ends = [floor + scale * x**-exponent for floor, scale, exponent in drawn]
    low, high = np.percentile(ends, SURE)
    floor, scale, exponent = law
    return float(floor + scale * x**-exponent), float(low), float(high)


def _fit(xs: np.ndarray, ys: np.ndarray) -> Law:
    """Of each exponent of a grid the best line in x ** -exponent, and of those the best; then of a grid about it."""
    exponents = np.geomspace(*EXPONENTS, 60)
    for _ in range(3):
        laws = [_line(xs, ys, exponent) for exponent in exponents]
        best = min(range(len(laws)), key=lambda i: laws[i][0])
        around = exponents[max(0, best - 1)], exponents[min(len(exponents) - 1, best + 1)]
        exponents = np.linspace(*around, 20)
    return laws[best][1:]


def _line(xs: np.ndarray, ys: np.ndarray, exponent: float) -> tuple[float, float, float, float]:
    """The squares that are left, and the law with that exponent."""
    powers = xs**-exponent
    about = powers - powers.mean()
    scale = float(about @ ys / (about @ about))
    floor = float(ys.mean() - scale * powers.mean())
    if floor < 0:
        scale, floor = float(powers @ ys / (powers @ powers)), 0.0
    return float(((floor + scale * powers - ys) ** 2).sum()), floor, scale, float(exponent)
