"""Why a task was not solved, as far as can be told once its solution is known.

Several reasons may hold at once. The first of them, in the order of `KINDS`, is the one that a task is counted by: what
would have helped soonest.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..answers import STAGES, Predictions, choose_attempts, rank
from ..answers.vote import RULES
from ..config import VoteConfig
from ..errors import counted
from ..puzzles import Grid, Task, same_grid

MEMORISED = 0.02  # nats a token, of the last tenth of the steps, up to which the demonstrations are known by heart
DISAGREE = 0.5  # share of the views behind the first attempt, below which they disagree
MOST = 0.5  # share of the views, from which on it is most of them
# A loss has risen if over the last tenth of the steps it is so many times and so many nats above that over the first.
RISE, RISE_NATS = 1.5, 0.1
RISE_STEPS = 20  # at least: of fewer a tenth is a single step, and says little

KINDS = {
    "unanswered": "no answer",
    "fell-back": "fell back to an answer without adaptation",
    "not-selected": "proposed, not selected",
    "not-adapted": "not adapted, no time",
    "diverged": "adaptation diverged",
    "no-room": "prompts lost demonstrations, or had no room for the reply",
    "wrong-shape": "wrong shape in most views",
    "memorised": "demonstrations memorised, views disagree",
    "stopped": "adaptation stopped by the clock",
    "not-proposed": "never proposed",
}


@dataclass(frozen=True)
class Reason:
    kind: str  # a key of `KINDS`
    says: str  # one sentence with the figures


def why_not_solved(
    task: Task,
    solution: Sequence[Grid],
    predictions: Predictions | None,
    adaptation: Mapping[str, Any] | None,
    fallback: str | None,
    vote: VoteConfig,
    stage: str = "tasks",
) -> list[Reason]:
    """The reasons that hold, in the order of `KINDS`; none if the task is solved.

    Args:
        predictions: None: the run has not come to the task.
        adaptation: `Adaptation.to_json`; None: there was none.
        fallback: what the answer is instead of one of the adapted model.
        stage: of `STAGES`, which the answer is of.
    """
    if predictions is None or not predictions.candidates:
        says = "The run has not come to it." if predictions is None else "All tries failed, so there is no answer."
        return [Reason("unanswered", says)]
    attempts = choose_attempts(predictions, task, vote)
    missed = [
        test for test, both in enumerate(attempts) if not any(same_grid(attempt, solution[test]) for attempt in both)
    ]
    if not missed:
        return []
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    if fallback:
        found["fell-back"].append("Adaptation failed, so the model answered as it is.")
    if stage == STAGES[0]:
        found["not-adapted"].append("It has the answer of the cheap pass: so far there was no time to adapt to it.")
    for test in missed:
        of = f"Test input {test + 1}: " if len(task.test) > 1 else ""
        place = _place(predictions, task, test, solution[test], vote)
        if place:
            found["not-selected"].append(of + _not_selected(place, predictions, task, test, solution[test], vote))
        else:
            found["not-proposed"].append(f"{of}The right answer was never proposed, by no view and no search.")
            if says := _wrong_shape(predictions, test, solution[test]):
                found["wrong-shape"].append(of + says)
    if predictions.dropped:
        found["no-room"].append(f"Prompts lost up to {counted(predictions.dropped, 'demonstration')}.")
    if predictions.too_long:
        found["no-room"].append(
            f"{counted(predictions.too_long, 'prompt')} left no room for the largest reply, so replies may be cut."
        )
    if adaptation:
        _judge_adaptation(found, adaptation, _agreement(predictions, task, missed, vote))
    return [Reason(kind, " ".join(says)) for kind, says in found.items() if says]


def main_kind(reasons: Sequence[Reason]) -> str:
    """What a task is counted by; "" if it is solved. Selection alone is to blame only if all outputs were proposed."""
    kinds = [reason.kind for reason in reasons]
    if "not-proposed" in kinds:
        kinds = [kind for kind in kinds if kind != "not-selected"]
    return kinds[0] if kinds else ""


def _judge_adaptation(found: dict[str, list[str]], adaptation: Mapping[str, Any], agreement: float) -> None:
    if adaptation.get("dropped"):
        found["no-room"].append(f"Samples of adaptation lost up to {counted(adaptation['dropped'], 'demonstration')}.")
    loss, ended = adaptation.get("last_loss"), adaptation.get("ended")
    if ended == "diverged":
        found["diverged"].append("The loss was not finite, so the adapter is what it was at the start.")
    elif _has_risen(adaptation):
        found["diverged"].append(
            f"The loss rose from {adaptation['first_loss']:.3f} nats a token over the first tenth of the steps to"
            f" {loss:.3f} over the last."
        )
    elif loss is not None and loss <= MEMORISED and agreement < DISAGREE:
        found["memorised"].append(
            f"The loss fell to {loss:.3f} nats a token, but only {agreement:.0%} of the views agree on the first"
            " attempt."
        )
    if ended == "deadline":
        found["stopped"].append(f"After {counted(adaptation['steps'], 'step')} there was no more time to adapt.")


def _has_risen(adaptation: Mapping[str, Any]) -> bool:
    first, last = adaptation.get("first_loss"), adaptation.get("last_loss")
    if first is None or last is None or adaptation.get("steps", 0) < RISE_STEPS:
        return False
    return bool(last >= RISE * first and last >= first + RISE_NATS)


def _place(predictions: Predictions, task: Task, test: int, right: Grid, vote: VoteConfig) -> int:
    """Where the right answer stands among the candidates, from 1; 0: it is none of them."""
    ranked = rank(predictions, task, test, vote)
    return next((place for place, entry in enumerate(ranked, 1) if same_grid(entry.grid, right)), 0)


def _not_selected(place: int, predictions: Predictions, task: Task, test: int, right: Grid, vote: VoteConfig) -> str:
    (candidate,) = (c for c in predictions.for_test(test) if same_grid(c.grid, right))
    views = counted(len(predictions.geometries), "view")
    by = f"{len(candidate.views)} of {views}" if candidate.views else "a search alone"
    others = [
        rule
        for rule in RULES
        if rule != vote.rule and 0 < _place(predictions, task, test, right, vote.model_copy(update={"rule": rule})) <= 2
    ]
    would = f"by {', '.join(others)} it would be selected" if others else "no other rule would select it"
    return f"The right answer, proposed by {by}, is in place {place} by {vote.rule}; {would}."


def _wrong_shape(predictions: Predictions, test: int, right: Grid) -> str:
    """What is said if most views answered in another shape."""
    shapes = Counter({c.grid.shape: 0 for c in predictions.for_test(test)})
    for c in predictions.for_test(test):
        shapes[c.grid.shape] += len(c.views)
    answers = sum(shapes.values())
    wrong = answers - shapes[right.shape]
    if not answers or wrong <= MOST * answers:
        return ""
    usual = max((shape for shape in shapes if shape != right.shape), key=lambda shape: (shapes[shape], shape))
    return (
        f"{wrong} of {counted(answers, 'answer')} had another shape than {_sides(right.shape)}, most often"
        f" {_sides(usual)}."
    )


def _sides(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _agreement(predictions: Predictions, task: Task, tests: Sequence[int], vote: VoteConfig) -> float:
    """Share of the views that gave the first attempt; of several test inputs, the least."""
    first = [rank(predictions, task, test, vote)[:1] for test in tests]
    views = max(1, len(predictions.geometries))
    return min((entries[0].votes / views if entries else 0.0) for entries in first)
