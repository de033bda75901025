"""Draws, packed batches and the loader, from files that are written here and from the default mixture."""

import gc
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arc_solver.config import CorpusConfig, FormatConfig, SourceConfig
from arc_solver.data.sources import Source, read_source
from arc_solver.data.stream import (
    COUNTS,
    FILLED,
    GROUP,
    SAMPLES_PER_GROUP,
    Batch,
    BatchStream,
    DrawnSample,
    SampleStream,
    batches,
    pack,
    pack_in_order,
    share_out,
)
from arc_solver.errors import UserError
from arc_solver.puzzles.encode import IGNORE, INPUT, NEWLINE, OUTPUT, PAD, Sample

pytestmark = [  # of PyTorch on a machine with few cores, and of Python 3.12 where the tests before have started threads
    pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def write_tasks(file: Path, smallest: int, largest: int, tasks: int = 30) -> Path:
    """Tasks of six pairs of random grids with sides from `smallest` to `largest`."""
    rng = np.random.default_rng(0)

    def rows() -> list[list[int]]:
        return rng.integers(0, 10, size=rng.integers(smallest, largest + 1, size=2)).tolist()

    content = {f"task{t}": [{"input": rows(), "output": rows()} for _ in range(6)] for t in range(tasks)}
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "small.json", 1, 6)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Most have samples of 600 to 1200 tokens."""
    return write_tasks(tmp_path_factory.mktemp("tasks") / "large.json", 6, 14)


@pytest.fixture(scope="module")
def default_mixture() -> list[Source]:
    return [read_source(source) for source in CorpusConfig().sources]


def pairs_of(file: Path, **settings) -> Source:
    return read_source(SourceConfig(kind="pairs", path=str(file), **settings))


@pytest.fixture(scope="module")
def mixture(small: Path, large: Path) -> list[Source]:
    """Both objectives, problem augmentation, and samples that are too long."""
    return [
        pairs_of(small, weight=2.0, imitate=1.0, problem_augmentation=0.5),
        pairs_of(large, weight=1.0, imitate=0.5),
        read_source(SourceConfig(kind="counting", weight=1.0)),
    ]


def stream(sources: Sequence[Source], *names: str | int, seed: int = 0, **settings) -> SampleStream:
    return SampleStream(sources, CorpusConfig(**settings), FormatConfig(), seed, *names)


def seen(draw: DrawnSample) -> tuple:
    sample = draw.sample
    arrays = (sample.ids_T, sample.labels_T, sample.positions_T)
    return (*(array.tobytes() for array in arrays), draw.source, draw.dropped, draw.too_long)


def seen_batch(batch: Batch) -> tuple[bytes, ...]:
    tensors = (batch.ids_T, batch.labels_T, batch.positions_T, batch.ends_S)
    return (*(tensor.numpy().tobytes() for tensor in tensors), batch.counts_SC.tobytes())


def steps(packed: BatchStream, count: int, first: int = 0, workers: int = 0, process: int = 0, processes: int = 1):
    """What one process gets for some steps: a list of batches each."""
    found = islice(batches(packed, first, workers, process, processes), count)
    return [[seen_batch(batch) for batch in lanes] for lanes in found]


def within_chance(hits: int, draws: int, share: float) -> bool:
    """Five standard deviations of a binomial: by chance once in two million."""
    return abs(hits - draws * share) < 5 * (draws * share * (1 - share)) ** 0.5


# ---- draws ---------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_names_and_index_alone(mixture):
    first = [seen(stream(mixture, "train")[i]) for i in range(80)]
    one = stream(mixture, "train")
    assert [seen(one[i]) for i in reversed(range(80))] == first[::-1]
    assert [seen(one[i]) for i in range(0, 80, 7)] == first[::7]
    assert len(set(first)) == 80
    for other in (stream(mixture, "train", seed=1), stream(mixture), stream(mixture, "train", 0)):
        assert not set(first) & {seen(other[i]) for i in range(80)}
    assert seen(one[2**40]) == seen(stream(mixture, "train")[2**40])


def test_a_draw_does_not_depend_on_the_hash_seed(default_mixture):
    code = (
        "from arc_solver.config import *; from arc_solver.data.sources import read_source\n"
        "from arc_solver.data.stream import *\n"
        "mixture = [read_source(source) for source in CorpusConfig().sources]\n"
        "samples = SampleStream(mixture, CorpusConfig(), FormatConfig(), 5)\n"
        "print([int(samples[i].sample.ids_T.sum()) * len(samples[i].sample) for i in range(30, 60)])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=env)
    samples = stream(default_mixture, seed=5)
    assert ran.stdout == f"{[int(samples[i].sample.ids_T.sum()) * len(samples[i].sample) for i in range(30, 60)]}\n"


def test_samples_keep_to_the_limits(small):
    samples = stream([pairs_of(small)], max_tokens=300, pairs=(2, 4))
    drawn = [samples[i] for i in range(300)]
    assert max(len(draw.sample) for draw in drawn) <= 300
    assert {int((draw.sample.ids_T == INPUT).sum()) for draw in drawn} == {2, 3, 4}
    with pytest.raises(UserError, match="max_tokens=8 is too small"):
        _ = stream([pairs_of(small)], max_tokens=8)[0]


def test_a_source_without_tasks_is_refused(small):
    with pytest.raises(UserError, match=r"source 'pairs .*small\.json' has no task left"):
        stream([pairs_of(small).without({f"task{t}" for t in range(30)})])


def pair_starts(sample: Sample) -> list[int]:
    """Where the first, the second ... pair starts; last, the length."""
    return [*np.flatnonzero(sample.ids_T == INPUT).tolist(), len(sample)]


def test_demonstrations_are_dropped_until_it_fits(mixture):
    """Compared with the same draws without a limit: the first pairs of each, as many as fit, but two at least."""
    limit = 500
    limited, free = stream(mixture, max_tokens=limit), stream(mixture, max_tokens=10**6)
    dropped, too_long = 0, 0
    for i in range(400):
        draw, whole = limited[i], free[i]
        starts = pair_starts(whole.sample)
        fewest = min(2, len(starts) - 1)
        if starts[fewest] > limit:
            assert draw.too_long >= 1 and draw.source == whole.source
            too_long += 1
            continue
        kept = len(pair_starts(draw.sample)) - 1
        assert draw.too_long == 0
        assert draw.sample.ids_T.tolist() == whole.sample.ids_T[: starts[kept]].tolist()
        assert draw.dropped == len(starts) - 1 - kept
        assert draw.dropped == 0 or starts[kept + 1] > limit
        dropped += draw.dropped > 0
    assert min(dropped, too_long) > 10


def test_samples_that_are_too_long_are_skipped(mixture):
    limit = 700
    limited, free = stream(mixture, max_tokens=limit, too_long="skip"), stream(mixture, max_tokens=10**6)
    skipped = 0
    for i in range(400):
        draw, whole = limited[i], free[i]
        assert draw.dropped == 0
        if len(whole.sample) <= limit:
            assert seen(draw) == seen(whole)
        else:
            assert draw.too_long >= 1 and draw.source == whole.source
            skipped += 1
    assert skipped > 20


def test_the_weights_hold_where_one_source_has_longer_samples(small, large):
    """What is too long is drawn again from the same source."""
    samples = stream([pairs_of(small), pairs_of(large)], max_tokens=400)
    draws = [samples[i] for i in range(600)]
    assert sum(draw.too_long for draw in draws if draw.source == 1) > 50
    assert 240 < sum(draw.source for draw in draws) < 360


def test_the_weights_choose_the_source(mixture):
    samples = stream(mixture, max_tokens=10**6)
    count = 1500
    drawn = Counter(samples[i].source for i in range(count))
    assert all(within_chance(drawn[s], count, share) for s, share in enumerate((0.5, 0.25, 0.25))), drawn


@pytest.mark.parametrize(("solve", "imitate"), [(1.0, 0.0), (0.0, 2.0), (1.0, 3.0), (5.0, 1.0)])
def test_the_objectives_are_drawn_by_weight(small, solve, imitate):
    samples = stream([pairs_of(small, solve=solve, imitate=imitate)])
    count, imitating = 600, 0
    for i in range(count):
        ids = samples[i].sample.ids_T
        outputs = int((ids == OUTPUT).sum())
        assert outputs in (0, int((ids == INPUT).sum())), "an imitation has no output at all"
        imitating += outputs == 0
    share = imitate / (solve + imitate)
    assert imitating == count * share if share in (0, 1) else within_chance(imitating, count, share)


def last_inputs(samples: SampleStream, count: int) -> Counter[int]:
    """How often the last input of a sample has so many cells."""
    found: Counter[int] = Counter()
    for i in range(count):
        ids = samples[i].sample.ids_T
        start, end = np.flatnonzero(ids == INPUT)[-1], np.flatnonzero(ids == OUTPUT)[-1]
        found[int((ids[start + 1 : end] != NEWLINE).sum())] += 1
    return found


@pytest.mark.parametrize("pairs", [(5, 5), (3, 3), (2, 5)])
def test_every_pair_is_held_out_equally_often(tmp_path, pairs):
    """The test pair too. Pairs are told apart by their inputs' sizes; the bound is chi-square's, p = 0.001."""
    raw = [{"input": [[0] * cells], "output": [[1, 2]]} for cells in range(1, 6)]
    file = tmp_path / "aa.json"
    file.write_text(json.dumps({"train": raw[:4], "test": raw[4:]}))
    samples = stream([read_source(SourceConfig(kind="tasks", path=str(file)))], pairs=pairs)
    count = 1000
    held_out = last_inputs(samples, count)
    assert set(held_out) == {1, 2, 3, 4, 5}
    assert sum((held_out[cells] - count / 5) ** 2 / (count / 5) for cells in range(1, 6)) < 18.47, held_out


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_problem_augmentation_has_its_share(tmp_path, share):
    """Seen by the sizes: borders, upscaling and mirroring change them, in one place; a geometry (1 in 4) does not."""
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps({"aa": [{"input": [[0, 1, 2]] * 3, "output": [[3, 4], [5, 6]]}] * 3}))
    samples = stream([pairs_of(file, problem_augmentation=share)])
    count, changed = 500, 0
    for i in range(count):
        sizes = {(pair.input.shape, pair.output.shape) for pair in samples.draw_pairs(i)[1]}
        assert len(sizes) == 1, "one change for all pairs of a task"
        (size,) = sizes
        assert size[0] == (3, 3) or size[1] == (2, 2), "of its inputs or of its outputs"
        changed += size != ((3, 3), (2, 2))
    assert changed == 0 if share == 0 else within_chance(changed, count, 0.75 * share)


def test_problem_augmentation_0_leaves_a_task_as_it_is(small):
    """Only turned and recoloured: sizes stay, up to a transposition, and so do the numbers of equal colours."""
    raw = json.loads(small.read_text())
    tasks = {task_id: {_signature(p["input"], p["output"]) for p in pairs} for task_id, pairs in raw.items()}
    samples = stream([pairs_of(small)])
    for i in range(200):
        drawn = {_signature(pair.input, pair.output) for pair in samples.draw_pairs(i)[1]}
        assert any(drawn <= own for own in tasks.values())


@pytest.mark.parametrize("kinds", [(), ("geometry",), ("colours",), ("order",), ("geometry", "colours", "order")])
def test_a_sample_is_augmented_by_the_kinds_that_are_asked_for(large, kinds):
    """Of grids so large that none equals another by chance."""
    tasks = {task_id: [_whole(p["input"]) for p in pairs] for task_id, pairs in json.loads(large.read_text()).items()}
    turned = {_whole(grid): _whole(own) for pairs in tasks.values() for own in pairs for grid in _turns(np.array(own))}
    samples = stream([pairs_of(large)], augment=kinds)
    drawn = [[_whole(pair.input) for pair in samples.draw_pairs(i)[1]] for i in range(40)]
    grids = [grid for pairs in drawn for grid in pairs]
    assert all(grid in turned for grid in grids) == ("colours" not in kinds)
    assert all(turned.get(grid) == grid for grid in grids) == (not {"geometry", "colours"} & {*kinds})
    if not {"geometry", "colours"} & {*kinds}:
        places = [[pairs.index(grid) for grid in of] for of in drawn for pairs in tasks.values() if of[0] in pairs]
        assert all(of == sorted(of) for of in places) == ("order" not in kinds)


def _whole(grid) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row)) for row in grid)


def _turns(grid: np.ndarray) -> list[np.ndarray]:
    return [np.rot90(of, quarter) for of in (grid, grid.T) for quarter in range(4)]


def _signature(*grids) -> tuple:
    """What geometries and colour permutations leave alone."""
    cells = [np.array(grid) for grid in grids]
    counts = np.array([np.bincount(grid.ravel(), minlength=10) for grid in cells])
    return tuple(tuple(sorted(grid.shape)) for grid in cells), tuple(sorted(zip(*counts.tolist(), strict=True)))


# ---- packing -------------------------------------------------------------------------------------------------------


def draws_of(lengths: Iterable[int]) -> list[DrawnSample]:
    return [DrawnSample(Sample(*np.zeros((3, length), dtype=np.uint8))) for length in lengths]


@pytest.mark.parametrize(("shortest", "longest"), [(1, 30), (20, 100), (60, 100), (100, 100), (1, 100)])
def test_sharing_out(shortest, longest, rng):
    for count in (1, 5, 16):
        draws = draws_of(rng.integers(shortest, longest + 1, size=2 * count + 3))
        shared, left_out = share_out(draws, 100, count)
        assert len(shared) == count
        assert Counter(map(id, [*chain(*shared), *left_out])) == Counter(map(id, draws))
        sums = [sum(len(draw.sample) for draw in batch) for batch in shared]
        assert max(sums) <= 100
        assert all(len(draw.sample) > 100 - total for draw in left_out for total in sums), "there was no room"
        assert left_out or max(sums) - min(sums) <= longest, "batches are alike"


def test_pack_spelt_out():
    first = Sample(np.array([11, 1, 10]), np.array([IGNORE, 1, 10]), np.array([0, 1, 32]))
    second = Sample(np.array([12, 2]), np.array([IGNORE, 2]), np.array([1024, 1025]))
    batch = pack([first, second], 8)
    assert batch.ids_T.tolist() == [11, 1, 10, 12, 2, PAD, PAD, PAD]
    assert batch.labels_T.tolist() == [IGNORE, 1, 10, IGNORE, 2, IGNORE, IGNORE, IGNORE]
    assert batch.positions_T.tolist() == [0, 1, 32, 1024, 1025, 0, 0, 0]
    assert batch.ends_S.tolist() == [3, 5, 8], "padding is a sequence of its own"
    assert (batch.useful_tokens, batch.target_tokens) == (5, 3)
    full = pack([first, second], 5)
    assert full.ends_S.tolist() == [3, 5]
    assert {tensor.dtype for b in (batch, full) for tensor in (b.ids_T, b.labels_T, b.positions_T, b.ends_S)} == {
        full.ids_T.dtype
    }
    with pytest.raises(AssertionError):
        pack([first, second], 4)


def test_pack_in_order_keeps_all_samples_in_order(mixture):
    samples = [stream(mixture)[i].sample for i in range(30)]
    packed = pack_in_order(samples, 2048)
    assert [ids for batch in packed for ids in batch.ids_T.tolist() if ids != PAD] == [
        int(i) for sample in samples for i in sample.ids_T
    ]
    assert {len(batch.ids_T) for batch in packed} == {2048}
    assert sum(batch.target_tokens for batch in packed) == sum(int((s.labels_T != IGNORE).sum()) for s in samples)


def pieces(batch: Batch) -> list[tuple[bytes, bytes, bytes]]:
    """The samples of a batch as they would be alone."""
    starts = [0, *batch.ends_S[:-1].tolist()]
    parts = [slice(start, end) for start, end in zip(starts, batch.ends_S.tolist(), strict=True)]
    return [
        (
            batch.ids_T[part].numpy().astype(np.uint8).tobytes(),
            batch.labels_T[part].numpy().astype(np.int16).tobytes(),
            batch.positions_T[part].numpy().astype(np.int32).tobytes(),
        )
        for part in parts
        if (batch.ids_T[part] != PAD).any()
    ]


def group_draws(packed: BatchStream, group: int, lane: int) -> list[DrawnSample]:
    """What a group is made of, drawn once more: as many as fill 97% of it."""
    first = (group * packed.lanes + lane) * SAMPLES_PER_GROUP
    draws: list[DrawnSample] = []
    while sum(len(draw.sample) for draw in draws) < FILLED * GROUP * packed.batch_tokens:
        draws.append(packed.samples[first + len(draws)])
    return draws


def recount(packed: BatchStream, group: int, lane: int) -> tuple[np.ndarray, list[Batch]]:
    """Counts by hand, from what the batches hold and from what was drawn for them; and the batches."""
    draws = group_draws(packed, group, lane)
    held = Counter(piece for batch in packed[group, lane] for piece in pieces(batch))
    counts = np.zeros((len(packed.samples.sources), len(COUNTS)), dtype=int)
    for draw in draws:
        key = seen(draw)[:3]
        found = held[key] > 0
        held[key] -= found
        row = (1, len(draw.sample), draw.dropped, 0, 0) if found else (0, 0, 0, 0, 1)
        counts[draw.source] += row
        counts[draw.source, COUNTS.index("too_long")] += draw.too_long
    assert held.total() == 0, "a batch holds what was not drawn"
    return counts, packed[group, lane]


@pytest.mark.parametrize("too_long", ["drop", "skip"])
def test_counts_are_what_a_recount_finds(mixture, too_long):
    packed = BatchStream(stream(mixture, max_tokens=500, too_long=too_long), 4096, lanes=2)
    total = np.zeros((3, len(COUNTS)), dtype=int)
    for group, lane in ((0, 0), (0, 1), (3, 1)):
        counts, found = recount(packed, group, lane)
        assert sum(batch.counts_SC for batch in found).tolist() == counts.tolist()
        for batch in found:
            assert int(batch.counts_SC[:, COUNTS.index("tokens")].sum()) == batch.useful_tokens
            assert int(batch.counts_SC[:, COUNTS.index("samples")].sum()) == len(pieces(batch))
        total += counts
    happened = dict(zip(COUNTS, total.sum(axis=0).tolist(), strict=True))
    assert happened["too_long"] > 10
    assert (happened["demonstrations_dropped"] > 10) == (too_long == "drop")


def test_what_finds_no_room_is_counted(large):
    packed = BatchStream(stream([pairs_of(large)], max_tokens=1024), 1024)
    counts, found = recount(packed, 0, 0)
    told = dict(zip(COUNTS, sum(batch.counts_SC for batch in found)[0].tolist(), strict=True))
    assert told["left_out"] == counts[0, COUNTS.index("left_out")] > 0
    assert told["samples"] + told["left_out"] == len(group_draws(packed, 0, 0))


def test_what_was_too_long_is_counted_wherever_it_came(large):
    packed = BatchStream(stream([pairs_of(large)], max_tokens=500), 500)
    for group in range(3):
        counts, found = recount(packed, group, 0)
        assert counts[0, COUNTS.index("left_out")] > 0
        assert sum(batch.counts_SC for batch in found).tolist() == counts.tolist()


def filled(packed: BatchStream, groups: int) -> list[float]:
    """Share of useful tokens in each batch."""
    return [batch.useful_tokens / packed.batch_tokens for g in range(groups) for batch in packed[g, 0]]


@pytest.mark.parametrize("batch_tokens", [8192, 4096])
def test_over_95_percent_of_the_tokens_are_useful(default_mixture, batch_tokens):
    """With the default config, and where the longest sample takes a quarter of a batch."""
    shares = filled(BatchStream(stream(default_mixture), batch_tokens), 2)
    assert np.mean(shares) >= 0.95
    assert min(shares) >= 0.9, "no batch is much emptier"


def test_batches_shorter_than_a_sample_are_refused(small):
    with pytest.raises(UserError, match=r"batch_tokens=512 must be at least corpus\.max_tokens=1024"):
        BatchStream(stream([pairs_of(small)]), 512)


# ---- the loader ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(mixture: list[Source]) -> BatchStream:
    return BatchStream(stream(mixture, max_tokens=512), 1024, lanes=4)


@pytest.fixture(scope="module")
def first_steps(packed: BatchStream):
    """48 steps of four batches, in one process and without workers."""
    return steps(packed, 48)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(packed, first_steps, workers):
    assert steps(packed, 40, workers=workers) == first_steps[:40]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_same_batches(packed, first_steps, processes):
    shares = [steps(packed, 40, process=p, processes=processes) for p in range(processes)]
    together = [list(chain(*(share[k] for share in shares))) for k in range(40)]
    assert together == first_steps[:40]
    assert {len(lanes) for share in shares for lanes in share} == {4 // processes}


def test_no_sample_comes_twice(packed):
    """Over all steps and lanes, so over all processes."""
    places = [(group, lane) for group in range(3) for lane in range(4)]
    samples = [piece for place in places for batch in packed[place] for piece in pieces(batch)]
    assert len(set(samples)) == len(samples) > 400


@pytest.mark.parametrize("first", [1, 15, 16, 17, 37])
def test_batches_can_start_at_any_step(packed, first_steps, first):
    assert steps(packed, 48 - first, first) == first_steps[first:]


def test_a_resumed_process_with_workers_gets_its_share(packed, first_steps):
    resumed = steps(packed, 20, first=21, workers=2, process=1, processes=2)
    assert resumed == [lanes[2:] for lanes in first_steps[21:41]]


def test_what_a_worker_refuses_is_one_sentence(small):
    packed = BatchStream(stream([pairs_of(small)], max_tokens=8), 64)
    with pytest.raises(UserError, match=r"^corpus\.max_tokens=8 is too small.*$") as caught:
        steps(packed, 1, workers=1)
    assert "\n" not in str(caught.value)


def test_a_process_ends_though_its_loader_is_still_held():
    """As a traceback may hold it. Workers ignore the SIGTERM that multiprocessing ends what is left with."""
    code = (
        "import multiprocessing, sys; from arc_solver.config import *\n"
        "from arc_solver.data.sources import read_source; from arc_solver.data.stream import *\n"
        "counting = read_source(SourceConfig(kind='counting'))\n"
        "packed = BatchStream(SampleStream([counting], CorpusConfig(), FormatConfig(), 0), 2048)\n"
        "sys.held = batches(packed, 0, workers=2)\n"
        "next(sys.held)\n"
        "print(len(multiprocessing.active_children()))"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "2\n", "")


def test_a_loader_that_the_garbage_collector_finds_leaves_no_worker(packed, monkeypatch):
    """As in a traceback that refers to itself: by then its queues are gone."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds that PyTorch waits for each
    source = batches(packed, 0, workers=2)
    next(source)
    assert len(multiprocessing.active_children()) == 2
    cycle: list[Any] = [source]
    cycle.append(cycle)
    del source, cycle
    gc.collect()
    assert not multiprocessing.active_children()


def fork_workers() -> None:
    multiprocessing.set_start_method("fork", force=True)


def in_a_process_of_its_own(function: Callable[..., Any], *args: Any) -> Any:
    """This one has loaded who knows what. Its workers are forked, as those of a training run on Linux are."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=fork_workers) as pool:
        return pool.submit(function, *args).result()


def resident_mib() -> float:
    """Memory of this process and its children; what they share is counted once. As Linux sees it."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert children, "no workers"
    total = 0
    for pid in ("self", *children):
        (line,) = (s for s in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if s.startswith("Pss:"))
        total += int(line.split()[1])
    return total / 1024


def memory_at(milestones: Sequence[int], file: Path) -> list[float]:
    """Memory, in MiB, when a loader with two workers has made so many batches."""
    source = batches(BatchStream(stream([pairs_of(file)], pairs=(2, 3)), 1024), 0, 2)
    found, done = [], 0
    for milestone in milestones:
        next(islice(source, milestone - done - 1, None))
        done = milestone
        found.append(resident_mib())
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_10000_batches(large):
    early, late = in_a_process_of_its_own(memory_at, (2_000, 10_000), large)
    assert late < 2048
    assert late - early < 100


def lanes_with_few_files(file: Path) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    source = batches(BatchStream(stream([pairs_of(file)]), 1024, lanes=16), 0, 2)
    return sum(len(lanes) for lanes in islice(source, 40))


def test_many_lanes_do_with_1024_open_files(small):
    """What Linux allows a process unless it is told otherwise."""
    assert in_a_process_of_its_own(lanes_with_few_files, small) == 40 * 16
