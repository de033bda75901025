"""A run's folder, which always says all that is known: killed at any moment, the same command goes on from there.

    config.json, run.json         what is solved, and with which settings, checkpoint and version
    submission.json               there from the first moment, and valid at every other
    unadapted/ tasks/ again/      a file for each task: all answers and scores, from which can be voted again. The first
                                  are of a cheap pass without adaptation, the last of a second round; the best counts
    joint/ joint.json             the joint stage, if there is one, and what it took; see `joint.py`
    adapters/                     what adaptation learnt, written before any task of its group is asked
    log.jsonl                     a line for everything that happened
    summary.json                  how it stands: see `status.py`

Files are written under another name first and then renamed, so there is none that is half written.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import torch
from safetensors import SafetensorError

from .. import __version__
from ..answers import (
    STAGES,
    Predictions,
    candidate_grids,
    choose_attempts,
    first_attempts,
    parse_predictions,
    rank,
    solved_outputs,
    write_submission,
)
from ..answers.chances import solved_chance
from ..answers.submission import blank_submission
from ..config import Config
from ..data import NOTHING, TrainingData
from ..data.leaks import demonstrations_of
from ..errors import MachineError, UserError, first_line
from ..files import git_commit, lock, write_json, write_whole
from ..models import load_adapter, save_adapter
from ..models.lora import write_origin
from ..puzzles import Attempts, Task, TaskSet, challenge, read_json
from .adapt import Adaptation
from .run_config import config_text, refuse_another_run

SAMPLED = 1 << 20  # bytes of a file of weights that are looked at, at its beginning, middle and end
WRITING_SHARE = 0.05  # of the time may go into rewriting the submission


@dataclass(frozen=True, eq=False)
class TaskResult:
    """All that solving one task gave; the content of its file in the run directory."""

    task_id: str
    predictions: Predictions
    adaptation: Mapping[str, Any] | None  # see `Adaptation.to_json`
    seconds: float
    predicting: float  # of these seconds, those of prediction
    fallback: str | None = None  # what it is instead of an answer of the adapted model: "unadapted" or "placeholder"
    error: str | None = None  # traceback of what made it fall back

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task_id,
            "seconds": round(self.seconds, 2),
            "predicting": round(self.predicting, 2),
            "adaptation": self.adaptation,
            **self.predictions.to_json(),
            "fallback": self.fallback,
            "error": self.error,
        }

    @staticmethod
    def read(file: Path, task: Task) -> "TaskResult":
        """The result of a task that a file holds.

        Raises:
            UserError, KeyError: it holds none.
        """
        content = read_json(file)
        predictions = parse_predictions(content, task, file)
        return TaskResult(
            task.id,
            predictions,
            content["adaptation"],
            content["seconds"],
            content["predicting"],
            content["fallback"],
            content["error"],
        )


@dataclass(frozen=True, eq=False)
class TaskStatus:
    """A task's state in the journal: its best stage so far, the voted attempts, the time spent, what is right."""

    stage: str
    attempts: list[Attempts]
    adapted: bool
    fallback: str | None
    agreement: float  # share of the views that gave the first attempt; of several test inputs, the least
    leave_one_out: float  # see `Adaptation`; 0 without one
    earlier_s: float  # of one worker, adaptation and asking, in the stages before
    seconds: float  # and in this one too
    first: list[bool] | None  # whether the first attempt solves each test output; None: not known
    solved: list[bool] | None  # whether one of both does
    covered: list[bool] | None  # whether the right answer is among the candidates

    @property
    def chance(self) -> float:
        """That all test outputs are solved, as far as can be told without knowing them."""
        return 0.0 if self.fallback == "placeholder" else solved_chance(self.agreement, self.leave_one_out)


class Journal:
    """The folder of a run that this process works on. Made by `open_journal`; to be closed, as a file is.

    Args:
        continued: whether there was such a run before.
        lock: the open file that says that this process works on it.

    Raises:
        MachineError: something cannot be written. All that was written before stays.
    """

    def __init__(self, run_dir: Path, task_set: TaskSet, config: Config, continued: bool, lock: IO[str]):
        self.run_dir, self.task_set, self.config, self.continued, self._lock = (
            run_dir,
            task_set,
            config,
            continued,
            lock,
        )
        self.tasks = {task.id: task for task in task_set.tasks}
        self.statuses: dict[str, TaskStatus] = {}
        self.damaged: list[Path] = []  # files that could not be read, and were put aside
        self.origin: Mapping[str, str] = {}  # of the base that adapters are for; none: no folder has it
        self.learnt_before: TrainingData | None = NOTHING  # by the adapter that they go on from; None: not known
        self._submission = blank_submission(task_set)
        self._written_at, self._writing_s, self._stale = -math.inf, 0.0, True
        with self._writing():
            for stage in (*STAGES, "adapters"):  # some ways of copying a folder leave out empty ones
                (run_dir / stage).mkdir(exist_ok=True)
        self._read()
        with self._writing():
            self._log = (run_dir / "log.jsonl").open("a+b", buffering=0)
            if self._log.tell() and not (run_dir / "log.jsonl").read_bytes().endswith(b"\n"):
                self._log.write(b"\n")
        self.rewrite_submission()

    # ---- tasks ----

    def done(self, task_id: str, stage: str = "tasks") -> bool:
        """Whether a task has a result of this stage or a better one. A placeholder is none."""
        status = self.statuses.get(task_id)
        return bool(
            status
            and STAGES.index(status.stage) >= STAGES.index(stage)
            and not (stage != "unadapted" and status.fallback == "placeholder")
        )

    def save_result(self, result: TaskResult, stage: str = "tasks") -> TaskStatus:
        """Writes a task's result, once and for all. The submission follows: see `refresh_submission`."""
        self._write(self.run_dir / stage / f"{result.task_id}.json", result.to_json())
        task, before = self.tasks[result.task_id], self.statuses.get(result.task_id)
        earlier_s = 0.0
        if before:
            earlier_s = before.earlier_s if before.stage == stage else before.seconds
        status = _judged(task, self.task_set, self.config, stage, result, earlier_s)
        self._set_status(task.id, status)
        return status

    def refresh_submission(self) -> None:
        """Rewrites submission.json if results are newer, unless writing would take too much of the time."""
        if self._stale and self._writing_s < WRITING_SHARE * (time.monotonic() - self._written_at):
            self.rewrite_submission()

    def save_adaptations(self, tasks: Sequence[Task], adaptations: Sequence[Adaptation], round: int) -> None:
        """Writes what was learnt of a group, before any of its tasks is asked."""
        with self._writing():
            for task, adaptation in zip(tasks, adaptations, strict=True):
                folder = self._adapter_dir(task.id, round)
                part = folder.with_name(folder.name + ".part")
                shutil.rmtree(part, ignore_errors=True)
                try:
                    save_adapter(adaptation.adapter, part)
                    if self.origin:
                        before = self.learnt_before
                        write_origin(part, self.origin, before and before | demonstrations_of(task))
                    (part / "adaptation.json").write_text(json.dumps(adaptation.to_json()) + "\n")
                except BaseException:
                    shutil.rmtree(part, ignore_errors=True)
                    raise
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)

    def has_adaptation(self, task_id: str, round: int) -> bool:
        """Whether something was learnt of a task before."""
        return (self._adapter_dir(task_id, round) / "adaptation.json").exists()

    def adaptation(self, task_id: str, round: int) -> Adaptation | None:
        """What was learnt of a task before; None: nothing, or it cannot be read."""
        folder = self._adapter_dir(task_id, round)
        try:
            content = read_json(folder / "adaptation.json")
            return Adaptation(load_adapter(folder), **content)
        except (UserError, TypeError):
            return None

    def _adapter_dir(self, task_id: str, round: int) -> Path:
        return self.run_dir / "adapters" / (f"{task_id}@{round}" if round else task_id)  # no id has an @

    def predictions(self, task_id: str) -> Predictions:
        """All candidates of a task that has a result."""
        file = self.run_dir / self.statuses[task_id].stage / f"{task_id}.json"
        return parse_predictions(read_json(file), self.tasks[task_id], file)

    def rewrite_submission(self) -> None:
        """Rewrites submission.json now, however long it takes."""
        began = time.monotonic()
        with self._writing():
            second = [Path(self.config.run.submission)] if self.config.run.submission else []
            write_submission(self._submission, self.run_dir / "submission.json", *second)
        self._written_at = time.monotonic()
        self._writing_s, self._stale = self._written_at - began, False

    def log(self, **record: Any) -> None:
        with self._writing():
            self._log.write((json.dumps(record) + "\n").encode())

    def write_summary(self, content: Mapping[str, Any]) -> None:
        self._write(self.run_dir / "summary.json", content)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            if self._stale:
                self.rewrite_submission()
        finally:
            self._log.close()
            self._lock.close()

    # ---- reading and writing ----

    def _read(self) -> None:
        """What earlier runs have left."""
        for task_id, file, status in read_statuses(self.run_dir, self.task_set, self.config):
            if status:
                self._set_status(task_id, status)
            else:
                with self._writing():
                    file.replace(file.with_suffix(".damaged"))
                self.damaged.append(file)

    def _set_status(self, task_id: str, status: TaskStatus) -> None:
        self.statuses[task_id], self._submission[task_id] = status, status.attempts
        self._stale = True

    def _write(self, file: Path, content: Any) -> None:
        with self._writing():
            write_whole(file, json.dumps(content) + "\n", sync=False)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or first_line(error)
            raise MachineError(
                f"{self.run_dir} cannot be written ({why}); all answers so far are kept: mend that, and give the same"
                " command again"
            ) from None


def open_journal(run_dir: Path, task_set: TaskSet, config: Config, weights: Sequence[Path]) -> Journal:
    """The journal of a new run, or of one that is continued.

    Args:
        weights: folders of the checkpoint and of the adapter that is used with it.

    Raises:
        UserError: the folder is something else, another process works on it, or it is of another run: other tasks,
            another checkpoint, or settings that would mix results.
    """
    facts = {
        "version": __version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tasks": _digest(json.dumps([[task.id, challenge(task)] for task in task_set.tasks]).encode()),
        "checkpoint": _digest(
            *(_parts_of(file) for folder in weights for file in sorted(folder.glob("*.safetensors")))
        ),
    }
    continued = (run_dir / "run.json").exists()
    if not continued:
        _make(run_dir, task_set, config, facts)
    with ExitStack() as stack:
        held = stack.enter_context(_locked(run_dir))
        if continued:
            refuse_another_run(run_dir, config, facts)
        try:
            if (run_dir / "config.json").read_text() != config_text(config):
                write_whole(run_dir / "config.json", config_text(config))
        except OSError as error:
            raise UserError(f"{run_dir} cannot be written ({error.strerror}): give another --out") from None
        journal = Journal(run_dir, task_set, config, continued, held)
        stack.pop_all()
    return journal


def _locked(run_dir: Path) -> IO[str]:
    try:
        held = lock(run_dir / "lock")
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written ({error.strerror}): give another --out") from None
    if not held:
        raise UserError(f"another process works on {run_dir}: wait for it, or give another --out")
    return held


def _make(run_dir: Path, task_set: TaskSet, config: Config, facts: Mapping[str, str]) -> None:
    """The folder of a new run, whole from its first moment."""
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"{run_dir} exists and is no run to continue: give another --out")
    part = run_dir.with_name(f"{run_dir.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        for stage in (*STAGES, "adapters"):
            (part / stage).mkdir(parents=True)
        write_whole(part / "config.json", config_text(config))
        write_json(part / "run.json", facts)
        write_submission(blank_submission(task_set), part / "submission.json")
        part.rename(run_dir)  # over an empty folder too
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{run_dir} cannot be made ({error.strerror}): give another --out") from None


def read_statuses(run_dir: Path, task_set: TaskSet, config: Config) -> Iterator[tuple[str, Path, TaskStatus | None]]:
    """Task, file and status of all results, of a task the best one last; None: the file cannot be read."""
    seconds: dict[str, float] = defaultdict(float)
    for stage in STAGES:
        for task in task_set.tasks:
            file, status = run_dir / stage / f"{task.id}.json", None
            if not file.exists():
                continue
            with suppress(UserError, KeyError):
                result = TaskResult.read(file, task)
                status = _judged(task, task_set, config, stage, result, seconds[task.id])
                seconds[task.id] = status.seconds
            yield task.id, file, status


def _judged(
    task: Task, task_set: TaskSet, config: Config, stage: str, result: TaskResult, earlier_s: float
) -> TaskStatus:
    """How a task stands with a result, after so many seconds of earlier stages."""
    predictions = result.predictions
    attempts = choose_attempts(predictions, task, config.vote)
    solutions = {i: grids for i, grids in task_set.solutions.items() if i == task.id}
    return TaskStatus(
        stage,
        attempts,
        result.adaptation is not None,
        result.fallback,
        min(_agreement(predictions, task, test, config) for test in range(len(task.test))),
        (result.adaptation or {}).get("leave_one_out", 0.0),
        earlier_s,
        earlier_s + result.seconds,
        solved_outputs({task.id: first_attempts(attempts)}, solutions).get(task.id),
        solved_outputs({task.id: attempts}, solutions).get(task.id),
        solved_outputs(candidate_grids({task.id: predictions}, solutions), solutions).get(task.id),
    )


def _agreement(predictions: Predictions, task: Task, test: int, config: Config) -> float:
    ranked = rank(predictions, task, test, config.vote)
    return ranked[0].votes / max(1, len(predictions.geometries)) if ranked else 0.0


def _parts_of(file: Path) -> bytes:
    """What tells a checkpoint's weights from others': not all of them, as there may be gigabytes."""
    size, parts = file.stat().st_size, []
    with file.open("rb") as stream:
        for start in (0, size // 2, max(0, size - SAMPLED)):
            stream.seek(start)
            parts.append(stream.read(SAMPLED))
    return b"".join((f"{file.name} {size} ".encode(), *parts))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
