"""`bin/show`: what is drawn of a set, of a run, and of a submission."""

import json
import re

import pytest

from arc_solver.config import Config, TasksConfig
from arc_solver.errors import UserError
from arc_solver.puzzles import challenge, load_tasks
from arc_solver.rng import named_rng
from arc_solver.solving.predict import views_of
from arc_solver.solving.show import main


def drawn(capsys, *words) -> str:
    """What it shows, in which digits are cells."""
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_set_is_drawn_with_all_demonstrations_and_right_outputs(capsys):
    [task] = load_tasks(TasksConfig(spec="demo", ids=("66e6c45b",))).tasks
    shown = drawn(capsys, "demo", "--ids", "66e6c45b")
    for i in range(1, len(task.train) + 1):
        assert f"demonstration {i}" in shown
    assert "task 66e6c45b" in shown and "right output" in shown and "attempt" not in shown
    assert "1 of the 20 tasks of demo" in shown


@pytest.mark.parametrize(
    ("words", "tasks"), [([], 3), (["--limit", "5"], 5), (["--sample", "2"], 2), (["--limit", "99"], 20)]
)
def test_which_tasks_are_drawn(capsys, words, tasks):
    assert len(re.findall("^task ", drawn(capsys, "demo", *words), re.MULTILINE)) == tasks


def test_a_run_is_drawn_with_its_answers_as_far_as_it_has_come(capsys, whole, tmp_path):
    shown = drawn(capsys, whole, "--limit", "12")
    inputs = shown.count("test input")
    assert inputs >= 12 and shown.count("attempt 1") == shown.count("attempt 2") == inputs
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("run.json", "config.json", "submission.json"):
        (begun / name).write_bytes((whole / name).read_bytes())
    assert drawn(capsys, begun, "--limit", "12").count("attempt") == 0


def test_a_submission_is_drawn_and_judged(capsys, tmp_path):
    task_set = load_tasks(TasksConfig(spec="demo"))
    answers = {
        i: [{"attempt_1": grid.tolist(), "attempt_2": [[9]]} for grid in grids]
        for i, grids in task_set.solutions.items()
    }
    (tmp_path / "submission.json").write_text(json.dumps(answers))
    shown = drawn(capsys, "demo", "--limit", "2", "--submission", tmp_path / "submission.json")
    asked = sum(len(task.test) for task in load_tasks(TasksConfig(spec="demo", limit=2)).tasks)
    assert shown.count("attempt 1 ✓") == shown.count("attempt 2 ✗") == asked


def test_views_are_those_that_are_asked(capsys):
    [task] = load_tasks(TasksConfig(spec="demo", ids=("66e6c45b",))).tasks
    shown = drawn(capsys, "demo:66e6c45b", "--views", "3")
    expected = views_of(task, Config().predict, named_rng(0, task.id, "predict"))[:3]
    assert [
        f"view {i} of task {task.id}: geometry {view.geometry}," in shown for i, view in enumerate(expected, 1)
    ] == [True] * 3
    last = expected[-1].apply_task(task).test[0].tolist()
    assert all(" ".join(map(str, row)) in shown for row in last) and "view 4" not in shown


def test_a_sequence_is_shown_with_what_is_learnt(capsys):
    [task] = load_tasks(TasksConfig(spec="demo", ids=("66e6c45b",))).tasks
    lines = drawn(capsys, "demo:66e6c45b", "--encoded").splitlines()
    assert sum(line.strip() == "<input>" for line in lines) == len(task.train)
    learnt = [line.split()[1:] for line in lines if line.startswith("learnt  ")]
    *rows, end = learnt
    assert end == ["<end>"] and all(row[-1] == "⏎" for row in rows)
    assert {(len(rows), len(row) - 1) for row in rows} <= {pair.output.shape for pair in task.train}
    assert f"{sum(map(len, learnt))} of them learnt" in " ".join(" ".join(lines).split())


def test_a_picture_is_written(capsys, tmp_path):
    for name, begins in (("x.svg", b"<?xml"), ("x.png", b"\x89PNG")):
        assert name in drawn(capsys, "demo", "--limit", "2", "--views", "1", "--picture", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_picture_may_end_in_capitals(capsys, tmp_path):
    assert "X.PNG" in drawn(capsys, "demo", "--limit", "1", "--picture", tmp_path / "X.PNG")


def test_a_pipe_has_whole_rows(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    big = max(load_tasks(TasksConfig(spec="arc-agi-1/training")).tasks, key=lambda t: t.train[0].input.shape[1])
    shown = drawn(capsys, f"arc-agi-1/training:{big.id}")
    for pair in big.train:
        for cells in (pair.input, pair.output):
            assert all(" ".join(map(str, row)) in shown for row in cells.tolist())
    assert max(map(len, drawn(capsys, "demo").splitlines())) <= 80 < max(map(len, shown.splitlines()))


@pytest.mark.parametrize(("term", "hidden"), [("xterm", False), ("xterm-256color", True)])
def test_a_terminal_of_few_colours_has_numbers(capsys, monkeypatch, term, hidden):
    for name, value in (("TERM", term), ("FORCE_COLOR", "1"), ("COLORTERM", ""), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = drawn(capsys, "demo:66e6c45b", "--demonstrations", "1")
    style = r"\x1b\[(3\d(?:;5;\d+)?|9\d);(4\d(?:;5;\d+)?|10\d)m[1-9] "
    cells = re.findall(style, shown)
    assert cells and any(paper == ink.replace("3", "4", 1) for ink, paper in cells) == hidden


def test_how_many_are_drawn_is_said(capsys, whole, tmp_path):
    assert "3 of the 20 tasks of demo; --ids" in drawn(capsys, "demo")
    assert drawn(capsys, whole, "--limit", "12").splitlines()[-1] == f"12 tasks, all of {whole}"
    [task] = load_tasks(TasksConfig(spec="demo", limit=1)).tasks
    (tmp_path / "one.json").write_text(json.dumps(challenge(task)))
    assert drawn(capsys, tmp_path / "one.json").splitlines()[-1] == f"1 task, all of {tmp_path}/one.json"


def test_as_many_demonstrations_as_asked_for(capsys):
    assert "a demonstration" in drawn(capsys, "demo:66e6c45b", "--demonstrations", "1")
    assert "demonstration" not in drawn(capsys, "demo:66e6c45b", "--demonstrations", "0")


def test_what_cannot_be_shown(whole, tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps({"a": [{"input": [[1]], "output": [[2]]}]}))
    for words, said in (
        ([whole, "--solutions", "x"], "is a run"),
        (["demo", "--ids", "none"], "has no task 'none'"),
        ([f"{whole}:nope"], f"^{whole} has no task 'nope'; it has 12 tasks"),
        (["arc-agi-1/training", "--limit", "100", "--picture", tmp_path / "x.png"], "choose fewer tasks"),
        (["demo", "--submission", tmp_path / "none.json"], "does not exist"),
        ([tmp_path / "pairs.json"], "lists of pairs"),
        ([tmp_path / "nothing"], "not found"),
        (["demo", "--picture", "x.gif"], "a name that ends in .png or .svg"),
        (["demo", "--picture", "x.png", "--encoded"], "leave --picture out"),
        (["demo", "--demonstrations", "-1"], "at least 0"),
    ):
        with pytest.raises(UserError, match=said):
            main([*map(str, words)])
