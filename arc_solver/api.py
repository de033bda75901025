"""What a notebook needs: tasks, a model, one task adapted to and asked step by step, or all of `bin/solve` in a call.

README has an example of ten lines. Settings are words as on the command line, `section.key=value`; docs/settings.md
has them all.
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import answers, models, puzzles
from .answers import Predictions, Score, Submission, read_submission
from .config import load_config
from .decoding.engine_choice import make_engine
from .models import Adapter, Model, fast_dtype, pick_device
from .puzzles import Attempts, Task, TaskSet
from .rng import named_rng
from .solving import adapt as adapting
from .solving.adapt import Adaptation
from .solving.command import default_run_dir
from .solving.predict import predict as predict_task
from .solving.solve import INTERRUPTED, run


def load_tasks(spec: str = "demo", **choice: Any) -> TaskSet:
    """The tasks that a word names, as after `--tasks`: demo, arc-agi-1/evaluation, a file, a folder or an archive.

    Args:
        choice: which of them: `ids=("a", "b")`, `limit=N`, `sample=N` with `sample_seed=S`; `solutions=FILE`.

    Raises:
        UserError: there are none, or something in them is bad.
    """
    words = [f"tasks.{key}={json.dumps(value, default=str)}" for key, value in {"spec": spec, **choice}.items()]
    return puzzles.load_tasks(load_config(None, words).tasks)


def load_model(path: str = "", device: str = "auto") -> Model:
    """A checkpoint that `bin/train` left; by default the bundled model. On a GPU, if there is one.

    Raises:
        UserError: the folder holds none.
    """
    place = pick_device(device)
    return models.load_model(path, place, fast_dtype(place))


def adapt(task: Task, model: Model, *settings: str, seed: int = 0) -> Adaptation:
    """A LoRA adapter for a task, learnt on its demonstrations, and how that went: the model is left as it was.

    Raises:
        UserError: a setting is wrong.
    """
    config = load_config(None, settings)
    return adapting.adapt([task], model, config.adapt, [named_rng(seed, task.id, "adapt")])[0]


def predict(task: Task, model: Model, adapter: Adapter | None = None, *settings: str, seed: int = 0) -> Predictions:
    """All answers that augmented views of a task give, with their votes and log-probabilities.

    Args:
        adapter: what `adapt` learnt, its `.adapter`; None: the model is asked as it is.

    Raises:
        UserError: a setting is wrong.
    """
    config = load_config(None, settings)
    engine = make_engine(model, None, config, 1)
    return predict_task(task, engine, adapter, config.predict, named_rng(seed, task.id, "predict"))


def choose_attempts(predictions: Predictions, task: Task, *settings: str) -> list[Attempts]:
    """The two attempts for each test input, by `vote.rule`.

    Raises:
        UserError: a setting is wrong.
    """
    return answers.choose_attempts(predictions, task, load_config(None, settings).vote)


def solve(tasks: TaskSet, *settings: str, out: str | Path = "") -> Submission:
    """All of `bin/solve`: every task's two attempts for each test input, by id.

    Args:
        out: the run's folder, new or that of a run to continue; "": a new one under runs/.

    Raises:
        UserError: a setting is wrong, or the folder is of another run.
        KeyboardInterrupt: it was interrupted; with the same `out` it goes on.
    """
    run_dir = Path(out) if out else default_run_dir(tasks)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with _main_apart():
            code = run(load_config(None, settings), tasks, run_dir)
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
    """How many of the tasks a submission solves, of those whose solutions are known."""
    return answers.score(submission, tasks.solutions)


__all__ = ["adapt", "choose_attempts", "load_model", "load_tasks", "predict", "score", "solve"]
