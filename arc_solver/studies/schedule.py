"""Which run of a study is next, and where runs are done: on this machine, or on a Ray cluster."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from typing import Any, Protocol

from ..errors import MachineError, UserError, first_line
from ..solving.executors import connect_ray, cores
from .outcome import Outcome
from .runs import Job, Processes, Result, make_job, perform, read_result, save_result
from .study import StudyFile

LEAST_SEEDS = 2  # of each arm before a budget goes where the interval is widest: one alone has no spread
MOST_SEEDS = 50  # of an arm, whatever the budget


class Runner(Protocol):
    """Where runs are done."""

    count: int  # at once
    threads: int  # of each

    def submit(self, job: Job) -> None: ...

    def wait(self) -> "tuple[Job, Result | UserError | MachineError]":
        """The next that is done, or why it is not."""
        ...

    def end(self) -> None:
        """Ends what is under way, as after Ctrl-C."""
        ...


class LocalRunner:
    """Runs at once on this machine: one for each GPU, else one for each core.

    Args:
        perform: does a run in the environment that is given.
    """

    def __init__(self, count: int = 0, perform: Callable[[Job, Processes, Mapping[str, str]], Result] = perform):
        gpus = _gpus()
        self.count = count or len(gpus) or cores()
        self.threads = max(1, cores() // self.count)
        self._perform, self._processes = perform, Processes()
        self._pool = ThreadPoolExecutor(self.count)
        self._jobs: dict[Future[Result], Job] = {}
        self._places: SimpleQueue[dict[str, str]] = SimpleQueue()
        for i in range(self.count):
            self._places.put({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})

    def submit(self, job: Job) -> None:
        self._jobs[self._pool.submit(self._run, job)] = job

    def wait(self) -> tuple[Job, Result | UserError | MachineError]:
        done = next(iter(wait(self._jobs, return_when=FIRST_COMPLETED).done))
        job = self._jobs.pop(done)
        try:
            return job, done.result()
        except (UserError, MachineError) as error:
            return job, error
        except OSError as error:
            return job, MachineError(first_line(error))

    def end(self) -> None:
        self._processes.end()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, job: Job) -> Result:
        place = self._places.get()
        try:
            return self._perform(job, self._processes, place)
        finally:
            self._places.put(place)


class RayRunner:
    """Runs on a Ray cluster whose machines share this folder: one for each GPU, else one for each core.

    Raises:
        UserError: Ray is not installed, or there is no cluster at `address`.
    """

    threads = 1

    def __init__(self, count: int = 0, address: str | None = None):
        self._ray = connect_ray(count, address)
        resources = self._ray.cluster_resources()
        device = "GPU" if resources.get("GPU", 0) >= 1 else "CPU"
        self.count = count or max(1, int(resources.get(device, 1)))
        needs = {"num_gpus": 1} if device == "GPU" else {"num_cpus": 1}
        self._run = self._ray.remote(**needs, max_retries=0)(_perform_elsewhere).remote
        self._jobs: dict[Any, Job] = {}

    def submit(self, job: Job) -> None:
        self._jobs[self._run(job)] = job

    def wait(self) -> tuple[Job, Result | UserError | MachineError]:
        [done], _ = self._ray.wait(list(self._jobs), num_returns=1)
        job = self._jobs.pop(done)
        try:
            return job, self._ray.get(done)
        except (UserError, MachineError) as error:  # as what Ray raises is of both types
            return job, error
        except OSError as error:
            return job, MachineError(first_line(error))
        except self._ray.exceptions.RayTaskError:  # our own mistake
            raise
        except self._ray.exceptions.RayError as error:  # the process or its machine ended
            return job, MachineError(first_line(error))

    def end(self) -> None:
        for reference in self._jobs:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()


def _perform_elsewhere(job: Job) -> Result:
    return perform(job, Processes(), {})


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


# ---- what is next --------------------------------------------------------------------------------------------------


class Plan:
    """The runs of a study: which are done, and which is next.

    Without a budget each arm has as many seeds as the study says, seed after seed, so that a study that is ended says
    something of each arm. With one, each arm has two, and then the one of which least is known has another, until the
    next would not fit any more.

    Args:
        budget_s: of machine time; infinite: there is none.
        count, threads: runs at once, and the threads of each.
    """

    def __init__(self, found: StudyFile, study_dir: Path, budget_s: float = math.inf, count: int = 1, threads: int = 1):
        self.found, self.study_dir, self.budget_s = found, study_dir, budget_s
        self.count, self.threads = count, threads
        self.results: dict[tuple[str, int], Result] = {}
        self.failed: set[str] = set()  # arms of which a run failed: they have no others by this call
        self.in_flight: dict[tuple[str, int], Job] = {}
        self.began: dict[tuple[str, int], float] = {}  # when, of `time.monotonic()`, a run of this call did
        for arm in found.study.arms:
            for seed in range(MOST_SEEDS):
                if result := read_result(self._job(arm.name, seed)):
                    self.results[arm.name, seed] = result

    @property
    def outcome(self) -> Outcome:
        """Of all runs that are done, by this call or an earlier one."""
        order = [arm.name for arm in self.found.study.arms]
        places = sorted(self.results, key=lambda place: (order.index(place[0]), place[1]))  # not as they came to an end
        return Outcome(self.found.study, [self.results[place] for place in places])

    @property
    def left(self) -> int:
        """Runs that a fixed number of seeds leaves to do."""
        seeds = range(self.found.study.seeds)
        return sum((arm.name, seed) not in self.results for arm in self.found.study.arms for seed in seeds)

    @property
    def left_s(self) -> float:
        """Seconds until a fixed number of seeds is done, by what runs took so far; infinite: nobody knows. What several
        runs share counts once."""
        if self.budget_s < math.inf or not self.results:
            return math.inf
        counted: set[Path] = set()
        takes = [0.0]
        for arm in (arm.name for arm in self.found.study.arms if arm.name not in self.failed):
            for place in ((arm, seed) for seed in range(self.found.study.seeds) if (arm, seed) not in self.results):
                job = self.in_flight.get(place) or self._job(*place)
                undone = job.undone - counted
                counted |= undone
                parts = [what for what, folder in (("train", job.trained), ("solve", job.solved)) if folder in undone]
                elapsed = time.monotonic() - self.began[place] if place in self.in_flight else 0.0
                takes.append(max(0.0, sum(self._takes(arm, what) for what in parts) - elapsed))
        return max(*takes, sum(takes) / self.count)

    @property
    def spent_s(self) -> float:
        """Time of the whole machine that was spent on what is done; what several runs share counts once."""
        parts = {}
        for result in self.results.values():
            share = result.about.get("share", 1 / self.count)
            for what, key in (("train", "trained"), ("solve", "solved")):
                if what in result.seconds:
                    parts[what, result.about.get(key, (result.arm, result.seed))] = share * result.seconds[what]
        return sum(parts.values())

    def next(self) -> Job | None:
        """None: nothing is left to do, or the budget is spent."""
        pending = {*self.results, *self.in_flight}
        arms = [arm.name for arm in self.found.study.arms if arm.name not in self.failed]
        if not arms:
            return None
        limited = self.budget_s < math.inf
        seeds = min(LEAST_SEEDS, self.found.study.seeds) if limited else self.found.study.seeds
        fixed = [(arm, seed) for seed in range(seeds) for arm in arms if (arm, seed) not in pending]
        if fixed and not (limited and self._is_spent(fixed[0][0])):
            busy = {folder for job in self.in_flight.values() for folder in job.undone}
            free = (place for place in fixed if not (busy and self._job(*place).undone & busy))
            return self._give(*next(free, fixed[0]))  # what another does already would only be waited for
        if fixed or not limited:
            return None
        outcome = self.outcome
        is_compared = self.found.study.kind == "compare" and len(arms) > 1 and arms[0] == outcome.first.name
        widest = max(arms[1:] if is_compared else arms, key=outcome.width)
        counts = {arm: sum(arm == of for of, _ in pending) for arm in arms}
        arm = min((arms[0], widest) if is_compared else (widest,), key=counts.__getitem__)  # both ends of a difference
        if self._is_spent(arm) or counts[arm] >= MOST_SEEDS:
            return None
        return self._give(arm, next(seed for seed in range(MOST_SEEDS) if (arm, seed) not in pending))

    def fail(self, job: Job) -> None:
        del self.in_flight[job.arm, job.seed]
        self.failed.add(job.arm)

    def done(self, job: Job, result: Result) -> None:
        del self.in_flight[job.arm, job.seed]
        self.results[job.arm, job.seed] = result
        save_result(result, self.study_dir)

    def _is_spent(self, arm: str) -> bool:
        """Whether another run of an arm would not fit into the budget; what one takes is known from those before."""
        known = [sum(result.seconds.values()) for result in self.results.values()]
        of_arm = [sum(result.seconds.values()) for (name, _), result in self.results.items() if name == arm]
        expected = max(of_arm or known or [0.0]) / self.count
        return self.spent_s + expected * (1 + len(self.in_flight)) > self.budget_s

    def _takes(self, arm: str, what: str) -> float:
        """Seconds of a training or of a run of bin/solve: what it took in this arm, or else in others."""
        known = {place: result.seconds[what] for place, result in self.results.items() if what in result.seconds}
        of_arm = [seconds for (name, _), seconds in known.items() if name == arm]
        return mean(of_arm or known.values() or [0.0])

    def _job(self, arm: str, seed: int) -> Job:
        named = {arm.name: arm for arm in self.found.study.arms}
        return make_job(self.found, self.study_dir, named[arm], seed, self.threads, 1 / self.count)

    def _give(self, arm: str, seed: int) -> Job:
        job = self.in_flight[arm, seed] = self._job(arm, seed)
        self.began[arm, seed] = time.monotonic()
        return job


def run_all(plan: Plan, runner: Runner) -> Iterator[tuple[Job, Result | MachineError]]:
    """Does what is left to do, and yields what comes of it. Where a run fails, the other arms go on.

    Raises:
        UserError: the settings of a run were refused; those under way are waited for and kept.
    """
    refused: UserError | None = None
    try:
        while True:
            while not refused and len(plan.in_flight) < runner.count and (job := plan.next()):
                runner.submit(job)
            if not plan.in_flight:
                break
            job, result = runner.wait()
            if isinstance(result, Result):
                plan.done(job, result)
                yield job, result
                continue
            plan.fail(job)
            said = f"arm '{job.arm}', seed {job.seed}: {result}"
            if isinstance(result, UserError):
                refused = refused or UserError(said)
            else:
                yield job, MachineError(said)
    finally:
        runner.end()
    if refused:
        raise refused
