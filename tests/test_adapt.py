from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import TOY, flip_task
from scipy.stats import chisquare

from arc_solver.adapt import adapt, held_out_samples, planned_steps
from arc_solver.config import AdaptConfig, FormatConfig, named_rng
from arc_solver.encode import IGNORE, INPUT, encode_sample
from arc_solver.model import new_model
from arc_solver.tasks import Pair, Task


def one_sided(count: int) -> Task:
    """Demonstration i is an i+1 by 1 grid, so that it is known again under every augmentation."""
    pairs = tuple(Pair(np.full((i + 1, 1), i, np.uint8), np.full((i + 1, 1), i, np.uint8)) for i in range(count))
    return Task("lengths", pairs, (pairs[0].input,))


def shown(sample) -> list[int]:
    """Which demonstrations of `one_sided` a sample shows, in order."""
    pieces = np.split(sample.ids_T, np.flatnonzero(sample.ids_T == INPUT))[1:]
    return [int((piece < 10).sum()) // 2 - 1 for piece in pieces]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_demonstration_is_held_out_equally_often(count):
    """Chi-square over what is really last in the ids, and over every position before it."""
    config = AdaptConfig()
    samples = list(islice(held_out_samples(one_sided(count), config, FormatConfig(), named_rng(0, "x")), 600))
    orders = [shown(sample) for sample, _ in samples]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert all(order[-1] == held_out for order, (_, held_out) in zip(orders, samples, strict=True))
    for start in range(0, 600, count):  # exactly once in every n samples
        assert sorted(order[-1] for order in orders[start : start + count]) == list(range(count))
    for position in range(count):
        counts = Counter(order[position] for order in orders)
        assert chisquare([counts[i] for i in range(count)]).pvalue > 0.001


def test_the_held_out_output_is_learnt_and_the_first_is_not():
    for sample, held_out in islice(held_out_samples(one_sided(3), AdaptConfig(), FormatConfig(), named_rng(1)), 20):
        learnt = sample.labels_T[sample.labels_T != IGNORE]
        assert sample.labels_T[-1] != IGNORE
        first = shown(sample)[0]
        assert (learnt < 10).sum() == 6 - (first + 1)
        assert held_out != first


def test_a_single_demonstration_is_learnt_without_context():
    task = one_sided(1)
    sample, held_out = next(held_out_samples(task, AdaptConfig(), FormatConfig(), named_rng(0)))
    assert held_out == 0
    assert (sample.labels_T != IGNORE).sum() == 3  # cell, newline, end


def test_long_tasks_lose_demonstrations_but_not_the_held_out_one(rng):
    task = flip_task(rng, demonstrations=5)
    longest = max(len(encode_sample([pair], FormatConfig())) for pair in task.train)
    config = AdaptConfig(max_tokens=2 * longest)
    for sample, _ in islice(held_out_samples(task, config, FormatConfig(), named_rng(0)), 40):
        assert len(sample) <= 2 * longest
        assert sample.labels_T[-1] != IGNORE
    tiny = AdaptConfig(max_tokens=1)  # a pair that is too long by itself stays
    sample, _ = next(held_out_samples(task, tiny, FormatConfig(), named_rng(0)))
    assert (sample.ids_T == INPUT).sum() == 1


def test_the_budget_cuts_steps(rng):
    task = flip_task(rng)
    config = AdaptConfig(steps=50, batch_size=2, budget_tokens=20 * task.tokens)
    assert planned_steps(task, config) == 10
    assert planned_steps(task, config.model_copy(update={"budget_tokens": 1})) == 1
    assert planned_steps(task, config.model_copy(update={"budget_tokens": 10**9})) == 50


def test_adapting_lowers_the_loss_and_leaves_the_base(rng):
    task = flip_task(rng)
    model = new_model(TOY, FormatConfig(), seed=1)
    with torch.no_grad():
        model.lm.lm_head.weight *= 20  # as drawn, a random head could not say anything with certainty
    before = {name: p.clone() for name, p in model.lm.state_dict().items()}
    config = AdaptConfig(rank=4, alpha=8, lr=2e-2, steps=40)
    first, second = (adapt(task, model, config, named_rng(0, "adapt")) for _ in range(2))
    assert first.last_loss < 0.8 * first.first_loss
    assert all(torch.equal(p, before[name]) for name, p in model.lm.state_dict().items())
    for name, (a, b) in first.adapter.weights.items():
        assert torch.equal(a, second.adapter.weights[name][0])
        assert torch.equal(b, second.adapter.weights[name][1])
        assert b.any()
