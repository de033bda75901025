import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from conftest import grid

from arc_solver.augment import ColourPolicy, random_augmentation
from arc_solver.config import CorpusConfig, FormatConfig, UserError
from arc_solver.corpus import (
    BatchStream,
    SampleStream,
    batches,
    held_out_ids,
    leak_audit,
    pack,
    pair_key,
    re_arc_generators,
    take,
    training_data,
    training_pairs,
)
from arc_solver.encode import IGNORE, INPUT, PAD
from arc_solver.tasks import Pair

CONFIG = CorpusConfig()


def stream(seed: int = 0, **settings) -> SampleStream:
    return SampleStream(CorpusConfig(**settings), FormatConfig(), seed)


def content(samples) -> list[bytes]:
    return [s.ids_T.tobytes() + s.labels_T.tobytes() + s.positions_T.tobytes() for s in samples]


def test_every_training_task_has_a_generator():
    assert set(re_arc_generators()) == set(training_pairs())


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker:UserWarning")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_any_worker_count_gives_the_same_samples():
    first = content(take(stream(), 1000, workers=0))
    assert len(set(first)) > 990
    assert content(take(stream(), 1000, workers=1)) == first
    assert content(take(stream(), 1000, workers=4)) == first
    assert content(take(stream(seed=1), 1000, workers=0)) != first


def test_a_sample_depends_on_seed_and_index_alone():
    """Not on what was asked before, and not on Python's hash seed."""
    code = (
        "from arc_solver.config import *; from arc_solver.corpus import *\n"
        "s = SampleStream(CorpusConfig(), FormatConfig(), 5)\n"
        "print([int(s[i].ids_T.sum()) * len(s[i]) for i in range(30, 60)])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": h},
        ).stdout
        for h in ("1", "2")
    ]
    samples = stream(seed=5)
    backwards = [int(samples[i].ids_T.sum()) * len(samples[i]) for i in reversed(range(30, 60))]
    assert runs[0] == runs[1] == f"{backwards[::-1]}\n"


def test_samples_keep_to_the_limits():
    samples = stream(max_tokens=300, pairs=(2, 4))
    lengths = [len(samples[i]) for i in range(200)]
    assert max(lengths) <= 300
    counts = [int((samples[i].ids_T == INPUT).sum()) for i in range(200)]
    assert set(counts) == {2, 3, 4}
    with pytest.raises(UserError, match="max_tokens=8 is too small"):
        _ = stream(max_tokens=8)[0]


def test_difficulty_sets_the_size():
    small, large = (
        np.mean([len(s) for s in islice(iter(stream(difficulty=d, max_tokens=100_000, arc_training=0)), 100)])
        for d in ((0.0, 0.05), (0.4, 0.6))
    )
    assert large > 2 * small


def test_the_weights_choose_the_source():
    only_arc = stream(re_arc=0, pairs=(9, 9), max_tokens=100_000)
    known = {pair_key(pair) for pairs in training_pairs().values() for pair in pairs}
    rng = np.random.default_rng(0)
    assert all(pair_key(pair) in known for _ in range(30) for pair in only_arc._draw(rng) if pair_key(pair))
    only_re_arc = stream(arc_training=0, pairs=(4, 4), max_tokens=100_000)
    drawn = [pair_key(pair) for _ in range(30) for pair in only_re_arc._draw(rng)]
    assert sum(key in known for key in drawn) < 10


def test_held_out_tasks_are_in_validation_only():
    held_out = held_out_ids(CONFIG)
    assert len(held_out) == CONFIG.holdout_tasks
    train = stream()
    assert not held_out & set(train.ids)
    assert not held_out & set(train.arc)
    validation = SampleStream(CONFIG, FormatConfig(), 0, split="validation")
    assert set(validation.ids) == held_out
    assert len(train.ids) == 400 - CONFIG.holdout_tasks - len(CONFIG.exclude)


def test_batches_hold_whole_samples_and_little_padding():
    samples = stream()
    packed = BatchStream(samples, 8192)
    seen = []
    for batch in (packed[0], packed[7]):
        assert len(batch.ids_T) == len(batch.labels_T) == len(batch.positions_T) == batch.ends_S[-1] == 8192
        assert batch.useful_tokens >= 0.95 * 8192
        starts = [0, *batch.ends_S[:-1].tolist()]
        for start, end in zip(starts, batch.ends_S.tolist(), strict=True):
            assert batch.labels_T[start] == IGNORE
            piece = batch.ids_T[start:end]
            assert piece[0] == (INPUT if (piece != PAD).any() else PAD)
        seen.append(batch.ids_T.tolist())
    assert seen[0][: len(samples[0])] == samples[0].ids_T.tolist()
    assert seen[0] == packed[0].ids_T.tolist()
    assert seen[0] != seen[1]


def test_batches_can_start_anywhere():
    packed = BatchStream(stream(), 4096)
    (third,) = islice(batches(packed, first=3, workers=0), 1)
    assert third.ids_T.tolist() == packed[3].ids_T.tolist()
    with pytest.raises(UserError, match=r"batch_tokens=512"):
        BatchStream(stream(), 512)


def test_pack_fills_with_a_sequence_of_its_own():
    sample = stream()[0]
    batch = pack([sample, sample], 3 * len(sample))
    assert batch.ends_S.tolist() == [len(sample), 2 * len(sample), 3 * len(sample)]
    assert (batch.ids_T[2 * len(sample) :] == PAD).all()
    assert (batch.labels_T[2 * len(sample) :] == IGNORE).all()


def test_pair_key_sees_through_augmentation(rng):
    pair = Pair(grid("0120", "3400"), grid("012"))
    for _ in range(40):
        view = random_augmentation(rng, ColourPolicy(0.0), [pair]).apply_pair(pair)
        assert pair_key(view) == pair_key(pair)
    assert pair_key(Pair(grid("0120", "3400"), grid("010"))) != pair_key(pair)
    assert pair_key(Pair(grid("11"), grid("1"))) is None


def test_leak_audit(arc):
    data = training_data(CONFIG)
    assert leak_audit(data, arc["evaluation"]).passed
    trained = leak_audit(data, arc["training"])
    assert len(trained.by_id) == 400 - len(CONFIG.exclude)
    assert not trained.passed


def test_leak_audit_finds_copies_under_another_id(arc):
    """Without the exclusions, two evaluation tasks turn out to be training tasks under another id."""
    audit = leak_audit(training_data(CorpusConfig(exclude=())), arc["evaluation"])
    assert audit.by_id == ()
    assert audit.by_content == ("070dd51e", "50a16a69")
