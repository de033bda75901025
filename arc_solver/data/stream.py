"""The sample stream of offline training: a mixture's tasks are drawn, augmented, encoded and packed.

A sample is a pure function of (seed, stage, index), and a batch of (seed, stage, step, lane): nothing depends on
workers, processes or what ran before. So a run resumes at any step at once, and any number of devices sees the same
batches, none of them twice.
"""

import atexit
import ctypes
import pickle
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..config import CorpusConfig, FormatConfig
from ..errors import UserError
from ..puzzles import IGNORE, PAD, ColourPolicy, Labels, Pair, Sample, encode_sample, random_augmentation, sample_tokens
from ..puzzles.augment import random_problem_augmentation
from ..puzzles.encode import encode_imitation, imitation_tokens
from ..rng import named_rng
from .sources import Source

GROUP = 16  # batches that are packed together: enough for even filling, few enough to be made in a moment
FILLED = 0.97  # share of a group's room that is drawn for it; all of it finds room then, but for very long samples
SAMPLES_PER_GROUP = 2**20  # each group draws from indexes of its own: more than fit in any budget

# What became of the samples of each source. "too_long" ones did not even fit with 2 pairs; "left_out" ones found no
# room in a batch.
COUNTS = ("samples", "tokens", "demonstrations_dropped", "too_long", "left_out")


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples packed one after another into a fixed budget of T tokens; the rest is PAD, without labels."""

    ids_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    ends_S: torch.Tensor  # int64, where each sample ends; the last is T, padding being a sample of its own
    counts_SC: np.ndarray = field(
        default_factory=lambda: np.zeros((0, len(COUNTS)), dtype=np.int64)
    )  # [sources, COUNTS]

    @property
    def useful_tokens(self) -> int:
        return int((self.ids_T != PAD).sum())

    @property
    def target_tokens(self) -> int:
        """Number of tokens that have a label and so count in the loss."""
        return int((self.labels_T != IGNORE).sum())


class NoRoom(UserError):
    """The longest sample that is allowed is shorter than all that a source gives."""


@dataclass(frozen=True, eq=False)
class DrawnSample:
    """A sample with the source and the task it was drawn from, and what was dropped or rejected on the way."""

    sample: Sample
    source: int = 0  # index into the mixture
    task: str = ""  # id in that source
    dropped: int = 0  # demonstrations that were dropped to make it fit
    too_long: int = 0  # samples of its source that were drawn before it and did not fit at all


class SampleStream(Dataset[DrawnSample]):
    """Draw `index` is a pure function of (seed, names, index), for any index >= 0.

    Args:
        sources: the mixture, without the tasks that are to be left out.
        names: what distinguishes this stream from others of the same seed.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: CorpusConfig,
        format: FormatConfig,
        seed: int,
        *names: str | int,
        labels: Labels = "all-but-first",
    ):
        for source in sources:
            if not source.tasks:
                raise UserError(
                    f"source '{source.config.label}' has no task left, as all of its tasks are validated on, scored"
                    " on or in audit.exclude: give another, or leave it out"
                )
        self.sources, self.config, self.format, self.labels = sources, config, format, labels
        self.seed, self.names = seed, names
        self.policy = ColourPolicy(config.keep_background, config.output_only)
        weights = np.array([source.config.weight for source in sources])
        self.cumulative = np.cumsum(weights / weights.sum())
        self.ids = [list(source.tasks) for source in sources]

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> DrawnSample:
        rng = named_rng(self.seed, *self.names, index)
        s = min(int(np.searchsorted(self.cumulative, rng.random(), side="right")), len(self.sources) - 1)
        config = self.sources[s].config
        for too_long in range(1000):  # of the same source, so that the weights are those of what is trained on
            task, pairs = self._draw(rng, s)
            imitates = rng.random() * (config.solve + config.imitate) >= config.solve
            tokens = imitation_tokens if imitates else sample_tokens
            kept = len(pairs)
            room = self.config.max_tokens
            while self.config.too_long == "drop" and kept > 2 and tokens(pairs[:kept], self.format) > room:
                kept -= 1
            if tokens(pairs[:kept], self.format) <= room:
                return DrawnSample(self._encode(pairs[:kept], imitates), s, task, len(pairs) - kept, too_long)
        raise NoRoom(
            f"corpus.max_tokens={self.config.max_tokens} is too small for source '{config.label}': 1000 samples"
            " of it in a row were longer: make it larger, or leave the source out"
        )

    def draw_pairs(self, index: int) -> tuple[str, list[Pair]]:
        """The id of a task of the first source, and augmented pairs of it, before any is dropped for length; a pure
        function too."""
        return self._draw(named_rng(self.seed, *self.names, index), 0)

    def _draw(self, rng: np.random.Generator, s: int) -> tuple[str, list[Pair]]:
        """A task's id, and augmented pairs of it in random order, before any is dropped for length."""
        source = self.sources[s]
        low, high = self.config.pairs
        count = int(rng.integers(low, high + 1))
        task_id = self.ids[s][rng.integers(len(self.ids[s]))]
        pairs = source.tasks[task_id](rng, count)
        if len(pairs) > count:
            chosen = rng.permutation(len(pairs))[:count]
            pairs = [pairs[i] for i in (chosen if "order" in self.config.augment else np.sort(chosen))]
        if source.config.problem_augmentation and rng.random() < source.config.problem_augmentation:
            problem = random_problem_augmentation(rng, pairs)
            pairs = [problem.apply_pair(pair) for pair in pairs]
        augmentation = random_augmentation(rng, self.policy, pairs).only(self.config.augment)
        return task_id, [augmentation.apply_pair(pairs[i]) for i in augmentation.order or range(len(pairs))]

    def _encode(self, pairs: Sequence[Pair], imitates: bool) -> Sample:
        if imitates:
            return encode_imitation([pair.input for pair in pairs], self.format, self.labels)
        return encode_sample(pairs, self.format, self.labels)


class _Sender(Dataset[bytes]):
    """What a worker sends: bytes, because each tensor would hold a file open, and errors as values, because raised ones
    come with the worker's traceback."""

    def __init__(self, stream: "BatchStream"):
        self.stream = stream

    def __getitem__(self, place: tuple[int, int]) -> bytes:
        try:
            return pickle.dumps(self.stream[place])
        except UserError as error:
            return pickle.dumps(error)


class BatchStream(Dataset[list[Batch]]):
    """Groups of 16 packed batches. Step k takes batch k % 16 of group k // 16 in each of its `lanes`.

    Samples are drawn until they fill 97% of a group and are shared out, longest first, each to the batch with most
    room: batches are alike, long samples as frequent as drawn, and over 95% of the tokens useful. What finds no room is
    counted as left out; it is much only where nearly all samples are over a fifth of a batch long.

    Args:
        lanes: batches of a step, over all processes.
    """

    def __init__(self, samples: SampleStream, batch_tokens: int, lanes: int = 1):
        self.samples, self.batch_tokens, self.lanes = samples, batch_tokens, lanes
        if samples.config.max_tokens > batch_tokens:
            raise UserError(
                f"train.batch_tokens={batch_tokens} must be at least corpus.max_tokens={samples.config.max_tokens}"
            )

    def __getitem__(self, place: tuple[int, int]) -> list[Batch]:
        group, lane = place
        first = (group * self.lanes + lane) * SAMPLES_PER_GROUP
        draws: list[DrawnSample] = []
        drawn = 0
        while drawn < FILLED * GROUP * self.batch_tokens:
            draws.append(self.samples[first + len(draws)])
            drawn += len(draws[-1].sample)
        batches, left_out = share_out(draws, self.batch_tokens, GROUP)
        counts = [self._counts(batch) for batch in batches]
        counts[0] += self._counts(left_out, packed=False)
        return [
            replace(pack([draw.sample for draw in batch], self.batch_tokens), counts_SC=counted)
            for batch, counted in zip(batches, counts, strict=True)
        ]

    def _counts(self, draws: Sequence[DrawnSample], packed: bool = True) -> np.ndarray:
        counts_SC = np.zeros((len(self.samples.sources), len(COUNTS)), dtype=np.int64)
        for draw in draws:
            counts_SC[draw.source] += (1, len(draw.sample), draw.dropped, 0, 0) if packed else (0, 0, 0, 0, 1)
            counts_SC[draw.source, COUNTS.index("too_long")] += draw.too_long
        return counts_SC


def share_out(
    draws: Sequence[DrawnSample], batch_tokens: int, count: int
) -> tuple[list[list[DrawnSample]], list[DrawnSample]]:
    """Shares samples out over `count` batches, longest first; and what found no room.

    Each goes to the batch with most room, which makes the batches alike. Where that leaves any out, as of nothing but
    long samples, each goes to the fullest batch that has room, if that leaves fewer tokens out.
    """
    alike = _share_out(draws, batch_tokens, count, max)
    if not alike[1]:
        return alike
    tight = _share_out(draws, batch_tokens, count, min)
    return min(alike, tight, key=lambda shared: sum(len(draw.sample) for draw in shared[1]))


def _share_out(
    draws: Sequence[DrawnSample],
    batch_tokens: int,
    count: int,
    choose: Callable[[list[tuple[int, int]]], tuple[int, int]],
) -> tuple[list[list[DrawnSample]], list[DrawnSample]]:
    rooms = [batch_tokens] * count
    batches: list[list[DrawnSample]] = [[] for _ in range(count)]
    left_out = []
    for draw in sorted(draws, key=lambda draw: -len(draw.sample)):
        size = len(draw.sample)
        fitting = [(room, -b) for b, room in enumerate(rooms) if room >= size]
        if not fitting:
            left_out.append(draw)
            continue
        b = -choose(fitting)[1]
        batches[b].append(draw)
        rooms[b] -= size
    return batches, left_out


def pack(samples: Sequence[Sample], batch_tokens: int) -> Batch:
    """Samples one after another, padded to `batch_tokens`."""
    ends = np.cumsum([len(sample) for sample in samples])
    room = batch_tokens - int(ends[-1])
    assert room >= 0, (batch_tokens, ends)

    def joined(arrays: Iterable[np.ndarray], fill: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([*arrays, np.full(room, fill)]).astype(np.int64))

    return Batch(
        joined((s.ids_T for s in samples), PAD),
        joined((s.labels_T for s in samples), IGNORE),
        joined((s.positions_T for s in samples), 0),
        torch.from_numpy(ends if room == 0 else np.append(ends, batch_tokens)),
    )


def batches(
    stream: BatchStream, first_step: int, workers: int, process: int = 0, processes: int = 1
) -> Iterator[list[Batch]]:
    """For step `first_step` and each one after it, without end, the batches that this process takes.

    Process p of P takes the lanes from p * lanes / P on: the same batches a step for any number of processes.
    """
    mine = range(stream.lanes // processes * process, stream.lanes // processes * (process + 1))
    first_group = first_step // GROUP
    places = ((group, lane) for group in range(first_group, 2**40) for lane in mine)
    loader = DataLoader(
        _Sender(stream),
        batch_size=None,
        sampler=places,  # type: ignore[arg-type] # any iterable will do
        num_workers=workers,
        worker_init_fn=_be_quiet,
    )
    loaded = iter(loader)
    atexit.register(_end_workers, weakref.ref(loaded))  # where this is held until then
    skipped = first_step % GROUP
    try:
        while True:
            lanes = [_received(next(loaded)) for _ in mine]
            for i in range(skipped, GROUP):
                yield [lane[i] for lane in lanes]
            skipped = 0
    finally:
        _end_workers(weakref.ref(loaded))


def _end_workers(loaded: "weakref.ref[Any]") -> None:
    """For certain. PyTorch asks them through queues, which are gone where this is found by the garbage collector.

    Then it sends SIGTERM, as multiprocessing does at exit, which they ignore; and multiprocessing waits without end.
    """
    if (still := loaded()) is not None and hasattr(still, "_workers"):  # which one without workers lacks
        still._shutdown_workers()
        for worker in still._workers:
            worker.kill()
            worker.join()


def _received(sent: bytes) -> list[Batch]:
    found = pickle.loads(sent)
    if isinstance(found, UserError):
        raise found
    return found


def _be_quiet(_: int) -> None:
    import signal

    torch.set_num_threads(1)
    for name in (signal.SIGINT, signal.SIGTERM):  # the main process's to handle, also where a whole group gets them
        signal.signal(name, signal.SIG_IGN)
    if sys.platform == "linux":  # a killed main process leaves no worker behind
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def pack_in_order(samples: Sequence[Sample], batch_tokens: int) -> list[Batch]:
    """All samples, in as many batches as they need."""
    packed: list[list[Sample]] = [[]]
    room = batch_tokens
    for sample in samples:
        if len(sample) > room:
            packed.append([])
            room = batch_tokens
        packed[-1].append(sample)
        room -= len(sample)
    return [pack(chosen, batch_tokens) for chosen in packed]
