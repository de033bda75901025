"""The whole sentence: on a toy model through the real command, and a tiny model that learns five tasks by heart."""

import io
import json
import os
import pickle
import re
import signal
import time

import numpy as np
import pytest
import torch
from forked import is_alive, output_of
from rich.console import Console
from small_runs import small
from solve_runs import start, start_anew
from toys import TOY, flip_task, hasty, random_adapter, write_challenges

from arc_solver.answers.submission import read_submission, score
from arc_solver.answers.vote import choose_attempts
from arc_solver.config import AdaptConfig, Config, FormatConfig, OptimConfig, PredictConfig, TasksConfig
from arc_solver.data.stream import pack
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.models.model import Model, load_model, new_model, packed_loss, save_model
from arc_solver.puzzles.encode import encode_sample
from arc_solver.puzzles.task_files import load_tasks, smallest
from arc_solver.puzzles.tasks import Pair, TaskSet
from arc_solver.rng import named_rng
from arc_solver.solving.command import default_run_dir, main
from arc_solver.solving.predict import predict
from arc_solver.solving.solve import _Shown
from arc_solver.solving.worker import AdaptJob, PredictJob, Worker
from arc_solver.training.optimize import fit, make_optimizers
from arc_solver.training.train import train

QUICK = ["adapt.steps=3", "adapt.rank=4", "predict.views=3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A toy model that bin/train trained, and that was made hasty."""
    folder = tmp_path_factory.mktemp("toy")
    config = small(train={"steps": 2})
    train(config, folder / "training")
    save_model(hasty(load_model(folder / "training" / "model")), folder)
    return folder


@pytest.fixture(scope="module")
def challenges(tmp_path_factory):
    """Four small tasks with one to four test inputs, one of them with a single demonstration."""
    rng = np.random.default_rng(0)
    tasks = [flip_task(rng, f"task{i}", demonstrations=4 - i, tests=i + 1) for i in range(4)]
    tasks[3] = flip_task(rng, "task3", demonstrations=1, tests=4)
    return write_challenges(tmp_path_factory.mktemp("tasks"), tasks)


def run(*words, expect: int = 0) -> tuple[str, str]:
    """What the command says on stdout and on stderr."""
    return output_of(start(words), expect)


def test_the_whole_sentence_is_reproducible(checkpoint, challenges, tmp_path):
    """bin/solve twice, with one worker and with two: byte-identical submissions, valid and complete."""
    model = f"model.path={checkpoint}"
    words = ["--tasks", str(challenges), model, *QUICK, "--out"]
    first, _ = output_of(start_anew([*words, tmp_path / "a", "run.workers=2"]))
    run(*words, tmp_path / "b", "run.workers=1")
    other, _ = run(*words, tmp_path / "c", "--seed", "1", "--limit", "2", "--executor", "inprocess")
    files = [(tmp_path / name / "submission.json").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    for record in (
        "config.json",
        "log.jsonl",
        "summary.json",
        "report.html",
        "tasks/task2.json",
        "adapters/task3/adapter_config.json",
    ):
        assert (tmp_path / "a" / record).is_file(), record
    found = load_tasks(TasksConfig(spec=str(challenges)))
    result = score(read_submission(tmp_path / "a" / "submission.json", found.tasks), found.solutions)
    assert (len(result.per_task), result.outputs) == (4, 10)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["score"] == result.to_json()
    records = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    log = [record for record in records if record["event"] == "task"]
    assert {record["task"]: len(record["distinct"]) for record in log} == {f"task{i}": i + 1 for i in range(4)}
    for record in log:
        assert sum(map(sum, record["votes"])) <= 3 * len(record["votes"])
        assert record["cost"]["accepted"] <= record["cost"]["decoded"]
    begin, *jobs = (record for record in records if record["event"] in ("begin", "job"))
    assert (begin["workers"], begin["deadline"]) == (2, None)
    for kind in ("adapt", "ask"):
        assert sorted(i for job in jobs if job["job"] == kind for i in job["tasks"]) == [f"task{i}" for i in range(4)]
    assert all(begin["time"] <= job["ended"] and job["seconds"] > 0 and job["worker"] in (0, 1) for job in jobs)
    assert summary["data"] == found.data
    assert str(tmp_path / "a") in first.replace("\n", "")  # lines are broken wherever the paths' lengths say
    shown, shown_other = (" ".join(each.split()) for each in (first, other))
    for text in ("(pass@1)", "Wilson", found.digest, "leak audit passed", "seed 0", "4 tasks"):
        assert text in shown
    assert "seed 1" in shown_other
    assert re.search(r"to do: up to [\d,]+ tokens to learn from, [\d,]+ tokens to ask", shown)
    assert re.search(r"up to about \d+ \w+, less where tasks stop early: [\d,]+ tokens/s of each of 2 workers", shown)
    assert len(json.loads((tmp_path / "c" / "submission.json").read_text())) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "nowhere.json"], "not found"),
        (["--ids", "zzz"], "has no task 'zzz'"),
        (["adapt.typo=1"], "unknown setting adapt.typo"),
        (["adapt.targets=['nose']"], "no linear layer named nose"),
        (["nowhere.toml"], "does not exist"),
        (["model.path=nowhere"], "there is no folder nowhere"),
        (["run.device=gpu"], "is no device"),
        (["--limit", "0"], "--limit is at least 1"),
        (["--limit", "few"], "invalid int value"),
        (["--sample", "0"], "--sample is at least 1"),
        (["--sample", "3", "--limit", "5"], "leave one of them out"),
        (["--sample-seed", "1"], "--sample N makes: give that too"),
        (["--sample", "21"], "of only 20 tasks"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(words, said, tmp_path):
    out, errors = run(*words, "--out", tmp_path / "run", expect=2)
    assert out == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "run").exists()


def test_a_refused_command_leaves_no_process(tmp_path):
    process = start(["--out", tmp_path / "run", "model.path=nowhere"])
    output_of(process, expect=2)
    assert not is_alive(process.pid, os.killpg)


def test_an_engine_that_cannot_serve_the_model_is_refused_before_any_work(checkpoint, challenges, tmp_path):
    words = ("--tasks", challenges, "--out", tmp_path / "run", f"model.path={checkpoint}", "engine.kind=vllm")
    _, errors = run(*words, expect=2)
    assert "use engine.kind=torch" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_a_terminal_shows_how_far_a_run_is_and_numbers_where_colours_are_few(
    checkpoint, challenges, tmp_path, monkeypatch
):
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=150)
    monkeypatch.setattr("arc_solver.solving.solve.Console", lambda: terminal)
    monkeypatch.setattr("arc_solver.solving.solve.MEASURE_S", 0.0)
    note = _Shown.note

    def drawn(self, *what):
        note(self, *what)
        terminal.print(self.say)  # as the terminal sees it a moment later

    monkeypatch.setattr(_Shown, "note", drawn)
    before = signal.getsignal(signal.SIGTERM)
    try:
        words = [
            "--tasks",
            challenges,
            "--out",
            tmp_path / "run",
            "--executor",
            "inprocess",
            f"model.path={checkpoint}",
        ]
        assert main([*map(str, words), *QUICK, "run.show=1"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    shown = terminal.file.getvalue()
    cells = re.findall(r"\x1b\[([39][\d;]*?);((?:4|10)[\d;]*)m[1-9] ", shown)  # ink and paper
    assert cells and not any(paper == {"3": "4", "9": "10"}[ink[0]] + ink[1:] for ink, paper in cells)
    assert "loading the model" in shown and "starting 1 worker" in shown
    assert re.search(r"0 of 4 tasks .* \d+% of the work", shown) and re.search(r"[123] of 4 tasks .* ETA \d", shown)


def test_a_killed_main_process_leaves_no_workers(checkpoint, challenges, tmp_path):
    words = ["--tasks", challenges, "--out", tmp_path / "run", f"model.path={checkpoint}", "adapt.steps=1000000"]
    words += ["adapt.stop=never"]
    process = start([*words, "adapt.budget_tokens=1000000000000", "run.workers=2"])
    while not (tmp_path / "run" / "submission.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(5)
    process.kill()
    process.wait()
    for _ in range(600):
        if not is_alive(process.pid, os.killpg):
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("workers outlived the main process")


def test_a_tiny_model_learns_five_tasks_by_heart(arc):
    """Through the same fit, predict and vote: all test outputs of the five smallest training tasks, exactly."""
    config = FormatConfig()
    wider = TOY.model_copy(update={"width": 64, "mlp_width": 128, "heads": 4, "kv_heads": 4})
    model = new_model(wider, config, seed=0)
    tasks = smallest(arc["training"].tasks, 5)
    solutions = {task.id: arc["training"].solutions[task.id] for task in tasks}
    samples = []
    for task in tasks:
        for test_input, output in zip(task.test, solutions[task.id], strict=True):
            samples.append(encode_sample([*task.train, Pair(test_input, output)], config))
    batch = pack(samples, sum(map(len, samples)))
    optim = OptimConfig(optimizer="muon", lr=5e-3, steps=150)
    named = list(model.lm.named_parameters())
    losses: list[float] = []

    def backward_at(_):
        loss = packed_loss(model, batch)
        loss.backward()
        return loss

    fit(
        [p for _, p in named],
        make_optimizers(named, optim),
        optim,
        backward_at,
        after_step=lambda step: losses.append(step.loss),
    )
    assert losses[-1] < 0.01
    engine = TorchEngine(Model(model.lm.eval(), config, None), 10_000)
    settings = Config(predict=PredictConfig(views=1))
    submission = {}
    for task in tasks:
        predictions = predict(task, engine, None, settings.predict, named_rng(0))
        submission[task.id] = choose_attempts(predictions, task, settings.vote)
    assert score(submission, solutions).share_of_outputs == 1.0


def test_a_job_does_not_depend_on_what_ran_before(toy_model, rng):
    config = Config(adapt=AdaptConfig(steps=2, rank=2), predict=PredictConfig(views=2))
    groups = [(flip_task(rng, f"task{i}"), flip_task(rng, f"other{i}")) for i in range(2)]
    worker = Worker(toy_model, None, config, TorchEngine(toy_model, 10_000))

    def solved(group):
        adapters = tuple(adaptation.adapter for adaptation in worker.run(AdaptJob(group)).values)
        return [found.to_json() for found in worker.run(PredictJob(group, adapters, config.predict)).values]

    forwards = [solved(group) for group in groups]
    assert [solved(group) for group in reversed(groups)][::-1] == forwards
    rounds = [worker.run(AdaptJob(groups[0], round=n)).values[0] for n in (0, 1)]
    assert rounds[0].last_loss != rounds[1].last_loss  # each has samples of its own


def test_jobs_end_with_their_time(toy_model, rng):
    """Adapting stops after the step in which time is up; asking gives what is there, which may be nothing."""
    config = Config(
        adapt=AdaptConfig(steps=10**6, budget_tokens=10**12, rank=2, stop="never"), predict=PredictConfig(views=4)
    )
    task = flip_task(rng)
    worker = Worker(toy_model, None, config, TorchEngine(toy_model, 10_000))
    (adaptation,) = worker.run(AdaptJob((task,), seconds=0.5)).values
    assert adaptation.ended == "deadline"
    assert 0 < adaptation.steps < 10**6
    (nothing,) = worker.run(PredictJob((task,), (adaptation.adapter,), config.predict, seconds=0.0)).values
    assert nothing.candidates == ()
    (found,) = worker.run(PredictJob((task,), (adaptation.adapter,), config.predict)).values
    assert found.candidates


def test_adapters_survive_the_way_to_another_process(toy_model):
    adapter = random_adapter(toy_model, 0)
    again = pickle.loads(pickle.dumps(adapter))
    assert (again.rank, again.alpha) == (adapter.rank, adapter.alpha)
    for name, (a, b) in adapter.weights.items():
        assert torch.equal(again.weights[name][0], a)
        assert torch.equal(again.weights[name][1], b)


def test_run_directories_get_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = TaskSet("arc-agi-1/evaluation", (), {})
    first = default_run_dir(found)
    first.mkdir(parents=True)
    assert first.name.startswith("arc-agi-1-evaluation-")
    assert default_run_dir(found) != first
