from math import exp, inf

import numpy as np
import pytest
from toys import grid

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.answers.vote import NO_ANSWER, RULES, choose_attempts, rank
from arc_solver.config import VoteConfig
from arc_solver.puzzles.tasks import Pair, Task, same_grid

A, B, C, D = grid("1"), grid("2"), grid("33"), grid("45")
TASK = Task("t", (Pair(A, B),), (A,))  # its demonstration says nothing against any candidate


def config(rule="votes", **priors):
    return VoteConfig(rule=rule, **priors)


def predictions(*candidates, geometries=(0, 0, 0, 0), test=0):
    """Candidates from (grid, views, log-probabilities) or (grid, views, log-probabilities, searched)."""
    return Predictions(
        tuple(geometries),
        tuple(
            Candidate(test, cells, tuple(views), tuple(*searched), tuple(log_probabilities))
            for cells, views, log_probabilities, *searched in candidates
        ),
    )


def order(found, task=TASK, test=0, **settings):
    return [ranked.grid.tolist() for ranked in rank(found, task, test, config(**settings))]


def scores(found, rule):
    return {str(ranked.grid.tolist()): ranked.score for ranked in rank(found, TASK, 0, config(rule))}


def random_predictions(rng, views=6, many=8):
    """Distinct candidates of which some are tied, some were not scored everywhere, and some only searched for."""
    answered = rng.integers(0, many - 2, size=views)
    found = []
    for i in range(many):
        own = [v for v in range(views) if answered[v] == i]
        searched = [v for v in range(views) if rng.random() < 0.3]
        logs = [-float(p) for p in rng.choice([0.1, 0.2, 0.3, 7.0], size=views)]
        skipped = rng.random(views) < 0.2 if i % 3 == 0 else np.zeros(views, dtype=bool)
        kept = [None if skipped[v] and v not in own + searched else logs[v] for v in range(views)]
        found.append((grid(str(i), str(9 - i)), own, kept, searched))
    return predictions(*found, geometries=[v % 3 for v in range(views)])


# ---- known answers -------------------------------------------------------------------------------------------------

# A: 2 views of 4, which are of one geometry. B: 1 view, and a search. C: 1 view. D: found by search alone.
FOUR = predictions(
    (A, [0, 1], [-1, -1, -8, -8]),
    (B, [2], [-2, -2, -1, -2], [0]),
    (C, [3], [-6, -6, -6, -0.5]),
    (D, [], [-2, -2, -2, -3], [1]),
    geometries=[0, 0, 1, 2],
)


def test_votes_by_hand():
    assert scores(FOUR, "votes") == {"[[1]]": (2, -1), "[[2]]": (1, -1), "[[3, 3]]": (1, -0.5), "[[4, 5]]": (0, -2)}
    assert order(FOUR) == [[[1]], [[3, 3]], [[2]], [[4, 5]]]


def test_product_by_hand():
    expected = {"[[2]]": (1, -7), "[[4, 5]]": (1, -9), "[[1]]": (1, -18), "[[3, 3]]": (1, -18.5)}
    assert scores(FOUR, "product") == expected
    assert order(FOUR, rule="product") == [[[2]], [[4, 5]], [[1]], [[3, 3]]]


def test_mean_probability_by_hand():
    means = {i: score[1] for i, score in scores(FOUR, "mean-probability").items()}
    assert means == {
        "[[1]]": pytest.approx((2 * exp(-1) + 2 * exp(-8)) / 4),
        "[[2]]": pytest.approx((3 * exp(-2) + exp(-1)) / 4),
        "[[3, 3]]": pytest.approx((3 * exp(-6) + exp(-0.5)) / 4),
        "[[4, 5]]": pytest.approx((3 * exp(-2) + exp(-3)) / 4),
    }
    assert order(FOUR, rule="mean-probability") == [[[2]], [[1]], [[3, 3]], [[4, 5]]]


def test_hierarchical_by_hand():
    """A has both views of geometry 0, so one share like B and C; their products decide."""
    assert scores(FOUR, "hierarchical") == {
        "[[2]]": (1, -7),
        "[[1]]": (1, -18),
        "[[3, 3]]": (1, -18.5),
        "[[4, 5]]": (0, -9),
    }
    assert order(FOUR, rule="hierarchical") == [[[2]], [[1]], [[3, 3]], [[4, 5]]]
    uneven = predictions((A, [0, 1, 3], [-1] * 4), (B, [2], [-2] * 4), geometries=[0, 0, 0, 1])
    shares = {i: score[0] for i, score in scores(uneven, "hierarchical").items()}
    assert shares == {"[[1]]": pytest.approx(2 / 3 + 1), "[[2]]": pytest.approx(1 / 3)}


def test_probmul_by_hand():
    """3 + log-probability for each view that answered or found it, and the product."""
    assert scores(FOUR, "probmul") == {
        "[[1]]": (2 + 2 - 18,),
        "[[2]]": (2 + 1 - 7,),
        "[[3, 3]]": (2.5 - 18.5,),
        "[[4, 5]]": (1 - 9,),
    }


def test_kgmon_by_hand():
    assert scores(FOUR, "kgmon") == {
        "[[1]]": (2 - 18 / 4,),
        "[[2]]": (2 - 7 / 4,),
        "[[3, 3]]": (1 - 18.5 / 4,),
        "[[4, 5]]": (1 - 9 / 4,),
    }
    both = predictions((A, [0], [-1, -3], [0]), geometries=[0, 0])  # a view that answered and found it counts once
    assert scores(both, "kgmon") == {"[[1]]": (1 - 2,)}
    shares = {"[[1]]": (1 - 4.5,), "[[2]]": (1 - 1.75,), "[[3, 3]]": (1 - 4.625,), "[[4, 5]]": (-2.25,)}
    assert scores(FOUR, "hierarchical-kgmon") == shares


def test_what_was_not_scored_everywhere():
    """It goes behind for the product and the mean; elsewhere a view that is missing counts as the others' mean."""
    found = predictions((A, [0], [-1, None, None]), (B, [1, 2], [-9, -2, -4]), geometries=[0, 1, 2])
    assert scores(found, "product") == {"[[2]]": (1, -15), "[[1]]": (0, -3)}
    assert order(found, rule="product") == order(found, rule="mean-probability") == [[[2]], [[1]]]
    assert scores(found, "probmul") == {"[[1]]": (2 - 3,), "[[2]]": (1 - 1 - 15,)}
    assert scores(found, "kgmon") == {"[[1]]": (1 - 1,), "[[2]]": (2 - 5,)}
    nowhere = predictions((A, [], [None, None]), (B, [], [None, -1e9]), geometries=[0, 0])
    assert all(order(nowhere, rule=rule) == [[[2]], [[1]]] for rule in RULES if rule != "votes")
    assert [r.log_probability for r in rank(nowhere, TASK, 0, config("kgmon"))] == [-2e9, -inf]


def test_hopeless_means_are_told_apart_by_the_product():
    found = predictions((A, [], [-2000, -2000]), (B, [], [-1000, -1000]), geometries=[0, 0])
    assert order(found, rule="mean-probability") == [[[2]], [[1]]]


def test_one_view_that_finds_it_impossible_is_a_veto_where_log_probabilities_are_summed():
    found = predictions((A, [0, 1, 2], [-0.1, -0.1, -0.1, -60]), (B, [3], [-2.5, -2.5, -2.5, -0.1]))
    first = {rule: order(found, rule=rule)[0] for rule in RULES}
    assert [rule for rule in RULES if first[rule] == [[2]]] == ["product", "probmul", "kgmon", "hierarchical-kgmon"]


# ---- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_candidates_does_not_matter(rule, rng):
    for _ in range(10):
        found = random_predictions(rng)
        expected = [(r.grid.tolist(), r.score) for r in rank(found, TASK, 0, config(rule))]
        assert len(expected) == len(found.candidates)
        for _ in range(10):
            shuffled = Predictions(
                found.geometries, tuple(found.candidates[i] for i in rng.permutation(len(found.candidates)))
            )
            assert [(r.grid.tolist(), r.score) for r in rank(shuffled, TASK, 0, config(rule))] == expected


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_views_does_not_matter(rule, rng):
    """Views numbered in another way give the same scores, bit for bit."""
    for _ in range(10):
        found = random_predictions(rng)
        expected = [(r.grid.tolist(), r.score) for r in rank(found, TASK, 0, config(rule))]
        new = [int(v) for v in rng.permutation(len(found.geometries))]  # new[v]: the view that v becomes
        old = np.argsort(new)
        renamed = Predictions(
            tuple(found.geometries[v] for v in old),
            tuple(
                Candidate(
                    c.test,
                    c.grid,
                    tuple(new[v] for v in c.views),
                    tuple(new[v] for v in c.searched),
                    tuple(c.log_probabilities[v] for v in old),
                )
                for c in found.candidates
            ),
        )
        assert [(r.grid.tolist(), r.score) for r in rank(renamed, TASK, 0, config(rule))] == expected


@pytest.mark.parametrize("rule", RULES)
def test_two_attempts_for_every_test_input(rule):
    task = Task("t", TASK.train, (A, A, A))
    found = predictions((A, [0, 1, 2, 3], [-1] * 4)).candidates
    found += predictions((B, [0, 1, 2], [-2] * 4), (C, [3], [-1] * 4), (D, [], [-9] * 4, [0]), test=2).candidates
    answers = choose_attempts(Predictions((0, 0, 0, 0), found), task, config(rule))
    assert [[attempt.tolist() for attempt in both] for both in answers[:2]] == [[[[1]]] * 2, [[[0]]] * 2]
    assert not same_grid(*answers[2])
    assert np.array_equal(NO_ANSWER, [[0]])


@pytest.mark.parametrize("rule", RULES)
def test_exact_ties_are_decided_by_the_grids(rule):
    for cells in ([A, B], [B, A]):
        found = predictions(*((g, [v], [-1, -1]) for v, g in enumerate(cells)), geometries=[0, 1])
        assert order(found, rule=rule) == [[[1]], [[2]]]


@pytest.mark.parametrize("rule", RULES)
def test_saved_candidates_are_judged_alike(rule, rng):
    found = random_predictions(rng)
    again = Predictions.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert order(again, rule=rule) == order(found, rule=rule)


def test_a_grid_that_is_there_twice_is_our_mistake():
    with pytest.raises(AssertionError, match="twice"):
        rank(predictions((A, [0], [-1] * 4), (A, [1], [-1] * 4)), TASK, 0, config())


def test_grids_of_other_shape_with_the_same_cells_are_different():
    found = predictions((grid("11"), [0], [-1] * 4), (grid("1", "1"), [1], [-1] * 4))
    assert len(rank(found, TASK, 0, config())) == 2


# ---- priors --------------------------------------------------------------------------------------------------------

PLAIN, MIXED = grid("55", "55"), grid("12", "34")


def test_one_colour_goes_last_unless_a_demonstration_has_it():
    found = predictions((PLAIN, [0, 1, 2], [-1] * 4), (MIXED, [3], [-1] * 4))
    never = Task("t", (Pair(PLAIN, MIXED), Pair(MIXED, MIXED)), (MIXED,))
    once = Task("t", (Pair(PLAIN, MIXED), Pair(MIXED, grid("22", "22"))), (MIXED,))
    assert order(found, never) == [PLAIN.tolist(), MIXED.tolist()]
    assert order(found, never, monochrome_prior=True) == [MIXED.tolist(), PLAIN.tolist()]
    assert order(found, once, monochrome_prior=True) == [PLAIN.tolist(), MIXED.tolist()]


@pytest.mark.parametrize(
    ("demonstrations", "expected"),
    [
        ([((2, 3), (2, 3)), ((1, 1), (1, 1))], (4, 2)),  # kept
        ([((2, 3), (4, 6)), ((1, 1), (2, 2))], (8, 4)),  # twice the size
        ([((2, 3), (2, 9)), ((1, 2), (1, 6))], (4, 6)),  # three times as wide
        ([((2, 3), (2, 3)), ((1, 1), (2, 2))], None),  # now this, now that
        ([((2, 4), (1, 2)), ((4, 4), (2, 2))], None),  # a half is no such factor
        ([((2, 3), (3, 4)), ((2, 3), (3, 4))], None),
    ],
)
def test_odd_shapes_go_last(demonstrations, expected):
    train = tuple(Pair(np.ones(i, np.uint8), np.ones(o, np.uint8)) for i, o in demonstrations)
    task = Task("t", train, (np.ones((4, 2), np.uint8),))
    shapes = [(1, 1), (4, 2), (8, 4), (4, 6), (2, 1), (2, 4)]  # from most to least voted
    cells = [np.ones(shape, np.uint8) for shape in shapes]
    counts = [range(6 - i) for i in range(6)]
    found = predictions(*((g, views, [-1] * 6) for g, views in zip(cells, counts, strict=True)), geometries=range(6))
    ranked = [r.grid.shape for r in rank(found, task, 0, config(shape_prior=True))]
    assert ranked == ([expected] if expected else []) + [shape for shape in shapes if shape != expected]


@pytest.mark.parametrize("rule", RULES)
def test_priors_only_reorder(rule, rng):
    """All candidates stay, and those that break equally many priors stay in their order."""
    task = Task("t", (Pair(MIXED, MIXED),), (grid("12", "34", "56"),))
    found = [(PLAIN, [0], [-1.0, -2, -3]), (grid("12", "34", "78"), [], [-5.0] * 3), (grid("7"), [1], [-3.0, -1, -2])]
    found += [(grid("11", "11", "11"), [2], [-3.0, -1.5, -0.5]), (MIXED, [], [-1.5, -1, -9])]
    found = predictions(*found, geometries=[0, 0, 1])
    plain = order(found, task, rule=rule)
    both = rank(found, task, 0, config(rule, monochrome_prior=True, shape_prior=True))
    assert [r.broken_priors for r in both] == [0, 1, 1, 2, 2]
    after = [r.grid.tolist() for r in both]
    for count in range(3):
        group = [r.grid.tolist() for r in both if r.broken_priors == count]
        assert group == [cells for cells in plain if cells in group]
    assert sorted(after) == sorted(plain)


def test_priors_hold_for_the_attempts_too():
    """Three candidates, the most voted of a shape that no demonstration has: it is none of the two attempts."""
    task = Task("t", (Pair(MIXED, MIXED),), (MIXED,))
    found = predictions((grid("7"), [0, 1, 2], [-1] * 4), (MIXED, [0], [-1] * 4), (grid("21", "34"), [], [-9] * 4))
    (attempts,) = choose_attempts(found, task, config(shape_prior=True))
    assert [attempt.shape for attempt in attempts] == [MIXED.shape] * 2
