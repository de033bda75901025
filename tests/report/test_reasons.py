"""Why a task was not solved: known cases, each with what makes it one."""

import pytest
from toys import grid

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.config import VoteConfig
from arc_solver.puzzles.tasks import Pair, Task
from arc_solver.report.reasons import KINDS, main_kind, why_not_solved

RIGHT = grid("12", "34")
TASK = Task("t", (Pair(grid("12", "34"), grid("21", "43")),), (grid("21", "43"),))
TWO = Task("u", TASK.train, (grid("21", "43"), grid("11", "22")))
LEARNT = {"steps": 40, "last_loss": 0.2, "ended": "steps", "dropped": 0}


def found(*answers, views=8, **more) -> Predictions:
    """Grids with how many views answered each, in turn, and how probable each is in every view."""
    candidates, at = [], 0
    for cells, votes, score in answers:
        candidates.append(Candidate(0, cells, tuple(range(at, at + votes)), (), (score,) * views))
        at += votes
    return Predictions((0,) * views, tuple(candidates), **more)


def kinds(predictions, adaptation=LEARNT, fallback=None, rule="votes", task=TASK, solution=(RIGHT,), stage="tasks"):
    reasons = why_not_solved(task, solution, predictions, adaptation, fallback, VoteConfig(rule=rule), stage)
    return [reason.kind for reason in reasons], main_kind(reasons), " ".join(reason.says for reason in reasons)


WRONG = [(grid("00", "00"), 4, -1.0), (grid("11", "11"), 2, -2.0)]


def test_a_solved_task_has_none():
    assert kinds(found((RIGHT, 8, -1.0))) == ([], "", "")
    assert kinds(found((grid("00", "00"), 5, -1.0), (RIGHT, 3, -2.0)))[1] == ""


@pytest.mark.parametrize("predictions", [None, Predictions((), ())])
def test_no_answer_is_the_only_reason(predictions):
    assert kinds(predictions)[:2] == (["unanswered"], "unanswered")


def test_what_was_proposed_and_not_selected_says_by_which_rules_it_would_have_been():
    listed, main, says = kinds(found(*WRONG, (RIGHT, 1, -0.5)))
    assert (listed, main) == (["not-selected"], "not-selected")
    assert "proposed by 1 of 8 views, is in place 3 by votes" in says
    assert "by product, mean-probability, probmul, kgmon, hierarchical-kgmon it would be selected" in says
    assert "no other rule would select it" in kinds(found(*WRONG, (RIGHT, 0, -50.0)))[2]


def test_most_views_in_another_shape():
    few = [(grid("00", "00"), 4, -1.0), (grid("12"), 4, -2.0)]
    most = [(grid("00", "00"), 3, -1.0), (grid("12"), 4, -2.0), (grid("123"), 1, -2.0)]
    assert kinds(found(*few))[0] == ["not-proposed"]
    listed, main, says = kinds(found(*most))
    assert (listed, main) == (["wrong-shape", "not-proposed"], "wrong-shape")
    assert "5 of 8 answers had another shape than 2 × 2, most often 1 × 2" in says


@pytest.mark.parametrize(
    ("adaptation", "kind"),
    [
        ({"last_loss": 0.01}, "memorised"),
        ({"ended": "diverged"}, "diverged"),
        ({"ended": "deadline"}, "stopped"),
        ({"dropped": 2}, "no-room"),
    ],
)
def test_what_adaptation_says(adaptation, kind):
    torn = [(grid("00", "00"), 3, -1.0), (grid("11", "11"), 3, -2.0)]
    listed, main, _ = kinds(found(*torn), LEARNT | adaptation)
    assert listed == [kind, "not-proposed"]
    assert main == kind
    assert kinds(found(*torn), None)[0] == ["not-proposed"]


def test_an_answer_of_the_cheap_pass_is_counted_as_one_without_time():
    other_shape = [(grid("12"), 5, -2.0), (grid("123"), 3, -2.0)]
    listed, main, says = kinds(found(*other_shape), None, stage="unadapted")
    assert (listed, main) == (["not-adapted", "wrong-shape", "not-proposed"], "not-adapted")
    assert "no time to adapt to it" in says
    assert kinds(found((RIGHT, 8, -1.0)), None, stage="unadapted")[0] == []


@pytest.mark.parametrize(
    ("first", "last", "steps", "rose"),
    [
        (0.48, 4.16, 240, True),
        (2.0, 3.1, 240, True),
        (2.0, 2.9, 240, False),  # under half as much again
        (0.02, 0.09, 240, False),  # so little is noise
        (0.2, 0.5, 19, False),  # so few steps too
    ],
)
def test_a_loss_that_rose_has_diverged(first, last, steps, rose):
    learnt = LEARNT | {"first_loss": first, "last_loss": last, "steps": steps}
    listed, _, says = kinds(found(*WRONG), learnt)
    assert ("diverged" in listed) == rose
    assert (f"rose from {first:.3f} nats a token over the first tenth of the steps to {last:.3f}" in says) == rose


def test_a_small_loss_of_views_that_agree_is_no_reason():
    assert kinds(found(*WRONG), LEARNT | {"last_loss": 0.01})[0] == ["not-proposed"]


def test_prompts_that_had_no_room_and_fallbacks():
    assert kinds(found(*WRONG, dropped=1))[:2] == (["no-room", "not-proposed"], "no-room")
    assert kinds(found(*WRONG, too_long=2))[0] == ["no-room", "not-proposed"]
    assert kinds(found(*WRONG), None, "unadapted")[:2] == (["fell-back", "not-proposed"], "fell-back")


def test_selection_is_to_blame_only_if_all_outputs_were_proposed():
    proposed = found(*WRONG, (RIGHT, 1, -0.5))
    other = tuple(Candidate(1, c.grid, c.views, (), c.log_probabilities) for c in found(*WRONG).candidates)
    both = Predictions(proposed.geometries, proposed.candidates + other)
    listed, main, says = kinds(both, task=TWO, solution=(RIGHT, grid("99", "99")))
    assert (listed, main) == (["not-selected", "not-proposed"], "not-proposed")
    assert "Test input 1: The right answer, proposed" in says and "Test input 2: The right answer was never" in says


def test_reasons_are_in_the_order_in_which_they_are_counted():
    listed, _, _ = kinds(found(*WRONG, dropped=1), LEARNT | {"ended": "diverged"}, "unadapted")
    assert listed == sorted(listed, key=list(KINDS).index)
