"""`bin/bench precision`: adapting and answering in the type that is used on this machine, beside float32.

One process and, on a CPU, one core: the same tasks, samples and views, each side in turn, the best of some rounds.
"""

from dataclasses import dataclass

import torch

from ..config import Config, TasksConfig, load_config
from ..decoding import TorchEngine
from ..models import Model, fast_dtype, load_model, pick_device
from ..puzzles import Task, load_tasks
from ..rng import named_rng
from ..solving.adapt import adapt
from ..solving.predict import predict_tasks
from ..training.parallel import keep_freed_memory
from .baseline_training import now_s

ROUNDS = 3
GROUPS = {"adapt one task": slice(4, 5), "adapt four at once": slice(4, 8)}  # of the demo set
SETTINGS = ("adapt.steps=15", "adapt.stop=never", "predict.views=8")


@dataclass(frozen=True)
class PrecisionMeasurement:
    name: str
    used: float
    float32: float
    unit: str


def compare_precisions() -> list[PrecisionMeasurement]:
    """What is used here, and float32."""
    config, device = load_config(None, SETTINGS), pick_device("auto")
    if device.type == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    tasks = load_tasks(TasksConfig(spec="demo")).tasks
    models = [load_model("", device, dtype) for dtype in (fast_dtype(device), torch.float32)]
    found = []
    for name, group in GROUPS.items():
        speeds = [[_adapt_tokens_per_s(model, tasks[group], config) for model in models] for _ in range(ROUNDS)]
        used, float32 = map(max, zip(*speeds, strict=True))
        found.append(PrecisionMeasurement(name, used, float32, "tokens/s"))
    seconds = [[_answer_s(model, tasks[:4], config) for model in models] for _ in range(ROUNDS)]
    used, float32 = map(min, zip(*seconds, strict=True))
    found.append(PrecisionMeasurement("answer four tasks", used, float32, "s"))
    return found


def _adapt_tokens_per_s(model: Model, tasks: tuple[Task, ...], config: Config) -> float:
    began = now_s()
    learnt = adapt(tasks, model, config.adapt, [named_rng(0, task.id) for task in tasks])
    return sum(adaptation.tokens for adaptation in learnt) / (now_s() - began)


def _answer_s(model: Model, tasks: tuple[Task, ...], config: Config) -> float:
    engine = TorchEngine(model, config.predict.batch_tokens)
    began = now_s()
    for task in tasks:
        predict_tasks([task], engine, [None], config.predict, [named_rng(0, task.id)])
    return now_s() - began
