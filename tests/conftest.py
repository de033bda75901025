import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from solve_runs import finish, some_tasks, start_anew, words_for
from toys import FORMATS, TOY, hasty, write_challenges

from arc_solver.config import FormatConfig, TasksConfig
from arc_solver.data.leaks import NOTHING
from arc_solver.models.model import Model, new_model, save_model
from arc_solver.puzzles.task_files import load_tasks
from arc_solver.puzzles.tasks import TaskSet

TRANSFORMERS_4 = Path(__file__).parents[1] / ".venv-transformers4" / "bin" / "python"


def pytest_configure() -> None:
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The longest first: a file is one process's, and at the end no other could help with it.
LONGEST = ("kills", "train", "dry_run", "rehearsal", "runs", "submit", "parallel", "solve", "memory", "executors")


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


@pytest.fixture(scope="session")
def checkpoint(shared_dir: Path) -> Path:
    """A toy model that ends its replies soon, as a folder. Tests must leave it as it was, and the run below."""

    def make(folder: Path) -> None:
        save_model(hasty(new_model(TOY, FormatConfig(), seed=1, trained_on=NOTHING)), folder)

    return made_once(shared_dir / "toy", make)


@pytest.fixture(scope="session")
def challenges(shared_dir: Path) -> Path:
    """Twelve small tasks."""

    def make(folder: Path) -> None:
        folder.mkdir()
        write_challenges(folder, some_tasks(12))

    return made_once(shared_dir / "tasks", make) / "toy_challenges.json"


@pytest.fixture(scope="session")
def whole(checkpoint: Path, challenges: Path, shared_dir: Path) -> Path:
    """An uninterrupted run on them, by `bin/solve`."""

    def make(out: Path) -> None:
        said = finish(start_anew(words_for(checkpoint, challenges, out)))
        assert "tasks answered" in said

    return made_once(shared_dir / "whole", make)


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A new folder that all processes of this run of tests share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """What the first process that asks for it makes, and others wait for."""
    made = folder.with_name(f"{folder.name}.made")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not made.exists():
            make(folder)
            made.touch()
    return folder
