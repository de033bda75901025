"""`bin/bench adapt`: adaptation alone, ours beside PEFT's loop; with `--profile`, where the time of a step goes.

One process and, on a CPU, one core: the same tasks, samples and steps, each side in turn, the best of some rounds.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from ..config import AdaptConfig, TasksConfig, load_config
from ..models import Model, fast_dtype, load_model, pick_device
from ..models.model import BUNDLED_DIR
from ..puzzles import Task, load_tasks
from ..rng import named_rng
from ..solving.adapt import adapt, group_by_length
from ..training.parallel import keep_freed_memory
from .baseline_solving import Spent, adapt_baseline, load_baseline
from .baseline_training import now_s

ROUNDS, STEPS = 3, 20
SHOWN = 16  # operations, the longest first


@dataclass(frozen=True)
class AdaptMeasurement:
    """Tokens a second of both sides."""

    name: str
    ours: float
    baseline: float


@dataclass(frozen=True)
class OperationTime:
    """What an operation takes of a step, what it calls not counted."""

    name: str
    calls: float
    milliseconds: float


def compare_adaptation() -> list[AdaptMeasurement]:
    """One task alone, and the demo set's longest group as `bin/solve` forms it."""
    model, config, group = _demo()
    device = model.device
    lm, format = load_baseline(BUNDLED_DIR, device, fast_dtype(device))
    found = []
    for name, tasks in {"one task": group[:1], f"{len(group)} tasks": group}.items():
        ours, baseline = [], []
        for _ in range(ROUNDS):
            ours.append(_tokens_per_s(tasks, model, config))
            began, spent = now_s(), Spent()
            for task in tasks:
                adapt_baseline(task, copy.deepcopy(lm), config, format, named_rng(0, task.id), spent)
            baseline.append(spent.adapt_tokens / (now_s() - began))
        found.append(AdaptMeasurement(name, max(ours), max(baseline)))
    return found


def profile_adaptation() -> list[OperationTime]:
    """Where the time of a step of that group goes by PyTorch's profiler, which itself takes some."""
    model, config, group = _demo()
    _tokens_per_s(group, model, config)  # once before, as all is slower the first time
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        _tokens_per_s(group, model, config)
    averages = profiled.key_averages()
    found = [
        OperationTime(event.key, event.count / STEPS, event.self_cpu_time_total / 1000 / STEPS) for event in averages
    ]
    found.sort(key=lambda operation: -operation.milliseconds)
    shown, rest = found[:SHOWN], found[SHOWN:]
    shown.append(OperationTime("all others", sum(x.calls for x in rest), sum(x.milliseconds for x in rest)))
    return shown


def _demo() -> tuple[Model, AdaptConfig, list[Task]]:
    config, device = load_config(None, [f"adapt.steps={STEPS}", "adapt.stop=never"]).adapt, pick_device("auto")
    if device.type == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    model = load_model("", device, fast_dtype(device))
    return model, config, group_by_length(load_tasks(TasksConfig(spec="demo")).tasks, config, device)[0]


def _tokens_per_s(tasks: Sequence[Task], model: Model, config: AdaptConfig) -> float:
    began = now_s()
    learnt = adapt(tasks, model, config, [named_rng(0, task.id) for task in tasks])
    return sum(adaptation.tokens for adaptation in learnt) / (now_s() - began)
