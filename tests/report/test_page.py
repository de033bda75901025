"""The page of a run: whole, small, and of data that stays data."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from pages import Reader, facts_of
from toys import flip_task

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.puzzles.tasks import Task, TaskSet, freeze
from arc_solver.report.collect import Job, RunReader, Session
from arc_solver.report.page import COLUMNS, run_page, warnings_of
from arc_solver.report.reasons import KINDS, Reason

MOST_BYTES = 15_000_000


@pytest.fixture(scope="module")
def run(whole):
    return RunReader(whole).read()


def said(run) -> str:
    return " ".join(" ".join(Reader(run_page(run)).text).split())


def as_before(task, **more):
    """A task that has no answer."""
    why = [Reason("unanswered", "The run has not come to it.")]
    return replace(task, predictions=None, ranked=[], attempts=[], stage="", reasons=why, **more)


def test_the_page_of_a_real_run(run):
    page = Reader(run_page(run))
    text = " ".join(" ".join(page.text).split())
    solved = run.score("solved")
    for said in (
        f"{solved.tasks_solved} of 12 tasks",
        "leak audit passed",
        run.task_set.digest,
        "adapt.steps",
        run.facts["commit"][:12],
        "worker 0",
    ):
        assert said in text, said
    assert "kaggle." not in text and "<td>stages</td>" not in run_page(run)  # of releases and trainings
    for i, task in enumerate(run.tasks):
        assert json.loads(page.scripts[f"t{i}"])["id"] == task.task.id
        assert task.task.id in page.text
    assert page.loaded == []


def test_what_comes_from_files_is_text_whatever_is_in_it(run):
    evil = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)><!--"
    task = run.tasks[0]
    named = replace(task, task=Task(evil, task.task.train, task.task.test), error=evil, fallback="unadapted")
    changed = replace(
        run,
        name=evil,
        tasks=[named, *run.tasks[1:]],
        settings={**run.settings, "tasks.spec": evil},
        task_set=TaskSet(evil, run.task_set.tasks, run.task_set.solutions, chosen=evil),
        audit=(False, evil),
    )
    page = Reader(run_page(changed))
    content = json.loads(page.scripts["t0"])
    assert (content["id"], content["error"]) == (evil, evil)
    assert sum(evil in text for text in page.text) >= 5  # names, table, settings, audit
    assert "owned" not in page.scripts["code"]
    assert page.loaded == []


def test_no_script_runs_but_the_pages_own(run):
    """By its hash in the policy; see `test_browser.py` for what a browser makes of it."""
    page = run_page(run)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    code = Reader(page).scripts["code"]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_every_row_has_all_columns(run):
    rows = re.findall(r"<tr data-i=.*?</tr>", run_page(run), re.DOTALL)
    assert len(rows) == 12 and all(row.count("<td") == len(COLUMNS) for row in rows)


def test_a_run_without_solutions_or_answers_has_a_page(run):
    blank = [replace(task, solution=None, reasons=[], predictions=None, ranked=[], attempts=[]) for task in run.tasks]
    bare = replace(run, tasks=blank, summary={}, facts={}, sessions=[], is_running=True, audit=(None, "no leak audit"))
    text = " ".join(" ".join(Reader(run_page(bare)).text).split())
    assert "0 of 12 tasks answered" in text and "this run's log has no jobs" in text
    assert "Where the next point is" not in text


@pytest.mark.parametrize("is_running", [True, False])
def test_while_tasks_have_no_answer_those_that_have_one_are_scored(run, is_running):
    right = replace(run.tasks[5], attempts=[(cells, cells) for cells in run.tasks[5].solution], reasons=[])
    tasks = [*map(as_before, run.tasks[:5]), right, *run.tasks[6:]]
    partial = replace(run, tasks=tasks, is_running=is_running, folder="runs/x")
    solved = 1 + sum(all(task.solved) for task in run.tasks[6:])
    text, page = said(partial), run_page(partial)
    assert f"{solved} of 7 tasks tasks solved by two attempts, of those answered{' so far' * is_running}:" in text
    assert f"with those without an answer as not solved {solved} of 12 tasks" in text
    assert f"<title>whole: {solved} of 7 solved</title>" in page
    assert 'data-kind="unanswered"' not in page and f"{7 - solved} tasks not solved" in text
    of = "Not finished: 7 of 12 tasks answered, and no process works on it; bin/solve --out runs/x goes on."
    assert (of in text) is not is_running
    assert "answered so far" not in said(run) and "Not finished" not in said(run)


def test_answers_of_the_cheap_pass_are_something_to_go_on_with(run):
    tasks = [replace(run.tasks[0], stage="unadapted"), *run.tasks[1:]]
    (warning,) = warnings_of(replace(run, tasks=tasks, folder="runs/x"))
    assert "12 of 12 tasks answered, 1 of them by the cheap pass, without adaptation" in warning
    assert warnings_of(run) == []


def test_a_damaged_file_is_said(run):
    tasks = [as_before(run.tasks[0], damaged=["tasks/a.json"]), *run.tasks[1:]]
    (warning,) = warnings_of(replace(run, tasks=tasks, damaged=["tasks/a.json"], folder="runs/x"))
    assert warning.startswith("1 file cannot be read (tasks/a.json), and what they said is missing here; bin/solve")
    page = run_page(replace(run, tasks=tasks))
    assert "of those answered" in page and ">!</i>its file cannot be read <b>1</b>" in page


def test_a_search_finds_a_task_by_the_names_of_its_reasons(run):
    why = [Reason("wrong-shape", "Most."), Reason("memorised", "By heart.")]
    page = run_page(replace(run, tasks=[replace(run.tasks[0], reasons=why)]))
    (words,) = re.findall(r'data-words="([^"]+)"', page)
    assert all(KINDS[reason.kind] in words for reason in why)


def test_one_task_is_a_task(run):
    assert "1 task, 0 to 2" in said(replace(run, summary={"expected": [1.2, 0, 2]}))


def test_bars_and_times_have_names_for_those_who_do_not_see_them(run):
    page = run_page(replace(run, tasks=[replace(run.tasks[0], reasons=[Reason("wrong-shape", "Most.")])]))
    assert f'aria-label="{KINDS["wrong-shape"]}: 1"' in page
    jobs = (Job("adapt", 0, ("a",), 0.0, 50.0, False), Job("ask", 0, ("b",), 50.0, 60.0, True))
    page = run_page(replace(run, sessions=[Session(0.0, None, 1, jobs)]))
    assert 'role="img" aria-label="worker 0, 60 s in all: 1 job of adapting, 50 s; 1 job failed"' in page


def test_the_timeline_shows_who_did_what_when(run):
    """100 s to the deadline: half of it adapting, then a job that failed, and a second call without one."""
    jobs = (Job("adapt", 0, ("<a>",), 1000.0, 1050.0, False), Job("ask", 1, ("b", "c"), 1060.0, 1060.0, True))
    second = Session(5000.0, None, 1, (Job("ask", 0, ("d",), 5010.0, 5020.0, False),))
    page = run_page(replace(run, sessions=[Session(1000.0, 1100.0, 2, jobs), second]))
    assert 'class="job adapt" style="left:0.0%;width:50.0%" title="adapting to &lt;a&gt;: 50 s"' in page
    assert 'class="job ask failed" style="left:60.0%;width:0.0%" title="asking b, c: failed"' in page
    assert 'class="job limit" style="left:100.0%"' in page
    assert 'class="job ask" style="left:50.0%;width:50.0%" title="asking d: 10 s"' in page
    text = " ".join(" ".join(Reader(page).text).split())
    assert all(said in text for said in ("call 1", "call 2", "worker 1", "a job that failed", "the deadline", "1:30"))


def test_400_tasks_with_64_candidates_each_stay_small(run, arc):
    """The evaluation tasks at their sizes; candidates are noisy copies of a solution, scored under 32 views."""
    rng = np.random.default_rng(0)
    tasks, solutions = arc["evaluation"].tasks, arc["evaluation"].solutions
    facts = []
    for task in tasks:
        candidates = []
        for k in range(64):
            of = solutions[task.id][k % len(task.test)]
            of = of if of.size > 1 else np.zeros((1, 2), np.uint8)
            noise = rng.random(of.shape) < 0.1 * rng.random()
            cells = np.where(noise, rng.integers(10, size=of.shape), of).astype(np.uint8)
            cells.flat[:2] = k // 10, k % 10  # no two are equal
            scores = tuple((-100 * rng.random(32)).tolist())
            candidates.append(Candidate(k % len(task.test), freeze(cells), (k % 32,), (), scores))
        facts.append(facts_of(task, Predictions((0,) * 32, tuple(candidates)), solutions[task.id]))
    assert len(facts) == 400
    page = run_page(replace(run, tasks=facts))
    assert len(page.encode()) < MOST_BYTES
    assert all(task.candidates == 64 for task in facts)


def test_a_task_without_candidates_has_a_row(run, rng):
    task = flip_task(rng)
    failed = replace(run.tasks[0], task=task, predictions=Predictions((), ()), ranked=[[]], fallback="placeholder")
    assert "fell back" in run_page(replace(run, tasks=[failed]))
