"""Validation on held-out tasks: a loss that does not depend on batching, and answers that are generated and compared.

Loss stops telling the truth once it rises: answers may get better still. So both are measured, on sets that are fixed
by the config.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..config import ALL_KINDS, CorpusConfig, FormatConfig
from ..data.corpus import Partition, validation_source
from ..data.stream import Batch, SampleStream, pack_in_order
from ..decoding import TorchEngine
from ..models import Model
from ..puzzles import Grid, Labels, Malformed, Prompt, decode_reply, encode_prompt, same_grid

Question = tuple[Prompt, Grid]  # and its answer


def _stream(
    partition: Partition, corpus: CorpusConfig, format: FormatConfig, name: str, labels: Labels
) -> SampleStream:
    """The same samples for every seed of a run, and however its training samples are augmented."""
    corpus = corpus.model_copy(update={"augment": ALL_KINDS})
    return SampleStream([validation_source(partition)], corpus, format, 0, name, labels=labels)


def validation_batches(
    partition: Partition, corpus: CorpusConfig, format: FormatConfig, labels: Labels, batch_tokens: int
) -> list[Batch]:
    """A fixed set of at least `partition.config.tokens` tokens."""
    stream = _stream(partition, corpus, format, "validation", labels)
    samples = [stream[0].sample]
    while sum(len(sample) for sample in samples) < partition.config.tokens:
        samples.append(stream[len(samples)].sample)
    return pack_in_order(samples, batch_tokens)


def accuracy_prompts(partition: Partition, corpus: CorpusConfig, format: FormatConfig) -> list[Question]:
    """Prompts with their solutions, fixed by the config: the last pair of each drawn task is asked.

    Demonstrations are dropped from a prompt that is longer than a sample may be.
    """
    stream = _stream(partition, corpus, format, "questions", "last")
    asked = []
    for i in range(partition.config.accuracy_prompts):
        *pairs, last = stream.draw_pairs(i)
        while len(pairs) > 1 and len(encode_prompt(pairs, last.input, format)) > corpus.max_tokens:
            pairs.pop()
        asked.append((encode_prompt(pairs, last.input, format), last.output))
    return asked


@torch.no_grad()
def validation_loss(loss_of: Callable[[Batch], Tensor], fixed: Iterable[Batch]) -> float:
    """Mean cross entropy over all target ids of the batches, in nats: the same however they are packed.

    `loss_of` is the sum over a batch's target ids.
    """
    losses, targets = zip(*((loss_of(batch).item(), batch.target_tokens) for batch in fixed), strict=True)
    return sum(losses) / sum(targets)


def accuracy(
    model: Model, asked: Sequence[Question], batch_tokens: int, is_over: Callable[[], bool] = lambda: False
) -> float:
    """Share of the questions that greedy decoding answers exactly; NaN if `is_over`, asked at every step, cut it."""
    trains = model.lm.training
    model.lm.eval()
    engine = TorchEngine(model, batch_tokens)

    def look(_: int) -> None:
        if is_over():
            engine.deadline = -math.inf

    engine.on_step = look
    try:
        with engine.open_session([prompt for prompt, _ in asked], [None] * len(asked)) as session:
            replies = session.generate(range(len(asked)))
    finally:
        model.lm.train(trains)
    if is_over():
        return math.nan
    right = 0
    for reply, (_, answer) in zip(replies, asked, strict=True):
        grid = decode_reply(reply.ids, model.format)
        right += not isinstance(grid, Malformed) and same_grid(grid, answer)
    return right / len(asked)
