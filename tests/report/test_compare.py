"""Two runs beside each other: who solves what, against a case worked by hand."""

from dataclasses import replace

import pytest
from pages import facts_of
from toys import flip_task, grid

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.answers.comparison import sign_test
from arc_solver.errors import UserError
from arc_solver.puzzles.tasks import TaskSet, freeze
from arc_solver.report.collect import RunFacts
from arc_solver.report.compare import compare
from arc_solver.report.page import comparison_page

WRONG = grid("7")


def run_of(name, tasks, solved, **settings) -> RunFacts:
    """A run that answers each output right or wrong, as `solved` says."""
    solutions = {task.id: tuple(freeze(cells[:, ::-1].copy()) for cells in task.test) for task in tasks}
    facts = []
    for task, outputs in zip(tasks, solved, strict=True):
        answers = [right if good else WRONG for right, good in zip(solutions[task.id], outputs, strict=True)]
        found = Predictions((0,), tuple(Candidate(t, cells, (0,), (), (-1.0,)) for t, cells in enumerate(answers)))
        facts.append(facts_of(task, found, solutions[task.id]))
    found = TaskSet("toy", tuple(tasks), solutions)
    return RunFacts(name, found, facts, "votes", False, {}, {}, settings, [], (True, "leak audit passed"), [])


@pytest.fixture
def tasks(rng):
    return [flip_task(rng, f"task{i}", tests=2 if i == 0 else 1) for i in range(5)]


def test_who_solves_what(tasks):
    ours = run_of("ours", tasks, [[True, True], [True], [False], [True], [False]], **{"adapt.steps": 240})
    theirs = run_of("theirs", tasks, [[True, False], [False], [True], [True], [False]], **{"adapt.steps": 120})
    both = compare(ours, theirs)
    assert [beside.outcome for beside in both.tasks] == ["first", "first", "second", "both", "neither"]
    assert (both.difference.won, both.difference.lost) == (2, 1)  # outputs
    assert both.difference.p == sign_test(2, 1)
    assert both.settings == [("adapt.steps", 240, 120)]
    assert both.left_out == 0
    both = replace(both, first=replace(ours, summary={"seconds": {"whole": 3600.0}}))  # of more tasks, and workers
    page = " ".join(comparison_page(both).split())
    assert "time of one worker, for these tasks</th><td>5 s</td><td>5 s</td>" in page
    assert "A solves 2 tasks that B does not, and B 1 that A does not." in page
    assert "A wins 2 and loses 1: 1 more than B" in page
    assert f"p = {both.difference.p:.2g}" in page
    for said in ("3 of 5 tasks, 4 of 6 outputs", "2 of 5 tasks, 3 of 6 outputs", "240", "120"):
        assert said in page, said


def test_only_the_same_tasks_are_compared(tasks, rng):
    first = run_of("first", tasks[:4], [[True, True], [True], [True], [True]])
    other = [*tasks[1:3], flip_task(rng, tasks[3].id), tasks[4]]  # the third has other grids
    second = run_of("second", other, [[False], [False], [False], [False]])
    both = compare(first, second)
    assert [beside.first.task.id for beside in both.tasks] == ["task1", "task2"]
    assert both.left_out == 3


def test_runs_that_share_nothing_are_refused(tasks, rng):
    first = run_of("first", tasks[:1], [[True, True]])
    with pytest.raises(UserError, match="first and second share no task with a known solution"):
        compare(first, run_of("second", tasks[1:2], [[True]]))
    unknown = replace(first, tasks=[replace(first.tasks[0], solution=None)])
    with pytest.raises(UserError, match="share no task"):
        compare(first, unknown)
