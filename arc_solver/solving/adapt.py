"""Test-time training: a LoRA adapter for each task, learnt on the task's own demonstrations.

Every sample shows the demonstrations under a new augmentation in a new order, and the last one is held out: predicted
from the n-1 before it. In each n samples in a row every demonstration is the held-out one exactly once.

Tasks of like length are adapted at once, each with its own adapter, optimizer, schedule and gradient clipping, over one
base: the loss is the sum of the tasks' means, so nothing of one reaches another.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from ..config import AdaptConfig, FormatConfig
from ..data.stream import pack
from ..models import Adapter, LoraBank, Model, Packing, attach_adapters, fresh_adapter, to_device
from ..puzzles import (
    IGNORE,
    OUTPUT,
    Augmentation,
    ColourPolicy,
    Pair,
    Sample,
    Task,
    encode_sample,
    random_augmentation,
    sample_tokens,
)
from ..training.memory import activation_bytes_per_token
from ..training.optimize import step_rate

log = logging.getLogger(__name__)

CPU_GROUP_TOKENS, GPU_GROUP_TOKENS = 2048, 32_768
CPU_GROUPS = 8  # there are at least, if there are as many tasks, so that all cores have work
ROUNDS = 4  # of all demonstrations, each of which was the held-out one
FEWEST = 12  # held-out outputs, however few demonstrations there are
SURE = 0.9  # share of them that is answered exactly, from which on a task needs no more
KEPT_FROM = 3  # demonstrations, from which on a joint stage does not see the last one, see `joint.py`
CURVE = 40  # points of a loss curve, at most
TAIL = 0.5  # of the steps so far: in so many more the learning rate falls to 0 before a task stops
STEP_SHARE = 0.7  # of the free memory may go into what a forward pass keeps; the backward pass needs some besides
ADAPTER_SHARE = 0.25  # of all memory may go into the adapters of a group
# Of a number of an adapter in training: all, and beside itself: its gradient twice, AdamW's two moments, 16 bit.
ADAPTER_BYTES, BESIDE_BYTES = 24, 20


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
    leave_one_out: float  # share of the last samples whose held-out output was answered exactly, before it was learnt
    # "steps", "leave-one-out", "deadline", or "diverged": not finite, so the adapter is what it was at the start
    ended: str
    losses: Sequence[float] = ()  # means over equal parts of the steps, nats; earlier versions did not keep them

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "first_loss": round(self.first_loss, 4),
            "last_loss": round(self.last_loss, 4),
            "seconds": round(self.seconds, 2),
            "dropped": self.dropped,
            "leave_one_out": round(self.leave_one_out, 4),
            "ended": self.ended,
            "losses": [round(loss, 4) for loss in self.losses],
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
    return max(1, min(config.steps, config.budget_tokens // step_tokens(task, config)))


def step_tokens(task: Task, config: AdaptConfig) -> int:
    """Tokens of a step of a task, at most."""
    return min(task.tokens, config.max_tokens) * config.batch_size


def group_room(config: AdaptConfig, device: torch.device) -> int:
    """Tokens of a step of all tasks that are adapted at once, at most."""
    return config.group_tokens or (CPU_GROUP_TOKENS if device.type == "cpu" else GPU_GROUP_TOKENS)


def group_by_length(
    tasks: Sequence[Task], config: AdaptConfig, device: torch.device, most: int = 0
) -> list[list[Task]]:
    """The tasks that are adapted at once: of like length, so that little is padding. Longest first.

    Args:
        most: tasks in a group for which there is memory; 0: it does not matter.
    """
    on_cpu, room = device.type == "cpu", group_room(config, device)
    wanted = config.together or (max(1, len(tasks) // CPU_GROUPS) if on_cpu else len(tasks))
    most = min(wanted, most or wanted)
    groups: list[list[Task]] = []
    for task in sorted(tasks, key=lambda task: (-step_tokens(task, config), task.id)):
        longest = step_tokens(groups[-1][0], config) if groups else 0
        fits = groups and len(groups[-1]) < most and longest * (len(groups[-1]) + 1) <= room
        if fits and step_tokens(task, config) > 0.8 * longest:
            groups[-1].append(task)
        else:
            groups.append([task])
    return groups


def max_group_size(adapter: Adapter, memory: int) -> int:
    """How many adapters like this one can be trained at once with this much memory."""
    numbers = sum(a.numel() + b.numel() for a, b in adapter.weights.values())
    return max(1, int(ADAPTER_SHARE * memory) // (ADAPTER_BYTES * numbers))


def adapt(
    tasks: Sequence[Task],
    model: Model,
    config: AdaptConfig,
    rngs: Sequence[np.random.Generator],
    starts: Sequence[Adapter] | None = None,
    on_step: Callable[[int], None] = lambda tokens: None,
    deadline: float = math.inf,
    memory: float = math.inf,
) -> list[Adaptation]:
    """Fine-tunes an adapter for each task on its demonstrations. The base model is left as it was.

    Args:
        rngs: one for each task: its result does not depend on which tasks it is adapted with.
        starts: the adapters that they continue; None: a fresh one for each.
        on_step: called after each step, with its tokens.
        deadline: of `time.monotonic()`. No step begins after it, and the learning rate falls in time for it.
        memory: bytes that are free. What has no room in one pass goes through the model part by part; the gradients
            are the same.
    """
    began = time.monotonic()
    starts = starts or [fresh_adapter(model, config, rng) for rng in rngs]
    with attach_adapters(model, starts) as bank:
        learners = [
            _Learner(k, *each, bank, config, model.format) for k, each in enumerate(zip(tasks, rngs, strict=True))
        ]
        bank.activate([0])  # what a token keeps does not depend on how many adapters there are
        passes = MicroBatching.plan(model, config, max(0, memory - BESIDE_BYTES * bank.weights_KP.numel()))
        while live := [learner for learner in learners if not learner.ended]:
            spent = (time.monotonic() - began) / max(1e-9, deadline - began)
            if spent >= 1:
                for learner in live:
                    learner.ended = "deadline"
                break
            before = sum(learner.tokens for learner in live)
            _step(model, bank, live, starts, passes, spent)
            on_step(sum(learner.tokens for learner in live) - before)
        adapters = [bank.export(learner.k) for learner in learners]
    seconds = time.monotonic() - began
    tokens = max(1, sum(learner.tokens for learner in learners))
    return [x.result(adapter, seconds * x.tokens / tokens) for x, adapter in zip(learners, adapters, strict=True)]


Part = list[tuple[int, Sequence[Sample]]]  # learners, by index, each with samples that go through the model together


@dataclass(eq=False)
class MicroBatching:
    """How a step is split into micro-batches that fit in memory, and whether activations are recomputed."""

    room: float = math.inf  # tokens, padding included
    recompute: bool = False  # activations are computed again in the backward pass instead of kept
    may_recompute: bool = True  # where memory runs out all the same

    @staticmethod
    def plan(model: Model, config: AdaptConfig, memory: float) -> "MicroBatching":
        """The split for so many free bytes; recomputes where not even one of the longest samples fits."""
        may = config.recompute != "no"
        if memory == math.inf:
            return MicroBatching(recompute=config.recompute == "yes", may_recompute=may)
        kept, recomputed = activation_bytes_per_token(model)
        room = STEP_SHARE * memory / kept
        pays = room < config.max_tokens and recomputed < kept
        recompute = config.recompute == "yes" or (config.recompute == "auto" and pays)
        return MicroBatching(STEP_SHARE * memory / recomputed if recompute else room, recompute, may)

    def split(self, samples: Sequence[Sequence[Sample]]) -> list[Part]:
        """Learners in parts for which there is room; one that has none by itself, sample by sample."""
        pieces: Part = []
        for i, own in enumerate(samples):
            fits = sum(map(len, own)) <= self.room
            pieces += [(i, own)] if fits else [(i, [sample]) for sample in own]
        parts: list[Part] = []
        for piece in pieces:
            together = [*parts[-1], piece] if parts else [piece]
            padded = len(together) * max(sum(map(len, own)) for _, own in together)
            if parts and padded <= self.room and parts[-1][-1][0] != piece[0]:
                parts[-1] = together
            else:
                parts.append([piece])
        return parts

    def shrink(self, samples: Sequence[Sequence[Sample]]) -> bool:
        """Less at once, after memory ran out with these; false: there is nothing less."""
        used = max(sum(len(sample) for _, own in part for sample in own) for part in self.split(samples))
        smallest = max(len(sample) for own in samples for sample in own)
        if used <= smallest:
            if self.recompute or not self.may_recompute:
                return False
            self.recompute = True
        self.room = max(smallest, used // 2)
        return True


@dataclass(eq=False)
class _Learner:
    """One task of a group: its samples, its row of the bank, its optimizer, and how far it is."""

    k: int
    task: Task
    rng: np.random.Generator
    bank: LoraBank
    config: AdaptConfig
    format: FormatConfig
    losses: list[float] = field(default_factory=list)
    # Of each step that holds out what the weights have not learnt: whether all held-out outputs were answered so.
    exact: list[bool] = field(default_factory=list)
    decays_from: int = -1  # the step from which on the learning rate falls to 0; -1: it has not come to that
    ends: int = field(init=False)  # steps
    tokens: int = 0
    dropped: int = 0
    ended: str = ""
    optimizer: AdamW = field(init=False)
    samples: Iterator[tuple[Sample, int]] = field(init=False)
    drawn: list[Sample] = field(init=False)  # for the next step
    is_question: bool = field(init=False)  # whether one of them holds out what the weights have not learnt

    def __post_init__(self) -> None:
        self.config = config = self.config.model_copy(update={"steps": planned_steps(self.task, self.config)})
        self.ends = config.steps
        self.samples = held_out_samples(self.task, config, self.format, self.rng)
        self.optimizer = AdamW(
            [self.bank.flat_parameter(self.k)], config.lr, config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.draw()

    @property
    def steps(self) -> int:
        return len(self.losses)

    def draw(self) -> None:
        drawn = [next(self.samples) for _ in range(self.config.batch_size)]
        self.drawn = [sample for sample, _ in drawn]
        self.is_question = any(held_out in self.unseen for _, held_out in drawn)

    @property
    def unseen(self) -> range:
        """Demonstrations that the weights have not learnt, by index: with a joint stage, those that it has not seen."""
        count = len(self.task.train)
        first = 0 if not self.config.joint else count - 1 if count >= KEPT_FROM else count
        return range(first, count)

    def step(self, spent: float) -> None:
        """A step of the optimizer, from the gradients in the bank. `spent`: share of the time that is over."""
        progress = max(self.steps / self.config.steps, spent)
        rate = step_rate(progress, self.config)
        if self.decays_from >= 0:
            rate *= (self.ends - self.steps) / (self.ends - self.decays_from)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate
        self.optimizer.step()

    def note(self, used: Sequence[Sample], loss: float, exact: bool | None, norm: float, start: Adapter) -> None:
        """What came of a step with these samples. Where it is not finite, the adapter is what it was at the start.

        Args:
            exact: whether all that was held out was answered exactly; None: it was no question.
        """
        self.losses.append(loss)
        self.exact += [] if exact is None else [exact]
        self.tokens += sum(map(len, used))
        shown = min(int((sample.ids_T == OUTPUT).sum()) for sample in used)
        self.dropped = max(self.dropped, len(self.task.train) - shown)
        if not math.isfinite(norm + loss):
            self.bank.set(self.k, start)
            self.ended = "diverged"
        elif self.steps == self.ends:
            self.ended = "steps" if self.decays_from < 0 else "leave-one-out"
        elif self.config.stop == "leave-one-out" and self._needs_no_more():
            self.decays_from = self.steps
            self.ends = self.steps + math.ceil(TAIL * self.steps)

    def _needs_no_more(self) -> bool:
        """Whether it is time to let the learning rate fall. Later than in the first half little would be saved."""
        return self.decays_from < 0 and 2 * self.steps <= self.config.steps and self.leave_one_out >= SURE

    @property
    def leave_one_out(self) -> float:
        """Share of the last questions of which all held-out outputs were answered exactly; those to come were not."""
        asked = math.ceil(max(FEWEST, ROUNDS * len(self.unseen)) / self.config.batch_size)
        return sum(self.exact[-asked:]) / asked

    def result(self, adapter: Adapter, seconds: float) -> Adaptation:
        losses = [loss for loss in self.losses if math.isfinite(loss)] or [0.0]
        tenth = max(1, len(losses) // 10)
        first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
        curve = [float(np.mean(part)) for part in np.array_split(losses, min(CURVE, len(losses)))]
        return Adaptation(
            adapter, self.steps, self.tokens, first, last, seconds, self.dropped, self.leave_one_out, self.ended, curve
        )


def _step(
    model: Model,
    bank: LoraBank,
    live: Sequence[_Learner],
    starts: Sequence[Adapter],
    passes: MicroBatching,
    spent: float,
) -> None:
    """A step of all. What a GPU does is not waited for until the samples of the next step are drawn."""
    samples, are_questions = [learner.drawn for learner in live], [learner.is_question for learner in live]
    losses_L, wrong_L = _backward(model, bank, live, samples, passes)
    norms_K = bank.clip(live[0].config.clip)
    for learner in live:
        learner.step(spent)
    for learner in live:
        learner.draw()
    noted = torch.cat((losses_L, wrong_L, norms_K)).tolist()  # once, as a GPU is waited for
    losses, wrong, norms = noted[: len(live)], noted[len(live) : -bank.count], noted[-bank.count :]
    for learner, used, is_question, loss, mistakes in zip(live, samples, are_questions, losses, wrong, strict=True):
        learner.note(used, loss, mistakes == 0 if is_question else None, norms[learner.k], starts[learner.k])


def _backward(
    model: Model, bank: LoraBank, live: Sequence[_Learner], samples: Sequence[Sequence[Sample]], passes: MicroBatching
) -> tuple[Tensor, Tensor]:
    """Leaves the gradients of each one's mean loss in the bank.

    Returns the losses, and how many ids of held-out outputs were not the most probable ones, [L] each.
    """
    counts = [sum(int((sample.labels_T != IGNORE).sum()) for sample in own) for own in samples]
    counts_L = to_device(torch.tensor(counts, dtype=torch.float32), model.device)
    while True:
        try:
            return _passed(model, bank, live, samples, passes, counts_L)
        except torch.OutOfMemoryError:
            if not passes.shrink(samples):
                raise
            log.warning("out of memory: going on with %d tokens at once", passes.room)
        torch.cuda.empty_cache()  # the frame that held the memory is gone by now


def _passed(
    model: Model,
    bank: LoraBank,
    live: Sequence[_Learner],
    samples: Sequence[Sequence[Sample]],
    passes: MicroBatching,
    counts_L: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same in as many parts as `passes` says. `counts_L`: target ids of each."""
    bank.zero_gradients()
    losses_L, wrong_L = torch.zeros_like(counts_L), torch.zeros_like(counts_L)
    for part in passes.split(samples):
        members, own = [i for i, _ in part], [some for _, some in part]
        logits_MRV, labels_MR, is_held_out_MR = _ask(model, bank, [live[i] for i in members], own, passes.recompute)
        losses_MR = F.cross_entropy(logits_MRV.transpose(1, 2), labels_MR, ignore_index=IGNORE, reduction="none")
        members_M = to_device(torch.tensor(members), model.device)
        means_M = losses_MR.sum(1) / counts_L.index_select(0, members_M)
        bank.backward(means_M.sum())
        losses_L.index_add_(0, members_M, means_M.detach())
        is_wrong_MR = is_held_out_MR & (logits_MRV.argmax(-1) != labels_MR)
        wrong_L.index_add_(0, members_M, is_wrong_MR.sum(1).float())
    return losses_L, wrong_L


def _ask(
    model: Model,
    bank: LoraBank,
    learners: Sequence[_Learner],
    samples: Sequence[Sequence[Sample]],
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each learner's samples through its adapter.

    Returns the logits at the places before a target id, [L, R, V]; that id, [L, R]; and whether it is of a held-out
    output. Who has fewer than R is asked at other places besides, with `IGNORE` as their target: blocks of all adapters
    are equal.
    """
    bank.activate([learner.k for learner in learners])
    longest = max(sum(map(len, own)) for own in samples)
    batches = [pack(own, longest) for own in samples]
    ids_LT, labels_LT, positions_LT = (
        torch.stack([getattr(batch, name) for batch in batches]) for name in ("ids_T", "labels_T", "positions_T")
    )
    ends_S = torch.cat([batch.ends_S + i * longest for i, batch in enumerate(batches)])
    targets_LT = F.pad(labels_LT[:, 1:], (0, 1), value=IGNORE)  # nothing is learnt at a sequence's first id
    is_asked_LT = targets_LT != IGNORE
    is_held_out_LT = torch.stack([_of_held_out(own, longest) for own in samples]) & is_asked_LT
    most = int(is_asked_LT.sum(1).max())
    columns_LR = is_asked_LT.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    rows_LR = columns_LR + longest * torch.arange(len(samples))[:, None]
    device = model.device
    logits_LRV = model.logits(
        to_device(ids_LT.view(1, -1), device),
        to_device(positions_LT.view(1, -1), device),
        rows=to_device(rows_LR, device),
        packing=Packing.of(ends_S, device),
        recompute=recompute,
    )
    labels_LR, is_held_out_LR = (x.gather(1, columns_LR) for x in (targets_LT, is_held_out_LT))
    return logits_LRV, to_device(labels_LR, device), to_device(is_held_out_LR, device)


def _of_held_out(samples: Sequence[Sample], length: int) -> Tensor:
    """Where in packed samples the held-out outputs are, which come last in each; from their marker on. [length]"""
    is_held_out_T, start = torch.zeros(length, dtype=torch.bool), 0
    for sample in samples:
        is_held_out_T[start + int(np.flatnonzero(sample.ids_T == OUTPUT)[-1]) : start + len(sample)] = True
        start += len(sample)
    return is_held_out_T
