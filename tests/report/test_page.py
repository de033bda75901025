"""The page of a run: whole, small, and of data that stays data."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from test_collect import facts_of
from toys import flip_task

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.puzzles.tasks import Task, TaskSet, freeze
from arc_solver.report.collect import RunReader
from arc_solver.report.page import COLUMNS, run_page

MOST_BYTES = 15_000_000


class Reader(HTMLParser):
    """The text of all table cells and headings, and of the scripts by their id; addresses that would be loaded."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.scripts, self.loaded, self.inside = [], {}, [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.inside = [tag, attributes]
        self.loaded += [attributes[name] for name in ("src", "srcset", "data", "poster") if name in attributes]
        self.loaded += [attributes["href"]] if tag in ("link", "base") and "href" in attributes else []

    def handle_endtag(self, tag):
        self.inside = []

    def handle_data(self, data):
        if self.inside and self.inside[0] == "script":
            name = self.inside[1].get("id", "code")
            self.scripts[name] = self.scripts.get(name, "") + data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def run(whole):
    return RunReader(whole).read()


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
