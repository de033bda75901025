"""Which jobs there are, in which order, and what follows from failures: with a worker that only pretends."""

import gc
import json
import time
import tracemalloc
from dataclasses import dataclass, field

import numpy as np
import pytest
from toys import flip_task, grid

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.config import Config
from arc_solver.models.adapters import Adapter
from arc_solver.models.hardware import pick_device
from arc_solver.puzzles.tasks import Pair, Task, TaskSet
from arc_solver.solving.adapt import Adaptation, group_by_length
from arc_solver.solving.budget import Budget, Work
from arc_solver.solving.executors import InProcess, JobResult
from arc_solver.solving.journal import Journal, open_journal
from arc_solver.solving.scheduler import FinishedTask, Scheduler
from arc_solver.solving.worker import AdaptJob, JobOutput, ResourceUsage, prediction_groups

CPU = pick_device("cpu")
CONFIG = Config.model_validate(
    {
        "adapt": {"steps": 10, "together": 2},
        "predict": {"views": 4, "score": False},
        "vote": {"rule": "votes"},
    }
)


@dataclass
class Pretender:
    """Adapts to nothing, and mirrors test inputs. It fails where it is told to, and notes what it was asked."""

    fails: dict[tuple[str, str], int] = field(default_factory=dict)  # ("adapt" or "ask", task id) -> how often
    bare: bool = True  # answers without an adapter
    disagrees: frozenset[str] = frozenset()
    token_s: float = 0.0  # what a token takes, by the clock
    jobs: list = field(default_factory=list)

    def run(self, job):
        kind = "adapt" if isinstance(job, AdaptJob) else "ask"
        self.jobs.append((kind, job.stage, tuple(task.id for task in job.tasks), job.seconds))
        for task in job.tasks:
            if self.fails.get((kind, task.id), 0) > 0:
                self.fails[kind, task.id] -= 1
                raise RuntimeError(f"{task.id} cannot be {kind}ed")
            if kind == "ask" and job.adapters[0] is None and not self.bare:
                raise RuntimeError("nothing works")
        seconds, self.share = 0.001, 1.0
        if self.token_s:
            tokens = sum(task.tokens for task in job.tasks) * (120 if kind == "adapt" else job.config.views)
            seconds = min(tokens * self.token_s, job.seconds)
            self.share = seconds / (tokens * self.token_s)
            time.sleep(seconds)
        return JobOutput([getattr(self, kind)(task, job) for task in job.tasks], ResourceUsage(seconds, 0.0, 1, 1))

    def adapt(self, task, job):
        return Adaptation(Adapter(1, 1.0, {}), 10, int(task.tokens * 40 * self.share), 1.0, 0.1, 0.01, 0, 0.5, "steps")

    def ask(self, task, job):
        views = range(job.config.views)
        right = [np.ascontiguousarray(g[:, ::-1]) for g in task.test]
        if task.id in self.disagrees and job.stage != "again":
            answers = [(t, grid(str(v)), (v,)) for t in range(len(right)) for v in views]
        else:
            answers = [(t, g, tuple(views)) for t, g in enumerate(right)]
        scores = (None,) * len(views)
        return Predictions((0,) * len(views), tuple(Candidate(t, g, v, (), scores) for t, g, v in answers))


def some_tasks(count, seed=0, tests=1) -> TaskSet:
    rng = np.random.default_rng(seed)
    tasks = tuple(flip_task(rng, f"task{i}", tests=tests) for i in range(count))
    return TaskSet("toy", tasks, {t.id: tuple(np.ascontiguousarray(g[:, ::-1]) for g in t.test) for t in tasks})


def journal_of(folder, found, config=CONFIG) -> Journal:
    (folder / "model").mkdir(exist_ok=True)
    return open_journal(folder / "run", found, config, [folder / "model"])


def run(journal: Journal, worker, config=CONFIG, seconds=np.inf) -> list[FinishedTask]:
    deadline = time.monotonic() + seconds
    groups = group_by_length(journal.task_set.tasks, config.adapt, CPU)
    scheduler = Scheduler(groups, lambda tasks: prediction_groups(tasks, CPU), config, journal, Budget(1, deadline))
    finished = []
    with InProcess(lambda number: worker) as executor:
        for done in executor.map_unordered(scheduler.jobs(), deadline):
            finished += scheduler.handle_result(done)
            assert 0 <= scheduler.share_done <= 1
    if seconds == np.inf:
        assert scheduler.share_done == 1
        assert scheduler.waiting == (0, 0)
    return finished


def stands(journal) -> dict[str, tuple]:
    return {i: (s.stage, s.adapted, s.fallback, all(s.solved)) for i, s in sorted(journal.statuses.items())}


def events(journal) -> list[dict]:
    return [json.loads(line) for line in (journal.run_dir / "log.jsonl").read_text().splitlines()]


def test_what_all_of_it_is_likely_to_take(tmp_path):
    """Groups of 14, 8 and 6 seconds on two workers."""
    with journal_of(tmp_path, some_tasks(5)) as journal:
        groups = group_by_length(journal.task_set.tasks, CONFIG.adapt, CPU)
        scheduler = Scheduler(groups, lambda tasks: prediction_groups(tasks, CPU), CONFIG, journal, Budget(2))
        assert sum(scheduler.planned, Work()) == scheduler.all and len(scheduler.planned) == len(groups)
        scheduler.planned = [Work(adapting=3), Work(6, 3), Work(adapting=4)]
        assert scheduler.expected_s(2.0) == 14.0
        scheduler.budget.record(Work(asking=10), 100.0)
        assert scheduler.expected_s(2.0) == 42.0
        scheduler.planned = []
        assert scheduler.expected_s(2.0) == 0.0


GOOD = ("tasks", True, None, True)


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    """The pretender's adapters have none, which no file can hold."""
    monkeypatch.setattr("arc_solver.solving.journal.save_adapter", lambda adapter, folder: folder.mkdir(parents=True))
    monkeypatch.setattr("arc_solver.solving.journal.load_adapter", lambda folder: Adapter(1, 1.0, {}))


def test_the_share_that_is_done_grows_with_the_steps_of_running_jobs(tmp_path):
    """From the first step on, never back, and not to the end before they have ended."""
    found, worker = some_tasks(3), Pretender()
    with journal_of(tmp_path, found) as journal:
        groups = [[task] for task in found.tasks]
        scheduler = Scheduler(groups, lambda tasks: prediction_groups(tasks, CPU), CONFIG, journal, Budget(1))
        shares = [scheduler.share_done]
        for job in scheduler.jobs():
            planned = sum(scheduler._work(job))
            for done in (0.01, 0.5, 1.5):  # early stop, and replies of another length than was thought
                scheduler.note_progress(job, done * planned)
                shares.append(scheduler.share_done)
            assert shares[-1] < 1
            scheduler.handle_result(JobResult(job, worker.run(job)))
            scheduler.note_progress(job, planned)  # too late
            shares.append(scheduler.share_done)
    assert shares == sorted(shares)
    assert len(set(shares)) == len(shares)
    assert shares[0] == 0
    assert shares[-1] == 1


def test_all_tasks_are_adapted_and_asked_the_longest_first(tmp_path):
    found, worker = some_tasks(7, tests=2), Pretender()
    with journal_of(tmp_path, found) as journal:
        assert len(run(journal, worker)) == 7
        assert stands(journal) == {task.id: GOOD for task in found.tasks}
    adapted = [ids for kind, _, ids, _ in worker.jobs if kind == "adapt"]
    assert sorted(i for ids in adapted for i in ids) == sorted(journal.tasks)
    size = {task.id: task.tokens for task in found.tasks}
    weights = [sum(size[i] for i in ids) for ids in adapted]
    assert weights == sorted(weights, reverse=True)
    assert any(len(ids) > 1 for ids in adapted)
    assert all(seconds == np.inf for *_, seconds in worker.jobs)


def test_what_is_done_is_not_done_again(tmp_path):
    """A run that ends after any job and is continued does every job once, and the same ones."""
    found, whole = some_tasks(5), Pretender()
    (tmp_path / "whole").mkdir()
    with journal_of(tmp_path / "whole", found) as journal:
        run(journal, whole)
    for most in range(1, len(whole.jobs) + 1):
        folder = tmp_path / str(most)
        folder.mkdir()

        class Enough(BaseException):
            pass

        class Ends(Pretender):
            def run(self, job):
                if len(self.jobs) == most:  # noqa: B023
                    raise Enough
                return super().run(job)

        jobs = []
        for _ in range(len(whole.jobs)):
            worker = Ends()
            try:
                with journal_of(folder, found) as journal:
                    run(journal, worker)
            except Enough:
                jobs += worker.jobs
                continue
            jobs += worker.jobs
            break
        assert sorted(jobs) == sorted(whole.jobs)
        assert stands(journal) == {task.id: GOOD for task in found.tasks}


@pytest.mark.parametrize(
    ("fails", "bare", "stands_as", "failures"),
    [
        ({("adapt", "task1"): 1}, True, GOOD, 1),
        ({("ask", "task1"): 1}, True, GOOD, 1),
        ({("adapt", "task1"): 9}, True, ("tasks", False, "unadapted", True), 3),
        ({("ask", "task1"): 2}, True, ("tasks", False, "unadapted", True), 2),
        ({("ask", "task1"): 9}, True, ("tasks", False, "placeholder", False), 4),
        ({("adapt", "task1"): 9}, False, ("tasks", False, "placeholder", False), 5),
    ],
)
def test_failure_is_an_answer(tmp_path, fails, bare, stands_as, failures):
    """One task fails so and so often: it goes down the ladder, is logged at each step, and the others do not notice."""
    found, worker = some_tasks(4), Pretender(fails, bare)
    with journal_of(tmp_path, found) as journal:
        finished = len(run(journal, worker))
        expected = {task.id: GOOD for task in found.tasks} | {"task1": stands_as}
        assert stands(journal) == expected
        said = [event for event in events(journal) if event["event"] == "failure"]
        assert all("task1" in event["tasks"] and "RuntimeError" in event["error"] for event in said)
        assert finished == 4
        shared = [event for event in said if len(event["tasks"]) > 1]
        assert len(said) - len(shared) <= failures
        assert len(shared) <= 1
    if stands_as[2]:
        content = json.loads((journal.run_dir / "tasks" / "task1.json").read_text())
        assert "RuntimeError" in content["error"]


def test_a_placeholder_is_tried_again_when_the_run_is_continued(tmp_path):
    found = some_tasks(3)
    with journal_of(tmp_path, found) as journal:
        run(journal, Pretender({("ask", "task1"): 9}))
        assert stands(journal)["task1"][2] == "placeholder"
    worker = Pretender()
    with journal_of(tmp_path, found) as journal:
        run(journal, worker)
        assert stands(journal) == {task.id: GOOD for task in found.tasks}
    assert [(kind, ids) for kind, _, ids, _ in worker.jobs] == [("ask", ("task1",))]  # what it learnt was kept


def test_without_adaptation_all_are_only_asked(tmp_path):
    found, worker = some_tasks(3), Pretender()
    config = CONFIG.model_copy(update={"adapt": CONFIG.adapt.model_copy(update={"enabled": False})})
    with journal_of(tmp_path, found, config) as journal:
        run(journal, worker, config)
        assert set(stands(journal).values()) == {("tasks", False, None, True)}
    assert {kind for kind, *_ in worker.jobs} == {"ask"}


def test_with_little_time_all_have_a_cheap_answer_and_the_smallest_more(tmp_path):
    """3 s for what takes 24 s or so: the end is in time, and what was not adapted to has the cheap pass's answer."""
    found = some_tasks(12)
    work = sum(task.tokens for task in found.tasks) * 124
    worker = Pretender(token_s=24 / work)
    began = time.monotonic()
    with journal_of(tmp_path, found) as journal:
        run(journal, worker, seconds=3.0)
        assert time.monotonic() - began < 12  # 3 s and, on a busy machine, some more; half of the 24
        kinds = [(kind, stage) for kind, stage, *_ in worker.jobs]
        assert kinds[:12] == [("ask", "unadapted")] * 12
        assert all(status[3] for status in stands(journal).values())
        adapted = [i for i, status in stands(journal).items() if status[1]]
    assert 2 <= len(adapted) < 12
    size = {task.id: task.tokens for task in found.tasks}
    rest = [size[i] for i in size if i not in adapted]
    assert np.mean([size[i] for i in adapted]) < np.mean(rest)
    assert all(seconds < 3 for *_, seconds in worker.jobs)


def test_with_time_left_undecided_tasks_are_tried_once_more(tmp_path):
    found = some_tasks(6)
    worker = Pretender(disagrees=frozenset({"task2", "task4"}), token_s=1e-7)
    with journal_of(tmp_path, found) as journal:
        run(journal, worker, seconds=20.0)
        status = stands(journal)
    again = [(kind, ids) for kind, stage, ids, _ in worker.jobs if stage == "again"]
    assert sorted(again) == [("adapt", ("task2",)), ("adapt", ("task4",)), ("ask", ("task2",)), ("ask", ("task4",))]
    for i in ("task2", "task4"):
        assert status[i] == ("again", True, None, True)
        content = json.loads((journal.run_dir / "again" / f"{i}.json").read_text())
        assert len(content["geometries"]) == 8  # the views of both rounds
    assert status["task0"] == GOOD


def test_very_many_tasks_take_no_memory(tmp_path):
    """3,000 tasks, of whose answers only the attempts are kept in memory."""
    pair = Pair(grid("123", "456"), grid("321", "654"))
    tasks = tuple(Task(f"{i:05d}", (pair, pair), (pair.input,)) for i in range(3000))
    config = CONFIG.model_copy(update={"adapt": CONFIG.adapt.model_copy(update={"enabled": False})})
    seen = []
    tracemalloc.start()
    with journal_of(tmp_path, TaskSet("many", tasks, {}), config) as journal:
        one_by_one = [(task,) for task in tasks]
        scheduler = Scheduler(one_by_one, lambda tasks: prediction_groups(tasks, CPU), config, journal, Budget(1))
        worker = Pretender()
        with InProcess(lambda number: worker) as executor:
            for done in executor.map_unordered(scheduler.jobs()):
                scheduler.handle_result(done)
                worker.jobs.clear()
                if len(journal.statuses) in (1000, 3000):
                    gc.collect()  # what waits for it depends on how much there is from other tests
                    seen.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(journal.statuses) == 3000
    assert (seen[-1] - seen[0]) / 2000 < 4000  # bytes a task
