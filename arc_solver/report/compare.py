"""Two runs of the same tasks beside each other: which tasks flipped, and whether chance alone does that.

A task counts as solved if all its outputs are, and one that a run has not answered is not solved.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..answers.comparison import PairedDifference, paired_difference
from ..errors import UserError
from ..puzzles import task_hash
from .collect import NO_PART, RunFacts, RunReader, TaskFacts

OUTCOMES = {"first": "only by A", "second": "only by B", "both": "by both", "neither": "by neither"}


@dataclass(frozen=True, eq=False)
class Beside:
    """A task in both runs."""

    first: TaskFacts
    second: TaskFacts

    @property
    def outcome(self) -> str:
        """A key of `OUTCOMES`: who solves it."""
        solved = all(self.first.solved), all(self.second.solved)
        return {(True, True): "both", (True, False): "first", (False, True): "second", (False, False): "neither"}[
            solved
        ]

    @property
    def text(self) -> str:
        """What the page draws, as JSON."""
        content = json.loads(self.first.text)
        content["runs"] = [
            {key: both[key] for key in ("attempts", "reasons", "adaptation", "seconds")}
            | {"votes": of.votes, "views": of.views, "candidates": of.candidates}
            for of, both in ((self.first, content), (self.second, json.loads(self.second.text)))
        ]
        for key in ("candidates", "attempts", "reasons", "adaptation"):
            del content[key]
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, eq=False)
class Comparison:
    first: RunFacts
    second: RunFacts
    tasks: Sequence[Beside]  # that both have, with the same grids and a known solution

    @cached_property
    def difference(self) -> PairedDifference:
        """Test outputs that the first solves beside the second."""
        ours = {(both.first.task.id, 0): both.first.solved for both in self.tasks}
        return paired_difference(ours, {(both.second.task.id, 0): both.second.solved for both in self.tasks})

    @property
    def left_out(self) -> int:
        """Tasks that only one of them has, or that cannot be compared."""
        ids = {task.task.id for run in (self.first, self.second) for task in run.tasks}
        return len(ids) - len(self.tasks)

    @property
    def settings(self) -> list[tuple[str, Any, Any]]:
        """Settings that differ; those of training are no part of a run."""
        mine, theirs = self.first.settings, self.second.settings
        names = [name for name in dict.fromkeys([*mine, *theirs]) if not name.startswith(NO_PART)]
        return [(name, mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)]


def compare_folders(first: Path, second: Path) -> Comparison:
    """Compares the runs of two folders, under names that tell them apart.

    Raises:
        UserError: one is no run's folder, both are the same, or they share no task whose solution is known.
    """
    if first.resolve() == second.resolve():
        raise UserError(f"{first} and {second} are the same run: give two")
    names = _told_apart(first.resolve(), second.resolve())
    runs = [replace(RunReader(folder).read(), name=name) for folder, name in zip((first, second), names, strict=True)]
    return compare(*runs)


def _told_apart(first: Path, second: Path) -> list[str]:
    """The ends of two paths, as short as they differ."""
    most = max(len(first.parts), len(second.parts))
    length = next(n for n in range(1, most + 1) if first.parts[-n:] != second.parts[-n:])
    return [str(Path(*path.parts[-length:])) for path in (first, second)]


def page_name(first: Path, second: Path) -> str:
    """The name of their page in the first's folder: that of the second, as seen from where the first lies."""
    way = Path(os.path.relpath(second.resolve(), first.resolve().parent))
    seen = [part for part in way.parts if part != ".."] or [second.resolve().name]
    return f"report-against-{'-'.join(seen)}.html"


def compare(first: RunFacts, second: RunFacts) -> Comparison:
    """Pairs the tasks of two runs.

    Raises:
        UserError: they share none whose solution is known.
    """
    others = {task.task.id: task for task in second.tasks}
    shared = [
        Beside(task, other)
        for task in first.tasks
        if (other := others.get(task.task.id))
        and task.solution is not None
        and other.solution is not None
        and task_hash(task.task, first.task_set) == task_hash(other.task, second.task_set)
    ]
    if not shared:
        raise UserError(
            f"{first.name} and {second.name} share no task with a known solution: give two runs of the same tasks"
        )
    return Comparison(first, second, shared)
