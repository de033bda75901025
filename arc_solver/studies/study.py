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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

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
        """A value, or where it is `signed` a difference: of shares in percentage points."""
        if signed:
            return f"{100 * value:+.1f}" if self.is_share else f"{value:+.4f}"
        return f"{value:.1%}" if self.is_share else f"{value:.4f}"


METRICS = {
    "validation_loss": Metric("loss on held-out tasks, nats a token", is_share=False, is_solved=False),
    "accuracy": Metric("answers generated to held-out tasks that are right", is_share=True, is_solved=False),
    "pass@1": Metric("solved by one attempt", is_share=True, is_solved=True),
    "pass@2": Metric("solved by two attempts", is_share=True, is_solved=True),
    "coverage": Metric("solved by any candidate", is_share=True, is_solved=True),
}
RUN_SETTINGS = ("run.seed", "run.device", "run.workers")  # that a study gives on to its runs
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[^|`/\x00-\x1f]+$")]  # of an arm, and of its files
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\r\n]+$")]  # of a page
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

    question: Line
    hypothesis: Line  # written before the first run
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
        if twice := _twice(arm.name for arm in self.arms):
            raise ValueError(f"two arms are named '{twice}': rename one")
        if twice := _twice(self.metrics):
            raise ValueError(f"metrics has {twice} twice: leave one out")
        if self.kind != "scaling" and (with_x := [arm.name for arm in self.arms if arm.x is not None]):
            raise ValueError(f"arm '{with_x[0]}' has x, which is for a study of scaling: leave it out")
        if self.kind == "scaling" and (without := [arm.name for arm in self.arms if arm.x is None]):
            raise ValueError(f"a study of scaling needs x in each arm, and '{without[0]}' has none")
        if self.kind == "scaling" and len({arm.x for arm in self.arms}) < 3:
            raise ValueError("a power law has three parameters: give arms with at least three different x")
        if self.kind == "compare" and len(self.arms) < 2:
            raise ValueError("give at least two arms to compare")
        if not self.train and (needs := [m for m in self.metrics if not METRICS[m].is_solved]):
            raise ValueError(f"{needs[0]} is measured in training, and train is false: leave one of them out")
        for arm in self.arms:
            if given := {*keys(arm.set), *keys(self.set)} & {"run.seed", *arm.vary}:
                raise ValueError(f"the seeds of arm '{arm.name}' are of {given.pop()}: leave it out of set")
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
    own_seeds: int = 0  # what it says itself, whatever the command line does
    hours: float | None = None  # of the command line

    def config(self, arm: Arm, seed: int) -> Config:
        """All settings of a run. What an arm does not vary has seed 0.

        Raises:
            UserError: a setting is not one that exists.
        """
        study, own = self.study, keys(arm.set)
        for word, key in zip(self.overrides, keys(self.overrides), strict=True):
            if key in own:
                raise UserError(f"arm '{arm.name}' sets {key} itself: leave {word} out, or change {self.file}")
            if key in ("run.seed", *arm.vary):
                raise UserError(f"the seeds of arm '{arm.name}' are of {key}: leave {word} out; --seeds says how many")
        if twice := _twice(own):
            raise UserError(f"{self.file}, arm '{arm.name}': set has {twice} twice: leave one out")
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
    file: Path, overrides: Sequence[str] = (), seeds: int | None = None, hours: float | None = None
) -> StudyFile:
    """A study's file, checked whole before anything runs.

    Args:
        overrides: `section.key=value` words for all arms.
        seeds: in the place of its own; None: its own.
        hours: the budget that it is done with.

    Raises:
        UserError: it is not there, or no study.
    """
    try:
        tree: Any = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        study = Study.model_validate(tree)
    except OSError as error:
        raise UserError(f"study {file} cannot be read ({error.strerror}); see configs/studies/ for some") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"study {file} is no TOML: {error}; see configs/studies/ for some") from None
    except ValidationError as error:
        raise UserError(f"study {file}: {_explained(error)}") from None
    asked = study if seeds is None else study.model_copy(update={"seeds": seeds})
    found = StudyFile(file.stem, file, asked, tuple(overrides), study.seeds, hours)
    configs = [found.config(arm, 0) for arm in study.arms]
    _require_effect(found)
    _require_trained(found, configs)
    _require_alike(found, configs)
    return found


def _require_effect(found: StudyFile) -> None:
    """Refuses settings of how a run is done that a study gives its runs itself."""
    words = [*found.study.set, *found.overrides, *(word for arm in found.study.arms for word in arm.set)]
    for word, key in zip(words, keys(words), strict=True):
        if key.startswith("run.") and key not in RUN_SETTINGS:
            raise UserError(f"{key} is not for a study, whose runs are done whole: leave {word} out")


def _require_trained(found: StudyFile, configs: Sequence[Config]) -> None:
    """Refuses trainings that do not leave what is measured."""
    if not found.study.train:
        return
    for arm, config in zip(found.study.arms, configs, strict=True):
        lora = config.lora
        if lora.enabled and lora.save == "adapter":
            raise UserError(f"{found.file}, arm '{arm.name}': a study measures models: set lora.save to both or merged")
        is_continued = found.study.solves and config.adapt.start == "pretrained"
        if is_continued and not (lora.enabled and lora.save == "both"):
            raise UserError(
                f"{found.file}, arm '{arm.name}': adapt.start=pretrained continues the adapter that was trained: set"
                " lora.enabled=true and lora.save=both"
            )


def _require_alike(found: StudyFile, configs: Sequence[Config]) -> None:
    """Refuses arms that cannot be compared, as different things would be measured of them."""
    study = found.study
    metrics = [METRICS[metric] for metric in study.metrics]
    if "accuracy" in study.metrics and (off := [c for c in configs if not c.validation.accuracy_every]):
        steps = off[0].train.steps
        raise UserError(f"{found.file}: accuracy is measured where validation.accuracy_every says: set it, to {steps}")
    if study.kind == "spread":
        return
    asked: list[tuple[str, Callable[[Config], Any]]] = []
    if any(metric.is_solved for metric in metrics):
        asked.append(("tasks", lambda config: config.tasks))
    if not all(metric.is_solved for metric in metrics):
        asked.append(("validation", lambda config: config.validation))
    if "validation_loss" in study.metrics:  # of other tokens; their positions are not among them
        asked.append(("format", lambda config: (config.format.shape_header, config.format.row_numbers)))
    for section, of in asked:
        for arm, config in zip(study.arms[1:], configs[1:], strict=True):
            if of(config) != of(configs[0]):
                raise UserError(
                    f"{found.file}: arm '{arm.name}' has other {section}.* settings than '{study.arms[0].name}', so"
                    " what is measured cannot be compared: give all arms the same, or choose another metric"
                )


def keys(words: Sequence[str]) -> list[str]:
    """Of `section.key=value` words."""
    return [word.partition("=")[0] for word in words]


T = TypeVar("T")


def _twice(names: Iterable[T]) -> T | None:
    """The first that stands there twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _explained(error: ValidationError) -> str:
    """What is wrong with a place of the file. Arms are counted from 1."""
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])  # a key may be but misspelt
    kind, loc, message = first["type"], first["loc"], first["msg"]
    names = []
    for place, part in enumerate(loc):
        if isinstance(part, int):
            names.append(f"{'arm' if loc[place - 1] == 'arms' else 'entry'} {part + 1}")
        elif part != "arms" or len(loc) == 1:
            names.append(part)
    if kind == "extra_forbidden":
        known = [*(Arm if len(loc) > 1 else Study).model_fields]
        return f"{', '.join(names)}: there is no such key; {meant(str(loc[-1]), known)}"
    said = _SAID.get(kind, message).removeprefix("Value error, ").replace("Input should", "should", 1)
    if kind not in ("missing", "value_error"):
        said += f", got {first['input']!r}"
    return f"{', '.join(names)}: {said}" if names else said


_SAID = {
    "missing": "is missing: give it",
    "too_short": "give at least one",
    "string_too_short": "is empty: give a text",
    "string_too_long": "give a shorter one, of 80 letters at most",
    "string_pattern_mismatch": "give one line, and the name of an arm without / | and `",
    "tuple_type": 'give a list, such as ["..."]',
}
