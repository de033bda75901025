"""`bin/solve --revote`: selects again among the saved candidates of runs, without a model.

    bin/solve --revote RUN_DIR vote.rule=product        # writes RUN_DIR/submission-product.json
    bin/solve --revote RUN_DIR [RUN_DIR ...] --all-rules

The first answers a run's tasks by one rule. The second compares all rules on the tasks of one run or several, each
with "votes": what it wins and loses, with an interval from a paired bootstrap over tasks, since the outputs of one task
stand or fall together. A run may still be going on.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..command import Parser, user_path
from ..config import RULES_OF_FEW_SCORES, Config, TasksConfig, VoteConfig, load_config
from ..errors import UserError, counted
from ..puzzles import NotThere, Task, TaskSet, grid_key, load_tasks, read_json
from ..puzzles.tasks import Solutions
from .candidates import STAGES, Predictions
from .comparison import Outputs, paired_difference
from .submission import Score, Submission, candidate_grids, coverage, score, solved_outputs, write_submission
from .vote import RULES, choose_attempts

BASELINE = "votes"  # what the other rules are compared with


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What a run's folder says about its tasks."""

    run_dir: Path
    config: Config  # its sections tasks and vote alone are the run's
    task_set: TaskSet
    predictions: dict[str, Predictions]  # of the tasks that are done; placeholders have no candidates
    failed: int

    @property
    def partly_scored(self) -> int:
        """Candidates that were scored in some views and not in all."""
        scores = (c.log_probabilities for found in self.predictions.values() for c in found.candidates)
        return sum(None in of and any(p is not None for p in of) for of in scores)

    @property
    def missing(self) -> int:
        """Tasks that the run has not come to."""
        return len(self.task_set.tasks) - len(self.predictions)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_run(run_dir: Path, overrides: Sequence[str] = ()) -> SavedRun:
    """Reads a run's folder and the tasks that its config names.

    Args:
        overrides: `tasks.key=value` and `vote.key=value` words, on top of the run's config.

    Raises:
        UserError: it is no run's folder, a file in it is damaged, or its tasks are not found any more.
    """
    config = settings_of_run(run_dir, overrides)
    given = any(word.startswith(("tasks.spec=", "tasks.solutions=")) for word in overrides)
    task_set = load_tasks(config.tasks) if given else tasks_of_run(run_dir, config.tasks, may_move=True)
    predictions, failed = {}, 0
    for task in task_set.tasks:
        if file := best_file(run_dir, task.id):
            content = read_json(file)
            predictions[task.id] = parse_predictions(content, task, file)
            failed += content.get("fallback") == "placeholder"
    if not predictions:
        raise UserError(
            f"{run_dir} has no candidates yet: none of its {counted(len(task_set.tasks), 'task')} of"
            f" {task_set.name} is done"
        )
    return SavedRun(run_dir, config, task_set, predictions, failed)


def settings_of_run(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """A run's config, of which the sections tasks and vote alone are the run's: so other versions' runs are read too.

    Raises:
        UserError: it is no run's folder, or those sections are of another version.
    """
    if not (run_dir / "config.json").is_file() or not (run_dir / "tasks").is_dir():
        missing = "config.json" if run_dir.is_dir() else "a folder"  # a file is none
        missing = "tasks/" if (run_dir / "config.json").is_file() else missing
        raise UserError(f"{run_dir} is no run of bin/solve, {missing} is missing: give what its --out was")
    # Whether all answers were scored is seen below; that is no reason not to try another rule.
    saved = [*_saved_words(run_dir / "config.json"), "predict.score_all=true"]
    try:
        return load_config(None, [*saved, *overrides])
    except UserError:
        _require_this_version(run_dir, saved)
        raise


def best_file(run_dir: Path, task_id: str) -> Path | None:
    """What a run's best stage so far found for a task; None: it has not come to it."""
    files = [run_dir / stage / f"{task_id}.json" for stage in STAGES]
    return next((file for file in reversed(files) if file.exists()), None)


def tasks_of_run(run_dir: Path, config: TasksConfig, may_move: bool = False) -> TaskSet:
    """The tasks of a run, from where its config says that they are.

    Args:
        may_move: another place may be given for them.

    Raises:
        UserError: they are not there any more, or something in them is bad.
    """
    try:
        return load_tasks(config)
    except NotThere as error:
        word = {"tasks": "tasks.spec=SPEC", "solutions": "tasks.solutions=FILE"}[error.what]
        instead = f", or give {word}, where they are now" if may_move else ""
        raise UserError(
            f"the {error.what} of {run_dir} are no longer at {error.place}: put them back{instead}"
        ) from None


def _require_this_version(run_dir: Path, saved: Sequence[str]) -> None:
    try:
        load_config(None, saved)
    except UserError as error:
        raise UserError(f"{run_dir} was made by another version of arc_solver ({error}): use that one for it") from None


def _saved_words(file: Path) -> list[str]:
    """The run's settings that matter here, as overrides for `load_config`."""
    content = read_json(file)
    try:
        return [
            f"{section}.{key}={json.dumps(value, ensure_ascii=False)}"
            for section in ("tasks", "vote")
            for key, value in content[section].items()
        ]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is no config of a run: its sections tasks and vote are missing") from None


def parse_predictions(content: Any, task: Task, file: Path) -> Predictions:
    """What a task's file holds.

    Raises:
        UserError: it is not what this version writes.
    """
    try:
        if content.get("fallback") not in (None, "unadapted", "placeholder"):
            raise ValueError("fallback is unknown")
        predictions = Predictions.from_json(content)
        if problem := _problem(predictions, task):
            raise ValueError(problem)
        return predictions
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"{file} holds no candidates as this version writes them ({said}): remove it, or solve the task again"
        ) from None


def _problem(predictions: Predictions, task: Task) -> str:
    """What would make nonsense of a vote, or ""."""
    views = range(len(predictions.geometries))
    seen: set[tuple[int, bytes]] = set()
    for candidate in predictions.candidates:
        known = [p for p in candidate.log_probabilities if p is not None]
        key = candidate.test, grid_key(candidate.grid)
        if candidate.test not in range(len(task.test)):
            return f"a candidate answers test input {candidate.test}, and the task has {len(task.test)}"
        if key in seen:
            return "a grid is there twice"
        if len(candidate.log_probabilities) != len(views):
            return f"{len(candidate.log_probabilities)} log-probabilities for {counted(len(views), 'view')}"
        if not all(isinstance(p, int | float) and -math.inf < p < 1e-3 for p in known):
            return "a log-probability is no number up to 0"
        for listed in (candidate.views, candidate.searched):
            if len({*listed}) < len(listed) or not all(v in views for v in listed):
                return f"views {listed}, each at most once, of {len(views)}"
        seen.add(key)
    return ""


# ---- selecting -----------------------------------------------------------------------------------------------------


def select(run: SavedRun, rule: str) -> Submission:
    """The answers to all tasks of a run by a rule, with the priors of its config; placeholders where none are found."""
    nothing, config = Predictions((), ()), run.config.vote.model_copy(update={"rule": rule})
    return {
        task.id: choose_attempts(run.predictions.get(task.id, nothing), task, config) for task in run.task_set.tasks
    }


def revote(run: SavedRun, console: Console) -> Path:
    """Writes the run's submission by its config's rule, and prints what it scores."""
    file = run.run_dir / f"submission-{_name(run.config.vote)}.json"
    submission = select(run, run.config.vote.rule)
    write_submission(submission, file)
    lines = [f"{_name(run.config.vote)}: {file}"]
    if run.missing or run.failed:
        lines.append(
            f"placeholders for {run.missing + run.failed} of {counted(len(run.task_set.tasks), 'task')}:"
            f" {run.missing} not solved yet, {run.failed} failed"
        )
    if run.config.vote.rule not in RULES_OF_FEW_SCORES and (remark := _partly_scored([run])):
        lines.append(remark)
    if solutions := run.task_set.solutions:
        lines.append(f"score:    {_figures(score(submission, solutions))}")
        lines.append(f"coverage: {_figures(coverage(run.predictions, solutions))} have the right answer as a candidate")
        if unknown := len(run.task_set.tasks) - len(solutions):
            lines.append(f"not scored: {counted(unknown, 'task')} without a known solution")
    else:
        lines.append("no score: the solutions are not known")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return file


def _name(config: VoteConfig) -> str:
    """The rule and the priors, as part of a file's name."""
    priors = [key for key, value in config if key != "rule" and value]
    return "+".join([config.rule, *(re.sub("_prior$", "", key) for key in priors)])


def _partly_scored(runs: Sequence[SavedRun]) -> str:
    """What rules that weigh scores must be read with, or ""."""
    candidates = sum(len(found.candidates) for run in runs for found in run.predictions.values())
    if not (partly := sum(run.partly_scored for run in runs)):
        return ""
    return (
        f"{partly} of {counted(candidates, 'candidate')} not scored in all views, as product has no use for it: what"
        " other rules that weigh scores would choose, only a run with predict.score_all=true can tell"
    )


def _figures(result: Score) -> str:
    tasks, outputs = counted(len(result.per_task), "task"), counted(result.outputs, "output")
    return f"{result.tasks_solved} of {tasks}, {result.outputs_solved} of {outputs} ({result.share_of_outputs:.1%})"


# ---- comparing -----------------------------------------------------------------------------------------------------


def compare(runs: Sequence[SavedRun]) -> Table:
    """All rules on the tasks that the runs have solved, as far as their solutions are known.

    Raises:
        UserError: no solution to a run's tasks is known.
    """
    known = [(run, _known_solutions(run)) for run in runs]
    by_rule = {rule: _pool(solved_outputs(select(run, rule), solutions) for run, solutions in known) for rule in RULES}
    covered = _pool(solved_outputs(candidate_grids(run.predictions, solutions), solutions) for run, solutions in known)
    table = Table(title=_title(runs, len(covered)), box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("rule", "tasks", "outputs", "share", f"against {BASELINE}, 95%", "won", "lost", "p"):
        table.add_column(column, no_wrap=True)
    for rule, outputs in by_rule.items():
        table.add_row(rule, *_totals(outputs), *_against(outputs, by_rule[BASELINE]) if rule != BASELINE else ())
    table.add_section()
    table.add_row("coverage", *_totals(covered))
    return table


def _pool(by_run: Iterable[Mapping[str, list[bool]]]) -> Outputs:
    return {(task_id, r): outputs for r, run in enumerate(by_run) for task_id, outputs in run.items()}


def _known_solutions(run: SavedRun) -> Solutions:
    known = {i: run.task_set.solutions[i] for i in run.predictions if i in run.task_set.solutions}
    if not known:
        raise UserError(
            f"rules are compared by what they solve, and no solution is known to the tasks of {run.run_dir}"
            f" ({run.task_set.name}): give tasks.solutions=FILE"
        )
    return known


def _totals(outputs: Outputs) -> tuple[str, str, str]:
    right, count = sum(map(sum, outputs.values())), sum(map(len, outputs.values()))
    return str(sum(map(all, outputs.values()))), str(right), f"{right / count:.1%}"


def _against(ours: Outputs, other: Outputs) -> tuple[str, ...]:
    found = paired_difference(ours, other)
    return str(found), str(found.won), str(found.lost), f"{found.p:.2g}"


def _title(runs: Sequence[SavedRun], tasks: int) -> Text:
    priors = sorted({_name(run.config.vote).partition("+")[2] for run in runs} - {""})
    names = ", ".join(dict.fromkeys(run.task_set.name for run in runs))
    left_out = sum(len(run.task_set.tasks) for run in runs) - tasks
    rest = f"; {left_out} not solved yet or without a known solution" if left_out else ""
    return Text(f"{counted(tasks, 'task')} of {names}{rest}{'; priors: ' + ', '.join(priors) if priors else ''}")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/solve --revote", description="Select again among the saved candidates of runs.")
    parser.add_argument("--revote", nargs="*", default=[], metavar="RUN_DIR", help="folders that bin/solve wrote")
    parser.add_argument("--all-rules", action="store_true", help="compare all rules, as with several runs")
    parser.add_argument("overrides", nargs="*", metavar="vote.key=value", help="or tasks.key=value")
    args = parser.parse_intermixed_args(arguments)
    words = [*args.revote, *args.overrides]
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    for word in overrides:
        if not word.startswith(("vote.", "tasks.")):
            raise UserError(f"'{word}': the candidates of a run are what they are; only vote.* and tasks.* can be set")
    run_dirs = list(dict.fromkeys(user_path(word).resolve() for word in words if word not in overrides))
    if not run_dirs:
        raise UserError("name the folder of a run: bin/solve --revote RUN_DIR")
    compared = len(run_dirs) > 1 or args.all_rules
    if compared and any(word.startswith("vote.rule=") for word in overrides):
        raise UserError("all rules are compared here: leave vote.rule out, or name one run and leave out --all-rules")
    runs = [read_run(run_dir, overrides) for run_dir in run_dirs]
    console = Console()
    if compared:
        console.width = max(console.width, 100)  # a file's is 80, which would cut the figures
        console.print(compare(runs))
        if remark := _partly_scored(runs):
            console.print(remark, soft_wrap=True)
    else:
        revote(runs[0], console)
    return 0
