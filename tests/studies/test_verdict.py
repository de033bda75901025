"""Verdicts: right in 19 of 20 cases where nothing differs, and effects that are there are found."""

from collections.abc import Mapping

import numpy as np
import pytest

from arc_solver.studies import verdict
from arc_solver.studies.verdict import Measured, difference, fit_power_law, spread

TASKS, REPETITIONS = 80, 100


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(verdict, "RESAMPLES", 2000)


def trained(rng, seeds, effect=0.0, of_seeds=0.04) -> Measured:
    """A fake trainer: each seed has its luck in all tasks at once, and each task and seed their own besides."""
    hard = np.random.default_rng(0).beta(0.4, 0.8, TASKS)
    tasks = {}
    for seed in range(seeds):
        chances = np.clip(hard + effect + rng.normal(0, of_seeds), 0, 1)
        tasks[seed] = {f"{i:03d}": float(solved) for i, solved in enumerate(rng.random(TASKS) < chances)}
    return Measured(tasks)


def values_alone(values: Mapping[int, float]) -> Measured:
    """Of seeds that were asked different tasks: nothing is known but what each came to."""
    return Measured({seed: {f"of {seed}": value} for seed, value in values.items()})


def verdicts(seeds, effect=0.0, of=lambda measured: measured, **luck) -> list[str]:
    rng = np.random.default_rng(1)
    pairs = [(trained(rng, seeds, effect, **luck), trained(rng, seeds, **luck)) for _ in range(REPETITIONS)]
    return [difference(of(ours), of(first), 1).verdict for ours, first in pairs]


both_ways = pytest.mark.parametrize(
    "of", [lambda measured: measured, lambda measured: values_alone(measured.values)], ids=["tasks", "values"]
)


@both_ways
@pytest.mark.parametrize("of_seeds", [0.0, 0.04])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_arms_that_are_the_same_cannot_be_told_apart(seeds, of_seeds, of):
    """In at least 19 of 20 repetitions, as far as a hundred of them can say."""
    told = sum(verdict != "cannot tell" for verdict in verdicts(seeds, of=of, of_seeds=of_seeds))
    assert told <= 10  # of 100; with a chance of 5% each, more come in 1% of cases


def losses(rng, seeds, effect=0.0, of_seeds=0.02) -> Measured:
    """The same of a loss, in which a seed's luck is that of all tasks, and what each has of its own is small."""
    hard = np.random.default_rng(0).gamma(2.0, 0.3, TASKS)
    made = {seed: hard * (1 + effect) + rng.normal(0, of_seeds) + rng.normal(0, 0.05, TASKS) for seed in range(seeds)}
    tasks = {seed: {f"{i:03d}": float(loss) for i, loss in enumerate(of)} for seed, of in made.items()}
    return Measured(tasks)


@pytest.mark.parametrize("of_seeds", [0.0, 0.01, 0.04])
@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_losses_that_are_the_same_cannot_be_told_apart(seeds, of_seeds):
    rng = np.random.default_rng(7)
    pairs = [(losses(rng, seeds, of_seeds=of_seeds), losses(rng, seeds, of_seeds=of_seeds)) for _ in range(400)]
    assert sum(difference(*pair, -1).verdict != "cannot tell" for pair in pairs) <= 30  # 20 are meant


def test_three_seeds_tell_an_effect_that_differs_from_task_to_task():
    """Most of the luck is that of the tasks then, of which there are many."""
    rng = np.random.default_rng(1)
    pairs = [(losses(rng, 3, 0.1, 0.005), losses(rng, 3, of_seeds=0.005)) for _ in range(REPETITIONS)]
    assert sum(difference(ours, first, -1).verdict == "worse" for ours, first in pairs) >= 90


@both_ways
@pytest.mark.parametrize("effect", [-1, 1])
def test_an_effect_of_twice_the_noise_is_found(effect, of):
    noise = float(np.std([trained(np.random.default_rng(i), 1).mean for i in range(200)]))
    found = verdicts(12, 2 * noise * effect, of=of)
    assert found.count("better" if effect > 0 else "worse") >= 90
    assert found.count("worse" if effect > 0 else "better") == 0


def test_less_is_better_for_a_loss():
    worse, better = values_alone({0: 1.0, 1: 1.1, 2: 1.05}), values_alone({0: 0.5, 1: 0.6, 2: 0.56})
    assert difference(better, worse, -1).verdict == "better"
    assert difference(worse, better, -1).verdict == "worse"
    assert difference(better, worse, 1).verdict == "worse"


def test_seeds_are_paired():
    """What all arms of a seed have in common is no luck of their difference."""
    first = values_alone({seed: float(seed) for seed in range(4)})
    ours = values_alone({seed: seed + 0.1 + 0.001 * (seed % 2) for seed in range(4)})
    found = difference(ours, first, 1)
    assert found.verdict == "better" and found.width < 0.01
    more = values_alone({**ours.values, 9: 100.0})
    assert difference(more, first, 1).value == pytest.approx(found.value)


def choosing(rng, seeds, effect=0.0) -> tuple[Measured, Measured]:
    """Two rules that select among the same candidates, and one that is better at it by `effect`."""
    first, ours = trained(rng, seeds), {}
    for seed, of in first.tasks.items():
        other = rng.random(TASKS) < 0.1
        again = rng.random(TASKS) < np.mean([*of.values()]) + effect / 0.1
        ours[seed] = {i: float(a) if o else x for (i, x), o, a in zip(of.items(), other, again, strict=True)}
    return Measured(ours), first


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_rules_that_select_among_the_same_candidates(seeds):
    """Their seeds have no luck besides that of the tasks: two tell more than one."""
    rng = np.random.default_rng(1)
    same = [difference(*choosing(rng, seeds), 1, shares_luck=True) for _ in range(REPETITIONS)]
    assert sum(of.verdict != "cannot tell" for of in same) <= 10
    assert np.median([of.width for of in same]) < 0.11 / np.sqrt(seeds)
    better = [difference(*choosing(rng, seeds, 0.05), 1, shares_luck=True).verdict for _ in range(REPETITIONS)]
    assert better.count("better") >= (40, 60, 80)[seeds - 1] and "worse" not in better


def test_one_seed_tells_nothing_of_others():
    rng = np.random.default_rng(2)
    ours, first = trained(rng, 1, 0.5), trained(rng, 1)
    found = difference(ours, first, 1)
    assert found.verdict == "cannot tell" and np.isnan(found.low) and found.more_seeds == 1
    assert difference(ours, first, 1, shares_luck=True).verdict == "better"
    assert spread(ours) is None


def test_the_same_results_are_no_difference():
    ours = trained(np.random.default_rng(3), 3)
    found = difference(ours, ours, 1)
    assert (found.value, found.low, found.high, found.verdict, found.more_seeds) == (0, 0, 0, "cannot tell", None)


def test_another_task_in_each_seed_is_luck():
    """No seed's mean differs from the others', and hardly a task's does: the tasks' luck is left all the same."""
    first = Measured({seed: {f"{i}": 0.0 for i in range(100)} for seed in range(3)})
    ours = Measured({seed: {f"{i}": float(i == seed) for i in range(100)} for seed in range(3)})
    found = difference(ours, first, 1)
    assert found.value == pytest.approx(0.01) and found.low < 0.01 < found.high


def test_no_interval_is_narrower_than_that_of_the_tasks():
    """Each seed solves three tasks less than the first, and others each time: that all lose as many is chance."""
    rng = np.random.default_rng(6)
    tables = [rng.permuted(np.repeat([1.0, -1.0, 0.0], [5, 8, 147])[None].repeat(3, 0), axis=1) for _ in range(20)]
    for table_ST in tables:
        ours, first = (
            Measured({seed: {f"{i}": float(x) for i, x in enumerate(of)} for seed, of in enumerate(table)})
            for table in (table_ST, 0 * table_ST)
        )
        found, of_tasks = difference(ours, first, 1), float(table_ST.mean(0).std() / np.sqrt(160))
        assert found.value == pytest.approx(-3 / 160) and found.width > 0.9 * 2 * 1.96 * of_tasks


def test_more_seeds_would_tell_and_they_do():
    """With as many as it says, the difference is told about as often as not."""
    rng = np.random.default_rng(4)

    def drawn(seeds, mean):
        return values_alone({seed: float(value) for seed, value in enumerate(rng.normal(mean, 1.0, seeds))})

    asked = [difference(drawn(4, 1.0), drawn(4, 0.0), 1) for _ in range(60)]
    needed = int(np.median([4 + found.more_seeds for found in asked if found.more_seeds]))
    told = [difference(drawn(needed, 1.0), drawn(needed, 0.0), 1).verdict for _ in range(60)]
    assert needed > 4 and told.count("better") / 60 >= 0.3


def test_too_few_tasks_are_no_matter_of_seeds():
    first = Measured({s: {"a": 1.0, "b": 0.0} for s in range(3)})
    ours = Measured({s: {"a": 0.1, "b": 1.0} for s in range(3)})
    found = difference(ours, first, 1)
    assert found.verdict == "cannot tell" and found.more_seeds is None


def test_a_spread_has_the_interval_of_a_normal_distribution():
    """In 19 of 20 cases the true one lies in it."""
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(300):
        found = spread(values_alone({s: float(v) for s, v in enumerate(rng.normal(3.0, 2.0, 5))}))
        inside += found.low <= 2.0 <= found.high
    assert 0.91 <= inside / 300 <= 0.985


def test_intervals_are_those_of_the_distributions():
    """Known quantiles of t and of chi-square."""
    chances = np.array([0.025, 0.5, 0.975])
    assert verdict._t(chances, 1) == pytest.approx([-12.706, 0, 12.706], rel=1e-3, abs=1e-3)
    assert verdict._t(chances, 4) == pytest.approx([-2.7764, 0, 2.7764], rel=1e-3, abs=1e-3)
    assert verdict._chi(chances, 1) ** 2 == pytest.approx([0.000982, 0.4549, 5.0239], rel=5e-3)
    assert verdict._chi(chances, 5) ** 2 == pytest.approx([0.8312, 4.3515, 12.8325], rel=1e-3)
    two = difference(values_alone({0: -0.9509, 1: -0.7886}), values_alone({0: 0.0, 1: 0.0}), 1)
    assert (two.low, two.high) == pytest.approx((-1.901, 0.161), abs=0.01)


def test_a_power_law_is_found_again():
    xs = [1, 3, 10, 30, 100]
    rng = np.random.default_rng(6)
    points = {x: [0.2 + 1.5 * x**-0.5 + float(rng.normal(0, 0.003)) for _ in range(3)] for x in xs}
    law = fit_power_law(points)
    low, high = law.exponent_interval
    assert low <= 0.5 <= high and high - low < 0.3
    at, below, above = law.ten_times
    assert below <= 0.2 + 1.5 * 1000**-0.5 <= above and at == pytest.approx(law.at(1000))
    assert law.foretold[1] <= law.foretold[3] <= law.foretold[2]
    flat = fit_power_law({x: [0.7] for x in xs})
    assert flat.at(10_000) == pytest.approx(0.7, abs=1e-6)


def test_points_that_follow_no_power_law_have_a_wide_interval():
    """Here the loss falls faster and faster, while seeds hardly differ."""
    points = {x: [4.0 - 0.1 * np.log2(x) ** 2 + luck for luck in (-0.001, 0.001)] for x in (2, 4, 8, 16)}
    law = fit_power_law(points)
    _, below, above = law.ten_times
    assert above - below > 0.2
