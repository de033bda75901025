"""Hands out the jobs of a run in order, and decides what follows from each result: retry, split, fall back.

Without a time budget every group of tasks is adapted and asked, the longest first, so that the workers end together.

With one, a cheap pass first asks all tasks without adaptation. Then groups are adapted and asked, the cheapest first:
there a minute solves most. What has no time left keeps the answer of the cheap pass. And where there is time in the
end, tasks whose views disagreed are adapted and asked once more, with other samples and views.

*Failure is an answer.* A group that raises is halved: memory may suffice then, and one bad task spoils no other. One
task alone is tried twice, then asked without an adapter, and if that fails too it has a placeholder. When a worker
died, the job is first tried again as it is.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..answers import Predictions
from ..config import Config
from ..puzzles import Task
from .adapt import Adaptation, planned_steps
from .budget import TRAINING, Budget, Work
from .executors import JobResult
from .journal import Journal, TaskResult, TaskStatus
from .worker import AdaptJob, Job, PredictJob, ResourceUsage

FIRST_VIEWS = 2  # of the cheap pass
FIRST_SHARE = 0.15  # of the time may go into it
UNDECIDED = 0.5  # share of the views that agree on the first attempt, below which a task is tried again
TRIES = 2
MOST_DONE = 0.95  # of a job that has not ended

Group = tuple[Task, ...]


@dataclass(frozen=True, eq=False)
class FinishedTask:
    """A task that has just got a result, for progress output."""

    result: TaskResult
    status: TaskStatus
    stage: str
    usage: ResourceUsage | None  # of the job that answered it


class Scheduler:
    """Hands out jobs, takes what became of them, and keeps results in the journal.

    Args:
        groups: the tasks that are adapted at once, finished ones among them: what a task learns depends on the others
            in the last bits.
        chunks: how tasks are asked: which of them at once.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Task]],
        chunks: Callable[[Sequence[Task]], list[Group]],
        config: Config,
        journal: Journal,
        budget: Budget,
    ):
        self.config, self.journal, self.budget, self.chunks = config, journal, budget, chunks
        self.learnt: dict[tuple[str, int], Adaptation] = {}  # by task and round, until it was asked
        self.tries: Counter[tuple[Any, ...]] = Counter()
        self.errors: dict[str, str] = {}  # traceback of a task's last failure
        self.running: dict[int, tuple[Job, float]] = {}  # by id, and when it must have ended
        self.shares: dict[int, float] = {}  # of them that is done, by id
        self.ready: deque[Job] = deque()  # what follows from what was done
        left = [tuple(group) for group in groups if any(not journal.done(task.id) for task in group)]
        self.groups = deque(sorted(left, key=self._rank))
        self.planned = [sum(self._work_of_group(group), Work()) for group in left]  # of each group
        self.waiting = sum(self.planned, Work())  # not begun yet
        self.all = self.waiting
        self.first = deque(self._of_cheap_pass())
        self.cheap_until = 0.0  # known once a worker is up and has ended a job
        self.again: deque[Task] | None = None  # filled when all else has begun

    @property
    def share_done(self) -> float:
        left = self.budget.equivalent_tokens(self.waiting)
        for key, (job, _) in self.running.items():
            if job.stage == "tasks":
                left += (1 - self.shares.get(key, 0.0)) * self.budget.equivalent_tokens(self._work(job))
        return min(1.0, max(0.0, 1 - left / max(self.budget.equivalent_tokens(self.all), 1.0)))

    def expected_s(self, s_per_trained_token: float) -> float:
        """What all of it takes, if a token of training takes so long on a worker and no task stops early."""
        s_per_asked = self.budget.s_per_predicted_token or s_per_trained_token / TRAINING
        busy_s = [0.0] * self.budget.workers
        for seconds in sorted(
            (w.adapting * s_per_trained_token + w.asking * s_per_asked for w in self.planned), reverse=True
        ):
            busy_s[busy_s.index(min(busy_s))] += seconds
        return max(busy_s)

    def jobs(self) -> Iterator[Job | None]:
        """What is to be done; None while that depends on what is being done."""
        while True:
            job = self._next() if self.budget.left_s > 0 else None
            if job is not None:
                self.running[id(job)] = job, time.monotonic() + job.seconds
                yield job
            elif self.running:
                yield None
            else:
                return

    def note_progress(self, job: Job, tokens: float) -> None:
        """So many tokens of a running job went through the model. More than were thought do not make it done."""
        if id(job) in self.running:
            self.shares[id(job)] = min(MOST_DONE, tokens / max(1.0, sum(self._work(job))))

    def handle_result(self, done: JobResult) -> list[FinishedTask]:
        """Saves the results of a job, or queues its retries."""
        job, _ = self.running.pop(id(done.job))
        self.shares.pop(id(done.job), None)
        self.cheap_until = self.cheap_until or time.monotonic() + FIRST_SHARE * self.budget.left_s
        if done.error is not None:
            return self._failed(job, done)
        values, usage = done.value.values, done.value.usage
        if isinstance(job, PredictJob):
            if job.stage != "unadapted":  # so little at a time tells nothing about the rest
                self.budget.record(self._work(job), usage.seconds)
            pairs = zip(job.tasks, values, strict=True)
            # What time was too short for is as if it had not been asked.
            return [
                self._answered(job, t, found, usage) for t, found in pairs if found.candidates or not job.is_limited
            ]
        self.budget.record(Work(adapting=sum(adaptation.tokens for adaptation in values)), usage.seconds)
        self.journal.save_adaptations(job.tasks, values, job.round)
        waiting = self._waiting_of(job.tasks, job.round)
        learnt = dict(zip((task.id for task in job.tasks), values, strict=True))
        self.learnt |= {(task.id, job.round): learnt[task.id] for task in waiting}
        self.ready.extend(self._asks(waiting, job.round))
        return []

    # ---- what is next ----

    def _next(self) -> Job | None:
        if self.first and (job := self._cheap()):
            return job
        if self.ready:
            return self._begun(self.ready.popleft())
        while self.groups:
            group = self.groups.popleft()
            adapting, asking = self._work_of_group(group)
            if not self.budget.is_worthwhile(adapting, asking):
                self.waiting -= adapting + asking
                continue  # those after it cost as much or more, but may have been adapted before
            if not self.config.adapt.enabled or self._remembers(group):
                self.ready.extend(self._asks(self._waiting_of(group, 0), 0))
                return self._begun(self.ready.popleft())
            return self._begun(AdaptJob(group))
        return self._once_more()

    def _begun(self, job: Job) -> Job:
        """A job, with the time that it may take."""
        work = self._work(job)
        then = self._asking(self._waiting_of(job.tasks, job.round)) if isinstance(job, AdaptJob) else Work()
        now = time.monotonic()
        busy_s = sum(min(max(0.0, end - now), self.budget.left_s) for _, end in self.running.values())
        seconds = self.budget.time_limit_s(work, then, self.waiting, busy_s)
        self.waiting -= work
        return replace(job, seconds=seconds)

    def _cheap(self) -> Job | None:
        """The next task of the cheap pass, as long as there is time for it."""
        left = (self.cheap_until or math.inf) - time.monotonic()
        if left <= 0:
            self.first.clear()
            return None
        few = {"views": min(FIRST_VIEWS, self.config.predict.views), "score": False, "threshold": 0.0}
        config = self.config.predict.model_copy(update=few)
        seconds = min(left, FIRST_SHARE * self.budget.left_s)
        return PredictJob((self.first.popleft(),), (None,), config, stage="unadapted", seconds=seconds)

    def _once_more(self) -> Job | None:
        """The next task of the second round, as long as there is time for one."""
        if not (self.budget.limited and self.config.adapt.enabled) or (self.again is None and self.running):
            return None
        if self.again is None:
            statuses = {i: s for i, s in self.journal.statuses.items() if s.stage == "tasks" and not s.fallback}
            undecided = [i for i, s in statuses.items() if s.agreement < UNDECIDED]
            undecided.sort(key=lambda i: (-statuses[i].agreement, i))  # those first in which the least is missing
            self.again = deque(self.journal.tasks[i] for i in undecided)
        while self.again:
            group = (self.again.popleft(),)
            work, then = self._adapting(group), self._asking(group)
            if self.budget.is_worthwhile(work, then, share=1.0):
                self.waiting += work + then
                return self._begun(AdaptJob(group, round=1))
        return None

    def _of_cheap_pass(self) -> list[Task]:
        if not (self.budget.limited and self.config.adapt.enabled):
            return []
        waiting = [task for group in self.groups for task in group if not self.journal.done(task.id, "unadapted")]
        return sorted(waiting, key=lambda task: task.tokens)

    def _waiting_of(self, tasks: Sequence[Task], round: int) -> list[Task]:
        return [task for task in tasks if not self.journal.done(task.id, _stage(round))]

    def _asks(self, tasks: Sequence[Task], round: int) -> Iterator[PredictJob]:
        for chunk in self.chunks(tasks):
            learnt = [self.learnt.get((task.id, round)) for task in chunk]
            adapters = tuple(adaptation.adapter if adaptation else None for adaptation in learnt)
            yield PredictJob(chunk, adapters, self.config.predict, round, _stage(round))

    def _remembers(self, group: Group) -> bool:
        """Whether all that is needed was learnt before this run was continued; it is at hand then."""
        waiting = self._waiting_of(group, 0)
        if not all(self.journal.has_adaptation(task.id, 0) for task in waiting):
            return False
        found = {(task.id, 0): self.journal.adaptation(task.id, 0) for task in waiting}
        self.learnt |= {key: adaptation for key, adaptation in found.items() if adaptation}
        return all(found.values())

    # ---- what it costs ----

    def _work_of_group(self, group: Group) -> tuple[Work, Work]:
        """To adapt to what must be adapted to, and to ask then."""
        waiting = self._waiting_of(group, 0)
        known = all(self.journal.has_adaptation(task.id, 0) for task in waiting)
        return Work() if known or not self.config.adapt.enabled else self._adapting(group), self._asking(waiting)

    def _rank(self, group: Group) -> float:
        """What is least comes first."""
        weight = self.budget.equivalent_tokens(sum(self._work_of_group(group), Work()))
        return weight / len(group) if self.budget.limited else -weight

    def _work(self, job: Job) -> Work:
        return self._adapting(job.tasks) if isinstance(job, AdaptJob) else self._asking(job.tasks, job.config.views)

    def _adapting(self, tasks: Sequence[Task]) -> Work:
        config = self.config.adapt
        lengths = [(planned_steps(task, config), min(task.tokens, config.max_tokens)) for task in tasks]
        return Work(adapting=sum(steps * config.batch_size * length for steps, length in lengths))

    def _asking(self, tasks: Sequence[Task], views: int = 0) -> Work:
        views = views or self.config.predict.views
        return Work(asking=sum(views * len(task.test) * task.tokens for task in tasks))

    # ---- what became of it ----

    def _answered(self, job: PredictJob, task: Task, found: Predictions, usage: ResourceUsage | None) -> FinishedTask:
        learnt = None if job.stage == "unadapted" else self.learnt.pop((task.id, job.round), None)
        before = self.journal.statuses.get(task.id)
        answered = {candidate.test for candidate in found.candidates}
        if before and (job.stage == "again" or len(answered) < len(task.test)):
            found = self.journal.predictions(task.id).merged_with(found)
        asking = usage.seconds / len(job.tasks) if usage else 0.0
        seconds = asking + (learnt.seconds if learnt else 0.0)
        fallback, error = None, None
        if job.stage == "tasks" and self.config.adapt.enabled and not learnt:
            fallback, error = "unadapted" if found.candidates else "placeholder", self.errors.get(task.id)
        result = TaskResult(task.id, found, learnt.to_json() if learnt else None, seconds, asking, fallback, error)
        return FinishedTask(result, self.journal.save_result(result, job.stage), job.stage, usage)

    def _failed(self, job: Job, done: JobResult) -> list[FinishedTask]:
        """The next step down the ladder."""
        ids = [task.id for task in job.tasks]
        key = (type(job), *ids, job.round, isinstance(job, PredictJob) and job.adapters[0] is None)
        self.tries[key] += 1
        kind = "adapt" if isinstance(job, AdaptJob) else "ask"
        self.journal.log(event="failure", job=kind, tasks=ids, attempt=self.tries[key], error=done.error)
        self.errors |= dict.fromkeys(ids, done.error or "")
        if job.stage != "tasks":  # they have an answer, or will have one
            if isinstance(job, AdaptJob):
                self.waiting -= self._asking(job.tasks)
            elif job.stage == "again":
                self.learnt.pop((ids[0], job.round), None)
            return []
        if self.tries[key] < TRIES and (done.died or len(ids) == 1):
            self._retry(job)
        elif len(ids) > 1:
            middle = len(ids) // 2
            for part in (slice(middle), slice(middle, None)):
                self._retry(_part(job, part))
        elif isinstance(job, AdaptJob) or job.adapters[0] is not None:
            self.learnt.pop((ids[0], job.round), None)
            if isinstance(job, AdaptJob):  # that it will be asked was known
                self.waiting -= self._asking(job.tasks)
            self._retry(PredictJob(job.tasks, (None,), self.config.predict))
        else:
            return [self._answered(job, job.tasks[0], Predictions((), ()), None)]
        return []

    def _retry(self, job: Job) -> None:
        self.waiting += self._work(job)
        self.ready.append(job)


def _stage(round: int) -> str:
    return "again" if round else "tasks"


def _part(job: Job, part: slice) -> Job:
    if isinstance(job, AdaptJob):
        return replace(job, tasks=job.tasks[part])
    return replace(job, tasks=job.tasks[part], adapters=job.adapters[part])
