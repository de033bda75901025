"""What a notebook needs: tasks, a model, one task adapted to and asked step by step, or all of `bin/solve` in a call.

README has an example of ten lines. Settings are words as on the command line, `section.key=value`; docs/settings.md
has them all.
"""

import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import answers, models, puzzles
from .answers import Predictions, Score, Submission, read_submission
from .config import Config, TasksConfig, load_config
from .decoding.engine_choice import make_engine
from .errors import UserError
from .models import Adapter, Model, fast_dtype, pick_device
from .puzzles import Attempts, Task, TaskSet
from .puzzles.tasks import excerpt
from .rng import named_rng
from .solving import adapt as adapting
from .solving.adapt import Adaptation
from .solving.command import default_run_dir, with_whole_paths
from .solving.predict import predict as predict_task
from .solving.solve import INTERRUPTED, run


def load_tasks(spec: str = "demo", **choice: Any) -> TaskSet:
    """The tasks that a word names, as after `--tasks`: demo, arc-agi-1/evaluation, a file, a folder or an archive.

    Args:
        choice: which of them: `ids=("a", "b")`, `limit=N`, `sample=N` with `sample_seed=S`; `solutions=FILE`.

    Raises:
        UserError: there are none, or something in them is bad.
    """
    if isinstance(ids := choice.get("ids"), str):
        choice["ids"] = [ids]
    elif ids is not None:
        choice["ids"] = [str(task_id) for task_id in ids]
    words = {"spec": str(spec), **{key: value for key, value in choice.items() if value is not None}}
    given = [f"tasks.{key}={json.dumps(value, default=str)}" for key, value in words.items()]
    return puzzles.load_tasks(load_config(None, given).tasks)


def load_model(path: str = "", device: str = "auto") -> Model:
    """A checkpoint that `bin/train` left; by default the bundled model. On a GPU, if there is one.

    Raises:
        UserError: the folder holds none.
    """
    place = pick_device(str(device))
    return models.load_model(str(Path(path).expanduser()) if path else "", place, fast_dtype(place))


def adapt(task: Task, model: Model, *settings: str, seed: int = 0) -> Adaptation:
    """A LoRA adapter for a task, learnt on its demonstrations, and how that went: the model is left as it was.

    Raises:
        UserError: a setting is wrong.
    """
    _require(task, Task, "task", "one of load_tasks(...).tasks")
    _require(model, Model, "model", "load_model()")
    config = _config(settings)
    return adapting.adapt([task], model, config.adapt, [named_rng(seed, task.id, "adapt")])[0]


def predict(task: Task, model: Model, adapter: Adapter | None = None, *settings: str, seed: int = 0) -> Predictions:
    """All answers that augmented views of a task give, with their votes and log-probabilities.

    Args:
        adapter: what `adapt` learnt, its `.adapter`; None: the model is asked as it is.

    Raises:
        UserError: a setting is wrong.
    """
    _require(task, Task, "task", "one of load_tasks(...).tasks")
    _require(model, Model, "model", "load_model()")
    if adapter is not None:
        _require(adapter, Adapter, "adapter", "adapt(task, model).adapter, or None")
    config = _config(settings)
    engine = make_engine(model, None, config, 1)
    return predict_task(task, engine, adapter, config.predict, named_rng(seed, task.id, "predict"))


def choose_attempts(predictions: Predictions, task: Task, *settings: str) -> list[Attempts]:
    """The two attempts for each test input, by `vote.rule`.

    Raises:
        UserError: a setting is wrong.
    """
    _require(predictions, Predictions, "predictions", "predict(task, model)")
    _require(task, Task, "task", "one of load_tasks(...).tasks")
    return answers.choose_attempts(predictions, task, _config(settings).vote)


def solve(tasks: TaskSet, *settings: str, out: str | Path = "") -> Submission:
    """All of `bin/solve`: every task's two attempts for each test input, by id.

    Args:
        out: the run's folder, new or that of a run to continue; "": a new one under runs/.

    Raises:
        UserError: a setting is wrong, or the folder is of another run.
        KeyboardInterrupt: it was interrupted; with the same `out` it goes on.
    """
    _require(tasks, TaskSet, "tasks", "load_tasks(...)")
    if any(word.startswith("tasks.") for word in settings):
        raise UserError("solve takes the tasks that it is given: choose them in load_tasks, and leave tasks.* out")
    if threading.current_thread() is not threading.main_thread():
        raise UserError("solve starts processes and handles signals: call it in the main thread")
    run_dir = Path(out).expanduser() if out else default_run_dir(tasks)
    config = _config(settings)
    ids = tuple(task.id for task in tasks.tasks) if tasks.chosen else ()
    # For whoever goes on with the run: the tasks that it was given.
    config = with_whole_paths(config.model_copy(update={"tasks": TasksConfig(spec=tasks.name, ids=ids)}))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with _main_apart():
            code = run(config, tasks, run_dir)
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == INTERRUPTED:
        raise KeyboardInterrupt(f"the answers so far are in {run_dir}")
    return read_submission(run_dir / "submission.json", tasks.tasks)


@contextmanager
def _main_apart() -> Iterator[None]:
    """Workers do not import the script that calls: they need nothing of it, and it would call again in each of them."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    try:
        main.__spec__ = None
        vars(main).pop("__file__", None)
        yield
    finally:
        vars(main).update(kept)


def score(submission: Submission, tasks: TaskSet) -> Score:
    """How many of the tasks a submission solves, of those whose solutions are known.

    Raises:
        UserError: it does not answer all of them.
    """
    _require(tasks, TaskSet, "tasks", "load_tasks(...)")
    _require(submission, dict, "submission", "what solve(...) gives, or {task id: choose_attempts(...)}")
    if missing := sorted(tasks.solutions.keys() - submission.keys()):
        raise UserError(f"submission has no answer to {missing[0]}: load the tasks that it answers, with ids=[...]")
    for task_id, attempts in submission.items():
        if not all(isinstance(grid, np.ndarray) for both in attempts for grid in both):
            raise UserError(
                f"submission: the attempts at {task_id} are not pairs of NumPy arrays, as choose_attempts gives"
            )
    return answers.score(submission, tasks.solutions)


def _config(settings: Sequence[str]) -> Config:
    if wrong := [word for word in settings if not isinstance(word, str)]:
        raise UserError(f'settings are words such as "adapt.steps=60", each for itself, got {excerpt(wrong[0])}')
    return load_config(None, settings)


def _require(value: Any, kind: type, name: str, instead: str) -> None:
    if not isinstance(value, kind):
        raise UserError(f"{name} is a {type(value).__name__}, and should be a {kind.__name__}: give {instead}")


__all__ = ["adapt", "choose_attempts", "load_model", "load_tasks", "predict", "score", "solve"]
