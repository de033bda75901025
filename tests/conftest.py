import gc
import json
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from arc_solver.config import FormatConfig, ModelConfig
from arc_solver.models.model import Model, new_model
from arc_solver.puzzles.encode import END, NEWLINE
from arc_solver.puzzles.tasks import Grid, Pair, Task, TasksConfig, TaskSet, challenge, freeze, load_tasks

TRANSFORMERS_4 = Path(__file__).parents[1] / ".venv-transformers4" / "bin" / "python"
TOY = ModelConfig(layers=2, width=32, heads=2, kv_heads=2, head_dim=16, mlp_width=64)
FORMATS = [
    FormatConfig(positions=positions, shape_header=header, row_numbers=numbers)
    for positions in ("grid", "token")
    for header in (False, True)
    for numbers in (False, True)
]


def pytest_configure() -> None:
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The longest first: a file is one process's, and at the end no other could help with it.
LONGEST = ("runs", "train", "dry_run", "rehearsal", "solve", "devices", "memory", "soak", "executors")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and not find_spec("vllm"):
        pytest.skip("needs vLLM: bin/test --all runs it in an environment of its own")
    if item.get_closest_marker("transformers4") and not TRANSFORMERS_4.exists():
        pytest.skip("needs transformers 4 in an environment of its own, which bin/test --all makes")


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    """A process that a test leaves is waited for when all have run, maybe without end."""
    yield
    if multiprocessing.active_children():
        gc.collect()  # a loader that the traceback of an expected error held
    assert not multiprocessing.active_children()


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


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def arc() -> dict[str, TaskSet]:
    """ARC-AGI-1: "training" and "evaluation"."""
    return {part: load_tasks(TasksConfig(spec=f"arc-agi-1/{part}")) for part in ("training", "evaluation")}


@pytest.fixture(params=FORMATS, ids=lambda f: f"{f.positions}-{f.shape_header:d}{f.row_numbers:d}")
def any_format(request: pytest.FixtureRequest) -> FormatConfig:
    return request.param


@pytest.fixture
def toy(any_format: FormatConfig) -> Model:
    return Model(new_model(TOY, any_format, seed=1).lm.eval(), any_format, None)


@pytest.fixture(scope="session")
def toy_model() -> Model:
    """A toy model in the default format. Tests must leave it as it was."""
    return Model(new_model(TOY, FormatConfig(), seed=1).lm.eval(), FormatConfig(), None)
