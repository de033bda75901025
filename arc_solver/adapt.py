"""Test-time training: a LoRA adapter for each task, learnt on the task's own demonstrations.

Every sample shows the demonstrations under a new augmentation in a new order, and the last one is held out: predicted
from the n-1 before it. In each n samples in a row every demonstration is the held-out one exactly once.

Tasks of like length are adapted at once, each with its own adapter, optimizer, schedule and gradient clipping, over one
base: the loss is the sum of the tasks' means, so nothing of one reaches another.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .adapters import Adapter, LoraBank, attached, fresh_adapter
from .attention import Packing
from .augment import Augmentation, ColourPolicy, random_augmentation
from .config import AdaptConfig, FormatConfig, named_rng
from .encode import IGNORE, OUTPUT, Sample, encode_sample, sample_tokens
from .model import Model, sent
from .optimize import make_optimizers, take_step
from .stream import pack
from .tasks import Pair, Task

CPU_GROUP_TOKENS, GPU_GROUP_TOKENS = 2048, 32_768
CPU_GROUPS = 8  # there are at least, if there are as many tasks, so that all cores have work
CHECKS = 10  # how often in a run "leave-one-out" looks


@dataclass(frozen=True, eq=False)
class Adaptation:
    """An adapter, and how it came about."""

    adapter: Adapter
    steps: int
    tokens: int
    first_loss: float  # mean over the first tenth of the steps, nats
    last_loss: float  # and over the last tenth
    seconds: float  # of the whole group, shared out by tokens
    dropped: int  # demonstrations that had no room in a sample, at most
    # "steps", "leave-one-out", "deadline", or "diverged": not finite, so the adapter is what it was at the start
    ended: str

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "first_loss": round(self.first_loss, 4),
            "last_loss": round(self.last_loss, 4),
            "seconds": round(self.seconds, 2),
            "dropped": self.dropped,
            "ended": self.ended,
        }


def held_out_samples(
    task: Task, config: AdaptConfig, format: FormatConfig, rng: np.random.Generator
) -> Iterator[tuple[Sample, int]]:
    """Endless samples of a task's demonstrations, each with the index of the held-out one, which comes last.

    A sample longer than `config.max_tokens` loses demonstrations from the front; the held-out one always stays.
    """
    policy = ColourPolicy(config.keep_background, config.output_only)
    while True:
        for held_out in (int(i) for i in rng.permutation(len(task.train))):
            augmentation = random_augmentation(rng, policy, task.train)
            pairs = _held_out_last(task, augmentation, held_out, config, format)
            yield encode_sample(pairs, format, config.labels), held_out


def _held_out_last(
    task: Task, augmentation: Augmentation, held_out: int, config: AdaptConfig, format: FormatConfig
) -> list[Pair]:
    shown = augmentation.order or range(len(task.train))
    order = [i for i in shown if i != held_out] + [held_out]
    pairs = [augmentation.apply_pair(task.train[i]) for i in order]
    while len(pairs) > 1 and sample_tokens(pairs, format) > config.max_tokens:
        pairs = pairs[1:]
    return pairs


def planned_steps(task: Task, config: AdaptConfig) -> int:
    """Steps that a task gets: `config.steps`, fewer where they would cost more than `config.budget_tokens`."""
    return max(1, min(config.steps, config.budget_tokens // _step_tokens(task, config)))


def _step_tokens(task: Task, config: AdaptConfig) -> int:
    return min(task.tokens, config.max_tokens) * config.batch_size


def group_by_length(tasks: Sequence[Task], config: AdaptConfig, device: torch.device) -> list[list[Task]]:
    """The tasks that are adapted at once: of like length, so that little is padding. Longest first."""
    on_cpu = device.type == "cpu"
    room = config.group_tokens or (CPU_GROUP_TOKENS if on_cpu else GPU_GROUP_TOKENS)
    most = config.together or (max(1, len(tasks) // CPU_GROUPS) if on_cpu else len(tasks))
    groups: list[list[Task]] = []
    for task in sorted(tasks, key=lambda task: (-_step_tokens(task, config), task.id)):
        longest = _step_tokens(groups[-1][0], config) if groups else 0
        fits = groups and len(groups[-1]) < most and longest * (len(groups[-1]) + 1) <= room
        if fits and _step_tokens(task, config) > 0.8 * longest:
            groups[-1].append(task)
        else:
            groups.append([task])
    return groups


def adapt(
    tasks: Sequence[Task],
    model: Model,
    config: AdaptConfig,
    rngs: Sequence[np.random.Generator],
    start: Adapter | None = None,
    on_step: Callable[[], None] = lambda: None,
    deadline: float = math.inf,
) -> list[Adaptation]:
    """Fine-tunes an adapter for each task on its demonstrations. The base model is left as it was.

    Args:
        rngs: one for each task: its result does not depend on which tasks it is adapted with.
        start: the adapter that all continue; None: a fresh one for each.
        on_step: called after each step.
        deadline: of `time.monotonic()`. No step begins after it, and the learning rate falls in time for it.
    """
    began = time.monotonic()
    starts = [start or fresh_adapter(model, config, rng) for rng in rngs]
    with attached(model, starts) as bank:
        learners = [
            _Learner(k, *each, bank, config, model.format) for k, each in enumerate(zip(tasks, rngs, strict=True))
        ]
        while live := [learner for learner in learners if not learner.ended]:
            spent = (time.monotonic() - began) / max(1e-9, deadline - began)
            if spent >= 1:
                for learner in live:
                    learner.ended = "deadline"
                break
            _step(model, bank, live)
            for learner in live:
                learner.step(starts[learner.k], spent)
            on_step()
            if config.stop == "leave-one-out":
                _stop_where_all_is_right(model, bank, [x for x in live if not x.ended and x.is_due()])
        adapters = [bank.export(learner.k) for learner in learners]
    seconds = time.monotonic() - began
    tokens = max(1, sum(learner.tokens for learner in learners))
    return [x.result(adapter, seconds * x.tokens / tokens) for x, adapter in zip(learners, adapters, strict=True)]


@dataclass(eq=False)
class _Learner:
    """One task of a group: its samples, its slice of the bank, its optimizer, and how far it is."""

    k: int
    task: Task
    rng: np.random.Generator
    bank: LoraBank
    config: AdaptConfig
    format: FormatConfig
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    dropped: int = 0
    ended: str = ""
    parameters: list[nn.Parameter] = field(init=False)
    optimizers: list[Optimizer] = field(init=False)
    samples: Iterator[tuple[Sample, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.config.model_copy(update={"steps": planned_steps(self.task, self.config)})
        self.samples = held_out_samples(self.task, self.config, self.format, self.rng)
        self.parameters = self.bank.slice(self.k)
        self.optimizers = make_optimizers([(f"lora.{i}", p) for i, p in enumerate(self.parameters)], self.config)

    @property
    def steps(self) -> int:
        return len(self.losses)

    def draw(self) -> list[Sample]:
        chosen = [next(self.samples)[0] for _ in range(self.config.batch_size)]
        self.tokens += sum(map(len, chosen))
        shown = min(int((sample.ids_T == OUTPUT).sum()) for sample in chosen)
        self.dropped = max(self.dropped, len(self.task.train) - shown)
        return chosen

    def step(self, start: Adapter, spent: float) -> None:
        """One step of its own optimizer; the loss is the last one noted. `spent`: share of the time that is over."""
        progress = max((self.steps - 1) / self.config.steps, spent)
        self.bank.take_gradients(self.k, self.parameters)
        norm, _ = take_step(self.parameters, self.optimizers, self.config, progress)
        if not math.isfinite(norm + self.losses[-1]):
            self.bank.set(self.k, start)
            self.ended = "diverged"
        elif self.steps == self.config.steps:
            self.ended = "steps"

    def is_due(self) -> bool:
        """Whether it is time to look how the held-out demonstrations are answered."""
        return self.steps % max(1, self.config.steps // CHECKS) == 0

    def questions(self) -> list[Sample]:
        """Each demonstration, given the others: as it is, and under an augmentation that depends on the step."""
        policy = ColourPolicy(self.config.keep_background, self.config.output_only)
        rng = named_rng(0, "questions", self.task.id, self.steps)
        views = [Augmentation(), random_augmentation(rng, policy, self.task.train)]
        asked = [(view, i) for view in views for i in range(len(self.task.train))]
        pairs = [_held_out_last(self.task, view, i, self.config, self.format) for view, i in asked]
        return [encode_sample(shown, self.format, "last") for shown in pairs]

    def result(self, adapter: Adapter, seconds: float) -> Adaptation:
        losses = [loss for loss in self.losses if math.isfinite(loss)] or [0.0]
        tenth = max(1, len(losses) // 10)
        first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
        return Adaptation(adapter, self.steps, self.tokens, first, last, seconds, self.dropped, self.ended)


def _step(model: Model, bank: LoraBank, live: Sequence[_Learner]) -> None:
    """Forward and backward for all: leaves the gradients in the bank, and notes each one's loss."""
    bank.drop_gradients()
    logits_NV, labels_N, owners_N = _ask(model, bank, live, [learner.draw() for learner in live])
    losses_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
    counts_L = owners_N.bincount(minlength=len(live))
    losses_L = losses_N.new_zeros(len(live)).index_add(0, owners_N, losses_N) / counts_L
    losses_L.sum().backward()
    for learner, loss in zip(live, losses_L.tolist(), strict=True):
        learner.losses.append(loss)


@torch.no_grad()
def _stop_where_all_is_right(model: Model, bank: LoraBank, asked: Sequence[_Learner]) -> None:
    if not asked:
        return
    logits_NV, labels_N, owners_N = _ask(model, bank, asked, [learner.questions() for learner in asked])
    wrong = set(owners_N[logits_NV.argmax(-1) != labels_N].tolist())
    for i, learner in enumerate(asked):
        if i not in wrong:
            learner.ended = "leave-one-out"


def _ask(
    model: Model, bank: LoraBank, learners: Sequence[_Learner], samples: Sequence[Sequence[Sample]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Each learner's samples through its adapter.

    Returns the logits at the N places before a learnt id, [N, V]; that id; and whose it is, as an index of `learners`.
    """
    bank.use([learner.k for learner in learners])
    longest = max(sum(map(len, own)) for own in samples)
    batches = [pack(own, longest) for own in samples]
    ids_T, labels_T, positions_T = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids_T", "labels_T", "positions_T")
    )
    ends_S = torch.cat([batch.ends_S + i * longest for i, batch in enumerate(batches)])
    rows_N = (labels_T[1:] != IGNORE).nonzero()[:, 0]  # nothing is learnt at a sequence's first id
    device = model.device
    ids_BT, positions_BT, on_device_N = (sent(x, device) for x in (ids_T[None], positions_T[None], rows_N))
    logits_NV = model.logits(ids_BT, positions_BT, rows_N=on_device_N, packing=Packing.of(ends_S, device))
    return logits_NV, labels_T[rows_N + 1], rows_N // longest
