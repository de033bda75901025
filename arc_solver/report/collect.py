"""A run's folder -> plain values for its page.

The folder may be that of a run that goes on, or of one that an earlier version made: what it does not say is None or
empty, and the page does without. A page is written many times while a run goes on, so a `RunReader` reads a task's
file again only when it is another.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..answers import (
    STAGES,
    Candidate,
    Predictions,
    Score,
    best_file,
    choose_attempts,
    parse_predictions,
    rank,
    score_of,
    tasks_of_run,
)
from ..answers.revote import settings_of_run
from ..answers.vote import Ranked
from ..config import BUNDLED_DIR, Config
from ..data import leak_audit, read_training_data
from ..errors import UserError, counted
from ..files import is_locked
from ..puzzles import Attempts, Grid, Task, TaskSet, read_json, read_object, same_grid, smallest
from .reasons import Reason, main_kind, why_not_solved

STATES = {  # of a task, and what the page says
    "solved": "solved",
    "covered": "proposed, not selected",
    "missed": "missed",
    "fell-back": "fell back",
    "answered": "answered",
    "damaged": "its file cannot be read",
    "waiting": "no answer yet",
}
NO_PART = ("kaggle.", "stages")  # settings that are no part of a run
NATS = 100  # log-probabilities travel as whole hundredths of a nat


@dataclass(frozen=True)
class Failure:
    """A job that failed. Whether it was tried again, and how, its tasks' other failures and answers tell."""

    kind: str  # "adapt", "ask"
    tasks: tuple[str, ...]
    error: str  # the last line of what was raised

    @property
    def says(self) -> str:
        """As of one of its tasks."""
        others = len(self.tasks) - 1
        together = f" together with {counted(others, 'other task')}" if others else ""
        return f"{'asking' if self.kind == 'ask' else 'adapting'}{together}: {self.error}"


@dataclass(frozen=True, eq=False)
class TaskFacts:
    """All that is known of one task of a run."""

    task: Task
    solution: Sequence[Grid] | None  # None: not known
    predictions: Predictions | None  # None: the run has not come to it, or its file cannot be read
    ranked: Sequence[Sequence[Ranked]]  # the candidates for each test input, best first
    attempts: Sequence[Attempts]  # for each test input; empty: none
    stage: str
    adaptation: Mapping[str, Any] | None
    seconds: float  # of one worker, all stages
    asking_s: float  # of these, in the last stage
    fallback: str | None
    error: str | None
    reasons: Sequence[Reason]  # empty if it is solved, or the solution is not known
    failures: Sequence[Failure] = ()  # in turn
    damaged: Sequence[str] = ()  # its files that cannot be read

    @property
    def solved(self) -> list[bool]:
        """Of each test output whether one of the attempts is right; nothing is, where the solution is not known."""
        return [self._is_right(test, both) for test, both in self._per_test(self.attempts)]

    @property
    def first(self) -> list[bool]:
        return [self._is_right(test, both[:1]) for test, both in self._per_test(self.attempts)]

    @property
    def covered(self) -> list[bool]:
        return [self._is_right(test, [r.grid for r in ranked]) for test, ranked in self._per_test(self.ranked)]

    def _per_test(self, values: Sequence[Any]) -> list[tuple[int, Any]]:
        return list(enumerate(values or [()] * len(self.task.test)))

    def _is_right(self, test: int, grids: Sequence[Grid]) -> bool:
        return self.solution is not None and any(same_grid(grid, self.solution[test]) for grid in grids)

    @property
    def state(self) -> str:
        """A key of `STATES`."""
        if self.solution is not None and all(self.solved):
            return "solved"
        if self.predictions is None:
            return "damaged" if self.damaged else "waiting"
        if self.fallback:
            return "fell-back"
        if self.solution is None:
            return "answered"
        return "covered" if all(self.covered) else "missed"

    @property
    def views(self) -> int:
        return len(self.predictions.geometries) if self.predictions else 0

    @property
    def votes(self) -> int | None:
        """Views that gave the first attempt; of several test inputs, the fewest. None: there is no answer."""
        return min((ranked[0].votes if ranked else 0 for ranked in self.ranked), default=None)

    @property
    def candidates(self) -> int:
        return sum(map(len, self.ranked))

    @property
    def wrong_cells(self) -> int | None:
        """Of the better attempt; of several test outputs, of all together. None: not known, or of another shape."""
        if self.solution is None or not self.attempts:
            return None
        counts = []
        for right, both in zip(self.solution, self.attempts, strict=True):
            counts.append([int((grid != right).sum()) for grid in both if grid.shape == right.shape])
        return sum(map(min, counts)) if all(counts) else None

    @property
    def main_reason(self) -> str:
        return main_kind(self.reasons)

    @cached_property
    def text(self) -> str:
        """What the page draws of the task, as JSON that is short: see `page.js`, which reads it."""
        found, tests = self.predictions, range(len(self.task.test))
        content = {
            "id": self.task.id,
            "train": [[grid_text(pair.input), grid_text(pair.output)] for pair in self.task.train],
            "test": [grid_text(grid) for grid in self.task.test],
            "solution": None if self.solution is None else [grid_text(grid) for grid in self.solution],
            "attempts": [[grid_text(grid) for grid in both] for both in self.attempts],
            "geometries": found and list(found.geometries),
            "candidates": [_short([r.candidate for r in self.ranked[test]]) for test in tests] if found else [],
            "adaptation": self.adaptation,
            "seconds": round(self.seconds, 1),
            "asking": round(self.asking_s, 1),
            "stage": self.stage,
            "fallback": self.fallback,
            "error": self.error,
            "failures": [failure.says for failure in self.failures],
            "reasons": [reason.says for reason in self.reasons],
        }
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def grid_text(grid: Grid) -> str:
    """A grid as digits, with a slash between two rows."""
    return "/".join("".join(map(str, row)) for row in grid.tolist())


def _short(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Candidates in few bytes: one that is like the first is kept as where it differs, cell and colour in turn."""
    listed = []
    for candidate in candidates:
        first, text = candidates[0].grid, grid_text(candidate.grid)
        entry: dict[str, Any] = {"v": list(candidate.views), "s": list(candidate.searched)}
        entry["p"] = [None if p is None else round(-p * NATS) for p in candidate.log_probabilities]
        entry["g"] = text
        if candidate is not candidates[0] and first.shape == candidate.grid.shape:
            flat, of_first = candidate.grid.ravel(), first.ravel()
            changes = [
                number for cell in (flat != of_first).nonzero()[0].tolist() for number in (cell, int(flat[cell]))
            ]
            if len(json.dumps(changes, separators=(",", ":"))) < len(text) + 2:
                entry["g"] = changes
        listed.append(entry)
    return listed


@dataclass(frozen=True)
class Job:
    """What a worker did: seconds since 1970."""

    kind: str  # "adapt", "ask"
    worker: int
    tasks: tuple[str, ...]
    began: float
    ended: float
    failed: bool


@dataclass(frozen=True)
class Session:
    """One call of bin/solve: a run that was continued has several."""

    began: float
    deadline: float | None
    workers: int
    jobs: tuple[Job, ...]
    answered: tuple[str, ...] = ()  # tasks whose answer it gave, those of the cheap pass apart

    @property
    def ended(self) -> float:
        return max((job.ended for job in self.jobs), default=self.began)


@dataclass(frozen=True, eq=False)
class RunFacts:
    """All that is known of a run."""

    name: str
    task_set: TaskSet
    tasks: Sequence[TaskFacts]
    vote: str  # the rule that selected
    is_running: bool
    facts: Mapping[str, Any]  # run.json
    summary: Mapping[str, Any]  # summary.json
    settings: Mapping[str, Any]  # config.json, by section.key
    sessions: Sequence[Session]
    audit: tuple[bool | None, str]  # whether it passed, None if it could not be made, and what it says
    damaged: Sequence[str]  # files that could not be read
    failures: Sequence[Failure] = ()  # in turn
    folder: str = ""  # as it was given

    def score(self, which: str, of_all: bool = False) -> Score | None:
        """Of the tasks with known solutions: by "first" attempts, "solved" by both, "covered". None: there are none.

        Args:
            of_all: what has no answer yet is counted too, as not solved.
        """
        counted = self.tasks if of_all else self.scored
        known = {t.task.id: getattr(t, which) for t in counted if t.solution is not None}
        return score_of(known) if known else None

    @property
    def scored(self) -> Sequence[TaskFacts]:
        """What a score is of: all tasks, or while some have no answer yet, those that have one."""
        if all(task.predictions for task in self.tasks):
            return self.tasks
        return [task for task in self.tasks if task.candidates]

    @property
    def wanted(self) -> Sequence[TaskFacts]:
        """The tasks that are to be solved: all, or the smallest."""
        if not (most := self.settings.get("run.smoke")):
            return self.tasks
        ids = {task.id for task in smallest(self.task_set.tasks, most)}
        return [task for task in self.tasks if task.task.id in ids]

    @property
    def answered(self) -> int:
        return sum(bool(task.candidates) for task in self.tasks)

    @property
    def unusual(self) -> dict[str, tuple[Any, Any]]:
        """Settings that are not the defaults of this version: the run's value, and the default."""
        return unusual(self.settings)


class RunReader:
    """Reads a run's folder, as often as is asked for.

    Raises:
        UserError: it is no run's folder, or its tasks are not found any more.
    """

    def __init__(self, run_dir: Path, task_set: TaskSet | None = None):
        """`task_set`: its tasks, if they are at hand."""
        self.run_dir = run_dir
        self.task_set = task_set or tasks_of_run(run_dir, settings_of_run(run_dir).tasks)
        self._known: dict[str, tuple[Any, TaskFacts]] = {}  # of each task: what tells its file from another
        self._audit: tuple[bool | None, str] | None = None

    def read(self, is_running: bool | None = None) -> RunFacts:
        """How the run stands. `is_running`: None: as its lock says."""
        config = settings_of_run(self.run_dir)
        records = read_log(self.run_dir / "log.jsonl")
        failures = [_failure(record) for record in records if record.get("event") == "failure"]
        of_task: dict[str, list[Failure]] = {}
        for failure in failures:
            for task_id in failure.tasks:
                of_task.setdefault(task_id, []).append(failure)
        tasks = [self._task(task, config, of_task.get(task.id, [])) for task in self.task_set.tasks]
        settings = read_object(self.run_dir / "config.json")
        self._audit = self._audit or self._audited(settings)
        return RunFacts(
            self.run_dir.resolve().name,
            self.task_set,
            tasks,
            config.vote.rule,
            is_locked(self.run_dir / "lock") if is_running is None else is_running,
            read_object(self.run_dir / "run.json"),
            read_object(self.run_dir / "summary.json"),
            flat(settings),
            _sessions(records),
            self._audit,
            [name for task in tasks for name in task.damaged],
            failures,
            str(self.run_dir),
        )

    def _task(self, task: Task, config: Config, failures: list[Failure]) -> TaskFacts:
        file = best_file(self.run_dir, task.id)
        stat = file and file.stat()
        key = (file, stat and stat.st_mtime_ns, stat and stat.st_size, config.vote, failures)
        if task.id not in self._known or self._known[task.id][0] != key:
            facts = self._read_task(task, config, failures)
            self._known[task.id] = key, facts
        return self._known[task.id][1]

    def _read_task(self, task: Task, config: Config, failures: list[Failure]) -> TaskFacts:
        """What the best stage says that can be read, as where the run goes on."""
        content: Mapping[str, Any] = {}
        found, stage = None, ""
        files = [file for name in STAGES if (file := self.run_dir / name / f"{task.id}.json").exists()]
        damaged: list[str] = []
        while files and not found:
            file = files.pop()
            try:
                content = read_json(file)
                found, stage = parse_predictions(content, task, file), file.parent.name
            except UserError:
                content = {}
                damaged.append(f"{file.parent.name}/{file.name}")
        solution, vote = self.task_set.solutions.get(task.id), config.vote
        adaptation, fallback = content.get("adaptation"), content.get("fallback")
        tests = range(len(task.test))
        unread = [Reason("unanswered", "Its file cannot be read.")] if damaged and not found else []
        why: list[Reason] = []
        if solution is not None:
            why = why_not_solved(task, solution, found, adaptation, fallback, vote, stage)
        return TaskFacts(
            task,
            solution,
            found,
            [rank(found, task, test, vote) for test in tests] if found else [],
            choose_attempts(found, task, vote) if found else [],
            stage,
            adaptation,
            content.get("seconds", 0.0) + sum(read_object(earlier).get("seconds", 0.0) for earlier in files),
            content.get("predicting", 0.0),
            fallback,
            content.get("error"),
            unread or why,
            failures,
            damaged,
        )

    def _audited(self, settings: Mapping[str, Any]) -> tuple[bool | None, str]:
        joint = self.run_dir / "joint" / "model"
        path = settings.get("model", {}).get("path", "")
        folder = joint if joint.is_dir() else Path(path) if path else BUNDLED_DIR
        if not folder.is_dir():
            return None, f"no leak audit: the model is no longer at {folder}"
        try:
            trained_on = read_training_data(folder)
        except UserError as error:
            return None, f"no leak audit: {error}"
        if not trained_on:
            return None, "no leak audit: this checkpoint does not say what it was trained on"
        found = leak_audit(trained_on, self.task_set)
        return found.passed, str(found)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by section.key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def unusual(settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of settings by section.key those that are not the defaults of this version, each with the default."""
    usual = flat(Config().model_dump(mode="json"))
    return {
        key: (value, usual.get(key))
        for key, value in settings.items()
        if usual.get(key) != value and not key.startswith(NO_PART)
    }


def read_log(file: Path) -> list[dict[str, Any]]:
    """The records of a log, but for a line that is half written."""
    records = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records += [record] if isinstance(record, dict) else []
    return records


def _sessions(records: Sequence[Mapping[str, Any]]) -> list[Session]:
    starts = [i for i, record in enumerate(records) if record.get("event") == "begin"]
    sessions = []
    for begin, end in pairwise([*starts, len(records)]):
        head = records[begin]
        jobs = tuple(_job(record) for record in records[begin:end] if record.get("event") == "job")
        answered = tuple(
            record["task"]
            for record in records[begin:end]
            if record.get("event") == "task" and record["stage"] != STAGES[0]
        )
        sessions.append(Session(head["time"], head["deadline"], head["workers"], jobs, answered))
    return sessions


def _job(record: Mapping[str, Any]) -> Job:
    seconds, ended = record["seconds"], record["ended"]
    began = ended - (seconds or 0.0)
    return Job(record["job"], record["worker"], tuple(record["tasks"]), began, ended, seconds is None)


def _failure(record: Mapping[str, Any]) -> Failure:
    lines = (record["error"] or "").strip().splitlines()
    return Failure(record["job"], tuple(record["tasks"]), lines[-1] if lines else "nobody says why")
