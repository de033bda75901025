import math
import time

import pytest

from arc_solver.solving.budget import FIRST_SHARE, LEAST_SHARE, Budget, Work

NOTHING = Work()


def hurried(seconds=100.0, workers=2) -> Budget:
    return Budget(workers, time.monotonic() + seconds)


def measured(budget: Budget) -> Budget:
    """A token of training takes 2 ms, one that is asked 1 ms."""
    budget.record(Work(adapting=5000), 10.0)
    budget.record(Work(asking=1000), 1.0)
    return budget


def test_without_a_deadline_there_is_no_limit():
    budget = measured(Budget(2))
    assert not budget.limited
    assert budget.time_limit_s(Work(adapting=1e12), NOTHING, Work(adapting=1e12), 0.0) == math.inf
    assert budget.is_worthwhile(Work(adapting=1e12), Work(asking=1e12), share=1.0)


def test_what_was_measured_is_what_it_costs():
    budget = measured(hurried())
    assert budget.estimated_s(Work(1000, 100)) == pytest.approx(2.1)
    assert budget.equivalent_tokens(Work(1000, 100)) == pytest.approx(2100)
    budget.record(Work(adapting=5000), 20.0)  # all together count, so one that was slow does not decide
    assert budget.estimated_s(Work(adapting=1000)) == pytest.approx(3.0)
    assert math.isnan(hurried().estimated_s(Work(adapting=1)))


def test_scarce_time_is_shared_in_proportion():
    """400 s of work, and 2 x 100 s to do it in: half of what each wants."""
    budget = measured(hurried())
    waiting = Work(adapting=200_000)
    for tokens in (10_000, 50_000):
        work = Work(adapting=tokens)
        assert budget.time_limit_s(work, NOTHING, waiting, 0.0) == pytest.approx(budget.estimated_s(work) / 2, rel=0.01)
    work = Work(adapting=50_000)
    assert budget.time_limit_s(work, NOTHING, waiting, 60.0) == pytest.approx(35, rel=0.01)  # 140 s are free


def test_a_wrong_estimate_cuts_nothing_where_there_is_time_for_all():
    """Both kinds of work may take many times what they are thought to."""
    budget = measured(hurried(1000.0))
    waiting = Work(adapting=10_000, asking=10_000)  # 30 s of 2000
    assert budget.time_limit_s(Work(adapting=1000), NOTHING, waiting, 0.0) > 20 * budget.estimated_s(
        Work(adapting=1000)
    )
    assert budget.time_limit_s(Work(asking=1000), NOTHING, waiting, 0.0) > 20 * budget.estimated_s(Work(asking=1000))


def test_nobody_has_too_little_or_more_than_there_is():
    budget = measured(hurried())
    work = Work(adapting=45_000)  # 90 s
    assert budget.time_limit_s(work, NOTHING, Work(adapting=1e9), 0.0) == pytest.approx(LEAST_SHARE * 90, rel=0.01)
    assert budget.time_limit_s(work, NOTHING, work, 0.0) == pytest.approx(
        100, rel=0.01
    )  # it wants 90, and may take more
    assert budget.time_limit_s(work, Work(asking=20_000), work, 0.0) == pytest.approx(80, rel=0.01)
    assert measured(hurried(-1.0)).time_limit_s(work, NOTHING, work, 0.0) == 0.0


def test_what_costs_nobody_knows_has_a_fair_share_or_some_time():
    budget = hurried()
    assert budget.time_limit_s(Work(adapting=10), NOTHING, Work(adapting=40), 0.0) == pytest.approx(50, rel=0.01)
    assert budget.time_limit_s(Work(adapting=1), NOTHING, Work(adapting=1e6), 0.0) == pytest.approx(
        100 * FIRST_SHARE, rel=0.01
    )


def test_asking_has_what_it_wants():
    budget = measured(hurried())
    assert 5 < budget.time_limit_s(Work(asking=5000), NOTHING, Work(adapting=1e9), 1e9) < 20
    assert budget.time_limit_s(Work(asking=5e6), NOTHING, NOTHING, 0.0) == pytest.approx(100, rel=0.01)


def test_what_there_is_no_time_to_ask_is_not_adapted_to():
    budget = measured(hurried())
    assert budget.is_worthwhile(Work(adapting=1e9), Work(asking=10_000))
    assert not budget.is_worthwhile(Work(adapting=10), Work(asking=100_000))
    assert budget.is_worthwhile(Work(adapting=30_000), Work(asking=1000), share=1.0)
    assert not budget.is_worthwhile(Work(adapting=60_000), Work(asking=1000), share=1.0)
