"""Where offline training tasks come from: task files, many-sample files, live RE-ARC, generated counting tasks.

A `Source` is one entry of the mixture: tasks by id, each able to give pairs. Which samples are drawn from it, and how
they are changed, is `corpus.py`'s business.

RE-ARC (Hodel 2024, arXiv 2404.07353) is one generator of pairs for each ARC-AGI-1 training task. `reasoning-gym`
ships them; only that part of it is loaded, which takes 10 ms and needs none of its requirements.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from .config import SourceConfig, TasksConfig, UserError, named_rng
from .counting import COUNTING_TASKS
from .tasks import MAX_SIDE, Grid, Pair, Task, TaskSet, check_task_id, freeze, load_tasks, make_pairs, read_json

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
        """Pairs that say what a task is: all of an ordinary one, 4 of a generator, the first 64 of many samples."""
        return self.tasks[task_id](named_rng(0, "leak audit", task_id), 4)[:64]


def read_source(config: SourceConfig) -> Source:
    """The source that a config describes, before any task is left out.

    Raises:
        UserError: it cannot be read, or no task is in it.
    """
    endless = config.kind in ("re-arc", "counting")
    tasks = READERS[config.kind](config)
    if not tasks:
        raise UserError(f"source '{config.label}' has no task with two demonstrations or more: leave it out")
    if config.max_tasks:
        ids = sorted(tasks)
        chosen = named_rng(0, "tasks of a source", config.label).permutation(len(ids))[: config.max_tasks]
        tasks = {ids[i]: tasks[ids[i]] for i in chosen}
    if config.max_pairs and not endless:
        tasks = {i: partial(_first_pairs, maker, config.max_pairs) for i, maker in tasks.items()}
    return Source(config, dict(sorted(tasks.items())), endless)


def _first_pairs(maker: PairMaker, most: int, rng: np.random.Generator, count: int) -> Sequence[Pair]:
    return maker(rng, count)[:most]


def _all_pairs(pairs: Sequence[Pair], rng: np.random.Generator, count: int) -> Sequence[Pair]:
    return pairs


# ---- files ---------------------------------------------------------------------------------------------------------


def solved_pairs(task: Task, found: TaskSet) -> tuple[Pair, ...]:
    """The test pairs of a task, as far as their outputs are known."""
    return tuple(Pair(i, o) for i, o in zip(task.test, found.solutions.get(task.id, ()), strict=False))


@cache
def task_pairs(spec: str) -> Mapping[str, tuple[Pair, ...]]:
    """All pairs of a task set, test pairs included: task id -> pairs."""
    found = load_tasks(TasksConfig(spec=spec))
    return {task.id: task.train + solved_pairs(task, found) for task in found.tasks}


def read_tasks(config: SourceConfig) -> dict[str, PairMaker]:
    """ARC's own format, as ConceptARC and Mini-ARC have it too: files or folders, test pairs included."""
    return {i: partial(_all_pairs, pairs) for i, pairs in task_pairs(config.path).items()}


def read_demonstrations(config: SourceConfig) -> dict[str, PairMaker]:
    """The demonstrations of a set that is to be solved; tasks with a single one teach nothing and are left out."""
    found = load_tasks(TasksConfig(spec=config.path), outputs=False)
    return {task.id: partial(_all_pairs, task.train) for task in found.tasks if len(task.train) > 1}


def read_pairs(config: SourceConfig) -> dict[str, PairMaker]:
    """Many pairs a task: a file `{id: [pair, ...]}`, or a folder of `<id>.json` files, each a list of pairs.

    RE-ARC is published as such a folder, named `tasks`, inside another: both names work.
    """
    path = Path(config.path)
    try:
        path.stat()
    except OSError as error:
        raise UserError(f"source {path} not found ({error.strerror}): give a file or a folder of pairs") from None
    tasks: dict[str, PairMaker] = {}
    for task_id, raw, file in _lists_of_pairs(path):
        check_task_id(task_id, str(file))
        kept = raw[: config.max_pairs or None] if isinstance(raw, list) else raw
        tasks[task_id] = partial(_all_pairs, make_pairs(kept, f"{file}: task {task_id}"))
    if not tasks:
        raise UserError(f"{path} holds no tasks: expected {{task id: [pair, ...]}} or <task id>.json files")
    return tasks


def _lists_of_pairs(path: Path) -> Iterator[tuple[str, Any, Path]]:
    """Task ids, parsed lists and the files they are from. Of a folder one file at a time: they are large."""
    if path.is_dir():
        folder = path / "tasks" if (path / "tasks").is_dir() else path
        for file in sorted(folder.glob("*.json")):
            yield file.stem, read_json(file), file
        return
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of lists of pairs, {{task id: [pair, ...]}}")
    for task_id, raw in content.items():
        yield task_id, raw, path


# ---- generators ----------------------------------------------------------------------------------------------------


@cache
def re_arc_generators() -> Mapping[str, Generator]:
    """The RE-ARC generators: ARC-AGI-1 training task id -> (rng, difficulty from, to) -> a pair.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    package = importlib.util.find_spec("reasoning_gym")
    if package is None or not package.submodule_search_locations:
        raise UserError("RE-ARC needs reasoning-gym: run bin/train, or pip install --no-deps reasoning-gym==0.1.25")
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


def re_arc_pair(generator: Generator, rng: np.random.Generator, difficulty: tuple[float, float]) -> Pair:
    """One generated pair. A generator that fails or makes an illegal grid is asked again.

    A few make no legal grid at all at the highest difficulties: after 100 failures they are asked for half of it.
    """
    lower, upper = difficulty
    for attempt in range(400):
        seed = int(rng.integers(2**62))
        scale = 0.5 ** (attempt // 100)
        try:
            raw = generator(Random(seed), scale * lower, scale * upper)
            return Pair(_generated_grid(raw["input"]), _generated_grid(raw["output"]))
        except Exception:  # generators may fail in many ways on a rare draw; the next draw is independent
            continue
    raise RuntimeError(f"{generator.__name__} made no legal pair in 400 draws at difficulty {difficulty} and below")


def _generated_grid(rows: Any) -> Grid:
    grid = np.array(rows)
    if grid.ndim != 2 or not (min(grid.shape) >= 1 and max(grid.shape) <= MAX_SIDE) or grid.min() < 0 or grid.max() > 9:
        raise ValueError("not a legal grid")
    return freeze(grid.astype(np.uint8))


def _re_arc_pairs(
    task_id: str, difficulty: tuple[float, float], rng: np.random.Generator, count: int
) -> Sequence[Pair]:
    lower, upper = difficulty
    one_scale = (lower, float(rng.uniform(lower, upper)))  # small and large grids alike, one scale a task
    return [re_arc_pair(re_arc_generators()[task_id], rng, one_scale) for _ in range(count)]


def read_re_arc(config: SourceConfig) -> dict[str, PairMaker]:
    return {i: partial(_re_arc_pairs, i, config.difficulty) for i in re_arc_generators()}


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
