"""Test-time training: a LoRA adapter for each task, learnt on the task's own demonstrations.

Every sample shows the demonstrations under a new augmentation in a new order, and the last one is held out: predicted
from the n-1 before it. In each n samples in a row every demonstration is the held-out one exactly once.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .adapters import Adapter, attached, fresh_adapter
from .augment import ColourPolicy, random_augmentation
from .config import AdaptConfig, FormatConfig
from .encode import Sample, encode_sample, sample_tokens
from .model import Model, packed_loss
from .optimize import Step, fit, make_optimizers
from .stream import pack
from .tasks import Pair, Task


@dataclass(frozen=True, eq=False)
class Adaptation:
    """An adapter, and how it came about."""

    adapter: Adapter
    steps: int
    tokens: int
    first_loss: float  # mean over the first tenth of the steps, nats
    last_loss: float  # and over the last tenth
    seconds: float


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
            assert augmentation.order is not None
            order = [i for i in augmentation.order if i != held_out] + [held_out]
            pairs: list[Pair] = [augmentation.apply_pair(task.train[i]) for i in order]
            while len(pairs) > 1 and sample_tokens(pairs, format) > config.max_tokens:
                pairs = pairs[1:]
            yield encode_sample(pairs, format, config.labels), held_out


def planned_steps(task: Task, config: AdaptConfig) -> int:
    """Steps that a task gets: `config.steps`, fewer where they would cost more than `config.budget_tokens`."""
    demonstrations = min(task.tokens, config.max_tokens)
    return max(1, min(config.steps, config.budget_tokens // (demonstrations * config.batch_size)))


def adapt(
    task: Task,
    model: Model,
    config: AdaptConfig,
    rng: np.random.Generator,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Adaptation:
    """Fine-tunes a fresh adapter on the task's demonstrations. The base model is left as it was."""
    start = time.monotonic()
    samples = held_out_samples(task, config, model.format, rng)
    losses: list[float] = []
    tokens = 0

    def backward_at(_: int) -> Tensor:
        nonlocal tokens
        chosen = [next(samples)[0] for _ in range(config.batch_size)]
        length = sum(len(sample) for sample in chosen)
        tokens += length
        loss = packed_loss(model, pack(chosen, length))
        loss.backward()
        return loss

    def after_step(step: Step) -> None:
        losses.append(step.loss)
        on_step(step)

    settings = config.model_copy(update={"steps": planned_steps(task, config)})
    with attached(model, [fresh_adapter(model, config, rng)]) as bank:
        named = [(f"lora.{i}", p) for i, p in enumerate(bank.parameters())]
        fit(bank.parameters(), make_optimizers(named, settings), settings, backward_at, after_step=after_step)
        adapter = bank.export(0)
    tenth = max(1, len(losses) // 10)
    first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
    return Adaptation(adapter, len(losses), tokens, first, last, time.monotonic() - start)
