"""Runs that go wrong: faults, damage, full disks, jumping clocks. Real processes, the real command."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from solve_runs import QUICK, answered, events, finish, is_valid, solve, start, words_for

from arc_solver.answers.submission import blank_submission, read_submission
from arc_solver.config import TasksConfig
from arc_solver.puzzles.task_files import load_tasks, smallest
from arc_solver.puzzles.tasks import same_grid

ROOT = Path(__file__).parents[2]
HERE = ("--executor", "inprocess")  # where it is not about workers, of which each takes seconds to start


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
    finish(start([*words, *QUICK, *HERE, "--limit", "1"], cwd=challenges.parent))
    assert "continued: 1 of 1" in finish(start(["--out", "run"], cwd=tmp_path))
    assert "1 of 1" in finish(start(["--status", "run"], cwd=tmp_path))


def test_a_run_whose_tasks_or_model_are_elsewhere_says_so(checkpoint, challenges, tmp_path):
    out, tasks, model = tmp_path / "run", tmp_path / "tasks", tmp_path / "model"
    shutil.copytree(challenges.parent, tasks)
    shutil.copytree(checkpoint, model)
    given = ["--solutions", str(tasks / "toy_solutions.json"), "--limit", "1"]
    solve(words_for(model, tasks / challenges.name, out, *HERE, *given))
    (tasks / "toy_solutions.json").rename(tmp_path / "solutions.json")
    assert f"the solutions of {out} are no longer at {tasks}" in solve(["--status", out], expect=2)
    found = f"tasks.solutions={tmp_path / 'solutions.json'}"
    assert "of 1 task," in solve(["--revote", out, found])
    tasks.rename(tmp_path / "moved")
    for option in ("--out", "--status", "--revote", "--reliability"):
        (line,) = solve([option, out], expect=2).splitlines()
        assert f"the tasks of {out} are no longer at {tasks / challenges.name}: put them back" in line
        assert ("give tasks.spec=SPEC" in line) == (option == "--revote")
    assert "of 1 task," in solve(["--revote", out, f"tasks.spec={tmp_path / 'moved' / challenges.name}", found])
    assert "tasks 'elsewhere' not found" in solve(["--out", out, "--tasks", "elsewhere"], expect=2)
    model.rename(tmp_path / "other")
    assert f"the model of {out} is no longer at {model}: put it back" in solve(["--out", out], expect=2)


def test_a_new_run_of_the_demo_set_says_that_it_is_one(checkpoint, challenges, tmp_path):
    """The folder may be meant to be that of a run that was killed before it had one."""
    quick = [f"model.path={checkpoint}", *QUICK, *HERE, "adapt.enabled=false", "predict.score=false", "vote.rule=votes"]
    said = solve(["--out", tmp_path / "demo", *quick, "--smoke", "1"], expect=0)
    assert f"{tmp_path / 'demo'} is new: the demo set is solved there" in said
    assert "is new" not in solve(["--out", tmp_path / "demo"])
    assert "is new" not in solve(["--out", tmp_path / "mine", "--tasks", challenges, *quick, "--smoke", "1"])


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
    from arc_solver.command import run_main
    from arc_solver.solving.command import main
    run_main(main)
"""


def script(folder: Path, what: str) -> Path:
    file = folder / "faulty.py"
    file.write_text(FAULTY % what.replace("\n", "\n    "))
    return file


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


def test_where_every_task_fails_nothing_is_scored(checkpoint, challenges, tmp_path):
    file, out = script(tmp_path, "raise RuntimeError('injected')"), tmp_path / "run"
    file.write_text(
        file.read_text().replace("if __name__", "worker.predict_tasks = lambda tasks, *_: hurt(tasks)\nif __name__")
    )
    said = solve(words_for(checkpoint, challenges, out, *HERE, "--limit", "2"), 3, file)
    assert "2 of 2 tasks fell back" in said.replace("\n", " ") and "no task has an answer" in said
    for shown in (said, solve(["--status", out])):
        assert "0 of 2" in shown and "pass@" not in shown and "expected to be" not in shown


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
    solve(words_for(checkpoint, challenges, out, *HERE))
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
        solve([*words, *HERE])
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
    file.write_text("import itertools\ntimes = itertools.cycle((2e9, 1e9, 3e9, 0.0))\n" + file.read_text())
    solve(words_for(checkpoint, challenges, out, *HERE, "--time-budget", "10m"), 0, file)
    answered = [event for event in events(out) if event["event"] == "task"]
    stopped = {event["adaptation"]["ended"] for event in answered if event["stage"] == "tasks"}
    assert stopped == {"steps"}
    assert is_valid(out, challenges)


def test_a_smoke_run_answers_a_few_tasks_in_a_whole_file_which_is_in_two_places(checkpoint, challenges, tmp_path):
    second, out = tmp_path / "working" / "submission.json", tmp_path / "run"
    words = words_for(checkpoint, challenges, out, *HERE, "--smoke", "3", "--submission", str(second))
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


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--time-budget", "soon"], "'soon' is no duration: write it as 11h30m, 40m or 90s"),
        (["--time-budget", "3s"], "at least 20 s"),
        (["--address", "auto"], "run.address (--address) is for a Ray cluster"),
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


def test_chances_are_said_of_unknown_tasks_and_compared_with_what_came_of_known_ones(whole, challenges, tmp_path):
    status = json.loads(solve(["--status", str(whole), "--json"]))
    mean, low, high = status["expected"]
    assert 0 <= low <= mean <= high <= 12
    said = solve(["--reliability", str(whole), "--picture", str(tmp_path / "curve.svg"), "--json"])
    content = json.loads(said)
    assert content["tasks"] == 12 == sum(x["tasks"] for x in content["bins"])
    assert content["expected"] == pytest.approx(mean)
    assert content["solved"] == status["score"]["tasks_solved"] == sum(x["solved"] for x in content["bins"])
    assert f"12 tasks: {mean:.0f} expected" in solve(["--reliability", str(whole)])
    fitted = json.loads(solve(["--reliability", str(whole), "--fit", "--json"]))
    told = solve(["--reliability", str(whole), "--fit"])
    assert all(f"{name} {value:g}" in told for name, value in fitted.items()) and len(fitted) == 3
    assert "fitted on 12 tasks" in told and "COEFFICIENTS" in told
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    says = solve(["--reliability", str(whole), "--picture", str(tmp_path / "no" / "curve.svg")], expect=2)
    assert "cannot be written" in says
    assert "is no folder" in solve(["--reliability", str(tmp_path / "nothing")], expect=2)


def test_a_submission_is_written_over_nothing_else(checkpoint, challenges, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_bytes(challenges.read_bytes())
    said = finish(start([*words_for(checkpoint, challenges, tmp_path / "out"), "--submission", mine]), expect=2)
    assert "exists and is no submission" in said and mine.read_bytes() == challenges.read_bytes()


def test_adapters_of_tasks_say_what_they_are_for(checkpoint, challenges, whole, tmp_path):
    """Another base refuses them, and the leak audit knows that they have seen the demonstrations alone."""
    adapter = sorted((whole / "adapters").iterdir())[0]
    origin = json.loads((adapter / "base.json").read_text())
    assert origin["path"] == str(checkpoint.resolve())
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    words = [*QUICK, "--tasks", challenges, "--ids", adapter.name, f"model.adapter={adapter}", "adapt.enabled=false"]
    said = solve([*words, f"model.path={other}", "--out", tmp_path / "a"], expect=2)
    assert "is for another base" in said
    said = solve([*words, f"model.path={checkpoint}", "--out", tmp_path / "b"])
    assert "only shapes are compared" not in said
    assert "the demonstrations, not the test pairs, of 1 of them are" in " ".join(said.split())


def test_status_says_that_nothing_works_on_a_run(whole, challenges, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for file in sorted((stopped / "tasks").iterdir())[:5]:
        file.unlink()
    said = solve(["--status", stopped])
    assert "no process works on it" in said and "of those answered so far" in said
    said = solve(["--status", whole])
    assert "no process works on it" not in said and "so far" not in said
