"""Every setting, declared once, beside its unit and its default.

A run is described by one `Config`: frozen, typed, unknown keys refused. It comes from a TOML file that holds only
what differs from the defaults, then from `section.key=value` words on the command line. A stage receives its own
section, so its signature says what can change it. The resolved config is written into the run directory.
"""

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
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

from .clock import duration_s
from .errors import UserError, meant

PACKAGE_DIR = Path(__file__).parent
BUNDLED_DIR = PACKAGE_DIR / "bundled"  # the model that ships with the package


class Section(BaseModel):
    # A word on the command line may look like a number and be a name: model.path=2026.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


SESSION_S = 12 * 3600  # after which Kaggle ends a notebook
MIN_BUDGET_S = 20  # below that, a run is mostly its own start

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of Llama and its kin


def _at_home(path: str) -> str:
    """A path with the home folder in the place of `~`, which shells do not see in model.path=~/models/mine."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise ValueError(f"there is no home folder for '{path}'") from None


def _digest(text: str) -> str:
    if text and not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"64 digits 0-9 and a-f, as sha256sum prints them; got '{text}'")
    return text


PathText = Annotated[str, AfterValidator(_at_home)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Quantize = Literal["", "8bit", "4bit"]
Schedule = Literal["linear", "cosine", "constant", "cyclic", "wsd"]
RULES_OF_FEW_SCORES = ("votes", "hierarchical", "product")  # that need no scores where product has no use for them
OutputOnly = Literal["keep", "permute"]
AugmentationKind = Literal["geometry", "colours", "order"]
ALL_KINDS: tuple[AugmentationKind, ...] = get_args(AugmentationKind)
VoteRule = Literal["votes", "product", "mean-probability", "hierarchical", "probmul", "kgmon", "hierarchical-kgmon"]


def _duration_s(text: str, setting: str) -> float:
    try:
        return duration_s(text)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None


class RunConfig(Section):
    seed: int = 0  # all randomness of a run follows from it
    device: str = "auto"  # auto | cpu | cuda | cuda:1 ...
    # processes: one for each worker, on this machine. ray: actors of a cluster, one for each GPU. inprocess: this one.
    executor: Literal["processes", "ray", "inprocess"] = "processes"
    address: str = ""  # of the Ray cluster, e.g. auto or ray://head:10001; "" = a Ray of this machine alone
    workers: NonNegativeInt = 0  # that solve tasks; 0 = one per CPU core, or one per GPU
    # From the command's start to its end, such as 11h30m, 40m or 90s; "" = as long as it takes.
    time_budget: str = ""
    watchdog_minutes: NonNegativeFloat = 10.0  # a worker that makes no step for so long is ended; 0 = never
    smoke: NonNegativeInt = 0  # only the N shortest tasks are solved, the others keep their placeholders; 0 = all
    submission: PathText = ""  # a second file in which the submission is kept up to date; "" = only the run's own
    show: NonNegativeInt = 4  # solved and unsolved tasks drawn in the terminal, each

    @property
    def budget_s(self) -> float:
        """The time budget in seconds."""
        return _duration_s(self.time_budget, "run.time_budget (--time-budget)") if self.time_budget else math.inf

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.address and self.executor != "ray":
            raise ValueError("run.address (--address) is for a Ray cluster: set run.executor to ray (--executor ray)")
        if self.budget_s < MIN_BUDGET_S:
            raise ValueError(f"run.time_budget (--time-budget) is at least {MIN_BUDGET_S} s, got {self.time_budget}")
        return self


class TasksConfig(Section):
    # demo | arc-agi-1/training | arc-agi-1/evaluation | a file or folder
    spec: Annotated[PathText, Field(min_length=1)] = "demo"
    solutions: PathText = ""  # solutions file; "" = found beside the challenges by its usual name
    ids: tuple[str, ...] = ()  # only these tasks
    limit: NonNegativeInt = 0  # the first N tasks by number of tokens; 0 = all
    sample: NonNegativeInt = 0  # N tasks drawn at random, spread over all numbers of tokens; 0 = all
    sample_seed: int = 0  # of that draw, whatever run.seed is

    @model_validator(mode="after")
    def _check(self) -> "TasksConfig":
        if self.limit and self.sample:
            raise ValueError(
                f"tasks.limit (--limit {self.limit}) takes the smallest tasks and tasks.sample (--sample {self.sample})"
                " draws tasks of all sizes: leave one of them out (tasks.limit=0, tasks.sample=0)"
            )
        return self


class FormatConfig(Section):
    """How a task becomes token ids. Belongs to a checkpoint: it is saved in it and read back from it."""

    # grid: a cell's place in its grid, alike at every grid size. token: one after the other, as pretrained models have.
    positions: Literal["grid", "token"] = "grid"
    shape_header: bool = False  # height and width before the rows of an output
    row_numbers: bool = False  # the row's number before each row


class ModelConfig(Section):
    # A checkpoint's folder, or for bin/train a Hugging Face hub id such as Qwen/Qwen2.5-0.5B-Instruct;
    # "" = the bundled model (bin/solve) or a new one of the shape below (bin/train).
    path: PathText = ""
    # Folder of a LoRA adapter for it: continued by bin/train with lora, else merged into the weights.
    adapter: PathText = ""
    # The base's linear layers in 8 or 4 bit while tasks are solved, for models that have no room else: the extra
    # `quantize`. Adapters are not quantised. "" = 16 or 32 bit, as the machine multiplies
    quantize: Quantize = ""
    layers: PositiveInt = 5  # of a new model
    width: PositiveInt = 256  # of a new model's hidden states
    heads: PositiveInt = 4  # of a new model's attention, in each layer
    kv_heads: PositiveInt = 4  # heads with keys and values of their own; `heads` is a multiple of them
    head_dim: PositiveInt = 64  # channels of a head
    mlp_width: PositiveInt = 768  # channels between the two products of a layer's MLP
    rope_theta: PositiveFloat = 10_000.0  # base of the rotary embedding
    seed: int | None = None  # of new weights, and of the first ones of new adapters; left out: run.seed

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads={self.heads} is no multiple of model.kv_heads={self.kv_heads}: set model.kv_heads to"
                f" {self.heads}, or to another number that divides it"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} is odd: give an even number")
        return self


class LoraConfig(Section):
    """Offline LoRA: an adapter is trained instead of the weights themselves."""

    enabled: bool = False  # whether bin/train trains an adapter, and the joint stage of bin/solve one that is merged
    rank: PositiveInt = 64  # of the adapter's matrices
    alpha: PositiveFloat = 64.0  # what the adapter is scaled by, see rslora
    rslora: bool = True  # scale by alpha / sqrt(rank) instead of alpha / rank
    dora: bool = False  # DoRA: magnitude and direction apart
    init: Literal["default", "gaussian", "orthogonal"] = "default"  # of A, and of B too if orthogonal
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = LINEAR_LAYERS  # layers that get an adapter, by name
    # What the run leaves: the adapter (then of a kind that vLLM serves), the weights with it merged in, or both.
    save: Literal["both", "adapter", "merged"] = "both"

    @model_validator(mode="after")
    def _check(self) -> "LoraConfig":
        if self.enabled and self.save != "merged" and (unserved := self._unserved()):
            raise ValueError(f"vLLM serves no adapter with {unserved}; leave it out, or set lora.save to 'merged'")
        return self

    def _unserved(self) -> str:
        """What vLLM refuses in an adapter, or ""."""
        if self.dora:
            return "lora.dora"
        embeddings = {"embed_tokens", "lm_head"} & set(self.targets)
        return f"lora.targets {', '.join(sorted(embeddings))}" if embeddings else ""


class SourceConfig(Section):
    """Where training tasks come from: one entry of the mixture."""

    # re-arc: live RE-ARC, a generator of pairs for each ARC-AGI-1 training task.
    # tasks: task files (see tasks.spec), test pairs included.
    # demonstrations: the same, but the test outputs are not even read (n-1 of a set to be solved).
    # pairs: many pairs a task, a file {id: [pair, ...]} or a folder of <id>.json files, as RE-ARC is published.
    # counting: generated tasks about number.
    kind: Literal["re-arc", "tasks", "demonstrations", "pairs", "counting"]
    path: PathText = ""  # what tasks, demonstrations and pairs are read from
    name: str = ""  # in logs; "" = kind and path
    weight: PositiveFloat = 1.0  # share of the samples, over the sum of all weights
    solve: NonNegativeFloat = 1.0  # weight of the objective: outputs, given examples
    imitate: NonNegativeFloat = 0.0  # weight of the objective: an input, given other inputs
    max_tasks: NonNegativeInt = 0  # a seeded choice of tasks, from which held-out ones are taken out; 0 = all
    # The first pairs of each task; of generated ones so many different pairs, made once. 0 = all, and new ones always.
    max_pairs: NonNegativeInt = 0
    # Tasks that are left out, by id or by a pattern with *: rules that are wrong, or scored on, or slow to generate.
    quarantine: tuple[str, ...] = ()
    pair_seconds: PositiveFloat = 5.0  # re-arc: CPU time after which a draw of a pair is given up for another
    problem_augmentation: Share = 0.0  # share of the samples whose task is made into a new one
    difficulty: tuple[Share, Share] = (0.0, 0.3)  # re-arc: range, 0 easiest (smallest grids) .. 1
    sha256: Annotated[str, AfterValidator(_digest)] = ""  # of the file: any other is refused; "" = any
    licence: str = ""  # of the tasks, for the model card

    @property
    def label(self) -> str:
        return self.name or f"{self.kind} {self.path}".strip()

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        reads = self.kind in ("tasks", "demonstrations", "pairs")
        if reads != bool(self.path):
            raise ValueError(f"kind '{self.kind}' {'needs a path' if reads else 'takes no path'}")
        if self.sha256 and not reads:
            raise ValueError(f"sha256 is of a file, and kind '{self.kind}' reads none")
        if self.solve + self.imitate <= 0:
            raise ValueError("at least one of solve and imitate needs a weight above 0")
        if self.difficulty[0] > self.difficulty[1]:
            raise ValueError(f"the difficulty of a source is {list(self.difficulty)}: the lowest comes first")
        return self


class CorpusConfig(Section):
    # The mixture, entries of [[corpus.sources]]: live RE-ARC at 0.8 and the ARC-AGI-1 training tasks at 0.2.
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = (
        SourceConfig(kind="re-arc", weight=0.8, licence="MIT"),
        SourceConfig(kind="tasks", path="arc-agi-1/training", weight=0.2, licence="Apache-2.0"),
    )
    pairs: tuple[PositiveInt, PositiveInt] = (3, 6)  # pairs in a sample, drawn uniformly
    max_tokens: PositiveInt = 1024  # longest sample
    too_long: Literal["drop", "skip"] = "drop"  # drop: the last pairs go until it fits or 2 are left; skip: draw again
    # What is changed of a task that a sample shows: its geometry (8 of them), its colours, the order of its pairs.
    # Validation has all of them always.
    augment: tuple[AugmentationKind, ...] = ALL_KINDS
    keep_background: Share = 0.8  # share of samples in which colour 0 stays 0
    output_only: OutputOnly = "permute"  # colours that only outputs have: left as they are, or permuted too

    @model_validator(mode="after")
    def _check(self) -> "CorpusConfig":
        if self.pairs[0] > self.pairs[1]:
            raise ValueError(f"corpus.pairs is {list(self.pairs)}: the lowest comes first, then the highest")
        labels = [source.label for source in self.sources]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two sources have the same name: give each its own, got {labels}")
        return self


class ValidationConfig(Section):
    """Random tasks of a set are kept out of training and validated on: a train/validation partition from a seed."""

    of: PathText = "arc-agi-1/training"  # the set they are drawn from, see tasks.spec
    tasks: Annotated[int, Field(ge=1)] = 20  # how many are drawn
    seed: int = 0  # of that draw, whatever run.seed is
    re_arc: bool = True  # pairs are made by the tasks' RE-ARC generators; else the tasks' own are used
    difficulty: tuple[Share, Share] = (0.0, 0.3)  # of those generators
    tokens: PositiveInt = 65_536  # of the validation samples
    every: PositiveInt = 250  # steps between validations
    accuracy_every: NonNegativeInt = 0  # steps between validations by generated answers; 0 = never
    accuracy_prompts: PositiveInt = 64  # answers that it generates


class AuditConfig(Section):
    """The leak audit: no training task may be one that the model is scored on, by id or by content."""

    scored_on: tuple[PathText, ...] = ("arc-agi-1/evaluation",)  # see tasks.spec; the validation tasks always count
    # What happens to training tasks that are among those: the run is refused, they are left out, or trained on.
    overlap: Literal["refuse", "exclude", "allow"] = "refuse"
    # Tasks that are left out: copies of the ARC-AGI-1 evaluation tasks 070dd51e and 50a16a69, as the audit found.
    exclude: tuple[str, ...] = ("40853293", "caa06a1f")


class OptimConfig(Section):
    """What `fit` needs, offline and at test time."""

    optimizer: Literal["muon", "adamw"] = "adamw"  # muon: Muon on hidden matrices, AdamW on the rest
    lr: PositiveFloat = 1e-3  # peak learning rate of AdamW
    muon_lr: PositiveFloat = 0.02  # peak learning rate of Muon
    weight_decay: NonNegativeFloat = 0.0  # decoupled, of AdamW and of Muon
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # of AdamW's moments
    clip: PositiveFloat = 1.0  # gradient norm
    steps: PositiveInt = 100  # steps of the optimizer
    schedule: Schedule = "linear"  # of the learning rate, after warmup; wsd: it stays, then decays
    warmup: Share = 0.02  # share of the steps
    decay: Share = 0.4  # share of the steps in which "wsd" falls to 0
    cycles: PositiveInt = 4  # of "cyclic"
    cycle_decay: Share = 0.5  # the peak of a cycle, as a share of the peak before it


class TrainConfig(OptimConfig):
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 0.05
    steps: PositiveInt = 2000
    schedule: Schedule = "wsd"
    batch_tokens: PositiveInt = 8192  # token budget of a packed batch
    batches_per_step: PositiveInt = 1  # shared out over the processes; each takes its share one after another
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto = where it pays; the run says why
    # auto = bf16 where the hardware multiplies it, else fp16 on a GPU, else fp32. fp16 scales the loss.
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    checkpointing: bool = False  # gradient checkpointing: activations are computed again instead of kept
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes: copies of the model, or shards of one (FSDP2)
    loader_workers: NonNegativeInt = 1  # processes that make samples, for each training process
    checkpoint_every: PositiveInt = 250  # steps
    # Decay of an exponential moving average of the weights, of all stages, which is what the run leaves; 0 = none.
    ema: Beta = 0.0
    # Whether the weights and the optimizer are kept as they are when "wsd" begins to decay, in DIR/before-decay, so
    # that another run can go on from there. Of several stages with that schedule, the last one's stay.
    keep_before_decay: bool = False
    labels: Literal["all-but-first", "last", "all"] = "all-but-first"  # the outputs that are learnt


class StageConfig(Section):
    """A part of an offline run. What it does not set of [train] and [corpus] is as those sections say."""

    name: str  # in logs, and of its checkpoints
    # What it takes over: the weights, or the optimizer's moments too (of the stage before; of the run that model.path
    # lies in, for the first).
    start: Literal["weights", "weights+optimizer"] = "weights"
    train: TrainConfig = TrainConfig()  # what differs from [train]
    corpus: CorpusConfig = CorpusConfig()  # what differs from [corpus]


class AdaptConfig(OptimConfig):
    optimizer: Literal["adamw"] = "adamw"  # type: ignore[assignment] # Muon is for whole weight matrices
    enabled: bool = True  # whether each task gets an adapter; else the model is asked as it is
    # What a task's adapter starts from: a fresh one (model.adapter is merged into the weights first), or model.adapter
    # itself, with its rank, alpha and targets.
    start: Literal["fresh", "pretrained"] = "fresh"
    rank: PositiveInt = 32  # of a fresh adapter's matrices
    alpha: PositiveFloat = 32.0  # it is scaled by alpha / rank
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = LINEAR_LAYERS  # layers that get an adapter, by name
    lr: PositiveFloat = 3e-3
    steps: PositiveInt = 240
    # never: all steps are taken. leave-one-out: a task stops early if in the first half of its steps nine of ten
    # held-out outputs come to be answered exactly before they are learnt, of the last four rounds of all demonstrations
    # and at least 12; it does after half as many steps again, in which the learning rate falls to 0.
    stop: Literal["never", "leave-one-out"] = "leave-one-out"
    batch_size: PositiveInt = 1  # sequences a step; more steps of fewer solve more, see docs/test-time.md
    # Tasks, of like length, that are adapted at once, at most. 0 = on a GPU all; on a CPU an eighth of the tasks, so
    # that all cores have work.
    together: NonNegativeInt = 0
    # Tokens of a step of all these tasks, at most. 0 = on a GPU 32,768; on a CPU 2,048, as more hardly helps.
    group_tokens: NonNegativeInt = 0
    # Whether activations are computed again in the backward pass instead of kept: far less memory, a third more time.
    # auto = where not even one of the longest sequences has room otherwise.
    recompute: Literal["auto", "yes", "no"] = "auto"
    max_tokens: PositiveInt = 2048  # longest sequence; demonstrations are dropped until it fits
    budget_tokens: PositiveInt = 600_000  # tokens a task may train on; fewer steps for long tasks
    keep_background: Share = 0.8  # share of samples in which colour 0 stays 0
    output_only: OutputOnly = "permute"  # colours that only outputs have: left as they are, or permuted too
    labels: Literal["all-but-first", "last", "all"] = "all-but-first"  # the outputs that are learnt
    # Tokens of the joint stage, as a share of those that all adapters are planned to take; 0 = none. In it the model
    # itself learns what all tasks of the run demonstrate, before each gets its adapter: all of its weights, or as
    # [lora] says if lora.enabled. With a time budget it has no more than that share of the time. It needs the extra
    # `train`.
    joint: Share = 0.0
    joint_lr: PositiveFloat = 1e-3  # its peak learning rate


class EngineConfig(Section):
    """What decodes. All but `kind` is for vLLM, which is the extra `vllm`."""

    # auto = vLLM where it is installed and pays: positions "token", a GPU from Ampere on, a model that is not tiny
    kind: Literal["auto", "torch", "vllm"] = "auto"
    kv_cache_gib: PositiveFloat = 4.0  # GiB for keys and values; vLLM has its copy of the weights besides
    max_loras: PositiveInt = 4  # adapters in one batch, each with room of its own on the GPU
    max_sequences: PositiveInt = 128  # replies that are decoded together
    step_tokens: PositiveInt = 8192  # ids in one forward pass; longer prompts go in pieces


class PredictConfig(Section):
    views: PositiveInt = 32  # augmented copies of the task that are asked
    # Of prompts, or of their continuations: rows x the longest, in one pass. 0 = 8,192 on a CPU, 32,768 on a GPU.
    batch_tokens: NonNegativeInt = 0
    # Longest prompt: demonstrations are dropped until it fits, but the last one stays, however long it is.
    max_tokens: PositiveInt = 16_384
    keep_background: Share = 0.8  # share of views in which colour 0 stays 0
    output_only: OutputOnly = "permute"  # colours that only outputs have: left as they are, or permuted too
    drafts: bool = True  # verified drafts: the same greedy answers, in fewer forward steps
    leaders: PositiveInt = 4  # views that are decoded first; their answers are the others' drafts
    threshold: Share = 0.0  # all answers of this probability or more are searched for, in every view; 0 = no search
    max_nodes: PositiveInt = 2048  # ids that a search may try in a view
    score: bool = True  # the candidates' log-probabilities under the views
    # Under every view; else those that can hardly be among the best two by vote.rule=product any more are scored in no
    # more views. Other rules need it, unless they only count votes.
    score_all: bool = False


class VoteConfig(Section):
    """How the two attempts are chosen among the candidates; `bin/solve --revote` chooses again."""

    rule: VoteRule = "product"  # see the functions of these names in vote.py
    monochrome_prior: bool = False  # grids of one colour go last, if no demonstration's output is one
    shape_prior: bool = False  # other shapes go last, if all demonstrations keep it, or multiply it by the same


# Kaggle's names for what a notebook runs on, and the GPUs that it must find there.
Machine = Literal["", "NvidiaTeslaT4", "NvidiaL4", "NvidiaL4X1", "NvidiaTeslaA100", "NvidiaH100", "NvidiaRtxPro6000"]
MACHINES: dict[Machine, tuple[str, ...]] = {
    "": (),
    "NvidiaTeslaT4": ("T4",) * 2,
    "NvidiaL4": ("L4",) * 4,
    "NvidiaL4X1": ("L4",),
    "NvidiaTeslaA100": ("A100",),
    "NvidiaH100": ("H100",),
    "NvidiaRtxPro6000": ("RTX PRO 6000",),
}


def _slug(name: str) -> str:
    if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) and 6 <= len(name) <= 42:
        return name
    raise ValueError(
        f"6 to 42 lower-case letters and digits, with single hyphens between, like my-solver; got '{name}'"
    )


Slug = Annotated[str, AfterValidator(_slug)]


class KaggleConfig(Section):
    """The notebook and the datasets that `bin/submit` makes of a config."""

    owner: str = ""  # account that they belong to; "" = the one that the kaggle client is signed in as
    name: Slug = "arc-solver"  # of the notebook; its datasets are <name>-wheels and <name>-weights
    competition: str = "arc-prize-2026-arc-agi-2"  # as in its address
    machine: Machine = ""  # what the notebook runs on; "" = a CPU
    image: str = ""  # docker image with its digest, as a pulled notebook names it; "" = Kaggle's latest
    vllm: bool = False  # whether vLLM's wheels travel too
    time_budget: str = "11h30m"  # of the run that is scored, from the notebook's start; Kaggle ends it after 12 h
    smoke_tasks: PositiveInt = 4  # that the run at a push solves, the shortest ones: its log is all that is ever seen
    smoke_budget: str = "30m"  # of the run at a push
    licence: Literal["CC0-1.0", "apache-2.0", "CC-BY-4.0", "GPL-3.0", "other"] = "other"  # of the datasets
    public: bool = False  # whether everybody sees notebook and datasets
    internet: bool = False  # competitions refuse notebooks that have it

    @model_validator(mode="after")
    def _check(self) -> "KaggleConfig":
        for key in ("time_budget", "smoke_budget"):
            if not MIN_BUDGET_S <= _duration_s(getattr(self, key), f"kaggle.{key}") < SESSION_S:
                raise ValueError(
                    f"kaggle.{key} is at least {MIN_BUDGET_S} s and under 12 h, after which Kaggle ends a notebook; got"
                    f" {getattr(self, key)}"
                )
        return self


class Config(Section):
    run: RunConfig = RunConfig()
    tasks: TasksConfig = TasksConfig()
    format: FormatConfig = FormatConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    corpus: CorpusConfig = CorpusConfig()
    validation: ValidationConfig = ValidationConfig()
    audit: AuditConfig = AuditConfig()
    train: TrainConfig = TrainConfig()
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)] = ()  # none given: one, of [train] and [corpus]
    adapt: AdaptConfig = AdaptConfig()
    engine: EngineConfig = EngineConfig()
    predict: PredictConfig = PredictConfig()
    vote: VoteConfig = VoteConfig()
    kaggle: KaggleConfig = KaggleConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_stages(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """A stage is the sections [train] and [corpus], with its own settings on top."""
        stages = tree.get("stages") or [{"name": "train"}]
        if not isinstance(stages, list | tuple) or not all(isinstance(stage, dict) for stage in stages):
            return tree
        if not all(isinstance(_settings(t, key), dict) for t in (tree, *stages) for key in ("train", "corpus")):
            return tree  # pydantic says what is wrong
        filled = []
        for stage in stages:
            merged = {key: {**_settings(tree, key), **_settings(stage, key)} for key in ("train", "corpus")}
            filled.append({**stage, **merged})
        return {**tree, "stages": filled}

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.model.quantize and self.engine.kind == "vllm":
            raise ValueError('model.quantize is for engine.kind="torch": vLLM has a copy of the weights of its own')
        if self.model.quantize and self.model.adapter and not (self.adapt.enabled and self.adapt.start == "pretrained"):
            lacking = "adapt.start=pretrained" if self.adapt.enabled else "adapt.enabled=true"
            raise ValueError(
                f"model.quantize: an adapter cannot be merged into quantised weights; set {lacking}, or give the merged"
                " model that bin/train left as model.path"
            )
        if self.adapt.joint and self.model.quantize:
            raise ValueError("adapt.joint changes the weights, and model.quantize freezes them: leave one of them out")
        if self.adapt.joint and self.adapt.start == "pretrained":
            raise ValueError(
                'adapt.joint changes the weights, and with adapt.start="pretrained" the adapter is for them as they'
                " were: leave one of them out"
            )
        if not self.predict.score and self.vote.rule not in ("votes", "hierarchical"):
            raise ValueError(f'vote.rule="{self.vote.rule}" needs predict.score: leave it on, or set vote.rule=votes')
        if not self.predict.score_all and self.vote.rule not in RULES_OF_FEW_SCORES:
            raise ValueError(f'vote.rule="{self.vote.rule}" needs all scores: set predict.score_all=true')
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}")
        origins = {(source.label, source.kind, source.path) for stage in self.stages for source in stage.corpus.sources}
        if twice := [label for label, count in Counter(label for label, *_ in origins).items() if count > 1]:
            raise ValueError(f"sources of two stages have the name '{twice[0]}' and are not the same: rename one")
        for key in ("precision", "checkpointing", "parallel", "ema"):
            if any(getattr(stage.train, key) != getattr(self.train, key) for stage in self.stages):
                raise ValueError(f"train.{key} is one for all stages: set it in [train]")
        if self.lora.enabled and any(stage.train.optimizer == "muon" for stage in self.stages):
            raise ValueError('lora.enabled needs train.optimizer="adamw": Muon is for whole weight matrices')
        if any(stage.train.keep_before_decay and stage.train.schedule != "wsd" for stage in self.stages):
            raise ValueError('train.keep_before_decay is for train.schedule="wsd", which stays before it decays')
        if self.train.ema and (self.lora.enabled or self.train.parallel == "fsdp"):
            raise ValueError("train.ema is for whole weights: leave it out with lora.enabled and with FSDP")
        for before, stage in zip(self.stages, self.stages[1:], strict=False):
            ours, theirs = stage.train.optimizer, before.train.optimizer
            if stage.start == "weights+optimizer" and ours != theirs:
                raise ValueError(
                    f"stage '{stage.name}' starts from the optimizer of '{before.name}', which is {theirs} and not"
                    f' {ours}: give both the same train.optimizer, or start = "weights"'
                )
        return self


def _settings(tree: dict[str, Any], key: str) -> Any:
    """What a section sets, be it parsed from a file or made in Python."""
    section = tree.get(key, {})
    return section.model_dump(exclude_unset=True) if isinstance(section, Section) else section


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config of a TOML file (defaults where None) with `section.key=value` overrides, checked. A run's is JSON.

    Raises:
        UserError: the file is missing or no TOML, or a key or value is not one that exists.
    """
    tree = {} if file is None else _read(Path(file))
    for word in overrides:
        _override(tree, word)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, file, overrides)) from None


def _read(file: Path) -> dict[str, Any]:
    """What a config file holds, not checked."""
    if (file / "run.json").is_file():
        raise UserError(f"{file} is the folder of a run, not a config: --out {file} continues it")
    other = UserError(
        f"{file} is YAML, and configs are TOML: see configs/"
        if file.suffix in (".yaml", ".yml")
        else f"{file} is no config file, which ends in .toml: see configs/; tasks are for --tasks of bin/solve"
    )
    if file.is_dir() or str(file) in ("demo", "arc-agi-1/training", "arc-agi-1/evaluation"):
        raise other
    try:
        text = file.read_text(encoding="utf-8-sig")  # Windows editors begin a file with a mark
        tree = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        if "=" in str(file):
            raise UserError(f"'{file}' is a setting, and a config file comes first: see configs/ for some") from None
        if str(file).partition(".")[0] in Config.model_fields:
            raise UserError(f"'{file}' has no value: settings are written section.key=value") from None
        raise UserError(f"config {file} does not exist; see configs/ for the ones that do") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        if file.suffix not in (".toml", ".json"):
            raise other from None
        kind = "JSON" if file.suffix == ".json" else "TOML"
        said = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"config {file} cannot be read as {kind}: {said}{_toml_hint(error)}") from None
    if file.suffix == ".json" and not (isinstance(tree, dict) and tree.keys() <= Config.model_fields.keys()):
        raise other
    return tree


def _toml_hint(error: Exception) -> str:
    """What such a mistake in TOML is mostly about."""
    if isinstance(error, UnicodeDecodeError):
        return "; save it as UTF-8"
    if "hex value" in str(error) or "escape" in str(error) or "'\\\\'" in str(error):
        return "; write paths with backslashes in 'single quotes'"
    if "Invalid value" in str(error):
        return '; text stands in straight quotes ("), and yes and no are true and false'
    if "twice" in str(error) or "overwrite" in str(error):
        return "; write each section and setting once"
    return ""


def _override(tree: dict[str, Any], word: str) -> None:
    path, equals, text = word.partition("=")
    *sections, key = path.split(".")
    if not (equals and key and (all(sections) if sections else key == "stages")):  # which is a list of its own
        what = (equals and _with_sections(word)) or "settings are written section.key=value, e.g. run.seed=1"
        raise UserError(f"'{word}' is not understood: {what}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: model.path=runs/mine
    place: Any = tree
    for i, section in enumerate(sections):  # stages.1.start=weights: the second stage of the config file
        before = ".".join(sections[:i])
        if isinstance(place, list):
            if not section.isdecimal() or int(section) >= len(place):
                known = " and ".join(f"{before}.{i}" for i in range(len(place)))
                raise UserError(f"'{word}': there is no {before}.{section} in the config file, which has {known}")
            place = place[int(section)]
        elif section.isdecimal():
            raise UserError(
                f"'{word}' changes an entry of a list in a config file, and there is none: give the whole list,"
                f" {before}=[...]"
            )
        else:
            place = place.setdefault(section, {})
        if not isinstance(place, (dict, list)):
            raise UserError(f"'{word}': '{section}' in the config file is not a section")
    if isinstance(place, list):
        raise UserError(f"'{word}': say which one, counted from 0, e.g. {'.'.join(sections)}.0.{key}=...")
    place[key] = value


def _with_sections(word: str) -> str:
    """What to say of a setting without its section; "" if no section has it."""
    key, sections = word.partition("=")[0], Config.model_fields
    has = [name for name in sections if key in getattr(sections[name].annotation, "model_fields", ())]
    return f"it lacks its section, did you mean {' or '.join(f'{name}.{word}' for name in has)}?" if has else ""


_SHOULD_BE = {  # pydantic's kinds of complaint, as one says them
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "finite_number": "should be a number, and not infinite",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "string_type": "should be text",
}


_EXAMPLES = {
    "corpus.pairs": "'corpus.pairs=[3,6]'",
    "corpus.sources": """'corpus.sources=[{kind="re-arc"}]'""",
    "validation.difficulty": "'validation.difficulty=[0.0,0.3]'",
    "adapt.betas": "'adapt.betas=[0.9,0.95]'",
    "train.betas": "'train.betas=[0.9,0.95]'",
}


def _as_list(key: str, overrides: Sequence[str], first: Any) -> str:
    """The user's own word in a list."""
    word = next((w.partition("=")[2] for w in overrides if w.partition("=")[0] == key), first["input"])
    words = [part.strip(" \"'") for part in word.strip("[]()").split(",")] if isinstance(word, str) else [word]
    return f"'{key}={json.dumps(words, default=str)}'"


def _explain(error: ValidationError, file: str | Path | None, overrides: Sequence[str]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    words = [f"{word.partition('=')[0]}." for word in overrides]
    given = any(word.startswith(f"{key}." if key else "") or f"{key}.".startswith(word) for word in words)
    where = f" (config {file})" if file and not given else ""
    if first["type"] == "extra_forbidden":
        known = _known(first["loc"][:-1])
        section = "".join(f"{part}." for part in first["loc"][:-1])
        return f"unknown setting {key}{where}; {meant(str(first['loc'][-1]), known, section)}"
    if first["type"] == "tuple_type":
        return f"setting {key}{where}: give a list, such as {_EXAMPLES.get(key) or _as_list(key, overrides, first)}"
    if first["type"] in ("missing", "too_long") and (example := _EXAMPLES.get(key.rpartition(".")[0])):
        return f"setting {key.rpartition('.')[0]}{where}: give two numbers, such as {example}"
    if first["type"] in ("too_short", "string_too_short") and first["input"] == "":
        return f"setting {key}{where} is empty: give a value, or leave it out"
    if first["type"] == "too_short":
        return f"setting {key}{where}: give at least one" if key else f"give at least one stage{where}"
    if first["type"] == "missing":
        return f"setting {key}{where} is missing: give it"
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        section = key.rpartition(".")[2]
        return f"{key}{where} is a section, with settings in it: write {key}.NAME=VALUE, or [{section}] in a file"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # our own sentence, which has the values in it
        of_section = first["loc"] and "." in message.partition(" ")[0]  # which setting it is stands there already
        return f"setting {key}{where}: {message}" if key and not of_section else f"{message}{where}"
    said = _SHOULD_BE.get(first["type"], message.replace("Input should", "should", 1))
    return f"setting {key}{where}: {said}, got {first['input']!r}"


def _known(loc: Sequence[str | int]) -> list[str]:
    """The settings of the section at `loc`."""
    section: Any = Config
    for part in loc:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next((t for t in get_args(annotation) if t is not Ellipsis), annotation)
    return list(section.model_fields)
