"""The joint stage: what it learns from, and that a run with one ends alike however often it is ended before."""

import json
import re
import signal
import time
from math import ceil

import numpy as np
import pytest
import torch
from solve_runs import assert_like, finish, solve, some_tasks, start, words_for
from toys import flip_task, write_challenges

from arc_solver.config import Config, load_config
from arc_solver.models.model import load_model
from arc_solver.puzzles.tasks import challenge
from arc_solver.solving.adapt import planned_steps, step_tokens
from arc_solver.solving.joint import shown, training_config

JOINT = (
    "adapt.joint=1",
    "adapt.joint_lr=1e-2",
    "adapt.steps=400",
    "adapt.stop=never",
    "predict.views=2",
    "--limit",
    "4",
)
HERE = ("--executor", "inprocess")


def test_it_learns_no_test_output_and_leaves_a_demonstration_for_the_adapters():
    tasks = some_tasks(12)
    content = json.loads(json.dumps(shown(tasks)))
    assert content.keys() == {task.id for task in tasks}
    for task in tasks:
        whole, told = challenge(task), content[task.id]
        assert told["test"] == [{"input": grid.tolist()} for grid in task.test]
        assert told["train"] == (whole["train"][:-1] if len(task.train) >= 3 else whole["train"])


def test_its_tokens_are_a_share_of_those_of_all_adapters(tmp_path):
    tasks, cpu = some_tasks(12), torch.device("cpu")
    config = load_config(None, ["adapt.joint=0.25", "adapt.steps=1000", "lora.enabled=true", "train.optimizer=adamw"])
    train = training_config(config, tasks, tmp_path / "shown.json", cpu)
    planned = sum(planned_steps(task, config.adapt) * step_tokens(task, config.adapt) for task in tasks)
    assert train.train.steps == ceil(0.25 * planned / train.train.batch_tokens) > 1
    assert train.lora.enabled and train.lora.save == "merged"
    assert Config.model_validate(train.model_dump()) == train  # bin/train takes it


def test_killed_and_continued_it_ends_alike_and_all_that_follows_uses_its_model(checkpoint, challenges, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    solve(words_for(checkpoint, challenges, whole, *JOINT))
    for name in (signal.SIGTERM, signal.SIGKILL):
        process = start(words_for(checkpoint, challenges, out, *JOINT, *HERE))
        known = _steps(out)
        while _steps(out) == known and process.poll() is None:
            time.sleep(0.01)
        process.send_signal_to_all(name)
        process.wait()
        assert process.returncode == (1 if name == signal.SIGTERM else -name)
        assert not (out / "joint.json").exists()
    said = finish(start(words_for(checkpoint, challenges, out, *JOINT, *HERE)))
    assert "time after the joint stage" in said
    assert_like(out, whole)
    base, ours, theirs = (
        load_model(folder).lm.state_dict() for folder in (checkpoint, out / "joint/model", whole / "joint/model")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], base[name]) for name in ours)
    record, summary = (json.loads((out / name).read_text()) for name in ("joint.json", "summary.json"))
    assert record == summary["joint"] and record["steps"] > 0
    # It is the model that answers: without adapters, the run and its model answer the same, and its base another.
    plain = [*HERE, "adapt.enabled=false"]
    alone, by_model, by_base = (tmp_path / name for name in ("alone", "model", "base"))
    solve(words_for(checkpoint, challenges, alone, *JOINT, *plain))
    model = alone / "joint/model"
    solve(words_for(model, challenges, by_model, *JOINT, *plain, "adapt.joint=0"))
    solve(words_for(checkpoint, challenges, by_base, *JOINT, *plain, "adapt.joint=0"))
    assert_like(alone, by_model)
    assert (alone / "submission.json").read_bytes() != (by_base / "submission.json").read_bytes()


def _steps(out) -> int:
    log = out / "joint" / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_a_time_budget_without_time_for_it_leaves_the_model_as_it_was(checkpoint, challenges, tmp_path):
    said = solve(
        words_for(checkpoint, challenges, tmp_path, *JOINT, *HERE, "adapt.joint=0.001", "--time-budget", "60s")
    )
    assert "left none for a step; the model is what it was" in said
    assert json.loads((tmp_path / "joint.json").read_text())["steps"] == 0


@pytest.mark.parametrize("more", [["model.quantize=4bit"], ["adapt.start=pretrained"]])
def test_it_is_refused_where_the_weights_must_stay(more, checkpoint, challenges, tmp_path):
    said = solve(words_for(checkpoint, challenges, tmp_path / "run", "adapt.joint=0.1", *more), expect=2)
    assert "adapt.joint changes the weights" in said
    assert len(said.splitlines()) == 1


def test_it_is_refused_in_the_words_of_bin_solve_where_it_has_nothing_to_learn(checkpoint, tmp_path):
    """Before there is a run: with other settings, the same --out can be given."""
    rng, out = np.random.default_rng(0), tmp_path / "run"
    single = write_challenges(tmp_path, [flip_task(rng, "task0", demonstrations=1)])
    said = solve(words_for(checkpoint, single, out, *JOINT, *HERE), expect=2)
    assert "adapt.joint learns from tasks with two demonstrations or more" in said and "source" not in said
    several = write_challenges(tmp_path, some_tasks(2))
    said = solve(words_for(checkpoint, several, out, *JOINT, *HERE, "adapt.max_tokens=60"), expect=2)
    (needed,) = re.findall(r"adapt\.joint needs adapt\.max_tokens=(\d+) or more", said)
    assert "corpus" not in said and not out.exists()
    said = solve(words_for(checkpoint, several, out, *JOINT, *HERE, f"adapt.max_tokens={needed}"))
    assert "to solve tasks" not in said and "2 of 2" in said


def test_what_training_says_is_said_in_the_words_of_bin_solve(checkpoint, challenges, tmp_path):
    diverged = ("adapt.joint_lr=1e30", "adapt.steps=4000")
    said = solve(words_for(checkpoint, challenges, tmp_path / "run", *JOINT, *HERE, *diverged), expect=1)
    assert "error: joint stage: the gradients of step" in said and "lower adapt.joint_lr" in said
