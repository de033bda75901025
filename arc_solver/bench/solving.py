"""`bin/bench solve`: test time, ours against the baseline's, on the same tasks, steps, samples and views.

The baseline solves one task after another in one process: PEFT at batch size 1, merge, Hugging Face `generate` over all
views at once, votes (`baseline_solving.py`). Ours is `bin/solve` as it is, with a worker for every core. Both have all
cores and bf16 where the hardware multiplies it, and train on the very same samples in the same order.

    adapt           tokens of adaptation a second
    decode_steps    forward passes that a view took part in, summed over all views, until all are answered
    decode_batches  the same, a pass of many views counted once
    decode_time     seconds until all views are answered, prompts included
    score           candidates scored under a view, a second; the baseline runs prompt and reply anew, ours goes on from
                    what decoding left
    whole           tasks an hour, from a command's start to its end, all that it writes included
    whole_at_equal_score
                    the same, ours with fewer steps, early stop and fewer views, which solve as many outputs or more
    solved          test outputs
    peak_memory     of all processes together

Decoding is measured besides on tasks with large outputs, and with random weights, where hardly a draft is right.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..answers import Predictions, read_submission, score
from ..config import FormatConfig, ModelConfig, PredictConfig, TasksConfig, load_config
from ..decoding import TorchEngine
from ..decoding.torch_engine import TorchSession
from ..models import Adapter, Model, fast_dtype, load_adapter, load_model, new_model, pick_device, save_model
from ..models.adapters import merge
from ..models.model import BUNDLED_DIR
from ..puzzles import PAD, Pair, Task, TaskSet, challenge, encode_prompt, encode_sample, load_tasks
from ..rng import named_rng
from ..solving.predict import predict, views_of
from .baseline_solving import load_baseline, submission_file
from .baseline_training import now_s

SETTINGS = (  # of both sides
    "adapt.batch_size=1",
    "adapt.steps=60",
    "adapt.stop=never",
    "adapt.together=8",
    "adapt.group_tokens=4096",
    "predict.views=32",
    "predict.score=false",  # the baseline does not score
    "vote.rule=votes",
)
# Ours where it need not do the same work, only solve as many: early stop, fewer views, which vote by their scores.
AS_MANY_SOLVED = ("adapt.steps=48", "predict.views=16")
LARGE_CELLS, LARGE_TASKS = 200, 3  # of each test output; training tasks with the fewest tokens
RANDOM_TASKS, RANDOM_VIEWS = 2, 8
SCORE_TASKS = 6  # on which scoring is measured, in one process with all cores
SCORED = 4  # candidates of a test input that the baseline scores: those of most votes
SCORE_TOKENS = 8192  # in a batch of the baseline's


@dataclass(frozen=True)
class SolveFigures:
    """What one side took for all tasks."""

    adapt_tokens_per_s: float
    decode_s: float
    view_steps: int
    batches: int
    scores_per_s: float
    tasks_per_hour: float
    solved: int
    peak_memory_bytes: int


def compare(
    task_set: TaskSet, model_dir: Path = BUNDLED_DIR, settings: Sequence[str] = SETTINGS, scored: int = 0
) -> tuple[SolveFigures, SolveFigures]:
    """Both sides on the same tasks: ours, the baseline's. Scoring is measured on the first `scored` tasks."""
    with _folder_of(task_set) as folder:
        ours = _ours(task_set, folder, model_dir, settings, scored)
        return ours, _baseline(task_set, folder, model_dir, settings, scored)


def solve_alone(task_set: TaskSet, settings: Sequence[str]) -> SolveFigures:
    """Our side alone."""
    with _folder_of(task_set) as folder:
        return _ours(task_set, folder, BUNDLED_DIR, settings, 0)


@contextmanager
def _folder_of(task_set: TaskSet) -> Iterator[Path]:
    """A folder for what a measurement leaves, with the tasks in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tasks").mkdir()
        for task in task_set.tasks:
            (folder / "tasks" / f"{task.id}.json").write_text(json.dumps(challenge(task)))
        yield folder


def large_tasks() -> TaskSet:
    """Training tasks whose test outputs all have 200 cells or more."""
    task_set = load_tasks(TasksConfig(spec="arc-agi-1/training"))
    large = [task for task in task_set.tasks if min(grid.size for grid in task_set.solutions[task.id]) >= LARGE_CELLS]
    chosen = tuple(sorted(large, key=lambda task: task.tokens)[:LARGE_TASKS])
    return TaskSet(task_set.name, chosen, {task.id: task_set.solutions[task.id] for task in chosen})


def random_model(folder: Path) -> Path:
    """A checkpoint of the bundled model's shape with random weights."""
    save_model(new_model(ModelConfig(), FormatConfig(), seed=0), folder)
    return folder


def _ours(task_set: TaskSet, folder: Path, model_dir: Path, settings: Sequence[str], scored: int) -> SolveFigures:
    """`bin/solve` in a process of its own."""
    run_dir, start = folder / "run", now_s()
    words = ["--tasks", folder / "tasks", "--out", run_dir, f"model.path={model_dir}", "run.show=0", *settings]
    _run("arc_solver.solve", *words)
    seconds = now_s() - start
    records = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    log = [record for record in records if record["event"] == "task"]
    learnt = [record["adaptation"] for record in log if record["adaptation"]]
    workers = {record["worker"]: record["peak_memory_bytes"] for record in log}
    adapt_s = sum(adaptation["seconds"] for adaptation in learnt) / len(workers)
    return SolveFigures(
        sum(adaptation["tokens"] for adaptation in learnt) / adapt_s if learnt else 0.0,
        sum(record["predicting"] for record in log) / len(workers),
        sum(record["cost"]["view_steps"] for record in log),
        sum(record["cost"]["forward_steps"] for record in log),
        _scores_per_s(task_set.tasks[:scored], run_dir, model_dir, settings),
        3600 * len(task_set.tasks) / seconds,
        score(read_submission(run_dir / "submission.json", task_set.tasks), task_set.solutions).outputs_solved,
        sum(workers.values()),
    )


def _scores_per_s(tasks: Sequence[Task], run_dir: Path, model_dir: Path, settings: Sequence[str]) -> float:
    """Our engine alone, with the adapters that the run left."""
    config, device = load_config(None, [*settings, "predict.score=true", "predict.score_all=true"]), pick_device("auto")
    engine = _Timed(load_model(model_dir, device, fast_dtype(device)), config.predict.batch_tokens)
    scored = 0
    for task in tasks:
        adapter = load_adapter(run_dir / "adapters" / task.id) if config.adapt.enabled else None
        predictions = predict(task, engine, adapter, config.predict, named_rng(config.run.seed, task.id, "predict"))
        scored += len(predictions.candidates) * len(predictions.geometries)
    return scored / engine.score_s if tasks else 0.0


def _baseline(task_set: TaskSet, folder: Path, model_dir: Path, settings: Sequence[str], scored: int) -> SolveFigures:
    result, start = folder / "baseline.json", now_s()
    _run("arc_solver.bench.baseline_solving", model_dir, folder / "tasks", result, *settings)
    seconds = now_s() - start
    measured = json.loads(result.read_text())
    total = measured["total"]
    return SolveFigures(
        total["adapt_tokens"] / total["adapt_s"] if total["adapt_tokens"] else 0.0,
        total["decode_s"],
        total["reply_tokens"],  # each id of a view takes a pass
        total["forward_steps"],
        _baseline_scores_per_s(task_set.tasks[:scored], folder / "run", model_dir, settings),
        3600 * len(task_set.tasks) / seconds,
        score(read_submission(submission_file(result), task_set.tasks), task_set.solutions).outputs_solved,
        measured["peak_memory_bytes"],
    )


class _Timed(TorchEngine):
    """Our engine, which also says how long scoring took."""

    score_s = 0.0

    @contextmanager
    def open_session(self, prompts: Sequence, adapters: Sequence[Adapter | None]) -> Iterator[TorchSession]:
        with super().open_session(prompts, adapters) as session:
            real = session.score

            def timed(replies: Sequence) -> list:
                start = now_s()
                try:
                    return real(replies)
                finally:
                    self.score_s += now_s() - start

            session.score = timed  # type: ignore[method-assign]
            yield session


@torch.inference_mode()
def _baseline_scores_per_s(tasks: Sequence[Task], run_dir: Path, model_dir: Path, settings: Sequence[str]) -> float:
    """Scores the leading candidates of our run under all views by whole forward passes of the stock model."""
    config, device = load_config(None, settings), pick_device("auto")
    scored, spent_s = 0, 0.0
    for task in tasks:
        lm, format = load_baseline(model_dir, device, fast_dtype(device))
        if (run_dir / "adapters" / task.id).is_dir():
            merge(Model(lm, format, None), load_adapter(run_dir / "adapters" / task.id))
        predictions = Predictions.from_json(json.loads((run_dir / "tasks" / f"{task.id}.json").read_text()))
        rows = _rows_to_score(task, predictions, config.predict, format, config.run.seed)
        start = now_s()
        for i in range(0, len(rows), count := max(1, SCORE_TOKENS // len(rows[0][0]))):
            _score_rows(lm, rows[i : i + count])
        spent_s += now_s() - start
        scored += len(rows)
    return scored / spent_s if tasks else 0.0


Row = tuple[torch.Tensor, torch.Tensor, int]  # ids, positions, where the reply begins


def _rows_to_score(
    task: Task, predictions: Predictions, config: PredictConfig, format: FormatConfig, seed: int
) -> list[Row]:
    """Prompt and reply of each view and leading candidate, longest first."""
    views = views_of(task, config, named_rng(seed, task.id, "predict"))
    rows = []
    for t in range(len(task.test)):
        for candidate in sorted(predictions.for_test(t), key=lambda c: -len(c.views))[:SCORED]:
            for view in views:
                seen = view.apply_task(task)
                answered = [*seen.train, Pair(seen.test[t], view.apply(candidate.grid))]
                whole, prompt = encode_sample(answered, format), encode_prompt(seen.train, seen.test[t], format)
                ids, positions = (torch.from_numpy(x.astype(np.int64)) for x in (whole.ids_T, whole.positions_T))
                rows.append((ids, positions, len(prompt)))
    return sorted(rows, key=lambda row: -len(row[0]))


def _score_rows(lm: torch.nn.Module, rows: Sequence[Row]) -> list[float]:
    pad = torch.nn.utils.rnn.pad_sequence
    ids_BT = pad([row[0] for row in rows], batch_first=True, padding_value=PAD)
    positions_BT = pad([row[1] for row in rows], batch_first=True)
    mask_BT = pad([torch.ones_like(row[0]) for row in rows], batch_first=True)
    device = next(lm.parameters()).device
    out = lm(ids_BT.to(device), attention_mask=mask_BT.to(device), position_ids=positions_BT.to(device))
    found_BT = out.logits.float().log_softmax(-1)[:, :-1].gather(2, ids_BT.to(device)[:, 1:, None])[:, :, 0].tolist()
    return [sum(found[start - 1 : len(ids) - 1]) for found, (ids, _, start) in zip(found_BT, rows, strict=True)]


def _run(module: str, *words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{module} failed: {done.stderr}")
