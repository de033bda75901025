"""What a wheel gives: one command, and functions for a notebook."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import Forked, output_of

import arc_solver
from arc_solver.__main__ import COMMANDS
from arc_solver.answers.submission import read_submission
from arc_solver.errors import UserError
from arc_solver.solving.status import read_status

ROOT = Path(__file__).parents[1]


def test_the_example_in_the_readme(tmp_path, monkeypatch, capsys):
    """Its tasks are solved, and what it does step by step with a task is what the whole run did with it."""
    (example,) = re.findall(r"```python\n(from arc_solver import .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example.count("\n") <= 10
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    tasks, submission = names["tasks"], names["submission"]
    assert (tmp_path / "runs" / "notebook" / "submission.json").is_file()
    assert names["score"](submission, tasks).tasks_solved >= 2
    assert capsys.readouterr().out.endswith(f"{names['score'](submission, tasks).tasks_solved}\n")
    again = read_submission(tmp_path / "runs" / "notebook" / "submission.json", tasks.tasks)
    assert as_lists(again) == as_lists(submission)
    assert isinstance(names["first"], np.ndarray)


def test_a_script_may_call_it_without_a_guard(tmp_path):
    """Workers must not run it again; afterwards the script is as it was."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import sys\nfrom arc_solver import load_tasks, score, solve\n"
        "tasks = load_tasks('demo', limit=2)\n"
        "found = solve(tasks, 'adapt.steps=2', 'predict.views=2', 'run.show=0', out=sys.argv[1])\n"
        "assert all(len(grid) for outputs in found.values() for both in outputs for grid in both)\n"
        "print('ended', __file__ == sys.modules['__main__'].__file__, score(found, tasks).outputs)\n"
    )
    words = [sys.executable, "-P", script, tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ended") == 1 and done.stdout.endswith("ended True 2\n")
    assert "fell back" not in done.stdout


def as_lists(submission) -> dict:
    return {i: [[grid.tolist() for grid in both] for both in outputs] for i, outputs in submission.items()}


def test_importing_it_is_quick_and_what_it_has_is_listed():
    code = "import sys, arc_solver; assert 'torch' not in sys.modules; assert arc_solver.load_tasks"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    for name in arc_solver.__all__:
        assert getattr(arc_solver, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'slove'"):
        arc_solver.slove  # noqa: B018


def test_one_command_for_all():
    """It calls itself so, in its help and in what it refuses."""
    said, _ = output_of(Forked("arc_solver", ["--help"]), 0)
    assert all(re.search(rf"^  {name} ", said, re.MULTILINE) for name in COMMANDS)
    for name in COMMANDS:
        said, _ = output_of(Forked("arc_solver", [name, "--help"]), 0)
        assert said.startswith(f"usage: arc-solver {name} ")
        assert "bin/" not in said
    for words in ([], ["slove"], ["solve", "--status", "/nowhere"], ["score", "--nothing"], ["train"]):
        _, said = output_of(Forked("arc_solver", words), 2)
        (line,) = said.splitlines()
        assert line.startswith("error: ")
        assert "arc-solver" in line
        assert "bin/" not in line


def test_an_installed_wheel_says_what_to_call_in_a_checkout(tmp_path):
    """Which is called bin/submit, whatever it is called here."""
    (tmp_path / "arc_solver").symlink_to(Path(arc_solver.__file__).parent)
    (tmp_path / "small.toml").write_text("")
    words = [sys.executable, "-P", "-m", "arc_solver", "submit", "small.toml", "build"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("clone the project, and call ./bin/submit there\n")


def test_a_users_own_path_is_no_call_of_a_command(tmp_path):
    """Where commands are called arc-solver, only calls are: not what a path has in it."""
    for words in (["solve", "--tasks", "/me/bin/train/x.json"], ["solve", "model.path=~/bin/train"]):
        _, said = output_of(Forked("arc_solver", words, cwd=tmp_path), 2)
        assert "/bin/train" in said and "arc-solver train" not in said
    _, said = output_of(Forked("arc_solver", ["solve", "model.path=bin/train"], cwd=tmp_path), 2)
    assert "(arc-solver train configs/" in said


def test_a_choice_of_tasks_that_there_is_not_is_one_sentence():
    with pytest.raises(UserError, match=r"^unknown setting tasks\.limt; did you mean tasks\.limit\?$"):
        arc_solver.load_tasks("demo", limt=3)
    assert len(arc_solver.load_tasks("demo", sample=3, sample_seed=1).tasks) == 3


def test_a_run_of_chosen_tasks_is_one_that_commands_understand(tmp_path, monkeypatch, capsys):
    """Its folder names the tasks that it was given, and no others."""
    monkeypatch.chdir(tmp_path)
    tasks = arc_solver.load_tasks("demo", ids=("66e6c45b", "be03b35f"))
    settings = ("adapt.enabled=false", "predict.views=2", "run.executor=inprocess", "run.show=0")
    found = arc_solver.solve(tasks, *settings, out="run")
    capsys.readouterr()
    name, summary = read_status(tmp_path / "run")
    assert (name, summary["tasks"], summary["answered"]) == ("demo", 2, 2)
    assert as_lists(arc_solver.solve(tasks, *settings, out="run")) == as_lists(found)
    with pytest.raises(UserError, match="leave tasks"):
        arc_solver.solve(tasks, "tasks.limit=1", out="run")


def test_what_is_given_in_the_wrong_place_is_one_sentence(toy_model):
    tasks = arc_solver.load_tasks("demo", ids="66e6c45b", limit=None)
    [task] = tasks.tasks
    for call, said in (
        (lambda: arc_solver.adapt(tasks, toy_model), r"task is a TaskSet, and should be a Task: give one of"),
        (lambda: arc_solver.adapt(task, "runs/mine"), r"model is a str, .* give load_model\(\)"),
        (lambda: arc_solver.adapt(task, toy_model, ["adapt.steps=2"]), r"settings are words"),
        (lambda: arc_solver.predict(task, toy_model, "predict.views=2"), r"adapter is a str, .* or None"),
        (lambda: arc_solver.choose_attempts({}, task), r"predictions is a dict"),
        (lambda: arc_solver.solve("demo"), r"tasks is a str, .* load_tasks"),
        (lambda: arc_solver.score({}, tasks), r"no answer to 66e6c45b"),
        (lambda: arc_solver.score("submission.json", tasks), r"submission is a str"),
        (lambda: arc_solver.score({"66e6c45b": [{"attempt_1": [[1]]}]}, tasks), r"not pairs of NumPy arrays"),
    ):
        with pytest.raises(UserError, match=said):
            call()


@pytest.mark.parametrize("words", [["data", "list"], ["data", "list", "--json"], ["show", "demo"]], ids=" ".join)
def test_whoever_has_read_enough_sees_no_traceback(words):
    command = [sys.executable, "-P", "-m", "arc_solver", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert "Traceback" not in said and "Error" not in said


def test_a_terminal_that_knows_no_sign_is_no_error(tmp_path):
    answers = {t.id: [{"attempt_1": [[1]], "attempt_2": [[1]]} for _ in t.test] for t in arc_solver.load_tasks().tasks}
    (tmp_path / "submission.json").write_text(json.dumps(answers))
    words = ["show", "demo", "--limit", "1", "--submission", tmp_path / "submission.json"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-P", "-m", "arc_solver", *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "attempt 1 ?" in done.stdout


def test_a_leftover_rank_hides_no_sentence(tmp_path):
    words = [sys.executable, "-P", "-m", "arc_solver", "score", "none.json", "--tasks", "nothing"]
    env = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: tasks 'nothing' not found")


def test_a_name_that_is_too_long_is_one_sentence(tmp_path):
    _, said = output_of(Forked("arc_solver", ["show", "x" * 300], cwd=tmp_path), 2)
    assert said.startswith("error: ") and "\n" not in said.strip()
