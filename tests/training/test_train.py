"""The offline run, from outside and from inside: resume, stages, LoRA, logs, and what goes wrong."""

import io
import json
import math
import pkgutil
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from forked import Forked, output_of
from rich.console import Console
from small_runs import finish, log, small, start_training, weights, write_config
from toys import KILLS, TOY

from arc_solver.config import Config, TasksConfig, load_config
from arc_solver.data.corpus import make_corpus
from arc_solver.data.counting import COUNTING_TASKS
from arc_solver.data.leaks import TrainingData
from arc_solver.data.stream import SampleStream, pack
from arc_solver.errors import UserError
from arc_solver.models.model import Model, load_model, new_model, packed_loss, recompute_activations, save_model
from arc_solver.puzzles.task_files import load_tasks
from arc_solver.report.page import training_page
from arc_solver.report.training import read_training
from arc_solver.training.checkpoints import latest_checkpoint
from arc_solver.training.command import main
from arc_solver.training.parallel import ParallelContext, decide_compile
from arc_solver.training.run import Interrupts
from arc_solver.training.train import BEGINNING, train
from arc_solver.training.validate import accuracy, accuracy_prompts, validation_batches, validation_loss

TWO_STAGES = [
    {"name": "a", "train": {"steps": 3}},
    {"name": "b", "start": "weights+optimizer", "train": {"steps": 3, "lr": 1e-3, "schedule": "cosine"}},
]
LORA = {"enabled": True, "rank": 4, "alpha": 8.0}


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A pretrained checkpoint."""
    return make_checkpoint(tmp_path_factory.mktemp("qwen") / "Tiny-Qwen2", "qwen2")


def lora_config(path, **sections) -> Config:
    return small(
        **{
            "model": {"path": str(path)},
            "format": {"positions": "token"},
            "lora": LORA,
            "train": {"optimizer": "adamw", "lr": 1e-2, **sections.pop("train", {})},
            **sections,
        }
    )


# ---- the same run again ----------------------------------------------------------------------------------------------


def test_training_twice_gives_identical_weights(tmp_path):
    train(small(), tmp_path / "a")
    train(small(), tmp_path / "b")
    first = weights(tmp_path / "a" / "model")
    assert same(first, weights(tmp_path / "b" / "model"))
    assert not same(first, new_model(TOY, small().format, seed=0).lm.state_dict())
    names = {file.name for file in (tmp_path / "a" / "model").iterdir()}
    beside = {"tokenizer.json", "training.json", "training_data.json", "loss.png", "README.md"}
    assert {"model.safetensors", *beside} <= names


@pytest.mark.parametrize("case", ["stages", "lora", "fp16"])
def test_a_run_killed_at_random_steps_ends_like_an_uninterrupted_one(case, qwen, tmp_path):
    """kill -9 at random moments, and --resume each time: bit-identical weights, an unbroken log."""
    config = {
        "stages": small(TWO_STAGES, train={"loader_workers": 1, "ema": 0.9}),
        "lora": lora_config(qwen),
        "fp16": small(train={"precision": "fp16", "optimizer": "adamw", "checkpoint_every": 2}),
    }[case]
    train(config, tmp_path / "whole")
    out_dir = tmp_path / "cut"
    file = write_config(config, tmp_path)
    rng = np.random.default_rng()
    for kill in range(1 + KILLS // 2):
        resume = ["--resume"] if (out_dir / "config.json").exists() else []
        process = start_training(file, out_dir, *resume)
        lines = int(rng.integers(0, 6)) if kill else 0
        while process.poll() is None and len(log_lines(out_dir)) <= lines:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal_to_all(signal.SIGKILL)
        process.wait()
    finish(start_training(file, out_dir, "--resume"))
    assert same(weights(tmp_path / "whole" / "model"), weights(out_dir / "model"))
    whole, cut = (
        [(r["step"], r.get("loss"), r.get("validation_loss")) for r in log(folder)]
        for folder in (tmp_path / "whole", out_dir)
    )
    assert whole == cut


def log_lines(out_dir: Path) -> list[str]:
    file = out_dir / "log.jsonl"
    return file.read_text().splitlines() if file.exists() else []


# ---- stages ----------------------------------------------------------------------------------------------------------


def adam_steps(out_dir: Path) -> set[float]:
    states = torch.load(latest_checkpoint(out_dir) / "optimizers.pt", weights_only=True)["optimizers"]
    return {float(s["step"]) for state in states for s in state["state"].values() if "step" in s}


def test_a_stage_takes_over_moments_only_if_asked(tmp_path):
    """The one line that answers whether the optimizer's state helps."""
    fresh = [TWO_STAGES[0], {**TWO_STAGES[1], "start": "weights"}]
    for name, stages in (("kept", TWO_STAGES), ("fresh", fresh)):
        train(small(stages), tmp_path / name)
    assert adam_steps(tmp_path / "kept") == {6.0}
    assert adam_steps(tmp_path / "fresh") == {3.0}
    records = [log(tmp_path / name) for name in ("kept", "fresh")]
    first, second = ([r["loss"] for r in run_log if "loss" in r] for run_log in records)
    assert first[:4] == second[:4]  # the same until the moments have had their say
    assert first[4:] != second[4:]
    assert [r["stage"] for r in records[0] if "loss" in r] == ["a"] * 3 + ["b"] * 3


def test_a_first_stage_takes_over_the_optimizer_of_an_earlier_run(tmp_path):
    train(small(), tmp_path / "a")
    stages = [{"name": "more", "start": "weights+optimizer"}]
    train(small(stages, model={"path": str(tmp_path / "a" / "model")}), tmp_path / "b")
    assert adam_steps(tmp_path / "b") == {12.0}


def test_the_moving_average_of_the_weights_is_what_a_run_leaves(tmp_path):
    steady = {"schedule": "constant", "warmup": 0.0}
    train(small(train={**steady, "steps": 4, "ema": 0.75}), tmp_path / "averaged")
    average = None
    for steps in range(1, 5):
        train(small(train={**steady, "steps": steps}), tmp_path / str(steps))
        now = weights(tmp_path / str(steps) / "model")
        average = now if average is None else {name: 0.75 * average[name] + 0.25 * w for name, w in now.items()}
    found = weights(tmp_path / "averaged" / "model")
    for name, weight in average.items():
        torch.testing.assert_close(found[name], weight, msg=name)
    assert same(weights(latest_checkpoint(tmp_path / "averaged") / "model"), now), "what is trained is not averaged"


def test_what_is_kept_from_before_the_decay_can_be_continued(tmp_path):
    first = {"schedule": "wsd", "decay": 0.5, "warmup": 0.0, "keep_before_decay": True}
    train(small(train=first), tmp_path / "a")
    kept = tmp_path / "a" / "before-decay"
    progress = json.loads((kept / "progress.json").read_text())
    assert progress["total_steps"] == 4, "the rates of six steps are 1, 1, 1, 5/6, 1/2, 1/6"
    assert not same(weights(kept / "model"), weights(tmp_path / "a" / "model"))
    stages = [{"name": "more", "start": "weights+optimizer"}]
    train(small(stages, model={"path": str(kept / "model")}, run={"device": "cpu", "seed": 1}), tmp_path / "b")
    assert adam_steps(tmp_path / "b") == {4.0 + 6.0}
    about = json.loads((tmp_path / "b" / "model" / "training.json").read_text())
    (earlier,) = about["earlier"]
    assert (earlier["steps"], earlier["tokens"], earlier["seed"]) == (4, progress["tokens"], 0)
    card = (tmp_path / "b" / "model" / "README.md").read_text()
    assert f"| tokens seen | {progress['tokens'] + about['tokens']:,}, in 2 runs |" in card
    counting = sum(run["sources"]["counting"]["samples"] for run in (earlier, about))
    assert f"| counting | {len(COUNTING_TASKS)} | {counting:,} |" in card


def test_a_longer_schedule_keeps_its_own_step_before_the_decay(ticking, tmp_path):
    """The run goes on where the first schedule had ended; what that one kept has 90 seconds less in it."""
    train(long_run(schedule="wsd", keep_before_decay=True), tmp_path / "a", max_s=100.0)
    kept = tmp_path / "a" / "before-decay" / "progress.json"
    first = json.loads(kept.read_text())
    assert first["rate"] < 1.0
    ticking["now"] = log(tmp_path / "a")[-2]["elapsed_s"]
    train(long_run(schedule="wsd", keep_before_decay=True), tmp_path / "a", max_s=400.0, resume=True)
    rates = {step["step"]: step["rate"] for step in log(tmp_path / "a")[:-1]}
    second = json.loads(kept.read_text())["total_steps"]
    assert second > first["total_steps"] and rates[second - 1] == 1.0 > rates[second]


def test_a_run_that_goes_on_from_its_last_steady_step_keeps_what_comes_after_it(tmp_path, monkeypatch):
    steady = {"schedule": "wsd", "decay": 0.5, "warmup": 0.0, "keep_before_decay": True}
    train(small(train=steady), tmp_path / "whole")
    seen: list[int] = []

    def interrupted_in_the_third_step(self: Interrupts) -> None:
        seen.append(1)
        self.asked = len(seen) == 3

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Interrupts, "watch", interrupted_in_the_third_step)
        train(small(train=steady), tmp_path / "cut")
    assert latest_checkpoint(tmp_path / "cut").name == "step-0000003"
    assert "data-running=" not in (tmp_path / "cut" / "report.html").read_text().partition("<main>")[0]
    train(small(train=steady), tmp_path / "cut", resume=True)
    assert same(*(weights(tmp_path / name / "before-decay" / "model") for name in ("whole", "cut")))


def test_a_card_says_what_is_not_known_of_earlier_runs(tmp_path):
    """Of a version that did not note its sources; and of a folder whose training.json is somebody else's."""
    train(small(), tmp_path / "a")
    file = tmp_path / "a" / "model" / "training.json"
    about = json.loads(file.read_text())
    here = {"path": str(tmp_path / "a" / "model")}

    def card(name: str, earlier: str) -> str:
        file.write_text(earlier)
        train(small(model=here), tmp_path / name)
        return (tmp_path / name / "model" / "README.md").read_text()

    old = card("b", json.dumps({name: about[name] for name in ("tokens", "steps", "minutes")}))
    assert f"| not noted | | | {about['tokens']:,} | | |" in old
    assert "| leak audit | unknown; leak audit passed: no training task is among" in old
    assert f"| began with | unknown, then {here['path']} |" in old
    for name, foreign in (("c", "[1]"), ("d", '{"epochs": 3}'), ("e", "{")):
        assert f"| began with | {here['path']} |" in (found := card(name, foreign)) and "in 1 run |" in found


def test_a_card_says_what_was_not_trained_on(tmp_path):
    sources = [{"kind": "counting"}, {"kind": "tasks", "path": "arc-agi-1/evaluation", "max_tasks": 60, "name": "some"}]
    audit = {"scored_on": ["demo"], "overlap": "exclude"}
    train(small(audit=audit, corpus={"sources": sources}), tmp_path / "a")
    about = json.loads((tmp_path / "a" / "model" / "training.json").read_text())
    demo = {task.id for task in load_tasks(TasksConfig(spec="demo")).tasks}
    left_out = about["left_out"]["some"]
    assert left_out.keys() <= demo and all(task_id == scored_id for task_id, scored_id in left_out.items())
    assert about["sources"]["some"]["tasks"] == 60 - len(left_out) < 60
    partition = json.loads((tmp_path / "a" / "partition" / "validation_challenges.json").read_text())
    assert about["held_out"] == list(partition)
    said = f"20 tasks held out to validate on, and {len(left_out)} that the audit left out"
    assert said in (tmp_path / "a" / "model" / "README.md").read_text()


def test_an_adapter_is_kept_from_before_the_decay_too(qwen, tmp_path):
    train(lora_config(qwen, train={"schedule": "wsd", "decay": 0.5, "keep_before_decay": True}), tmp_path / "a")
    kept = tmp_path / "a" / "before-decay" / "adapter"
    base = {"path": str(tmp_path / "a" / "base"), "adapter": str(kept)}
    train(lora_config(qwen, model=base), tmp_path / "b")
    (earlier,) = json.loads((tmp_path / "b" / "model" / "training.json").read_text())["earlier"]
    assert earlier["steps"] == json.loads((kept.parent / "progress.json").read_text())["total_steps"] < 6


def test_an_optimizer_state_that_does_not_fit_is_refused(tmp_path):
    train(small(), tmp_path / "a")
    stages = [{"name": "more", "start": "weights+optimizer"}]
    here = {"path": str(tmp_path / "a" / "model")}
    with pytest.raises(UserError, match=r"optimizers\.pt is of another train\.optimizer"):
        train(small(stages, model=here, train={"optimizer": "adamw"}), tmp_path / "b")
    states = latest_checkpoint(tmp_path / "a") / "optimizers.pt"
    states.write_bytes(states.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"optimizers\.pt is not whole .*: copy it again, or begin .*model\.path="):
        train(small(stages, model=here), tmp_path / "c")
    shutil.copytree(tmp_path / "a" / "model", tmp_path / "alone" / "model")
    with pytest.raises(UserError, match="lies in none"):
        train(small(stages, model={"path": str(tmp_path / "alone" / "model")}), tmp_path / "d")
    with pytest.raises(UserError, match="the new model lies in none"):
        train(small(stages), tmp_path / "e")


# ---- pretrained models and adapters ----------------------------------------------------------------------------------


def test_a_pretrained_model_is_cut_and_an_adapter_trained_continued_and_merged(qwen, tmp_path):
    train(lora_config(qwen), tmp_path / "a")
    base, merged = load_model(tmp_path / "a" / "base"), load_model(tmp_path / "a" / "model")
    assert base.parameters_count == merged.parameters_count
    assert not same(base.lm.state_dict(), merged.lm.state_dict())
    assert merged.trained_on and merged.trained_on.pretrained == {str(qwen)}
    again = lora_config(
        tmp_path / "a" / "base",
        model={"path": str(tmp_path / "a" / "base"), "adapter": str(tmp_path / "a" / "adapter")},
    )
    train(again, tmp_path / "b")
    assert log(tmp_path / "b")[0]["loss"] < log(tmp_path / "a")[0]["loss"] - 0.05  # it goes on where the first ended
    assert not (tmp_path / "b" / "base").exists()  # the base was there already


def test_full_weights_of_a_pretrained_model(qwen, tmp_path):
    train(lora_config(qwen, lora={"enabled": False}), tmp_path / "a")
    seen = [r["loss"] for r in log(tmp_path / "a") if "loss" in r]
    assert seen[-1] < seen[0] - 0.5
    assert not (tmp_path / "a" / "base").exists()
    assert load_model(tmp_path / "a" / "model").format.positions == "token"


def test_an_adapter_for_another_base_is_refused(qwen, tmp_path):
    train(lora_config(qwen, train={"steps": 1}), tmp_path / "a")
    other = make_checkpoint(tmp_path / "other", "qwen2", seed=1)
    config = lora_config(other, model={"path": str(other), "adapter": str(tmp_path / "a" / "adapter")})
    with pytest.raises(UserError, match="is for another base"):
        train(config, tmp_path / "b")


def test_what_a_lora_run_saves(qwen, tmp_path):
    left = {}
    for save in ("adapter", "merged"):
        train(lora_config(qwen, lora={**LORA, "save": save}, train={"steps": 1}), tmp_path / save)
        left[save] = {f.name for f in (tmp_path / save).iterdir()} & {"adapter", "model"}
    assert left == {"adapter": {"adapter"}, "merged": {"model"}}


def test_a_model_that_is_trained_on_keeps_what_it_has_seen(tmp_path):
    """Its base's training data counts in the audit; where the base does not say, neither does the result."""
    train(small(train={"steps": 1}), tmp_path / "known")
    base = load_model(tmp_path / "known" / "model")
    for seen, expected in ((TrainingData(frozenset({"zz"}), frozenset()), True), (None, False)):
        folder = tmp_path / f"base{expected}"
        save_model(Model(base.lm, base.format, seen), folder)
        train(small(train={"steps": 1}, model={"path": str(folder)}), tmp_path / f"run{expected}")
        after = load_model(tmp_path / f"run{expected}" / "model").trained_on
        assert (after is not None and {"zz"} < after.ids) == expected
        assert (after is None) != expected


# ---- time and interruptions ------------------------------------------------------------------------------------------


@pytest.fixture
def ticking(monkeypatch):
    """A run's clock that only its work moves on: what fits into a minute depends on no machine."""
    state = {"now": 0.0}

    def takes(seconds, name):
        owner, _, attribute = name.rpartition(".")
        real = getattr(pkgutil.resolve_name(owner), attribute)

        def slowly(*args, **options):
            state["now"] += seconds
            return real(*args, **options)

        monkeypatch.setattr(name, slowly)

    monkeypatch.setattr("arc_solver.clock.RunClock.now_s", lambda _: state["now"])
    takes(1.0, "arc_solver.training.parallel.ParallelContext.backward")
    takes(2.0, "arc_solver.training.run.validation_loss")
    takes(0.5, "arc_solver.training.run.save_checkpoint")
    takes(1.5, "arc_solver.training.train.save_results")
    return state


def long_run(**train: Any) -> Config:
    return small(train={"steps": 100_000, "warmup": 0.1, "checkpoint_every": 20, **train}, validation={"every": 20})


def test_a_run_with_a_time_limit_ends_in_time_with_all_that_it_leaves(ticking, tmp_path):
    train(long_run(), tmp_path / "a", max_s=120.0)
    *steps, last = log(tmp_path / "a")
    assert ticking["now"] < 120.0
    assert all(step["began_s"] < step["elapsed_s"] <= step["until_s"] < 120.0 for step in steps)
    rates = [step["rate"] for step in steps]
    assert rates[0] < 0.1 and max(rates) > 0.95 and rates[-1] < 0.1
    assert "validation_loss" in last and (tmp_path / "a" / "model" / "loss.png").exists()
    assert latest_checkpoint(tmp_path / "a").name == f"step-{steps[-1]['step']:07d}"


def test_a_run_that_ended_by_the_clock_goes_on_with_more_time(ticking, tmp_path):
    train(long_run(), tmp_path / "a", max_s=100.0)
    before = log(tmp_path / "a")[-2]
    assert before["rate"] < 0.1
    ticking["now"] = before["elapsed_s"]
    train(long_run(), tmp_path / "a", max_s=200.0, resume=True)
    *steps, last = log(tmp_path / "a")
    assert [step["step"] for step in steps] == list(range(1, last["step"] + 1))
    assert steps[before["step"]]["rate"] == pytest.approx(0.55, abs=0.15)  # about half of the longer run is over
    assert steps[-1]["rate"] < 0.1 and steps[-1]["elapsed_s"] < 200.0


def test_a_stage_has_its_share_of_the_time(ticking, tmp_path, capfd):
    stages = [{"name": name, "train": {"steps": steps}} for name, steps in (("a", 10_000), ("b", 30_000))]
    train(small(stages, validation={"every": 1000}), tmp_path / "a", max_s=100.0)
    *steps, _ = log(tmp_path / "a")
    ends = {step["stage"]: step for step in steps}
    assert ends["a"]["elapsed_s"] == pytest.approx(25.0, abs=5.0) and ends["b"]["elapsed_s"] < 100.0
    said = capfd.readouterr().err
    assert (
        f"the clock ended it after {steps[-1]['step']} of" in said and "new weights, as no model.path is given" in said
    )
    assert all(step["rate"] < 0.15 for step in ends.values())


def test_a_run_without_time_for_a_step_says_so_and_can_be_continued(ticking, tmp_path):
    with pytest.raises(UserError, match=r"--max-minutes 0\.05 left no time for a single step; .* give more"):
        train(small(), tmp_path / "a", max_s=3.0)
    assert load_model(tmp_path / "a" / "model")
    train(small(), tmp_path / "a", resume=True)
    train(small(), tmp_path / "whole")
    assert same(weights(tmp_path / "whole" / "model"), weights(tmp_path / "a" / "model"))


def test_validation_that_takes_too_much_of_the_time_is_left_out(ticking, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("arc_solver.training.report.VALIDATION_SHARE", 0.0)
    train(long_run(), tmp_path / "a", max_s=60.0)
    assert not any("validation_loss" in record for record in log(tmp_path / "a"))
    shown = capfd.readouterr().err
    assert json.loads((tmp_path / "a" / "model" / "training.json").read_text())["validation_loss"] is None
    assert "no validation: it would take" in shown and "no time to measure the validation loss at the end" in shown


@pytest.mark.parametrize("whole_group", [False, True])
def test_an_interrupted_run_saves_a_checkpoint_after_its_step(whole_group, tmp_path):
    """Ctrl-C, or a SIGTERM that a scheduler sends to all processes of a job."""
    config = small(
        train={"steps": 60, "checkpoint_every": 1000, "loader_workers": int(whole_group)}, validation={"every": 1000}
    )
    train(config, tmp_path / "whole")
    process = start_training(write_config(config, tmp_path), tmp_path / "cut")
    while len(log_lines(tmp_path / "cut")) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    if whole_group:
        process.send_signal_to_all(signal.SIGTERM)
    else:
        process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in said
    saved = latest_checkpoint(tmp_path / "cut")
    assert f"--resume continues from {saved}" in said
    assert saved.name == f"step-{log(tmp_path / 'cut')[-1]['step']:07d}"
    train(config, tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "whole" / "model"), weights(tmp_path / "cut" / "model"))


def test_a_run_that_is_ended_before_its_first_step_says_so(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    words = [str(write_config(small(), tmp_path)), "--out", str(tmp_path / "a")]
    for name in (signal.SIGINT, signal.SIGTERM):
        with monkeypatch.context() as patch:
            patch.setattr("arc_solver.training.train.make_corpus", lambda *_, name=name: signal.raise_signal(name))
            assert main(words) == 1
        assert capsys.readouterr().err.endswith("interrupted; no step was saved\n")
    assert signal.getsignal(signal.SIGTERM) == before
    assert main(words) == 0


def test_a_second_interruption_ends_a_run_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(alone=True) as interrupts:
        assert signal.getsignal(signal.SIGTERM) == before  # there is nothing to save yet
        interrupts.watch()
        interrupts.watch()
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    with Interrupts(alone=False) as interrupts:  # a launcher passes on what the processes have had themselves
        interrupts.watch()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.asked


# ---- logs and figures ------------------------------------------------------------------------------------------------


def test_logs_and_figures(tmp_path, capfd):
    train(small(validation={"tokens": 1000, "every": 3, "accuracy_every": 6, "accuracy_prompts": 2}), tmp_path / "a")
    steps = [r for r in log(tmp_path / "a") if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in steps if "validation_loss" in r] == [3, 6]
    assert [r["step"] for r in steps if "accuracy" in r] == [6]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss/train")] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in events.Scalars("loss/train")] == pytest.approx([r["loss"] for r in steps], abs=1e-6)
    about = json.loads((tmp_path / "a" / "model" / "training.json").read_text())
    assert sum(counts["tokens"] for counts in about["sources"].values()) == about["tokens"] == steps[-1]["tokens"]
    assert about["memory_peak_bytes"] > 0 and about["memory_estimate_bytes"] > 0
    shown = capfd.readouterr().err
    said = (
        "memory estimate",
        "peak memory",
        "leak audit passed",
        "held-out tasks",
        "too long",
        "counting",
        "step 1: loss",
        "step 2: loss",
        "ETA ",
    )
    for line in (*said, "not compiled: train.compile=no"):
        assert line in shown, line
    manifest = json.loads((tmp_path / "a" / "partition" / "manifest.json").read_text())
    assert len(manifest["validation"]) == 20
    facts = read_training(tmp_path / "a")
    assert facts.is_finished and facts.rate[0] == [1, 2, 3, 4, 5, 6]
    assert facts.validation[1][:2] == [r["validation_loss"] for r in steps if "validation_loss" in r]
    assert facts.sources == about["sources"]
    page = (tmp_path / "a" / "report.html").read_text()
    assert page == training_page(facts) and "data-running=" not in page.partition("<main>")[0]
    assert "leak audit passed" in page and all(label in page for label in about["sources"])


def test_what_a_run_is_busy_with_is_shown_in_a_terminal(tmp_path, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr("arc_solver.training.train.Console", lambda **_: terminal)
    monkeypatch.setattr("arc_solver.training.train.compiled", lambda logits_of: logits_of)
    answers = {"tokens": 1000, "every": 3, "accuracy_every": 6, "accuracy_prompts": 2}
    train(small(validation=answers, train={"compile": "yes"}), tmp_path / "a")
    shown = terminal.file.getvalue()
    rows = ("reading the training data", "loading the model", "trying the model", "drawing the first batches")
    rows += (
        "the first step, which compiles for about 16 s",
        "validating",
        "answering 2 questions",
        "saving a checkpoint",
    )
    for row in (*rows, "saving a checkpoint", "saving the results", "compiled: the first step took"):
        assert row in shown, row
    assert "step 1: loss" not in shown, "which the row says"
    assert re.search(r"step 3 .* loss \d\.\d+, .*tokens/s.* ETA 0:0", shown)


def test_validation_loss_does_not_depend_on_packing_or_order():
    config = small()
    model = new_model(TOY, config.format, seed=0)
    corpus = make_corpus(config)
    stream = SampleStream(corpus.mixtures[0], config.corpus, config.format, 0, "test")
    draws = [stream[i] for i in range(12)]
    samples, tasks = [draw.sample for draw in draws], [draw.task for draw in draws]
    one = [pack(samples, sum(map(len, samples)) + 50)]
    many = [pack([sample], len(sample) + i) for i, sample in enumerate(reversed(samples))]
    alone = [pack([sample], len(sample)) for sample in samples]

    def losses_of(batch):
        return packed_loss(model, batch, reduction="none")

    together, apart = validation_loss(losses_of, one, tasks), validation_loss(losses_of, many, tasks[::-1])
    assert together.value == pytest.approx(apart.value, abs=1e-5)
    assert together.by_task == pytest.approx(apart.by_task, abs=1e-5) and len(together.by_task) > 3
    for task in together.by_task:
        of = [batch for batch, name in zip(alone, tasks, strict=True) if name == task]
        nats = sum(packed_loss(model, batch, reduction="sum").item() for batch in of)
        assert together.by_task[task] == pytest.approx(nats / sum(batch.target_tokens for batch in of), abs=1e-5)


def test_validation_is_the_same_for_every_seed():
    first, second = (fixed_sets(small(run={"device": "cpu", "seed": seed})) for seed in (0, 1))
    assert first == second
    assert sum(len(ids) for ids in first[0]) >= 1000


def fixed_sets(config):
    partition = make_corpus(config).partition
    fixed = validation_batches(partition, config.corpus, config.format, "all-but-first", 512)
    asked = accuracy_prompts(partition, config.corpus, config.format)
    return [b.ids_T.tolist() for b in fixed[0]], [(task, p.ids_T.tolist(), g.tolist()) for task, p, g in asked]


def test_accuracy_counts_exact_answers(monkeypatch):
    """An engine that knows half of the answers."""
    from arc_solver.decoding.engine import Reply
    from arc_solver.puzzles.encode import encode_reply

    config = small(validation={"accuracy_prompts": 4})
    model = new_model(TOY, config.format, seed=0)
    asked = accuracy_prompts(make_corpus(config).partition, config.corpus, config.format)
    replies = [Reply(tuple(encode_reply(answer, config.format).tolist()), 0.0) for *_, answer in asked]
    replies[1] = Reply(replies[1].ids[:-1], 0.0)  # no end
    replies[2] = Reply(tuple((i + 1) % 10 if i < 10 else i for i in replies[2].ids), 0.0)  # other colours
    monkeypatch.setattr(
        "arc_solver.decoding.torch_engine.TorchSession.generate", lambda self, rows: [replies[i] for i in rows]
    )
    found = accuracy(model, asked, 1000)
    assert found.value == 0.5
    of_task = {
        task: [right for (of, *_), right in zip(asked, (1, 0, 0, 1), strict=True) if of == task] for task, *_ in asked
    }
    assert found.by_task == {task: sum(right) / len(right) for task, right in of_task.items()}
    assert accuracy(model, asked, 1000, lambda: True) is None  # cut short, they tell nothing
    assert model.lm.training


def test_compiled_equals_eager():
    """One graph serves every way of packing."""
    config = small()
    model = new_model(TOY, config.format, seed=0)
    stream = SampleStream(make_corpus(config).mixtures[0], config.corpus, config.format, 0, "test")
    compiled = torch.compile(model.logits, dynamic=False, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in (0, 5, 10):
            batch = pack([stream[i + j].sample for j in range(2 + i // 5)], 1024)
            losses = [packed_loss(model, batch, logits_of).item() for logits_of in (None, compiled)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("precision", "layers", "adapter", "left_s", "pays"),
    [
        ("bf16", 2, False, math.inf, True),
        ("fp32", 2, False, math.inf, True),
        ("bf16", 2, True, math.inf, True),
        ("fp32", 2, True, math.inf, False),  # gains nothing
        ("bf16", 2, False, 300.0, True),  # takes less than a tenth
        ("bf16", 8, False, 300.0, False),
        ("bf16", 2, True, 300.0, False),
        ("bf16", 8, False, 600.0, True),
        ("bf16", 40, True, 900.0, False),  # takes more than a third
        ("bf16", 40, True, 1000.0, True),
    ],
)
def test_what_is_compiled(precision, layers, adapter, left_s, pays, tmp_path, monkeypatch):
    monkeypatch.setattr("arc_solver.training.parallel.shutil.which", lambda _: "/usr/bin/g++")
    monkeypatch.setattr("arc_solver.training.parallel.sysconfig.get_path", lambda _: str(tmp_path))
    (tmp_path / "Python.h").touch()
    config = small(train={"precision": precision, "compile": "auto"}, model={"layers": layers})
    lm = new_model(config.model, config.format, seed=0).lm
    lm.get_input_embeddings().weight.requires_grad_(not adapter)
    devices = ParallelContext(config)
    choice = decide_compile(lm, config.train, devices, left_s)
    assert (choice.pays, choice.seconds > 0) == (pays, pays), choice
    for asked in ("yes", "no"):
        given = config.train.model_copy(update={"compile": asked})
        assert decide_compile(lm, given, devices, left_s).pays == (asked == "yes")
    (tmp_path / "Python.h").unlink()
    assert not decide_compile(lm, config.train, devices).pays


def test_checkpointing_gives_the_same_gradients():
    config = small()
    stream = SampleStream(make_corpus(config).mixtures[0], config.corpus, config.format, 0, "test")
    batch = pack([stream[i].sample for i in range(3)], 800)
    gradients = []
    for recomputes in (False, True):
        model = new_model(TOY, config.format, seed=0)
        model.lm.train()
        if recomputes:
            recompute_activations(model.lm)
        packed_loss(model, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.lm.parameters()]))
    assert torch.equal(*gradients)


def test_killed_as_it_begins_a_run_is_begun_anew(tmp_path, monkeypatch):
    def killed(file, _):
        raise KeyboardInterrupt

    one = small(train={"steps": 1})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("arc_solver.training.train.write_json", killed)
        train(one, tmp_path / "a")
    assert not (tmp_path / "a" / "config.json").exists()
    with pytest.raises(UserError, match="leave --resume out"):
        train(one, tmp_path / "a", resume=True)
    train(one, tmp_path / "a")
    assert (tmp_path / "a" / "model").is_dir() and not (tmp_path / "a" / BEGINNING).exists()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_what_a_user_gets_wrong(tmp_path):
    one = small(train={"steps": 1})
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/none: give the --out that the run was"):
        train(small(), tmp_path / "none", resume=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no training run to resume: give the --out"):
        train(small(), tmp_path / "empty", resume=True)
    train(one, tmp_path / "a")
    with pytest.raises(UserError, match="holds a training run"):
        train(small(), tmp_path / "a")
    with pytest.raises(UserError, match="not empty"):
        train(small(), tmp_path)
    with pytest.raises(UserError, match="give more"):
        train(one, tmp_path / "a", resume=True, max_s=0.01)
    with pytest.raises(UserError, match=r"run\.seed is not what the run was started with \(0 then, 1 now\)"):
        train(small(train={"steps": 1}, run={"device": "cpu", "seed": 1}), tmp_path / "a", resume=True)
    with pytest.raises(UserError, match=r"train\.optimizer is not what .*'muon' then, 'adamw' now"):
        train(small(train={"steps": 1, "optimizer": "adamw"}), tmp_path / "a", resume=True)
    file = tmp_path / "a" / "config.json"
    settings = json.loads(file.read_text())
    del settings["model"]["quantize"]  # which was not there yet when an older run began
    file.write_text(json.dumps(settings))
    train(one, tmp_path / "a", resume=True)
    with pytest.raises(UserError, match="is a file"):
        train(small(), tmp_path / "a" / "log.jsonl")
    with pytest.raises(UserError, match=r"batch_tokens=100"):
        train(small(train={"batch_tokens": 100}), tmp_path / "b")
    with pytest.raises(UserError, match=r"lora\.enabled needs a model"):
        train(small(lora=LORA, train={"optimizer": "adamw"}), tmp_path / "b")
    with pytest.raises(UserError, match="is no folder"):
        train(small(model={"path": "/nowhere/at/all"}), tmp_path / "b")
    with pytest.raises(UserError, match=r"give model\.path"):
        train(small(model={"adapter": "x"}), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_lora_run_that_cannot_start_leaves_nothing(qwen, tmp_path):
    """So the same --out can be given again."""
    config = lora_config(qwen, lora={**LORA, "targets": ["nope"]})
    with pytest.raises(UserError, match=r"no layer named nope"):
        train(config, tmp_path / "a")
    other = make_checkpoint(tmp_path / "other", "qwen2", seed=1)
    train(lora_config(other, train={"steps": 1}), tmp_path / "trained")
    model = {"path": str(qwen), "adapter": str(tmp_path / "trained" / "adapter")}
    with pytest.raises(UserError, match="is for another base"):
        train(lora_config(qwen, model=model), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["model.path=/nowhere"], "model.path=/nowhere is no folder"),
        (["train.step=3"], "unknown setting train.step"),
        (["corpus.sources.0.path=CUT"], "cut.json is not JSON"),
        (["corpus.sources.0.path=arc-agi-1/evaluation", 'audit.scored_on=["arc-agi-1/evaluation"]'], "leak audit: 40 "),
        (["validation.tasks=400"], "validation.tasks=400 leaves none"),
    ],
)
def test_one_sentence_and_exit_code_2(settings, sentence, tmp_path):
    cut = tmp_path / "cut.json"
    cut.write_text('{"a": {"train": [{"input": [[1]], "out')
    sources = [{"kind": "tasks", "path": "arc-agi-1/training", "max_tasks": 40}]
    file = write_config(small(corpus={"max_tokens": 200, "sources": sources}), tmp_path)
    words = [word.replace("CUT", str(cut)) for word in settings]
    out, errors = output_of(start_training(file, tmp_path / "run", *words), expect=2)
    assert errors.startswith("error: ") and sentence in errors
    assert len(errors.splitlines()) == 1 and out == ""
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_while_a_checkpoint_is_written(tmp_path):
    """Exit code 1, a sentence, the last good checkpoint intact; with room again the run ends as if nothing had been."""
    config = small()
    train(config, tmp_path / "whole")
    out_dir = tmp_path / "full"
    file = write_config(config, tmp_path)
    process = start_training(file, out_dir)
    while latest_checkpoint(out_dir) is None:
        time.sleep(0.001)
    process.send_signal_to_all(signal.SIGKILL)
    process.wait()
    good = latest_checkpoint(out_dir)
    before = {file: file.read_bytes() for file in good.rglob("*") if file.is_file()}
    size = (good / "optimizers.pt").stat().st_size // 2  # no file may grow beyond half of what is needed
    process = start_training(file, out_dir, "--resume")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    said = finish(process, expect=1)
    assert "could not be written" in said and f"last good checkpoint is {good}" in said
    assert "Traceback" not in said
    assert {file: file.read_bytes() for file in good.rglob("*") if file.is_file()} == before
    said = finish(Forked("arc_solver.train", ["--out", out_dir, "--resume"]))  # its config is in its folder
    assert f"continued from {good}" in said
    assert same(weights(tmp_path / "whole" / "model"), weights(out_dir / "model"))


def test_the_shipped_configs_are_read(tmp_path):
    files = sorted(Path("configs").glob("*.toml"))
    assert {file.stem for file in files} >= {"bundled", "qwen2.5-0.5b"}
    assert all(isinstance(load_config(file), Config) for file in files)
