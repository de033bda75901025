"""`bin/solve` in processes of its own, on small tasks, and what it leaves."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from forked import Forked, output_of
from toys import flip_task

from arc_solver.answers.submission import read_submission
from arc_solver.config import TasksConfig
from arc_solver.puzzles.task_files import load_tasks
from arc_solver.puzzles.tasks import Task

QUICK = ["adapt.steps=20", "adapt.rank=4", "predict.views=8", "run.show=0"]


def some_tasks(count: int) -> list[Task]:
    rng = np.random.default_rng(0)
    return [flip_task(rng, f"task{i:02d}", demonstrations=2 + i % 3, tests=1 + i % 2) for i in range(count)]


def words_for(checkpoint, challenges, out, *more) -> list[str]:
    return [*map(str, ("--tasks", challenges, "--out", out, f"model.path={checkpoint}")), *QUICK, *more]


def start(words, program="arc_solver.solve", cwd=None) -> Forked:
    return Forked(program, words, cwd)


def start_anew(words) -> subprocess.Popen[str]:
    """With a new interpreter, and so with another seed of `hash`."""
    command = [sys.executable, "-m", "arc_solver.solve", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, expect=0) -> str:
    return "".join(output_of(process, expect))


def solve(words, expect=0, program="arc_solver.solve") -> str:
    return finish(start(words, program), expect)


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if line.endswith("}")]


def answered(out: Path) -> list[str]:
    return sorted(event["task"] for event in events(out) if event["event"] == "task")


def is_valid(out: Path, challenges) -> bool:
    read_submission(out / "submission.json", load_tasks(TasksConfig(spec=str(challenges))).tasks)
    return True


def assert_like(out: Path, whole: Path) -> None:
    assert (out / "submission.json").read_bytes() == (whole / "submission.json").read_bytes()
    assert answered(out) == answered(whole)  # each once
