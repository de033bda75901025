"""Results of runs -> what is known of each arm, and of each beside the first."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .runs import Result
from .study import METRICS, Arm, Study
from .verdict import Difference, Measured, PowerLaw, Spread, difference, fit_power_law, spread


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the runs of a study have come to so far."""

    study: Study
    results: Iterable[Result]

    @cached_property
    def by_arm(self) -> Mapping[str, Mapping[int, Result]]:
        """The results of each arm that has any, by seed."""
        found: dict[str, dict[int, Result]] = {arm.name: {} for arm in self.study.arms}
        for result in sorted(self.results, key=lambda result: result.seed):
            found[result.arm][result.seed] = result
        return {name: of for name, of in found.items() if of}

    @property
    def first(self) -> Arm:
        return self.study.arms[0]

    def measured(self, arm: str, metric: str) -> Measured | None:
        """None: no run of that arm has this metric."""
        found = {seed: result for seed, result in self.by_arm.get(arm, {}).items() if result.tasks.get(metric)}
        if not found:
            return None
        return Measured({seed: result.tasks[metric] for seed, result in found.items()})

    def spread(self, arm: str, metric: str) -> Spread | None:
        measured = self.measured(arm, metric)
        found = spread(measured) if measured else None
        if not found or not METRICS[metric].is_share:
            return found
        return replace(found, high=max(found.value, min(found.high, 0.5)))  # no distribution of shares has more

    def difference(self, arm: str, metric: str) -> Difference | None:
        """Of an arm against the first; None: one of them was not measured."""
        ours, first = self.measured(arm, metric), self.measured(self.first.name, metric)
        if not ours or not first:
            return None
        found = difference(ours, first, METRICS[metric].sign, self.shares_candidates(arm))
        if not METRICS[metric].is_share or math.isnan(found.low):
            return found
        return replace(found, low=max(found.low, -1.0), high=min(found.high, 1.0))  # no shares differ by more

    def width(self, arm: str) -> float:
        """How little is known of an arm: the width of the interval that a verdict on it has."""
        metric = self.study.decides
        if self.study.kind == "compare" and arm != self.first.name:
            found = self.difference(arm, metric)
            return found.width if found else float("inf")
        of_seeds = self.spread(arm, metric)
        return (of_seeds.high - of_seeds.low) if of_seeds else float("inf")

    @cached_property
    def points(self) -> Mapping[float, Sequence[float]]:
        """Of each x the values of its seeds, by the deciding metric; of shares what is missing to 1."""
        points: dict[float, list[float]] = {}
        sign = METRICS[self.study.decides].sign
        for arm in self.study.arms:
            measured = self.measured(arm.name, self.study.decides)
            if arm.x is not None and measured:
                points.setdefault(arm.x, []).extend(v if sign < 0 else 1 - v for v in measured.values.values())
        return points

    @cached_property
    def power_law(self) -> PowerLaw | None:
        """Through the points; None: they are too few."""
        return fit_power_law(self.points) if len(self.points) > 2 else None

    def shares_candidates(self, arm: str) -> bool:
        """Whether an arm and the first chose among the same candidates, seed by seed."""
        ours, first = (self.by_arm.get(name, {}) for name in (arm, self.first.name))
        both = ours.keys() & first.keys()
        keys = [(ours[seed].about.get("solved"), first[seed].about.get("solved")) for seed in both]
        return bool(keys) and all(a is not None and a == b for a, b in keys)
