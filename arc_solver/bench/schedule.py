"""`bin/bench schedule`: what a task costs besides solving it.

Very many small tasks go through schedule, journal and submission, with a worker that answers at once: what a run that
labels a large corpus on a cluster would wait for.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..answers import Candidate, Predictions
from ..config import load_config
from ..models.model import BUNDLED_DIR
from ..puzzles import Pair, Task, TaskSet, freeze
from ..solving.budget import Budget
from ..solving.executors import InProcess
from ..solving.journal import open_journal
from ..solving.scheduler import Scheduler
from ..solving.worker import JobOutput, PredictJob, ResourceUsage, prediction_groups

TASKS = 10_000


class _AtOnce:
    """A worker that knows the answer."""

    def run(self, job: PredictJob) -> JobOutput:
        scores = (-1.0,) * job.config.views
        views = tuple(range(job.config.views))
        candidates = (Candidate(0, job.tasks[0].test[0], views, (), scores),)
        return JobOutput([Predictions((0,) * job.config.views, candidates)], ResourceUsage(0.0, 0.0, 0, 0))


def overhead_s(tasks: int = TASKS) -> float:
    """Seconds for each of so many tasks."""
    config = load_config(None, ["adapt.enabled=false"])
    grid = freeze(np.ones((5, 5), dtype=np.uint8))
    named = tuple(Task(f"{i:08x}", (Pair(grid, grid),) * 3, (grid,)) for i in range(tasks))
    found = TaskSet("many", named, {})
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        with open_journal(Path(name) / "run", found, config, [BUNDLED_DIR]) as journal:
            chunks = partial(prediction_groups, device=torch.device("cpu"))
            scheduler = Scheduler([(task,) for task in named], chunks, config, journal, Budget(1))
            with InProcess(lambda number: _AtOnce()) as executor:
                for done in executor.map_unordered(scheduler.jobs()):
                    scheduler.handle_result(done)
                    journal.refresh_submission()
        return (time.perf_counter() - began) / tasks
