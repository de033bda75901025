"""A training's folder -> plain values for its page, while it goes on too."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ..charts import smoothed
from ..errors import UserError
from ..puzzles import read_json
from .collect import flat, read_log, unusual

PIECES = 100  # that the speed is averaged over
LATEST = 100  # steps, by which it is judged how long the others take
MILLION = 1_000_000


Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True, eq=False)
class TrainingFacts:
    """All that a training's folder says."""

    name: str
    has_ended: bool  # as it should: it took all its steps, or the clock ended it
    total: int  # steps of all stages
    about: Mapping[str, Any]  # training.json beside the weights, or a checkpoint's progress; empty before the first
    settings: Mapping[str, Any]
    unusual: Mapping[str, tuple[Any, Any]]  # settings that are not the defaults: the value, and the default
    stages: Sequence[tuple[str, int]]  # names, and their last steps so far
    loss: Curve  # of training, smoothed, over millions of tokens
    validation: Curve
    accuracy: Curve  # share of generated answers that are right
    rate: Curve  # learning rate over steps
    speed: Curve  # tokens/s over millions of tokens
    left_s: float  # that the other steps take, if they are like the latest and no clock ends them

    @property
    def steps(self) -> int:
        """That were taken so far."""
        return int(self.rate[0][-1])

    @property
    def is_finished(self) -> bool:
        return self.has_ended and self.steps >= self.total

    @property
    def sources(self) -> Mapping[str, Mapping[str, Any]]:
        """What became of each source's samples."""
        found: Mapping[str, Mapping[str, Any]] = self.about.get("sources") or self.about.get("counts") or {}
        return found


def is_training(folder: Path) -> bool:
    """Whether a training began there; a run directory of bin/solve has a config.json too."""
    return (folder / "config.json").is_file() and (folder / "partition").is_dir()


def read_training(out_dir: Path) -> TrainingFacts:
    """What a training has come to.

    Raises:
        UserError: it has taken no step yet, or its config cannot be read.
    """
    config, records = read_json(out_dir / "config.json"), read_log(out_dir / "log.jsonl")
    steps = [record for record in records if record.get("loss") is not None]
    if not steps:
        raise UserError(f"{out_dir} has taken no step, so there is nothing to show yet: ask again later")
    peaks = {stage["name"]: stage["train"]["lr"] for stage in config["stages"]}
    stages = {step["stage"]: step["step"] for step in steps}
    rates = [peaks.get(step["stage"], 1.0) * step["rate"] for step in steps]
    total = sum(stage["train"]["steps"] for stage in config["stages"])
    return TrainingFacts(
        out_dir.resolve().name,
        any(record.get("finished") for record in records),
        total,
        _about(out_dir),
        flat(config),
        _unusual(config),
        list(stages.items()),
        ([step["tokens"] / MILLION for step in steps], smoothed([step["loss"] for step in steps])),
        _measured(records, "validation_loss"),
        _measured(records, "accuracy"),
        ([step["step"] for step in steps], rates),
        _speed(steps),
        _left_s(steps, total),
    )


def _about(out_dir: Path) -> dict[str, Any]:
    files = [out_dir / folder / "training.json" for folder in ("model", "adapter")]
    files += sorted((out_dir / "checkpoints").glob("step-*[0-9]/progress.json"), reverse=True)
    for file in files:
        if file.is_file():
            content: dict[str, Any] = json.loads(file.read_text())
            return content
    return {}


def _unusual(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Sources are no part of it, as a page's mixture has them. A stage's defaults are [train] and [corpus]."""
    found = unusual(flat(config))
    for stage in config["stages"]:
        for section in ("train", "corpus"):
            usual = flat(config.get(section, {}))
            found |= {
                f"{section}.{key} of stage {stage['name']}": (value, usual[key])
                for key, value in flat(stage.get(section, {})).items()
                if key in usual and value != usual[key]
            }
    return {name: values for name, values in found.items() if not name.startswith("corpus.sources")}


def _left_s(steps: Sequence[Mapping[str, Any]], total: int) -> float:
    """What lies between two steps counts, but for what is rare."""
    latest = steps[-LATEST - 1 :]
    times = [after["elapsed_s"] - before["elapsed_s"] for before, after in pairwise(latest)]
    return (total - steps[-1]["step"]) * median(times or [steps[-1]["elapsed_s"] - steps[-1]["began_s"]])


def _measured(records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    found = [(record["tokens"] / MILLION, record[name]) for record in records if record.get(name) is not None]
    return [tokens for tokens, _ in found], [value for _, value in found]


def _speed(steps: Sequence[Mapping[str, Any]]) -> Curve:
    """Tokens/s in pieces of the run; the first step compiles, and pauses between steps are no part of it."""
    tokens, speeds = [], []
    size = max(1, len(steps) // PIECES)
    for k in range(1, len(steps), size):
        piece = steps[k : k + size]
        seconds = sum(step["elapsed_s"] - step["began_s"] for step in piece)
        if seconds > 0:
            tokens.append(piece[-1]["tokens"] / MILLION)
            speeds.append((piece[-1]["tokens"] - steps[k - 1]["tokens"]) / seconds)
    return tokens, speeds
