"""Small tasks, models and adapters for tests."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from arc_solver.config import AdaptConfig, FormatConfig, ModelConfig
from arc_solver.models.adapters import Adapter, fresh_adapter
from arc_solver.models.model import Model
from arc_solver.puzzles.encode import END, NEWLINE
from arc_solver.puzzles.tasks import Grid, Pair, Task, challenge, freeze
from arc_solver.rng import named_rng

KILLS = int(os.environ.get("ARC_SOLVER_KILLS", "3"))  # of a run, in a test
ADAPTER = AdaptConfig(rank=3, alpha=6)
TOY = ModelConfig(layers=2, width=32, heads=2, kv_heads=2, head_dim=16, mlp_width=64)
FORMATS = [
    FormatConfig(positions=positions, shape_header=header, row_numbers=numbers)
    for positions in ("grid", "token")
    for header in (False, True)
    for numbers in (False, True)
]


def random_grid(rng: np.random.Generator, largest: int = 30) -> Grid:
    height, width = rng.integers(1, largest + 1, size=2)
    return freeze(rng.integers(0, 10, size=(height, width), dtype=np.uint8))


def grid(*rows: str) -> Grid:
    """grid("012", "345") is a 2 by 3 grid."""
    return freeze(np.array([[int(cell) for cell in row] for row in rows], dtype=np.uint8))


def flip_task(rng: np.random.Generator, task_id: str = "flip", demonstrations: int = 3, tests: int = 1) -> Task:
    """A small task: the output is the input, mirrored."""
    pairs = []
    for _ in range(demonstrations + tests):
        cells = random_grid(rng, largest=4)
        pairs.append(Pair(cells, freeze(np.ascontiguousarray(cells[:, ::-1]))))
    return Task(task_id, tuple(pairs[:demonstrations]), tuple(pair.input for pair in pairs[demonstrations:]))


def write_challenges(folder: Path, tasks: Sequence[Task]) -> Path:
    """A file of flip tasks, with the solutions beside it."""
    file = folder / "toy_challenges.json"
    file.write_text(json.dumps({task.id: challenge(task) for task in tasks}))
    solutions = {task.id: [cells[:, ::-1].tolist() for cells in task.test] for task in tasks}
    file.with_name("toy_solutions.json").write_text(json.dumps(solutions))
    return file


def hasty(model: Model) -> Model:
    """The model changed so that it ends rows and grids soon; a random one goes on to 30 by 30.

    Every embedding gets a common direction, and the head reads it as newline or end.
    """
    with torch.no_grad():
        direction = torch.ones(model.lm.config.hidden_size)
        model.lm.get_input_embeddings().weight += 0.05 * direction
        model.lm.get_output_embeddings().weight[[NEWLINE, END]] += 0.004 * direction
    return model


def random_adapter(model, seed: int, config: AdaptConfig = ADAPTER) -> Adapter:
    """One that changes something: B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    fresh = fresh_adapter(model, config, named_rng(seed, "A"))
    weights = {name: (a, torch.randn(b.shape, generator=generator) * 0.3) for name, (a, b) in fresh.weights.items()}
    return Adapter(fresh.rank, fresh.alpha, weights)
