import pytest
import torch

from arc_solver.bench.baseline_solving import load_baseline
from arc_solver.bench.solving import SCORED, SETTINGS, _rows_to_score, _score_rows, compare, large_tasks
from arc_solver.config import PredictConfig, TasksConfig
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.models.model import BUNDLED_DIR, load_model
from arc_solver.puzzles.task_files import load_tasks
from arc_solver.puzzles.tasks import TaskSet
from arc_solver.rng import named_rng
from arc_solver.solving.predict import predict


@pytest.fixture(scope="module")
def demo() -> TaskSet:
    return load_tasks(TasksConfig(spec="demo"))


def test_both_sides_do_the_same_work(demo):
    """One task, few steps: as many tokens were trained on and as many views answered."""
    task = demo.tasks[0]
    few = TaskSet("one", (task,), {task.id: demo.solutions[task.id]})
    ours, baseline = compare(few, settings=(*SETTINGS, "adapt.steps=3", "predict.views=3"), scored=1)
    for side in (ours, baseline):
        assert all(value > 0 for name, value in vars(side).items() if name != "solved"), side
        assert 0 <= side.solved <= 1
    assert baseline.view_steps <= 3 * baseline.batches, "each of 3 views takes part in no more passes than there are"


def test_the_baseline_scores_what_we_score(demo):
    """Whole forward passes of the stock model give the log-probabilities that our engine goes on to from its cache."""
    task, config = demo.tasks[3], PredictConfig(views=3)
    engine = TorchEngine(load_model(BUNDLED_DIR), 8192)
    predictions = predict(task, engine, None, config, named_rng(0, task.id, "predict"))
    lm, format = load_baseline(BUNDLED_DIR, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        theirs = sorted(_score_rows(lm, _rows_to_score(task, predictions, config, format, seed=0)))
    leading = sorted(predictions.candidates, key=lambda candidate: -len(candidate.views))[:SCORED]
    ours = sorted(p for candidate in leading for p in candidate.log_probabilities if p is not None)
    assert len(theirs) == 3 * len(leading)
    assert theirs == pytest.approx(ours, abs=1e-3)


def test_large_tasks_are_large():
    found = large_tasks()
    assert len(found.tasks) == 3
    assert all(grid.size >= 200 for task in found.tasks for grid in found.solutions[task.id])
