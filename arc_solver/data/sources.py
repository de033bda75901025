"""Where offline training tasks come from: task files, many-sample files, live RE-ARC, generated counting tasks.

A `Source` is one entry of the mixture: tasks by id, each able to give pairs. Which samples are drawn from it, and how
they are changed, is `corpus.py`'s business.

RE-ARC (Hodel 2024, arXiv 2404.07353) is one generator of pairs for each ARC-AGI-1 training task. `reasoning-gym`
ships them; only that part of it is loaded, which takes 10 ms and needs none of its requirements.
"""

import fnmatch
import importlib
import importlib.util
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import numpy as np

from ..config import SourceConfig, TasksConfig
from ..errors import UserError, install_command
from ..files import sha256
from ..puzzles import MAX_SIDE, Grid, Pair, Task, TaskSet, freeze, load_tasks, read_json, safe_id
from ..puzzles.file_tree import json_stem, open_inside, open_tree
from ..puzzles.task_files import BUILT_IN, ListsOfPairs
from ..puzzles.tasks import legal_pairs
from ..rng import named_rng
from .counting import COUNTING_TASKS

_log = logging.getLogger(__name__)
MOST_SLOW = 3  # draws of one pair that may take too long: such a generator belongs into quarantine

Generator = Callable[[Random, float, float], dict[str, Any]]
PairMaker = Callable[[np.random.Generator, int], Sequence[Pair]]


@dataclass(frozen=True, eq=False)
class Source:
    """Tasks of one origin."""

    config: SourceConfig
    tasks: Mapping[str, PairMaker]  # task id -> (rng, count) -> pairs: `count` new ones, or all that a file has
    endless: bool  # generated: the pairs never end

    def without(self, ids: Collection[str]) -> "Source":
        return replace(self, tasks={i: maker for i, maker in self.tasks.items() if i not in ids})

    def known_pairs(self, task_id: str) -> Sequence[Pair]:
        """Pairs that say what a task is: all that a file has, or some of a generator's."""
        return self.tasks[task_id](named_rng(0, "leak audit", task_id), 4)


def read_source(config: SourceConfig) -> Source:
    """The source that a config describes, before any task is left out.

    Raises:
        UserError: it cannot be read, or no task is in it.
    """
    endless = config.kind in ("re-arc", "counting")
    if config.sha256:
        _check_digest(config)
    tasks = READERS[config.kind](config)
    matched = {
        pattern: {pattern} & tasks.keys() or set(fnmatch.filter(tasks, pattern)) for pattern in config.quarantine
    }
    if unknown := [pattern for pattern, ids in matched.items() if not ids]:
        raise UserError(f"source '{config.label}' has no task {unknown[0]}: take it out of its quarantine")
    quarantined = set().union(*matched.values())
    tasks = {i: maker for i, maker in tasks.items() if i not in quarantined}
    if not tasks and quarantined:
        raise UserError(
            f"the quarantine of source '{config.label}' leaves none of its tasks ({len(quarantined)}): shorten it, or"
            " leave the source out"
        )
    if not tasks:
        raise UserError(f"source '{config.label}' has no task with two demonstrations or more: leave it out")
    if config.max_tasks:
        ids = sorted(tasks)
        chosen = named_rng(0, "tasks of a source", config.label).permutation(len(ids))[: config.max_tasks]
        tasks = {ids[i]: tasks[ids[i]] for i in chosen}
    if config.max_pairs and endless:
        tasks = {i: Pool(i, maker, config.max_pairs) for i, maker in tasks.items()}
    elif config.max_pairs:
        tasks = {i: partial(_first_pairs, maker, config.max_pairs) for i, maker in tasks.items()}
    return Source(config, dict(sorted(tasks.items())), endless)


def _check_digest(config: SourceConfig) -> None:
    file = Path(config.path)
    if config.path in BUILT_IN:
        raise UserError(
            f"source '{config.label}' has a sha256, which is of a file, and {config.path} comes with a package: leave"
            " sha256 out"
        )
    if not file.is_file():
        if file.is_dir():
            raise UserError(f"source '{config.label}' has a sha256, which is of a file, and {file} is a folder")
        raise UserError(
            f"source '{config.label}': {file} does not exist: make it (docs/data.md says how, for the configs that come"
            " with arc_solver), or leave the source out"
        )
    if (found := sha256(file)) != config.sha256:
        raise UserError(
            f"source '{config.label}': {file} is another file than the config means: its sha256 is {found}; get or make"
            " it as the config says, or set sha256 to that"
        )


def _first_pairs(maker: PairMaker, most: int, rng: np.random.Generator, count: int) -> Sequence[Pair]:
    return maker(rng, count)[:most]


def _all_pairs(pairs: Sequence[Pair], rng: np.random.Generator, count: int) -> Sequence[Pair]:
    return pairs


class Pool:
    """So many generated pairs of a task, the same for every seed. They are made when first asked for, and kept.

    They are asked for in blocks, each generated at once, as a generator may give the pairs of one call a common size.
    """

    BLOCK = 16

    def __init__(self, task_id: str, maker: PairMaker, size: int):
        self.task_id, self.maker = task_id, maker
        self.sizes = [min(self.BLOCK, size - first) for first in range(0, size, self.BLOCK)]
        self.made: dict[int, Sequence[Pair]] = {}

    def __call__(self, rng: np.random.Generator, count: int) -> Sequence[Pair]:
        block = int(rng.integers(len(self.sizes)))
        if block not in self.made:
            self.made[block] = self.maker(named_rng(0, "pool", self.task_id, block), self.sizes[block])
        return self.made[block]


# ---- files ---------------------------------------------------------------------------------------------------------


def solved_pairs(task: Task, task_set: TaskSet) -> tuple[Pair, ...]:
    """The test pairs of a task, as far as their outputs are known."""
    return tuple(Pair(i, o) for i, o in zip(task.test, task_set.solutions.get(task.id, ()), strict=False))


@cache
def task_pairs(spec: str) -> Mapping[str, Sequence[Pair]]:
    """All pairs of a task set, test pairs included: task id -> pairs."""
    return pairs_of(load_tasks(TasksConfig(spec=spec)))


def read_set(spec: str) -> TaskSet | Mapping[str, Sequence[Pair]]:
    """Tasks, or lists of pairs by task id, whatever a SPEC of `--tasks` names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return load_tasks(TasksConfig(spec=spec))
    except ListsOfPairs:
        lists = read_source(SourceConfig(kind="pairs", path=spec, name=spec))
        return {task_id: lists.known_pairs(task_id) for task_id in lists.tasks}


def pairs_of(found: TaskSet | Mapping[str, Sequence[Pair]]) -> Mapping[str, Sequence[Pair]]:
    """All pairs of what `read_set` read, test pairs included as far as they are known: task id -> pairs."""
    if isinstance(found, TaskSet):
        return {task.id: task.train + solved_pairs(task, found) for task in found.tasks}
    return found


def read_tasks(config: SourceConfig) -> dict[str, PairMaker]:
    """ARC's own format, as ConceptARC and Mini-ARC have it too: files or folders, test pairs included."""
    return {i: partial(_all_pairs, pairs) for i, pairs in task_pairs(config.path).items()}


def read_demonstrations(config: SourceConfig) -> dict[str, PairMaker]:
    """The demonstrations of a set that is to be solved; tasks with a single one teach nothing and are left out."""
    task_set = load_tasks(TasksConfig(spec=config.path), outputs=False)
    return {task.id: partial(_all_pairs, task.train) for task in task_set.tasks if len(task.train) > 1}


def read_pairs(config: SourceConfig) -> dict[str, PairMaker]:
    """Many pairs a task: a file `{id: [pair, ...]}`, or a folder of `<id>.json` files, each a list of pairs.

    Illegal pairs are left out, and a warning counts them: the published RE-ARC has some that are too large. It is a
    folder named `tasks`, inside another: both names work, and so does the archive that it comes in.
    """
    path = Path(config.path)
    tasks: dict[str, PairMaker] = {}
    illegal: list[str] = []
    hurt = 0
    for name, raw, where in _lists_of_pairs(path, config.label):
        pairs, problems = legal_pairs(raw, f"{where}: task {name}", config.max_pairs or None)
        illegal += problems
        hurt += bool(problems)
        if pairs:
            tasks[safe_id(name)] = partial(_all_pairs, pairs)
    if illegal:
        said = "source '%s': %d illegal pairs of %d tasks are left out, e.g. %s"
        _log.warning(said, config.label, len(illegal), hurt, illegal[0])
    if not tasks and illegal:
        raise UserError(f"{path}: none of its pairs is legal, e.g. {illegal[0]}")
    if not tasks:
        raise UserError(f"{path} holds no tasks: expected {{task id: [pair, ...]}} or <task id>.json files")
    return tasks


def _lists_of_pairs(path: Path, label: str) -> Iterator[tuple[str, Any, str]]:
    """Task names, parsed lists and the files they are from. Of a folder one file at a time: they are large."""
    inside = None if path.exists() else open_inside(path)
    if not inside and not path.exists():
        raise UserError(f"source '{label}': {path} does not exist: give a file, a folder or an archive of pairs")
    if inside and inside[1]:
        yield json_stem(inside[1]), inside[0].load(inside[1]), inside[0].where(inside[1])
        return
    if tree := inside[0] if inside else open_tree(path):
        leaves = tree.leaves()
        if len(leaves) > 1:
            raise UserError(
                f"{path} has JSON files in {len(leaves)} folders: give one of them as the source's path, such as"
                f" {leaves[0].path}"
            )
        for leaf in leaves:
            for name in leaf.json_files:
                yield json_stem(name), leaf.load(name), leaf.where(name)
        return
    content = read_json(path)
    if isinstance(content, list) and content and isinstance(content[0], dict) and "input" in content[0]:
        content = {json_stem(path.name): content}  # one file of a folder as RE-ARC's
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of lists of pairs, {{task id: [pair, ...]}}")
    for name, raw in content.items():
        if isinstance(raw, dict) or name in ("train", "test"):
            raise UserError(
                f'{path} holds tasks, and kind = "pairs" means {{task id: [pair, ...]}}: its kind is "tasks", or'
                ' "demonstrations" without the test pairs'
            )
        yield name, raw, str(path)


# ---- generators ----------------------------------------------------------------------------------------------------


@cache
def re_arc_generators() -> Mapping[str, Generator]:
    """The RE-ARC generators: ARC-AGI-1 training task id -> (rng, difficulty from, to) -> a pair.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    package = importlib.util.find_spec("reasoning_gym")
    if package is None or not package.submodule_search_locations:
        raise UserError(f"RE-ARC needs reasoning-gym: run {install_command('reasoning-gym==0.1.25')} --no-deps")
    # Loaded under a name of its own: importing reasoning_gym itself would load all its puzzles and their libraries.
    folder = f"{package.submodule_search_locations[0]}/arc/rearc_utils"
    spec = importlib.util.spec_from_file_location(
        "re_arc", f"{folder}/__init__.py", submodule_search_locations=[folder]
    )
    assert spec and spec.loader, folder
    module = importlib.util.module_from_spec(spec)
    sys.modules["re_arc"] = module
    spec.loader.exec_module(module)
    found = vars(importlib.import_module("re_arc.generators"))
    prefix = "generate_"
    return {name.removeprefix(prefix): found[name] for name in sorted(found) if name.startswith(prefix)}


def re_arc_pair(
    generator: Generator, rng: np.random.Generator, difficulty: tuple[float, float], most_s: float = math.inf
) -> Pair:
    """One generated pair. A generator that fails, makes an illegal grid or takes too long is asked again.

    A few make no legal grid at all at the highest difficulties: after 100 failures they are asked for half of it.

    Args:
        most_s: CPU time of a draw. What takes longer depends on the machine, so a warning names it.

    Raises:
        UserError: no draw succeeded, or three took too long.
    """
    lower, upper = difficulty
    slow = 0
    for attempt in range(400):
        seed = int(rng.integers(2**62))
        scale = 0.5 ** (attempt // 100)
        try:
            with _at_most(most_s):
                raw = generator(Random(seed), scale * lower, scale * upper)
            return Pair(_generated_grid(raw["input"]), _generated_grid(raw["output"]))
        except _TooSlow:
            slow += 1
            _log.warning("%s took over %g s for a pair, which is drawn again", generator.__name__, most_s)
            if slow == MOST_SLOW:
                break
        except Exception:  # generators may fail in many ways on a rare draw; the next draw is independent
            continue
    helps = f"set pair_seconds above {most_s:g}" if slow else "set another difficulty"
    raise UserError(
        f"{generator.__name__} made no legal pair in {attempt + 1} draws at difficulty {difficulty} and below"
        + f", {slow} of which took too long" * (slow > 0)
        + f": put its task into the quarantine of the source, or {helps}"
    )


class _TooSlow(BaseException):
    """Not one of the exceptions that a generator may catch itself."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises `_TooSlow` after so much CPU time of this process. Signals reach the main thread only: others run on."""
    if seconds == math.inf or threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: object) -> NoReturn:
        raise _TooSlow

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _generated_grid(rows: Any) -> Grid:
    grid = np.array(rows)
    if grid.ndim != 2 or not (min(grid.shape) >= 1 and max(grid.shape) <= MAX_SIDE) or grid.min() < 0 or grid.max() > 9:
        raise ValueError("not a legal grid")
    return freeze(grid.astype(np.uint8))


def _re_arc_pairs(
    task_id: str, difficulty: tuple[float, float], most_s: float, rng: np.random.Generator, count: int
) -> Sequence[Pair]:
    lower, upper = difficulty
    one_scale = (lower, float(rng.uniform(lower, upper)))  # small and large grids alike, one scale a task
    return [re_arc_pair(re_arc_generators()[task_id], rng, one_scale, most_s) for _ in range(count)]


def read_re_arc(config: SourceConfig) -> dict[str, PairMaker]:
    return {i: partial(_re_arc_pairs, i, config.difficulty, config.pair_seconds) for i in re_arc_generators()}


def _counting_pairs(task_id: str, rng: np.random.Generator, count: int) -> Sequence[Pair]:
    maker = COUNTING_TASKS[task_id](rng)
    return [maker(rng) for _ in range(count)]


def read_counting(config: SourceConfig) -> dict[str, PairMaker]:
    """Tasks about number: how many objects, which colour is most common, and so on."""
    return {i: partial(_counting_pairs, i) for i in COUNTING_TASKS}


READERS: Mapping[str, Callable[[SourceConfig], dict[str, PairMaker]]] = {
    "re-arc": read_re_arc,
    "tasks": read_tasks,
    "demonstrations": read_demonstrations,
    "pairs": read_pairs,
    "counting": read_counting,
}
