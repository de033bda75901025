"""A run's folder as values: what the run itself says, also while it goes on and of earlier versions."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from pages import facts_of, text_of
from toys import flip_task, grid, random_grid

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.errors import UserError
from arc_solver.files import lock
from arc_solver.puzzles.tasks import freeze
from arc_solver.report.collect import NATS, RunReader, grid_text
from arc_solver.report.page import run_page


@pytest.fixture
def run_dir(whole, tmp_path):
    """A run that a test may change."""
    return shutil.copytree(whole, tmp_path / "run")


def test_a_run_says_what_its_summary_says(whole):
    run, summary = RunReader(whole).read(), json.loads((whole / "summary.json").read_text())
    for which, key in (("first", "pass@1"), ("solved", "score"), ("covered", "coverage")):
        assert run.score(which).to_json() == summary[key], which
    assert run.answered == summary["answered"] == len(run.tasks) == 12
    assert not run.is_running and not run.damaged and run.audit[0] is True
    assert {task.state for task in run.tasks} <= {"solved", "covered", "missed"}
    assert all(bool(task.reasons) == (task.state != "solved") for task in run.tasks)
    assert run.unusual["adapt.steps"] == (20, 240)
    session, *others = run.sessions  # other tests may have continued it, with nothing left to do
    assert not any(other.jobs for other in others)
    for kind in ("adapt", "ask"):
        assert sorted(i for job in session.jobs if job.kind == kind for i in job.tasks) == sorted(
            task.task.id for task in run.tasks
        )
    assert all(session.began <= job.began <= job.ended <= session.ended and not job.failed for job in session.jobs)


def test_the_attempts_are_those_of_the_submission(whole):
    submission = json.loads((whole / "submission.json").read_text())
    for task in RunReader(whole).read().tasks:
        said = [[both["attempt_1"], both["attempt_2"]] for both in submission[task.task.id]]
        assert [[grid.tolist() for grid in both] for both in task.attempts] == said


def test_a_run_that_goes_on_is_read_again_only_where_it_changed(run_dir):
    first, second = sorted((run_dir / "tasks").iterdir())[:2]
    kept = first.read_text()
    first.unlink()
    reader = RunReader(run_dir)
    before = reader.read()
    assert [task.state for task in before.tasks if task.predictions is None] == ["waiting"]
    assert before.answered == 11
    first.write_text(kept)
    second.write_text("{")
    held = lock(run_dir / "lock")
    after = reader.read()
    held.close()
    assert after.is_running and not reader.read().is_running
    assert after.damaged == reader.read().damaged == [f"tasks/{second.name}"]  # also where it is not read again
    changed = [a.task.id for a, b in zip(before.tasks, after.tasks, strict=True) if a is not b]
    assert sorted(changed) == [first.stem, second.stem]


@pytest.mark.parametrize("content", [b'{"task": "task0', b"{}", b"[]", b"", b"\xff\xfe\x00"])
def test_a_damaged_file_is_none_that_was_not_reached_and_is_not_scored(run_dir, content):
    files = sorted((run_dir / "tasks").iterdir())
    files[0].write_bytes(content)
    files[1].unlink()
    run = RunReader(run_dir).read()
    states = {task.task.id: task.state for task in run.tasks}
    assert (states[files[0].stem], states[files[1].stem]) == ("damaged", "waiting")
    assert run.damaged == [f"tasks/{files[0].name}"]
    (says,) = [task.reasons[0].says for task in run.tasks if task.state == "damaged"]
    assert says == "Its file cannot be read."
    assert [len(run.score("solved", of_all=of_all).per_task) for of_all in (False, True)] == [10, 12]


def test_where_the_best_stage_is_damaged_the_one_before_it_counts(run_dir):
    file = next((run_dir / "tasks").iterdir())
    (run_dir / "again" / file.name).write_text("{")
    run = RunReader(run_dir).read()
    (task,) = (task for task in run.tasks if task.task.id == file.stem)
    assert (task.stage, run.damaged, run.answered) == ("tasks", [f"again/{file.name}"], 12)
    assert task.seconds == json.loads(file.read_text())["seconds"]


def test_only_the_smallest_tasks_of_a_smoke_run_are_wanted(run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    config["run"]["smoke"] = 3
    (run_dir / "config.json").write_text(json.dumps(config))
    run = RunReader(run_dir).read()
    most = max(task.task.tokens for task in run.wanted)
    assert len(run.wanted) == 3 and sum(task.task.tokens < most for task in run.tasks) < 3


def test_wrong_cells_are_those_of_the_better_attempt(rng):
    right = (grid("12", "34"), grid("5"))

    def wrong(*answers):
        found = [
            Candidate(t, cells, (0,), (), (-1.0 - k,)) for t, both in enumerate(answers) for k, cells in enumerate(both)
        ]
        return facts_of(flip_task(rng, tests=2), Predictions((0,), tuple(found)), right).wrong_cells

    assert wrong([grid("00", "00"), grid("12", "30")], [grid("5")]) == 1
    assert wrong([grid("00", "00"), grid("1")], [grid("4")]) == 5
    assert wrong([grid("12", "34")], [grid("5")]) == 0
    assert wrong([grid("12", "34")], [grid("55"), grid("5", "5")]) is None


def test_a_run_of_an_earlier_version_has_no_curves_and_no_jobs(run_dir):
    for file in (run_dir / "tasks").iterdir():
        content = json.loads(file.read_text())
        del content["adaptation"]["losses"]
        file.write_text(json.dumps(content))
    lines = (run_dir / "log.jsonl").read_text().splitlines()
    (run_dir / "log.jsonl").write_text("".join(line + "\n" for line in lines if '"event": "task"' in line) + '{"ev')
    run = RunReader(run_dir).read()
    assert run.sessions == [] and run.answered == 12


def test_the_best_stage_counts_and_all_take_time(run_dir):
    file = next((run_dir / "tasks").iterdir())
    content = json.loads(file.read_text())
    (run_dir / "again" / file.name).write_text(json.dumps(content | {"seconds": 3.0}))
    (task,) = (task for task in RunReader(run_dir).read().tasks if task.task.id == file.stem)
    assert (task.stage, task.seconds) == ("again", content["seconds"] + 3.0)


def test_a_task_that_only_the_cheap_pass_came_to_says_so(run_dir):
    file = next((run_dir / "tasks").iterdir())
    content = json.loads(file.read_text())
    file.unlink()
    for answer in content["candidates"]:
        answer["grid"] = [[9, 9, 9]]
    content |= {"adaptation": None, "candidates": content["candidates"][:1]}
    (run_dir / "unadapted" / file.name).write_text(json.dumps(content))
    run = RunReader(run_dir).read()
    (task,) = (task for task in run.tasks if task.task.id == file.stem)
    assert (task.stage, task.main_reason) == ("unadapted", "not-adapted")
    text = text_of(run_page(run))
    assert "adapted to 11 of 12" in text and f"bin/solve --out {run_dir} goes on" in text
    assert "adapted to 11 of 12 tasks; bin" not in text_of(run_page(replace(run, is_running=True)))


def logged(run_dir, *records):
    with (run_dir / "log.jsonl").open("a") as log:
        log.writelines(json.dumps(record) + "\n" for record in records)


def test_what_failed_is_said_of_its_tasks_and_of_the_run(run_dir):
    reader = RunReader(run_dir)
    before = reader.read()
    first, second = [task.task.id for task in before.tasks[:2]]
    error = "Traceback ...\nRuntimeError: worker 0 ended (signal 9)\n"
    assert before.failures == [] and json.loads(before.tasks[0].text)["failures"] == []
    logged(
        run_dir,
        {"event": "failure", "job": "adapt", "tasks": [first, second], "attempt": 1, "error": error},
        {"event": "failure", "job": "ask", "tasks": [first], "attempt": 1, "error": None},
    )
    run = reader.read()
    assert [json.loads(task.text)["failures"] for task in run.tasks[:3]] == [
        ["adapting together with 1 other task: RuntimeError: worker 0 ended (signal 9)", "asking: nobody says why"],
        ["adapting together with 1 other task: RuntimeError: worker 0 ended (signal 9)"],
        [],
    ]
    said = f"jobs that failed 2: {first}, {second}: adapting together with 1 other task: RuntimeError: worker 0 ended"
    assert said in text_of(run_page(run))


def test_a_run_that_was_continued_says_what_is_of_a_time_budget(run_dir):
    assert "time budget" not in text_of(run_page(RunReader(run_dir).read())).partition("All settings")[0]
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    begin = next(record for record in records if record["event"] == "begin")
    jobs = [record for record in records if record["event"] == "job"]
    tasks = [record for record in records if record["event"] == "task"]
    (run_dir / "log.jsonl").unlink()
    cheap = {**tasks[5], "stage": "unadapted"}
    logged(run_dir, {**begin, "deadline": begin["time"] + 60}, jobs[0], cheap, *tasks[:5], begin, *jobs[1:], *tasks[4:])
    file = run_dir / "tasks" / f"{tasks[0]['task']}.json"
    content = json.loads(file.read_text())
    content["adaptation"]["ended"] = "deadline"
    file.write_text(json.dumps(content))
    (run_dir / "tasks" / f"{tasks[6]['task']}.json").rename(run_dir / "unadapted" / f"{tasks[6]['task']}.json")
    said = "in 1 of 2 calls, which gave 5 of the 12 answers, 1 of them in the cheap pass; 1 adaptation stopped by the"
    assert said in text_of(run_page(RunReader(run_dir).read()))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run of bin/solve"):
        RunReader(tmp_path)


def drawn(content: dict) -> list[list[tuple]]:
    """The candidates as the page's script reads them."""
    shown = []
    for found in content["candidates"]:
        grids = []
        for one in found:
            if isinstance(one["g"], str):
                cells = [[int(digit) for digit in row] for row in one["g"].split("/")]
            else:
                cells = [list(row) for row in grids[0]]
                width, changes = len(cells[0]), one["g"]
                for cell, colour in zip(changes[::2], changes[1::2], strict=True):
                    cells[cell // width][cell % width] = colour
            grids.append(cells)
        shown.append([(g, one["v"], one["s"], one["p"]) for g, one in zip(grids, found, strict=True)])
    return shown


def test_the_short_form_of_candidates_loses_nothing_that_is_shown(rng):
    """Log-probabilities to a hundredth of a nat; grids that are like the first, and others."""
    for _ in range(50):
        task, candidates, seen = flip_task(rng), [], set()
        first = random_grid(rng, 8)
        for _ in range(6):
            cells = random_grid(rng, 8) if rng.random() < 0.3 else first.copy()
            cells = cells.copy()
            cells[rng.random(cells.shape) < 0.2] = rng.integers(10)
            if grid_text(cells) not in seen:
                seen.add(grid_text(cells))
                scores = tuple(None if rng.random() < 0.2 else -float(rng.random() * 300) for _ in range(4))
                views = tuple(np.flatnonzero(rng.random(4) < 0.5).tolist())
                candidates.append(Candidate(0, freeze(cells), views, views[:1], scores))
        facts = facts_of(task, Predictions((0, 1, 2, 3), tuple(candidates)))
        (shown,) = drawn(json.loads(facts.text))
        assert len(shown) == len(candidates)
        for (cells, views, searched, scores), entry in zip(shown, facts.ranked[0], strict=True):
            of = entry.candidate
            assert (cells, views, searched) == (of.grid.tolist(), list(of.views), list(of.searched))
            for short, whole_score in zip(scores, of.log_probabilities, strict=True):
                assert (short is None) == (whole_score is None)
                assert short is None or abs(whole_score + short / NATS) <= 0.5 / NATS + 1e-9
