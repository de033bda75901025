"""What a set of tasks is like: how many, how large, of which colours, and how much of it a context holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..puzzles import COLOURS, Pair, TaskSet
from ..puzzles.tasks import grid_tokens
from .sources import pairs_of

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)  # tokens


@dataclass(frozen=True)
class Spread:
    """How a number is distributed over tasks, pairs or grids."""

    least: int
    median: float
    most: int

    @staticmethod
    def of(values: Sequence[int]) -> "Spread":
        return Spread(min(values), float(np.median(values)), max(values))


@dataclass(frozen=True)
class Statistics:
    """Of a set of tasks, or of lists of pairs."""

    tasks: int
    pairs: int  # with an output that is known
    unsolved: int  # test inputs whose output is not known
    spreads: Mapping[str, Spread]
    colours: tuple[float, ...]  # share of all cells that has each
    same_shape: float  # share of the pairs whose output has the shape of its input
    # Tokens of a context -> tasks that fit into it, with their longest answer; of lists: pairs of median length.
    fits: Mapping[int, int]


def statistics(found: TaskSet | Mapping[str, Sequence[Pair]]) -> Statistics:
    """Of what `read_set` read. An answer that is not known counts as long as the longest output shown."""
    lists = pairs_of(found)
    pairs = [pair for listed in lists.values() for pair in listed]

    grids = [grid for pair in pairs for grid in (pair.input, pair.output)]
    cells = np.bincount(np.concatenate([grid.ravel() for grid in grids]), minlength=COLOURS)
    pair_tokens = [grid_tokens(pair.input) + grid_tokens(pair.output) + 1 for pair in pairs]
    spreads, unsolved = {}, 0
    if isinstance(found, TaskSet):
        unsolved = sum(len(task.train) + len(task.test) for task in found.tasks) - len(pairs)
        spreads["demonstrations a task"] = Spread.of([len(task.train) for task in found.tasks])
        spreads["test inputs a task"] = Spread.of([len(task.test) for task in found.tasks])
        answers = {i: max(grid_tokens(pair.output) for pair in listed) for i, listed in lists.items()}
        tokens = [task.tokens + answers[task.id] for task in found.tasks]
        spreads["tokens a task, with its longest answer"] = Spread.of(tokens)
        fits = {context: sum(each <= context for each in tokens) for context in CONTEXTS}
    else:
        spreads["pairs a task"] = Spread.of([len(listed) for listed in lists.values()])
        fits = {context: int(context // np.median(pair_tokens)) for context in CONTEXTS}
    spreads |= {
        "tokens a pair": Spread.of(pair_tokens),
        "rows of a grid": Spread.of([grid.shape[0] for grid in grids]),
        "columns of a grid": Spread.of([grid.shape[1] for grid in grids]),
        "colours a pair": Spread.of([len({*pair.input.flat, *pair.output.flat}) for pair in pairs]),
    }
    same = sum(pair.input.shape == pair.output.shape for pair in pairs)
    shares = tuple(round(float(share), 4) for share in cells / cells.sum())
    return Statistics(len(lists), len(pairs), unsolved, spreads, shares, round(same / len(pairs), 4), fits)
