"""What solves tasks: a model and its engine, to which jobs are handed.

A job keeps nothing for the next one, and what it gives depends on the seed and its tasks alone (and on the clock, if it
has only so many seconds). So any worker can take any job, in any order.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Config, PredictConfig
from ..decoding.engine_choice import make_engine
from ..errors import UserError
from ..models import (
    Adapter,
    Model,
    checkpoint_dir,
    fast_dtype,
    free_memory,
    fresh_adapter,
    load_model,
    merge_saved_adapter,
    peak_memory,
    pick_device,
)
from ..models.lora import load_start_adapter
from ..puzzles import Task
from ..rng import named_rng
from ..training.parallel import keep_freed_memory
from .adapt import adapt
from .executors import Watchdog, cores, tell
from .predict import predict_tasks
from .preflight import preflight

FIRST_LOOK_S = 600.0  # what `preflight` may take at least, as it meets every kernel for the first time


@dataclass(frozen=True, eq=False)
class AdaptJob:
    """Tasks to adapt to at once. Gives an `Adaptation` for each."""

    tasks: tuple[Task, ...]
    round: int = 0  # each has samples of its own
    seconds: float = math.inf  # that it may take

    @property
    def stage(self) -> str:
        """What it is for; see `candidates.STAGES`."""
        return "again" if self.round else "tasks"


@dataclass(frozen=True, eq=False)
class PredictJob:
    """Tasks to predict in one batch, each with its adapter or all without. Gives `Predictions` for each."""

    tasks: tuple[Task, ...]
    adapters: tuple[Adapter | None, ...]
    config: PredictConfig
    round: int = 0  # each has views of its own
    stage: str = "tasks"  # what it is for; see `candidates.STAGES`
    seconds: float = math.inf

    @property
    def is_limited(self) -> bool:
        return self.seconds < math.inf


Job = AdaptJob | PredictJob


@dataclass(frozen=True)
class ResourceUsage:
    """Resources that one job used: wall and CPU seconds, peak memory, GPU utilisation."""

    seconds: float
    cpu_seconds: float
    process: int
    peak_memory_bytes: int  # of that process so far
    gpu: float | None = None  # share of the last second in which the GPU computed, where that can be read


@dataclass(frozen=True, eq=False)
class JobOutput:
    """What a worker returns for a job: one value for each task, and the resources used."""

    values: list[Any]  # one for each task of the job
    usage: ResourceUsage


@dataclass(frozen=True, eq=False)
class Worker:
    """Takes jobs. `beat` is called at every step, to show that it is alive; `rest` when there is nothing to do."""

    model: Model
    start: Adapter | None  # what all adapters continue; None: each has a fresh one
    config: Config
    engine: Any
    neighbours: int = 1  # workers that share the memory of a CPU, this one among them
    beat: Callable[[], None] = lambda: None
    rest: Callable[[], None] = lambda: None

    def run(self, job: Job) -> JobOutput:
        began, cpu = time.monotonic(), time.process_time()
        self.beat()
        try:
            values = self._adapt(job) if isinstance(job, AdaptJob) else self._ask(job)
        finally:
            self.rest()
        usage = ResourceUsage(
            time.monotonic() - began,
            time.process_time() - cpu,
            os.getpid(),
            peak_memory(self.model.device),
            _gpu_utilisation(self.model.device),
        )
        return JobOutput(values, usage)

    def _adapt(self, job: AdaptJob) -> list[Any]:
        rngs = [self._rng(task, "adapt", job.round) for task in job.tasks]
        deadline = time.monotonic() + job.seconds
        memory = free_memory(self.model.device, self.neighbours)
        on_step = self._on_step()
        return adapt(job.tasks, self.model, self.config.adapt, rngs, self._starts(job), on_step, deadline, memory)

    def _starts(self, job: AdaptJob) -> list[Adapter] | None:
        """What the adapters continue; None: fresh ones, whose first weights are drawn before each task's samples."""
        if self.start:
            return [self.start] * len(job.tasks)
        if (seed := self.config.model.seed) is None:
            return None
        rngs = [named_rng(seed, task.id, "adapter", job.round) for task in job.tasks]
        return [fresh_adapter(self.model, self.config.adapt, rng) for rng in rngs]

    def _ask(self, job: PredictJob) -> list[Any]:
        rngs = [self._rng(task, "predict", job.round) for task in job.tasks]
        self.engine.deadline = time.monotonic() + job.seconds
        self.engine.on_step = self._on_step()
        return predict_tasks(job.tasks, self.engine, job.adapters, job.config, rngs)

    def _on_step(self) -> Callable[[int], None]:
        """What a job calls at every step with its tokens: it is alive, and has done so much."""
        done = 0

        def on_step(tokens: int) -> None:
            nonlocal done
            done += tokens
            self.beat()
            tell(done)

        return on_step

    def _rng(self, task: Task, stage: str, round: int) -> Any:
        return named_rng(self.config.run.seed, task.id, stage, *([round] if round else []))


def make_worker(config: Config, number: int = 0, neighbours: int = 0) -> Worker:
    """A worker in this process, which becomes its own: PyTorch's threads and memory are set to serve it.

    Args:
        neighbours: workers that share the memory of a CPU, this one among them; 0: as many as there are cores.

    Raises:
        UserError: model or engine cannot be used.
        MachineError: they do not work together on this device.
    """
    device = pick_device(config.run.device)
    if device.type == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name of old
        # As shapes differ in every pass. It is read when the first memory is taken.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if device.type == "cpu":
        torch.set_num_threads(1)  # one core a worker; and results then depend on no thread count
        keep_freed_memory()
    neighbours = neighbours or cores()
    model, start = load_base(config, device)
    engine = make_engine(model, start, config, neighbours)
    watched = config.run.executor != "inprocess"  # where it would end the run itself
    timeout_s = 60 * config.run.watchdog_minutes if watched else 0
    looking = Watchdog(timeout_s and max(timeout_s, FIRST_LOOK_S))
    looking.beat()
    try:
        preflight(model, engine, start, config)
    finally:
        looking.rest()  # a process in which no worker could be made goes on
    watchdog = Watchdog(timeout_s)
    return Worker(model, start, config, engine, neighbours, watchdog.beat, watchdog.rest)


def load_base(config: Config, device: torch.device) -> tuple[Model, Adapter | None]:
    """The checkpoint that all adapters of a run are for, and the adapter that they continue, if any.

    The adapter of the config is that one, or is merged into the weights.
    """
    model = load_model(config.model.path, device, fast_dtype(device), config.model.quantize)
    base_dir = checkpoint_dir(config.model.path)
    if not (config.adapt.enabled and config.adapt.start == "pretrained"):
        return merge_saved_adapter(model, config.model.adapter, base_dir), None
    if not config.model.adapter:
        raise UserError('adapt.start="pretrained" continues an adapter: give its folder as model.adapter')
    return load_start_adapter(model, Path(config.model.adapter), base_dir)


def prediction_groups(tasks: Sequence[Task], device: torch.device) -> list[tuple[Task, ...]]:
    """Splits tasks that were adapted together into prediction jobs: one task each on a CPU, all in one on a GPU."""
    return [(task,) for task in tasks] if device.type == "cpu" else [tuple(tasks)]


def _gpu_utilisation(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # NVIDIA's library for it is not there, or says no: its errors are of no common kind
        return None
