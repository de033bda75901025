"""Runs that are killed, stopped, starved and hurried: real processes, real signals, the real command."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from toys import TOY, flip_task, hasty, write_challenges

from arc_solver.answers.submission import blank_submission, read_submission
from arc_solver.config import FormatConfig, TasksConfig
from arc_solver.data.leaks import NOTHING
from arc_solver.models.model import new_model, save_model
from arc_solver.puzzles.task_files import load_tasks, smallest
from arc_solver.puzzles.tasks import Task, same_grid

ROOT = Path(__file__).parents[2]
QUICK = ["adapt.steps=20", "adapt.rank=4", "predict.views=8", "run.show=0"]
KILLS = int(os.environ.get("ARC_SOLVER_KILLS", "6"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    save_model(hasty(new_model(TOY, FormatConfig(), seed=1, trained_on=NOTHING)), folder)
    return folder


def some_tasks(count: int) -> list[Task]:
    rng = np.random.default_rng(0)
    return [flip_task(rng, f"task{i:02d}", demonstrations=2 + i % 3, tests=1 + i % 2) for i in range(count)]


@pytest.fixture(scope="module")
def challenges(tmp_path_factory):
    return write_challenges(tmp_path_factory.mktemp("tasks"), some_tasks(12))


def words_for(checkpoint, challenges, out, *more) -> list[str]:
    return [*map(str, ("--tasks", challenges, "--out", out, f"model.path={checkpoint}")), *QUICK, *more]


def start(words, script=("-m", "arc_solver.solve"), cwd=None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *script, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=cwd,
    )


def finish(process, expect=0) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == expect, out + errors
    return out + errors


def solve(words, expect=0, script=("-m", "arc_solver.solve")) -> str:
    return finish(start(words, script), expect)


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if line.endswith("}")]


def answered(out: Path) -> list[str]:
    return sorted(event["task"] for event in events(out) if event["event"] == "task")


def is_valid(out: Path, challenges) -> bool:
    read_submission(out / "submission.json", load_tasks(TasksConfig(spec=str(challenges))).tasks)
    return True


@pytest.fixture(scope="module")
def whole(checkpoint, challenges, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    said = solve(words_for(checkpoint, challenges, out))
    assert "tasks answered" in said
    return out


def test_killed_at_random_moments_a_run_ends_like_an_uninterrupted_one(checkpoint, challenges, whole, tmp_path):
    """kill -9 of the whole process group. Nothing that was finished is done again."""
    rng, kills, out, n = random.Random(0), 0, tmp_path / "run0", 0
    took = json.loads((whole / "summary.json").read_text())["seconds"]["whole"]
    while kills < KILLS:
        executor = rng.choice(["processes", "inprocess", "inprocess"])
        process = start(words_for(checkpoint, challenges, out, "--executor", executor))
        while not (out / "submission.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, took))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        assert is_valid(out, challenges)
        if process.returncode == 0:
            assert_like(out, whole)
            n += 1
            out = tmp_path / f"run{n}"
    solve(words_for(checkpoint, challenges, out))
    assert_like(out, whole)


def assert_like(out: Path, whole: Path) -> None:
    assert (out / "submission.json").read_bytes() == (whole / "submission.json").read_bytes()
    assert answered(out) == answered(whole)  # each once


def test_ctrl_c_and_sigterm_stop_at_once_and_the_command_says_how_to_go_on(checkpoint, challenges, tmp_path):
    endless = ["adapt.steps=100000", "adapt.budget_tokens=1000000000"]
    for number, executor in ((signal.SIGINT, "processes"), (signal.SIGTERM, "processes"), (signal.SIGTERM, "ray")):
        out = tmp_path / f"{number}-{executor}"
        process = start(words_for(checkpoint, challenges, out, *endless, "--executor", executor))
        while not (out / "submission.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(6)  # the workers are up, or on their way
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        said = finish(process, expect=1)
        assert f"bin/solve --out {out}" in said
        assert "Traceback" not in said
        assert is_valid(out, challenges)


def test_another_config_is_refused_and_the_same_one_has_nothing_left_to_do(checkpoint, challenges, whole):
    before = (whole / "submission.json").read_bytes()
    said = solve(words_for(checkpoint, challenges, whole, "predict.views=9"), expect=2)
    assert "predict.views=8, and now it is 9" in said
    said = solve(["--out", str(whole)])  # as it was begun
    assert "continued: 12 of 12 tasks" in said
    assert (whole / "submission.json").read_bytes() == before
    assert len(answered(whole)) == 12
    said = solve(["--status", str(whole)])
    assert "12 of 12" in said


def test_a_run_is_continued_from_any_folder(checkpoint, challenges, tmp_path):
    """Also when tasks and model were named relative to where it was begun."""
    model = os.path.relpath(checkpoint, challenges.parent)
    words = ["--tasks", challenges.name, "--out", str(tmp_path / "run"), f"model.path={model}"]
    finish(start([*words, *QUICK, "--limit", "1"], cwd=challenges.parent))
    assert "continued: 1 of 1" in finish(start(["--out", "run"], cwd=tmp_path))
    assert "1 of 1" in finish(start(["--status", "run"], cwd=tmp_path))


# What happens to workers is done to them by scripts that put something else in the place of a part, then run the
# command. Workers import the script too, so it happens in them.
FAULTY = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import arc_solver.solving.worker as worker
adapt, predict_tasks = worker.adapt, worker.predict_tasks
def hurt(tasks):
    %s
def bad_adapt(tasks, *rest):
    hurt(tasks)
    return adapt(tasks, *rest)
worker.adapt = bad_adapt
if __name__ == "__main__":
    from arc_solver.config import run_main
    from arc_solver.solving.command import main
    run_main(main)
"""


def script(folder: Path, what: str) -> tuple[str]:
    file = folder / "faulty.py"
    file.write_text(FAULTY % what.replace("\n", "\n    "))
    return (str(file),)


def once(folder: Path, task: str, what: str) -> str:
    """Python that does something the first time that a task is met."""
    mark = str(folder / "mark")
    return f"if any(t.id == {task!r} for t in tasks) and not os.path.exists({mark!r}): open({mark!r}, 'w'); {what}"


def test_tasks_that_raise_fall_back_and_the_exit_code_says_so(checkpoint, challenges, tmp_path):
    what = "if any(t.id in ('task03', 'task05') for t in tasks): raise RuntimeError('injected')"
    out = tmp_path / "run"
    said = solve(words_for(checkpoint, challenges, out), 3, script(tmp_path, what))
    assert "2 of 12 tasks fell back: task03, task05 answered without adaptation" in said.replace("\n", " ")
    failures = [event for event in events(out) if event["event"] == "failure"]
    assert all("injected" in event["error"] for event in failures)
    assert sum(event["tasks"] == ["task03"] for event in failures) >= 2
    summary = json.loads((out / "summary.json").read_text())
    assert summary["fallen_back"] == {"task03": "unadapted", "task05": "unadapted"}
    assert summary["answered"] == 12
    assert is_valid(out, challenges)


@pytest.mark.parametrize("what", ["os.kill(os.getpid(), 9)", "time.sleep(10000)"], ids=["killed", "hung"])
def test_a_worker_that_dies_or_hangs_is_replaced(what, checkpoint, challenges, whole, tmp_path):
    """And as the job is done again as it was, the answers are the same."""
    out = tmp_path / "run"
    words = words_for(checkpoint, challenges, out, "run.watchdog_minutes=0.1")
    said = solve(words, 0, script(tmp_path, once(tmp_path, "task04", what)))
    (failure,) = [event for event in events(out) if event["event"] == "failure"]
    assert "task04" in failure["tasks"]
    assert ("hurt" in said) == (what != "os.kill(os.getpid(), 9)")  # the stacks of what hung
    assert (out / "submission.json").read_bytes() == (whole / "submission.json").read_bytes()


def test_a_damaged_result_is_solved_again(checkpoint, challenges, whole, tmp_path):
    out = tmp_path / "run"
    solve(words_for(checkpoint, challenges, out))
    file = out / "tasks" / "task07.json"
    file.write_text(file.read_text()[:100])
    (out / "tasks" / "task08.json").write_text("")
    said = solve(["--out", str(out)])
    assert "task07.json could not be read" in said.replace("\n", " ")
    assert (out / "submission.json").read_bytes() == (whole / "submission.json").read_bytes()
    done = answered(out)
    assert {i: done.count(i) for i in done} == {f"task{i:02d}": 1 + (i in (7, 8)) for i in range(12)}


def test_a_full_disk_stops_the_run_and_it_goes_on_afterwards(checkpoint, challenges, whole, tmp_path):
    """A file system of 200 KiB, which the adapters fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        words = words_for(checkpoint, challenges, disk / "run")
        said = solve(words, expect=1)
        assert "No space left on device" in said
        assert "same command again" in said
        assert "Traceback" not in said
        assert is_valid(disk / "run", challenges)
        kept = len(list((disk / "run" / "tasks").glob("*.json")))
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        solve(words)
        assert (disk / "run" / "submission.json").read_bytes() == (whole / "submission.json").read_bytes()
        assert len(answered(disk / "run")) <= 12 + (12 - kept)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        (line,) = solve(words, expect=2).splitlines()
        assert "cannot be written (Read-only file system)" in line
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_clock_that_jumps_changes_nothing(checkpoint, challenges, whole, tmp_path):
    """By days, back and forth, at every step; in the command's own process and with a time budget."""
    out, jumps = tmp_path / "run", "time.time = lambda: next(times)"
    file = script(tmp_path, jumps)
    Path(file[0]).write_text(
        "import itertools\ntimes = itertools.cycle((2e9, 1e9, 3e9, 0.0))\n" + Path(file[0]).read_text()
    )
    solve(words_for(checkpoint, challenges, out, "--executor", "inprocess", "--time-budget", "10m"), 0, file)
    stopped = {event["adaptation"]["ended"] for event in events(out) if event.get("stage") == "tasks"}
    assert stopped == {"steps"}
    assert is_valid(out, challenges)


def test_a_smoke_run_answers_a_few_tasks_in_a_whole_file_which_is_in_two_places(checkpoint, challenges, tmp_path):
    second, out = tmp_path / "working" / "submission.json", tmp_path / "run"
    words = words_for(checkpoint, challenges, out, "--smoke", "3", "--submission", str(second))
    (line,) = solve(words, expect=2).splitlines()
    assert "there is no folder" in line
    second.parent.mkdir()
    assert "only 3 of 12 tasks" in solve(words)
    assert second.read_bytes() == (out / "submission.json").read_bytes()
    found = load_tasks(TasksConfig(spec=str(challenges)))
    answers = read_submission(second, found.tasks)
    blank = blank_submission(found)
    solved = {i for i, outputs in answers.items() if not same_answers(outputs, blank[i])}
    assert solved == {task.id for task in smallest(found.tasks, 3)}
    assert sorted(file.name for file in second.parent.iterdir()) == ["submission.json"]


def same_answers(some, others) -> bool:
    return all(
        same_grid(a, b) for both, others in zip(some, others, strict=True) for a, b in zip(both, others, strict=True)
    )


def test_a_folder_that_cannot_be_written_is_one_sentence(checkpoint, challenges):
    said = solve(words_for(checkpoint, challenges, "/proc/run"), expect=2)
    assert "cannot be made" in said
    assert len(said.splitlines()) == 1


def test_a_time_budget_is_kept_and_the_answers_are_whole(checkpoint, challenges, tmp_path):
    """Some time for work without end: late by nothing, and all have an answer of some kind.

    How much: three times what an ordinary run takes from start to end on the machine as it is now, and 30 s or more.
    """
    began = time.monotonic()
    solve(words_for(checkpoint, challenges, tmp_path / "ordinary"))
    budget_s = max(30, round(3 * (time.monotonic() - began)))
    out = tmp_path / "run"
    more = ["adapt.steps=1000000", "adapt.budget_tokens=100000000000", "--time-budget", f"{budget_s}s"]
    began = time.monotonic()
    said = solve(words_for(checkpoint, challenges, out, *more))
    assert time.monotonic() - began < budget_s
    summary = json.loads((out / "summary.json").read_text())
    assert summary["answered"] == 12
    assert is_valid(out, challenges)
    stopped = [e["adaptation"]["ended"] for e in events(out) if e["event"] == "task" and e["adaptation"]]
    assert set(stopped) == {"deadline"}
    assert "stopped by the clock" in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--time-budget", "soon"], "'soon' is no duration: write it as 11h30m, 40m or 90s"),
        (["--time-budget", "3s"], "at least 20 s"),
        (["--address", "auto"], 'run.address is for run.executor="ray"'),
        (["--executor", "threads"], "invalid choice"),
        (["--executor", "ray", "--address", "127.0.0.1:1"], "127.0.0.1:1"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(more, says, checkpoint, challenges, tmp_path):
    said = solve(words_for(checkpoint, challenges, tmp_path / "run", *more), expect=2)
    (line,) = said.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "run").exists()


def test_ray_workers_give_the_same_and_may_be_killed(checkpoint, whole, tmp_path, tmp_path_factory):
    """40 tasks on two actors; three times one of them is killed. At most the tasks in flight are done again."""
    challenges = write_challenges(tmp_path_factory.mktemp("many"), some_tasks(40))
    plain, out = tmp_path / "plain", tmp_path / "run"
    solve(words_for(checkpoint, challenges, plain, "adapt.steps=60"))
    process = start(words_for(checkpoint, challenges, out, "adapt.steps=60", "--executor", "ray", "run.workers=2"))
    killed: list[int] = []
    while process.poll() is None and len(killed) < 3:
        time.sleep(0.1)
        log = out / "log.jsonl"
        seen = [event["worker"] for event in events(out) if event["event"] == "task"] if log.exists() else []
        alive = [pid for pid in dict.fromkeys(seen) if pid not in killed]
        if len(seen) >= 5 * (len(killed) + 1) and alive:
            os.kill(alive[-1], signal.SIGKILL)
            killed.append(alive[-1])
    finish(process)
    assert len(killed) == 3
    assert answered(out) == sorted(f"task{i:02d}" for i in range(40))
    assert sum(event["event"] == "failure" for event in events(out)) <= 3
    assert (out / "submission.json").read_bytes() == (plain / "submission.json").read_bytes()
