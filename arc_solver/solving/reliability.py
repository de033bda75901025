"""How right a run's chances were: `bin/solve --reliability RUN_DIR [...]`, on tasks whose solutions are known."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..answers.chances import COEFFICIENTS, expected_solved, fit_coefficients, reliability
from ..charts import reliability_curve
from ..command import Parser, user_path
from ..errors import UserError, counted
from .journal import TaskStatus
from .status import best_statuses


def answered_tasks(run_dir: Path) -> list[tuple[TaskStatus, bool]]:
    """Of each answered task of a run whose solution is known, how it stands, and whether it is solved.

    Raises:
        UserError: it is no run's folder, or no solution is known.
    """
    task_set, statuses = best_statuses(run_dir)
    if not task_set.solutions:
        raise UserError(
            f"chances are compared with what is solved, and no solution is known to the tasks of {run_dir}"
            f" ({task_set.name}): give a run of tasks with solutions"
        )
    return [(status, all(status.solved)) for status in statuses.values() if status.solved is not None]


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/solve --reliability", description="Show how right predicted chances were.")
    parser.add_argument("--reliability", type=user_path, nargs="+", required=True, metavar="RUN_DIR")
    parser.add_argument(
        "--picture", type=user_path, metavar="FILE", help="draw the curve there, as SVG or PNG by its name"
    )
    parser.add_argument("--fit", action="store_true", help="print what the coefficients would be on these runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(arguments)
    answered = [found for run_dir in args.reliability for found in answered_tasks(run_dir)]
    if not answered:
        raise UserError("none of the tasks with a known solution has an answer yet: wait for the run, or let it go on")
    if args.fit:
        fitted = fit_coefficients([(status.agreement, status.leave_one_out, solved) for status, solved in answered])
        values = [round(value, 2) for value in fitted]
        names = "constant", "agreement", "leave-one-out"
        said = ", ".join(f"{name} {value:g}" for name, value in zip(names, values, strict=True))
        used = ", ".join(f"{value:g}" for value in COEFFICIENTS)
        told = f"{said}: fitted on {counted(len(answered), 'task')}, for COEFFICIENTS in answers/chances.py, now {used}"
        print(json.dumps(dict(zip(names, values, strict=True))) if args.json else told)
        return 0
    judged = [(status.chance, solved) for status, solved in answered]
    bins = reliability(judged)
    number, low, high = expected_solved([chance for chance, _ in judged])
    solved = sum(right for _, right in judged)
    brier = sum((chance - right) ** 2 for chance, right in judged) / len(judged)
    title = (
        f"{counted(len(judged), 'task')}: {number:.0f} expected to be solved ({low:.0f} to {high:.0f}), {solved} are"
    )
    if args.picture:
        try:
            reliability_curve([(x.chance, x.share, x.low, x.high, x.tasks) for x in bins], title, args.picture)
        except (OSError, ValueError) as error:
            raise UserError(f"--picture {args.picture} cannot be written: {error}") from None
    if args.json:
        about = {"tasks": len(judged), "expected": number, "interval_95": [low, high], "solved": solved}
        print(json.dumps({**about, "brier": brier, "bins": [asdict(x) for x in bins]}))
        return 0
    table = Table("predicted chance", "tasks", "solved", "share", "Wilson 95% interval", title=title)
    for x in bins:
        table.add_row(f"{x.chance:.0%}", f"{x.tasks}", f"{x.solved}", f"{x.share:.0%}", f"{x.low:.0%} to {x.high:.0%}")
    Console().print(table)
    Console().print(f"Brier score {brier:.3f}: 0 is best, 0.25 is what a coin has", highlight=False)
    return 0
