"""Every setting, declared once, beside its unit and its default.

A run is described by one `Config`: frozen, typed, unknown keys refused. It comes from a TOML file that holds only
what differs from the defaults, then from `section.key=value` words on the command line. A stage receives its own
section, so its signature says what can change it. The resolved config is written into the run directory.

Also here, because every module above needs them: `UserError`, and `named_rng`, the only source of randomness.
"""

import argparse
import hashlib
import json
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

PACKAGE_DIR = Path(__file__).parent


class UserError(Exception):
    """What the user or a file got wrong, as one sentence that says what to do. Commands exit with code 2."""


def named_rng(seed: int, *names: str | int) -> np.random.Generator:
    """A generator that depends on `seed` and `names` only: not on task order, workers or what ran before.

    The key is a SHA-256 of the names, never Python's salted `hash`.
    """
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
OutputOnly = Literal["keep", "permute"]


class RunConfig(Section):
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:1 ...
    workers: NonNegativeInt = 0  # processes that solve tasks; 0 = one per CPU core, or one on a GPU
    show: NonNegativeInt = 4  # solved and unsolved tasks drawn in the terminal, each


class TasksConfig(Section):
    spec: Annotated[str, Field(min_length=1)] = (
        "demo"  # demo | arc-agi-1/training | arc-agi-1/evaluation | a file or folder
    )
    solutions: str = ""  # solutions file; "" = found beside the challenges by its usual name
    ids: tuple[str, ...] = ()  # only these tasks
    limit: NonNegativeInt = 0  # the first N tasks by number of tokens; 0 = all


class FormatConfig(Section):
    """How a task becomes token ids. Belongs to a checkpoint: it is saved in it and read back from it."""

    positions: Literal["grid", "token"] = "grid"
    shape_header: bool = False  # height and width before the rows of an output
    row_numbers: bool = False  # the row's number before each row


class ModelConfig(Section):
    path: str = ""  # checkpoint folder; "" = the bundled model (bin/solve) or a new one (bin/train)
    layers: PositiveInt = 5
    width: PositiveInt = 256
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 4
    head_dim: PositiveInt = 64
    mlp_width: PositiveInt = 768
    rope_theta: PositiveFloat = 10_000.0

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError("heads must be a multiple of kv_heads, and head_dim even")
        return self


class CorpusConfig(Section):
    re_arc: NonNegativeFloat = 0.8  # weight of live RE-ARC
    arc_training: NonNegativeFloat = 0.2  # weight of the ARC-AGI-1 training tasks
    difficulty: tuple[Share, Share] = (0.0, 0.3)  # RE-ARC difficulty range, 0 easiest (smallest grids) .. 1
    pairs: tuple[PositiveInt, PositiveInt] = (3, 6)  # pairs in a sample, drawn uniformly
    max_tokens: PositiveInt = 1024  # longest sample; pairs are dropped until it fits, or it is drawn again
    # Training tasks that are copies of ARC-AGI-1 evaluation tasks (070dd51e and 50a16a69): the leak audit found them.
    exclude: tuple[str, ...] = ("40853293", "caa06a1f")
    holdout_tasks: Annotated[int, Field(ge=1, le=300)] = (
        20  # training tasks kept out of training, for the validation loss
    )
    keep_background: Share = 0.8  # share of samples in which colour 0 stays 0
    output_only: OutputOnly = "permute"  # colours that only outputs have: left as they are, or permuted too

    @model_validator(mode="after")
    def _check(self) -> "CorpusConfig":
        if self.re_arc + self.arc_training <= 0:
            raise ValueError("at least one of re_arc and arc_training needs a weight above 0")
        if self.difficulty[0] > self.difficulty[1] or self.pairs[0] > self.pairs[1]:
            raise ValueError("difficulty and pairs are (lowest, highest)")
        return self


class OptimConfig(Section):
    """What `fit` needs, offline and at test time."""

    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: Muon on hidden matrices, AdamW on the rest
    lr: PositiveFloat = 1e-3  # peak learning rate of AdamW
    muon_lr: PositiveFloat = 0.02  # peak learning rate of Muon
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    clip: PositiveFloat = 1.0  # gradient norm
    steps: PositiveInt = 100
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    warmup: Share = 0.02  # share of the steps
    decay: Share = 0.4  # share of the steps in which "wsd" falls to 0


class TrainConfig(OptimConfig):
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 0.05
    steps: PositiveInt = 2000
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "wsd"
    batch_tokens: PositiveInt = 8192  # token budget of a packed batch
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto = where a C++ compiler or a GPU is found
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto = bf16 where the hardware multiplies it
    loader_workers: NonNegativeInt = 1  # processes that make samples
    validation_tokens: PositiveInt = 65_536
    validate_every: PositiveInt = 250  # steps
    checkpoint_every: PositiveInt = 250  # steps
    labels: Literal["all-but-first", "last", "all"] = "all-but-first"  # the outputs that are learnt


class AdaptConfig(OptimConfig):
    optimizer: Literal["adamw"] = "adamw"  # type: ignore[assignment] # Muon is for matrices; adapters are stacks of them
    enabled: bool = True
    rank: PositiveInt = 32
    alpha: PositiveFloat = 32.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    lr: PositiveFloat = 3e-3
    steps: PositiveInt = 180
    batch_size: PositiveInt = 4  # sequences a step
    max_tokens: PositiveInt = 2048  # longest sequence; demonstrations are dropped until it fits
    budget_tokens: PositiveInt = 600_000  # tokens a task may train on; fewer steps for long tasks
    keep_background: Share = 0.8
    output_only: OutputOnly = "permute"  # colours that only outputs have: left as they are, or permuted too
    labels: Literal["all-but-first", "last", "all"] = "all-but-first"


class PredictConfig(Section):
    views: PositiveInt = 16  # augmented copies of the task that are asked
    batch_tokens: PositiveInt = 32_768  # prompts decoded together x the longest of them
    max_tokens: PositiveInt = 16_384  # longest prompt; demonstrations are dropped until it fits
    keep_background: Share = 0.8
    output_only: OutputOnly = "permute"  # colours that only outputs have: left as they are, or permuted too


class VoteConfig(Section):
    rule: Literal["votes"] = "votes"  # most views; ties by mean log-probability


class Config(Section):
    run: RunConfig = RunConfig()
    tasks: TasksConfig = TasksConfig()
    format: FormatConfig = FormatConfig()
    model: ModelConfig = ModelConfig()
    corpus: CorpusConfig = CorpusConfig()
    train: TrainConfig = TrainConfig()
    adapt: AdaptConfig = AdaptConfig()
    predict: PredictConfig = PredictConfig()
    vote: VoteConfig = VoteConfig()


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config of a TOML file (defaults where None) with `section.key=value` overrides, checked.

    Raises:
        UserError: the file is missing or no TOML, or a key or value is not one that exists.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        try:
            tree = tomllib.loads(Path(file).read_text())
        except FileNotFoundError:
            raise UserError(f"config {file} does not exist; see configs/ for the ones that do") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UserError(f"config {file} cannot be read as TOML: {error}") from None
    for word in overrides:
        _override(tree, word)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, file)) from None


def _override(tree: dict[str, Any], word: str) -> None:
    path, equals, text = word.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot and section and key):
        raise UserError(f"'{word}' is not understood: settings are written section.key=value, e.g. run.seed=1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: model.path=runs/mine
    if not isinstance(tree.setdefault(section, {}), dict):
        raise UserError(f"'{section}' in the config file is not a section")
    tree[section][key] = value


def _explain(error: ValidationError, file: str | Path | None) -> str:
    first = error.errors()[0]
    section, *rest = [str(part) for part in first["loc"]]
    key = ".".join([section, *rest])
    where = f" (config {file})" if file else ""
    if first["type"] == "extra_forbidden":
        fields = Config.model_fields
        known = fields[section].annotation.model_fields if rest and section in fields else fields  # type: ignore[union-attr]
        return f"unknown setting {key}{where}; known: {', '.join(known)}"
    return f"setting {key}{where}: {first['msg']}, got {first['input']!r}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def add_task_arguments(parser: Parser, required: bool = False) -> None:
    """The arguments that choose tasks, the same for every command."""
    parser.add_argument(
        "--tasks",
        metavar="SPEC",
        required=required,
        help="demo, arc-agi-1/training, arc-agi-1/evaluation, a file or a folder",
    )
    parser.add_argument("--solutions", metavar="FILE", help="solutions file, if not beside the challenges")
    parser.add_argument("--ids", help="only these tasks, separated by commas")
    parser.add_argument("--limit", type=int, metavar="N", help="the N tasks with the fewest tokens")


def task_overrides(args: argparse.Namespace) -> list[str]:
    """What those arguments say, as overrides for `load_config`."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is at least 1, got {args.limit}; leave it out for all tasks")
    ids = None if args.ids is None else [i.strip() for i in args.ids.split(",")]
    given = {"spec": args.tasks, "solutions": args.solutions, "ids": ids, "limit": args.limit}
    return [f"tasks.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]


def require_new_dir(folder: Path) -> None:
    """Refuses an --out that is a file or holds anything."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: give a folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty: give another --out")


def run_main(main: Callable[[list[str]], int]) -> None:
    """Runs a command: exit code 0 done, 2 the user's input is wrong (one sentence, no traceback), 1 anything else."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 1
    sys.exit(code)
