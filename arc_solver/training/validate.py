"""Validation on held-out tasks: a loss that does not depend on batching, and answers that are generated and compared.

Loss stops telling the truth once it rises: answers may get better still. So both are measured, on sets that are fixed
by the config.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ALL_KINDS, CorpusConfig, FormatConfig
from ..data.corpus import Partition, validation_source
from ..data.stream import Batch, SampleStream, pack_in_order
from ..decoding import TorchEngine
from ..models import Model
from ..puzzles import IGNORE, Grid, Labels, Malformed, Prompt, decode_reply, encode_prompt, same_grid


class Question(NamedTuple):
    """A prompt that ends where its answer begins, and of which task it is."""

    task: str
    prompt: Prompt
    answer: Grid


def _stream(
    partition: Partition, corpus: CorpusConfig, format: FormatConfig, name: str, labels: Labels
) -> SampleStream:
    """The same samples for every seed of a run, and however its training samples are augmented."""
    corpus = corpus.model_copy(update={"augment": ALL_KINDS})
    return SampleStream([validation_source(partition)], corpus, format, 0, name, labels=labels)


def validation_batches(
    partition: Partition, corpus: CorpusConfig, format: FormatConfig, labels: Labels, batch_tokens: int
) -> tuple[list[Batch], list[str]]:
    """A fixed set of at least `partition.config.tokens` tokens, and the tasks of its samples, in their order."""
    stream = _stream(partition, corpus, format, "validation", labels)
    draws = [stream[0]]
    while sum(len(draw.sample) for draw in draws) < partition.config.tokens:
        draws.append(stream[len(draws)])
    return pack_in_order([draw.sample for draw in draws], batch_tokens), [draw.task for draw in draws]


def accuracy_prompts(partition: Partition, corpus: CorpusConfig, format: FormatConfig) -> list[Question]:
    """Prompts with their solutions, fixed by the config: the last pair of each drawn task is asked.

    Demonstrations are dropped from a prompt that is longer than a sample may be.
    """
    stream = _stream(partition, corpus, format, "questions", "last")
    asked = []
    for i in range(partition.config.accuracy_prompts):
        task, (*pairs, last) = stream.draw_pairs(i)
        while len(pairs) > 1 and len(encode_prompt(pairs, last.input, format)) > corpus.max_tokens:
            pairs.pop()
        asked.append(Question(task, encode_prompt(pairs, last.input, format), last.output))
    return asked


@dataclass(frozen=True)
class HeldOutMean:
    """A mean over all that was asked of the held-out tasks: over target ids, or over questions."""

    value: float
    by_task: Mapping[str, float]  # over those of each task


@torch.no_grad()
def validation_loss(
    losses_of: Callable[[Batch], Tensor], batches: Iterable[Batch], tasks: Sequence[str]
) -> HeldOutMean:
    """Cross entropy of target ids, in nats; the same however the samples are packed.

    Args:
        losses_of: of a batch of T ids those of all but its first, [T - 1]; 0 where there is no target.
        tasks: of the samples of all batches, in their order.
    """
    nats: defaultdict[str, float] = defaultdict(float)
    targets: Counter[str] = Counter()
    left = iter(tasks)
    for batch in batches:
        losses_T = torch.cat([torch.zeros(1, dtype=torch.float64), losses_of(batch).double().cpu()])
        lengths = batch.ends_S.diff(prepend=batch.ends_S.new_zeros(1)).tolist()
        parts = zip(losses_T.split(lengths), batch.labels_T.split(lengths), strict=True)
        for losses_L, labels_L in parts:
            if count := int((labels_L != IGNORE).sum()):  # none: it is padding
                task = next(left)
                nats[task] += float(losses_L.sum())
                targets[task] += count
    by_task = {task: nats[task] / targets[task] for task in sorted(nats)}
    return HeldOutMean(sum(nats.values()) / targets.total(), by_task)


def accuracy(
    model: Model, asked: Sequence[Question], batch_tokens: int, is_over: Callable[[], bool] = lambda: False
) -> HeldOutMean | None:
    """Share of the questions that greedy decoding answers exactly; None if `is_over`, asked at every step, cut it."""
    trains = model.lm.training
    model.lm.eval()
    engine = TorchEngine(model, batch_tokens)

    def look(_: int) -> None:
        if is_over():
            engine.deadline = -math.inf

    engine.on_step = look
    try:
        with engine.open_session([question.prompt for question in asked], [None] * len(asked)) as session:
            replies = session.generate(range(len(asked)))
    finally:
        model.lm.train(trains)
    if is_over():
        return None
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for reply, question in zip(replies, asked, strict=True):
        grid = decode_reply(reply.ids, model.format)
        right[question.task].append(not isinstance(grid, Malformed) and same_grid(grid, question.answer))
    by_task = {task: sum(of) / len(of) for task, of in sorted(right.items())}
    return HeldOutMean(sum(map(sum, right.values())) / len(asked), by_task)
