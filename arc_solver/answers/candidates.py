"""What prediction leaves for selection: every distinct answer, who gave it, and how probable each view finds it.

Plain values that go to a run's folder and come back, so that selection can be done again without a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..puzzles import Grid, grid_key
from ..puzzles.tasks import make_grid

STAGES = ("unadapted", "tasks", "again")  # folders of a run with a file for each task; a later one counts more


@dataclass(frozen=True, eq=False)
class Candidate:
    """A distinct answer to one test input, with the views' augmentations undone."""

    test: int  # index of the test input
    grid: Grid
    views: tuple[int, ...]  # those that answered it, by greedy decoding
    searched: tuple[int, ...]  # those in which the threshold search found it
    log_probabilities: tuple[float | None, ...]  # of the whole reply under every view, nats; None: not scored there

    def with_views_around(self, before: int, after: int) -> "Candidate":
        """The same candidate with its view indexes shifted and the other views' scores set to None."""
        views, searched = (tuple(v + before for v in listed) for listed in (self.views, self.searched))
        scores = (None,) * before + self.log_probabilities + (None,) * after
        return Candidate(self.test, self.grid, views, searched, scores)

    def __or__(self, other: "Candidate") -> "Candidate":
        """What both say of the same answer, under the same views."""
        pairs = zip(self.log_probabilities, other.log_probabilities, strict=True)
        scores = tuple(mine if mine is not None else theirs for mine, theirs in pairs)
        return Candidate(self.test, self.grid, self.views + other.views, self.searched + other.searched, scores)

    def to_json(self) -> dict[str, Any]:
        return {
            "test": self.test,
            "views": list(self.views),
            "searched": list(self.searched),
            "log_probabilities": [None if p is None else round(p, 6) for p in self.log_probabilities],
            "grid": self.grid.tolist(),
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Candidate":
        return Candidate(
            content["test"],
            make_grid(content["grid"], "candidate"),
            tuple(content["views"]),
            tuple(content["searched"]),
            tuple(content["log_probabilities"]),
        )


@dataclass(frozen=True, eq=False)
class Predictions:
    """All candidates of a task, and the views that they were asked and scored under."""

    geometries: tuple[int, ...]  # of each view, 0 to 7
    candidates: tuple[Candidate, ...]
    dropped: int = 0  # demonstrations that had no room in a view's prompt, at most
    too_long: int = 0  # prompts after which the model's context has no room for the largest reply
    capped: int = 0  # searches that ended at the cap on nodes
    cost: Mapping[str, int] = field(default_factory=dict)  # `DecodingStats` of an engine, which tasks may have shared

    def merged_with(self, other: "Predictions") -> "Predictions":
        """The union of two predictions of one task; scores under the other's views stay None."""
        views, more = len(self.geometries), len(other.geometries)
        merged = {(c.test, grid_key(c.grid)): c.with_views_around(0, more) for c in self.candidates}
        for c in other.candidates:
            key, late = (c.test, grid_key(c.grid)), c.with_views_around(views, 0)
            merged[key] = merged[key] | late if key in merged else late
        return Predictions(
            self.geometries + other.geometries,
            tuple(merged.values()),
            max(self.dropped, other.dropped),
            self.too_long + other.too_long,
            self.capped + other.capped,
            {key: value + other.cost.get(key, 0) for key, value in self.cost.items()},
        )

    def for_test(self, test: int) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.test == test]

    def to_json(self) -> dict[str, Any]:
        return {
            "geometries": list(self.geometries),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "dropped": self.dropped,
            "too_long": self.too_long,
            "capped": self.capped,
            "cost": dict(self.cost),
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Predictions":
        candidates = tuple(Candidate.from_json(candidate) for candidate in content["candidates"])
        return Predictions(
            tuple(content["geometries"]),
            candidates,
            content["dropped"],
            content.get("too_long", 0),  # which runs before it was counted do not say
            content["capped"],
            content["cost"],
        )
