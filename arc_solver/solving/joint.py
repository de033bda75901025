"""The joint stage: before each task gets its adapter, the model itself learns what all tasks of a run demonstrate.

It is a run of `bin/train` in RUN_DIR/joint, on the demonstrations in RUN_DIR/demonstrations.json. No test output is
among them, and of each task with three demonstrations or more the last is kept for the adapters, which then have one
that the weights have not seen. Killed at any moment, it goes on from its last checkpoint. On a CPU its last bits depend
on the number of cores, as all of them work on it.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import AuditConfig, Config, CorpusConfig, SourceConfig, StageConfig, TrainConfig, ValidationConfig
from ..data.corpus import make_partition
from ..data.sources import solved_pairs
from ..data.stream import NoRoom
from ..errors import MachineError, UserError, counted
from ..files import write_json, write_whole
from ..models import checkpoint_dir
from ..puzzles import Pair, Task, challenge, read_json, sample_tokens
from ..training.checkpoints import latest_checkpoint, load_progress
from .adapt import KEPT_FROM, group_room, planned_steps, step_tokens

DEMONSTRATIONS, RECORD = "demonstrations.json", "joint.json"
PAIRS = (2, 8)  # of a sample
NEVER = 10**9  # steps
VALIDATION = ValidationConfig(tasks=1, re_arc=False, tokens=2048, every=NEVER)  # as little as there can be


# What bin/train's sentences say, in the words of who runs bin/solve.
IN_OUR_WORDS = {
    "continue with --resume": "give the same command again",
    "lower train.lr (train.muon_lr with Muon), or use another train.precision": "lower adapt.joint_lr",
}


def require_demonstrations(tasks: Sequence[Task], config: Config) -> None:
    """Refuses tasks of which the stage could learn nothing, before a run begins.

    Raises:
        UserError: none has two demonstrations, or no two have room.
    """
    least = [_least_tokens(pairs, config) for pairs in (task.train for task in tasks) if len(pairs) > 1]
    if not least:
        raise UserError(
            "adapt.joint learns from tasks with two demonstrations or more, and each of these has one: leave it out"
        )
    held_out = make_partition(VALIDATION).validation
    validated = [_least_tokens((*task.train, *solved_pairs(task, held_out)), config) for task in held_out.tasks]
    if config.adapt.max_tokens < (needed := max(min(least), *validated)):
        raise UserError(
            f"adapt.joint needs adapt.max_tokens={needed} or more, for two demonstrations of a task at once, and of the"
            f" one that it validates on; it is {config.adapt.max_tokens}: make it larger, or leave adapt.joint out"
        )


def _least_tokens(pairs: Sequence[Pair], config: Config) -> int:
    """Of a sample of two pairs of a task."""
    return sample_tokens(sorted(pairs, key=lambda pair: sample_tokens([pair], config.format))[:2], config.format)


def train_jointly(
    config: Config,
    tasks: Sequence[Task],
    run_dir: Path,
    device: torch.device,
    deadline: float,
    say: Callable[[str], None],
) -> Config:
    """Trains on all tasks' demonstrations, unless that was done before. The config of the workers, with that model.

    Args:
        deadline: of the whole run, of `time.monotonic()`; infinite: there is no hurry.

    Raises:
        UserError: the model cannot be trained so, or hardly a demonstration has room.
        MachineError: training diverged, or something cannot be written.
        KeyboardInterrupt: it was asked to end; a checkpoint is kept.
    """
    model = config.model.model_copy(update={"path": str((run_dir / "joint" / "model").absolute()), "adapter": ""})
    trained = config.model_copy(update={"model": model})
    if (run_dir / RECORD).exists():
        return trained
    from ..training.train import train  # imports Accelerate, which whoever solves without this stage may not have

    out_dir, share = run_dir / "joint", config.adapt.joint
    write_whole(run_dir / DEMONSTRATIONS, json.dumps(shown(tasks)) + "\n")
    began = (out_dir / "config.json").exists()
    checkpoint = latest_checkpoint(out_dir) if began else None
    spent_s = load_progress(checkpoint).spent_s if checkpoint else 0.0
    most_s = spent_s + share / (1 + share) * (deadline - time.monotonic())
    settings = training_config(config, tasks, run_dir / DEMONSTRATIONS, device)
    say(
        f"joint stage: at most {counted(settings.train.steps, 'step')} on the demonstrations of all tasks, in {out_dir}"
    )
    try:
        train(settings, out_dir, most_s, resume=began, by_itself=False)
    except NoRoom:
        raise UserError(
            f"adapt.joint learns from two demonstrations at once, and adapt.max_tokens={config.adapt.max_tokens} has"
            " room for those of hardly a task: give another --out, and make it larger or leave adapt.joint out"
        ) from None
    except (UserError, MachineError) as error:
        if isinstance(error, MachineError) or not (out_dir / "model" / "config.json").exists():
            raise type(error)(f"joint stage: {_in_our_words(str(error))}") from error
        say(f"joint stage: {most_s:.0f} s, its share of the time, left none for a step; the model is what it was")
    done = read_json(out_dir / "model" / "training.json")
    write_json(run_dir / RECORD, {name: done[name] for name in ("steps", "tokens", "minutes")})
    return trained


def _in_our_words(said: str) -> str:
    for theirs, ours in IN_OUR_WORDS.items():
        said = said.replace(theirs, ours)
    return said


def joint_record(run_dir: Path) -> dict[str, Any] | None:
    """Steps, tokens and minutes of the joint stage of a run; None: it had none, or is in it."""
    file = run_dir / RECORD
    return dict(read_json(file)) if file.exists() else None


def shown(tasks: Sequence[Task]) -> dict[str, Any]:
    """What the joint stage learns of each task, in the form of task files."""
    content = {}
    for task in tasks:
        told = challenge(task)
        if len(told["train"]) >= KEPT_FROM:
            told["train"] = told["train"][:-1]
        content[task.id] = told
    return content


def training_config(config: Config, tasks: Sequence[Task], demonstrations: Path, device: torch.device) -> Config:
    """The joint stage of a run as a config of `bin/train`."""
    adapt = config.adapt
    batch_tokens = max(group_room(adapt, device), adapt.max_tokens)
    planned = sum(planned_steps(task, adapt) * step_tokens(task, adapt) for task in tasks)
    train = TrainConfig(
        optimizer="adamw",
        lr=adapt.joint_lr,
        weight_decay=0.0,
        schedule="linear",
        steps=max(1, math.ceil(adapt.joint * planned / batch_tokens)),
        batch_tokens=batch_tokens,
        checkpointing=adapt.recompute == "yes",
        labels=adapt.labels,
    )
    corpus = CorpusConfig(
        sources=(SourceConfig(kind="demonstrations", path=str(demonstrations.absolute())),),
        pairs=PAIRS,
        max_tokens=adapt.max_tokens,
        keep_background=adapt.keep_background,
        output_only=adapt.output_only,
    )
    # A demonstration that is another task's test pair would be a leak: tasks that have one are left out.
    audit = AuditConfig(scored_on=(config.tasks.spec,), overlap="exclude", exclude=())
    return Config(
        run=config.run,
        model=config.model.model_copy(update={"path": str(checkpoint_dir(config.model.path))}),
        format=config.format,
        lora=config.lora.model_copy(update={"save": "merged"}),
        corpus=corpus,
        validation=VALIDATION,
        audit=audit,
        train=train,
        stages=(StageConfig(name="joint", train=train, corpus=corpus),),
    )
