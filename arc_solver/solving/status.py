"""How a run stands, at its end or at any time before: `bin/solve --status RUN_DIR`.

The results are counted as they lie in the folder; what the run itself knows, such as where the time goes, it writes to
summary.json every few seconds.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from ..answers import Score, data_rows, score_of, tasks_of_run
from ..answers.chances import expected_solved
from ..answers.submission import Row, score_rows, table_of
from ..command import Parser, as_called, user_path
from ..errors import UserError, counted, few
from ..files import is_locked
from ..puzzles import TaskSet, read_object
from .executors import JobResult
from .journal import Journal, TaskStatus, read_statuses
from .run_config import saved_config
from .worker import AdaptJob

EVERY_S = 5.0  # between two summaries, while a run goes on


@dataclass(eq=False)
class Meter:
    """Where the time of a run goes.

    Args:
        before: the summary of what was done before the run was continued.
        joint: what the joint stage took, if there was one: its steps, tokens and minutes.
    """

    workers: int
    deadline: float
    before: Mapping[str, Any]
    joint: Mapping[str, Any] | None = None
    began: float = field(default_factory=time.monotonic)
    adapting_s: float = 0.0  # of all workers together
    asking_s: float = 0.0
    cpu_s: float = 0.0
    peak_memory: dict[int, int] = field(default_factory=dict)  # bytes, by process
    gpu: list[float] = field(default_factory=list)  # shares, the latest only
    written: float = -math.inf

    def note(self, done: JobResult) -> None:
        if done.error is not None:
            return
        usage = done.value.usage
        if isinstance(done.job, AdaptJob):
            self.adapting_s += usage.seconds
        else:
            self.asking_s += usage.seconds
        self.cpu_s += usage.cpu_seconds
        self.peak_memory[usage.process] = usage.peak_memory_bytes
        self.gpu = [*self.gpu, usage.gpu][-100:] if usage.gpu is not None else self.gpu

    def summary(self, task_set: TaskSet, statuses: Mapping[str, TaskStatus], share_done: float) -> dict[str, Any]:
        """All of it, in numbers."""
        if self.before and not self.peak_memory:  # nothing was left to do
            return {**self.before, **counts(task_set, statuses)}
        spent = time.monotonic() - self.began
        left = spent * (1 - share_done) / share_done if share_done > 0 else None
        if left is not None and spent + left > self.deadline - self.began:
            left = max(0.0, self.deadline - time.monotonic())
        earlier = self.before.get("seconds", {})
        busy = self.adapting_s + self.asking_s
        utilisation = sum(self.gpu) / len(self.gpu) if self.gpu else self.cpu_s / max(1e-9, self.workers * spent)
        return {
            **counts(task_set, statuses),
            "joint": self.joint,
            "seconds": {
                "whole": round(spent + earlier.get("whole", 0.0), 2),
                "adapting": round(self.adapting_s + earlier.get("adapting", 0.0), 2),
                "asking": round(self.asking_s + earlier.get("asking", 0.0), 2),
            },
            "workers": self.workers,
            "busy": round(busy / max(1e-9, self.workers * spent), 3),
            "utilisation": round(utilisation, 3),
            "utilisation_of": "GPU" if self.gpu else "cores",
            "peak_memory_bytes": sum(self.peak_memory.values()),
            "share_done": round(share_done, 4),
            "projected_end": None if left is None else round(time.time() + left),
        }

    def keep(self, journal: Journal, share_done: float) -> None:
        """Writes a summary, but not more often than needed."""
        if time.monotonic() - self.written > EVERY_S:
            journal.write_summary(self.summary(journal.task_set, journal.statuses, share_done))
            self.written = time.monotonic()


def counts(task_set: TaskSet, statuses: Mapping[str, TaskStatus]) -> dict[str, Any]:
    """How many tasks are how far, and what that scores."""
    first, final, covered = scores(task_set, statuses)
    return {
        "tasks": len(task_set.tasks),
        "data": task_set.data,
        "answered": sum(status.fallback != "placeholder" for status in statuses.values()),
        "answered_of_scored": sum(
            i in task_set.solutions and status.fallback != "placeholder" for i, status in statuses.items()
        ),
        "adapted": sum(status.adapted for status in statuses.values()),
        "again": sum(status.stage == "again" for status in statuses.values()),
        "expected": expected_solved([status.chance for status in statuses.values()]),
        "fallen_back": {i: status.fallback for i, status in statuses.items() if status.fallback},
        "pass@1": first and first.to_json(),
        "score": final and final.to_json(),  # pass@2
        "coverage": covered and covered.to_json(),
        "seconds_per_task": _seconds_per_task(statuses),
    }


def _seconds_per_task(statuses: Mapping[str, TaskStatus]) -> dict[str, float] | None:
    """What the tasks that have an answer took of one worker."""
    seconds = [status.seconds for status in statuses.values() if status.fallback != "placeholder"]
    return {"median": round(median(seconds), 2), "longest": round(max(seconds), 2)} if seconds else None


def scores(task_set: TaskSet, statuses: Mapping[str, TaskStatus]) -> tuple[Score | None, Score | None, Score | None]:
    """Pass@1, pass@2 and coverage of the tasks with known solutions; what has no answer is not solved."""
    if not task_set.solutions:
        return None, None, None
    first, both, covered = {}, {}, {}
    for task_id, grids in task_set.solutions.items():
        status, nothing = statuses.get(task_id), [False] * len(grids)
        first[task_id] = (status and status.first) or nothing
        both[task_id] = (status and status.solved) or nothing
        covered[task_id] = (status and status.covered) or nothing
    return score_of(first), score_of(both), score_of(covered)


def summary_rows(content: Mapping[str, Any]) -> list[Row]:
    """A summary as a person reads it."""
    of = f"of {content['tasks']}"
    shown = [("tasks answered", f"{content['answered']} {of}"), ("adapted to", f"{content['adapted']} {of}")]
    if content["again"]:
        shown.append(("tried once more", f"{content['again']}"))
    if content["fallen_back"]:
        shown.append(("fallen back", describe_fallbacks(content["fallen_back"], content["tasks"])))
    if content["score"] and content["answered"]:  # where all failed, there is nothing to score
        shown += score_rows(content["pass@1"], content["score"], content["coverage"])
        if (asked := content["answered_of_scored"]) < content["score"]["tasks"]:
            shown.append(
                ("of those answered so far", f"{content['score']['tasks_solved']} of {counted(asked, 'task')}")
            )
        if unscored := content["tasks"] - content["score"]["tasks"]:
            shown.append(("tasks without a known solution, not scored", f"{unscored}"))
    if content["answered"] and (not content["score"] or content["score"]["tasks"] < content["tasks"]):
        says = "{:.0f} {of}, {:.0f} to {:.0f}".format(*content["expected"], of=of)
        shown.append(("tasks expected to be solved, 95%, from agreement and leave-one-out", says))
    if times := content["seconds_per_task"]:
        shown.append(("time per task, of one worker", "median {median:.0f} s, longest {longest:.0f} s".format(**times)))
    if joint := content.get("joint"):
        steps = counted(joint["steps"], "step")
        shown.append(("joint stage", f"{joint['minutes']:.1f} minutes; {steps}, {joint['tokens']:,} tokens"))
    if seconds := content.get("seconds"):
        spent = f"{seconds['adapting']:.0f} s adapting, {seconds['asking']:.0f} s asking, of all workers together"
        after = " after the joint stage" if joint else ""
        shown.append((f"time{after}", f"{seconds['whole']:.0f} s; {spent}"))
        shown.append(("workers", f"{content['workers']}, busy {content['busy']:.0%} of the time"))
        shown.append((f"utilisation of their {content['utilisation_of']}", f"{content['utilisation']:.0%}"))
        shown.append(("peak memory of the workers", f"{content['peak_memory_bytes'] / 2**30:.2f} GiB"))
    return [*shown, *data_rows(content["data"])]


def describe_fallbacks(fallen_back: Mapping[str, str], tasks: int) -> str:
    """How many tasks fell back to an unadapted or a placeholder answer, and which."""
    by_kind = {kind: sorted(i for i, k in fallen_back.items() if k == kind) for kind in ("unadapted", "placeholder")}
    says = {"unadapted": "answered without adaptation", "placeholder": "without any answer"}
    parts = [f"{few(ids, 10)} {says[kind]}" for kind, ids in by_kind.items() if ids]
    return f"{len(fallen_back)} of {counted(tasks, 'task')} fell back: {'; '.join(parts)}"


def read_status(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """The tasks' name, and the summary of a run, whether it goes on or not.

    Raises:
        UserError: it is no run's folder, or its tasks are not found any more.
    """
    task_set, statuses = best_statuses(run_dir)
    runs = is_locked(run_dir / "lock")
    return task_set.name, {**last_summary(run_dir), **counts(task_set, statuses), "running": runs}


def best_statuses(run_dir: Path) -> tuple[TaskSet, dict[str, TaskStatus]]:
    """The tasks of a run, and how those that have an answer stand.

    Raises:
        UserError: it is no run's folder, or its tasks are not found any more.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no folder: give what --out of bin/solve was")
    config = saved_config(run_dir)
    task_set = tasks_of_run(run_dir, config.tasks)
    # What cannot be read is solved again when the run goes on.
    return task_set, {i: status for i, _, status in read_statuses(run_dir, task_set, config) if status}


def last_summary(run_dir: Path) -> dict[str, Any]:
    """What a run last wrote about itself; nothing where that cannot be read, as none of it is needed."""
    return read_object(run_dir / "summary.json")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/solve --status", description="Say how a run stands.")
    parser.add_argument(
        "--status", type=user_path, required=True, metavar="RUN_DIR", help="a folder that bin/solve wrote"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(arguments)
    name, content = read_status(args.status)
    if args.json:
        print(json.dumps(content))
        return 0
    table = table_of(f"{args.status}: {name}", summary_rows(content))
    unfinished = len(content["fallen_back"]) + content["answered"] < content["tasks"]
    if unfinished and not content["running"]:
        table.add_row("no process works on it", as_called(f"bin/solve --out {args.status} goes on"))
    elif content.get("projected_end") and content["share_done"] < 1:
        table.add_row("projected end", time.strftime("%Y-%m-%d %H:%M", time.localtime(content["projected_end"])))
    Console().print(table)
    return 0
