"""What a study asks: its file, and the runs that answer it.

question = "Does a cyclic learning rate escape bad optima?"
hypothesis = "No: linear decay ends lower."
config = "../bundled.toml"                  # what all arms have, from the file's own folder
set = ["train.steps=400"]                   # over that, as on the command line
metrics = ["validation_loss", "pass@2"]     # the first decides

[[arms]]                                    # the first is the one that the others are compared with
name = "linear"
set = ["train.schedule=linear"]

[[arms]]
name = "cyclic"
set = ["train.schedule=cyclic"]
"""

import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from ..config import Config, Section, load_config
from ..errors import UserError, meant


@dataclass(frozen=True)
class Metric:
    """What is measured of a run."""

    title: str
    is_share: bool  # of tasks or answers, else nats a token
    is_solved: bool  # what bin/solve comes to; else bin/train

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.is_share else -1

    def says(self, value: float, signed: bool = False) -> str:
        sign = "+" if signed else ""
        return f"{100 * value:{sign}.1f}%" if self.is_share else f"{value:{sign}.4f}"


METRICS = {
    "validation_loss": Metric("loss on held-out tasks, nats a token", is_share=False, is_solved=False),
    "accuracy": Metric("answers generated to held-out tasks that are right", is_share=True, is_solved=False),
    "pass@1": Metric("solved by one attempt", is_share=True, is_solved=True),
    "pass@2": Metric("solved by two attempts", is_share=True, is_solved=True),
    "coverage": Metric("solved by any candidate", is_share=True, is_solved=True),
}
Name = Annotated[str, Field(min_length=1, pattern=r"^[^|`\n/]+$")]  # of an arm, in tables and file names
MetricName = Literal["validation_loss", "accuracy", "pass@1", "pass@2", "coverage"]
Setting = Literal["run.seed", "model.seed", "validation.seed", "tasks.sample_seed"]


class Arm(Section):
    """One of the ways that are compared."""

    name: Name
    set: tuple[str, ...] = ()  # settings that this arm has, as on the command line
    x: Annotated[float, Field(gt=0)] | None = None  # where it stands on the axis of a study of scaling
    # What the seeds are of. By default all randomness of a run; or a part of it, while the rest has the first seed.
    vary: Annotated[tuple[Setting, ...], Field(min_length=1)] = ("run.seed",)
    again: bool = False  # its runs are made anew, though another arm has the same


class Study(Section):
    """See the top of this file."""

    question: Annotated[str, Field(min_length=1)]
    hypothesis: Annotated[str, Field(min_length=1)]  # written before the first run
    about: str = ""  # what a reader has to know besides
    # compare: each arm with the first. spread: how much the seeds of each arm differ. scaling: a power law over x.
    kind: Literal["compare", "spread", "scaling"] = "compare"
    axis: str = "x"  # what the x of the arms is, in a study of scaling
    config: str = ""  # a config file, from the study's folder
    set: tuple[str, ...] = ()
    seeds: PositiveInt = 3
    train: bool = True  # whether each run trains a model; else model.path is asked as it is
    seen: bool = False  # the tasks that are solved were trained on, on purpose: no run is refused for it
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)]
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "Study":
        if twice := [name for name, count in Counter(arm.name for arm in self.arms).items() if count > 1]:
            raise ValueError(f"two arms are named '{twice[0]}': rename one")
        if self.kind == "scaling" and (without := [arm.name for arm in self.arms if arm.x is None]):
            raise ValueError(f"a study of scaling needs x in each arm, and '{without[0]}' has none")
        if self.kind == "scaling" and len({arm.x for arm in self.arms}) < 3:
            raise ValueError("a power law has three parameters: give arms with at least three different x")
        if self.kind == "compare" and len(self.arms) < 2:
            raise ValueError("give at least two arms to compare")
        if not self.train and (needs := [m for m in self.metrics if not METRICS[m].is_solved]):
            raise ValueError(f"{needs[0]} is measured in training, and train is false: leave one of them out")
        return self

    @property
    def solves(self) -> bool:
        """Whether tasks are solved, with adaptation, by what was trained."""
        return any(METRICS[metric].is_solved for metric in self.metrics)

    @property
    def decides(self) -> str:
        """The metric that the verdicts are about."""
        return self.metrics[0]


@dataclass(frozen=True, eq=False)
class StudyFile:
    """A study as its file has it, with every arm's settings checked."""

    name: str
    file: Path
    study: Study
    overrides: tuple[str, ...]  # of the command line, for all arms
    options: tuple[str, ...] = ()  # of the command line besides, that another call needs for the same answer

    def config(self, arm: Arm, seed: int) -> Config:
        """All settings of a run. What an arm does not vary has seed 0.

        Raises:
            UserError: a setting is not one that exists.
        """
        study, own = self.study, {word.partition("=")[0] for word in arm.set}
        if twice := [word for word in self.overrides if word.partition("=")[0] in own]:
            key = twice[0].partition("=")[0]
            raise UserError(f"arm '{arm.name}' sets {key} itself: leave {twice[0]} out, or change {self.file}")
        seeds = [f"{setting}={seed}" for setting in arm.vary]
        try:
            config = load_config(self.base, [*study.set, *self.overrides, *arm.set, *seeds])
        except UserError as error:
            raise UserError(f"{self.file}, arm '{arm.name}': {error}") from None
        scored_on, spec = config.audit.scored_on, config.tasks.spec
        if not (study.train and study.solves) or study.seen or spec in scored_on:
            return config
        # What is measured is audited before anything is trained.
        return config.model_copy(update={"audit": config.audit.model_copy(update={"scored_on": (*scored_on, spec)})})

    @property
    def base(self) -> Path | None:
        """The config file that all arms have."""
        return self.file.parent / self.study.config if self.study.config else None


def read_study(
    file: Path, overrides: Sequence[str] = (), seeds: int | None = None, options: Sequence[str] = ()
) -> StudyFile:
    """A study's file, checked whole before anything runs.

    Args:
        overrides: `section.key=value` words for all arms.
        seeds: in the place of its own; None: its own.
        options: see `StudyFile`.

    Raises:
        UserError: it is not there, or no study.
    """
    try:
        tree: Any = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        study = Study.model_validate({**tree, "seeds": seeds} if seeds is not None else tree)
    except OSError as error:
        raise UserError(f"study {file} cannot be read ({error.strerror}); see configs/studies/ for some") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"study {file} is no TOML: {error}; see configs/studies/ for some") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"study {file}: {_explained(first['type'], first['loc'], first['msg'])}") from None
    found = StudyFile(file.stem, file, study, tuple(overrides), tuple(options))
    for arm in study.arms:
        found.config(arm, 0)
    return found


def _explained(kind: str, loc: Sequence[int | str], message: str) -> str:
    """What is wrong with a place of the file. Arms are counted from 1."""
    names = [f"arm {part + 1}" if isinstance(part, int) else part for part in loc if part != "arms" or len(loc) == 1]
    if kind == "extra_forbidden":
        known = [*(Arm if len(loc) > 1 else Study).model_fields]
        return f"{', '.join(names)}: there is no such key; {meant(str(loc[-1]), known)}"
    said = {"missing": "is missing: give it", "too_short": "give at least one"}.get(kind, message)
    said = said.removeprefix("Value error, ").replace("Input should", "should", 1)
    return f"{', '.join(names)}: {said}" if names else said
