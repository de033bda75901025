"""`bin/show`: tasks and what was answered to them, as coloured grids in the terminal or in an SVG.

bin/show arc-agi-1/training --ids 007bbfb7
bin/show RUN_DIR --limit 3
bin/show SPEC --submission FILE --svg answers.svg
"""

from pathlib import Path

from rich.console import Console, Group

from ..answers import STAGES, Submission, read_submission, tasks_of_run
from ..command import Parser, add_choice_arguments, task_overrides, user_path
from ..config import TasksConfig, load_config
from ..errors import MachineError, UserError, counted
from ..puzzles import TaskSet, load_tasks
from ..puzzles.pictures import save_picture, task_picture
from ..puzzles.task_files import choose_tasks
from .run_config import saved_config

USUAL = 3  # tasks that are shown if nobody says which


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/show", description="Show tasks and what was answered to them, as coloured grids.")
    parser.add_argument("tasks", metavar="SPEC | RUN_DIR", help="what --tasks takes, or the folder of a run")
    add_choice_arguments(parser)
    parser.add_argument("--submission", type=user_path, metavar="FILE", help="answers to show beside the solutions")
    parser.add_argument("--svg", type=user_path, metavar="FILE", help="write a picture instead")
    args = parser.parse_args(arguments)
    config = load_config(None, task_overrides(args)).tasks
    run_dir = Path(config.spec)
    answers: Submission = {}
    if (run_dir / "run.json").is_file():
        if args.submission or args.solutions:
            raise UserError(f"{run_dir} is a run, with answers and solutions of its own: leave the options out")
        task_set, answers = _of_run(run_dir)
    else:
        task_set = load_tasks(TasksConfig(spec=config.spec, solutions=config.solutions))
        if args.submission:
            answers = read_submission(args.submission, task_set.tasks)
    if not (config.ids or config.limit or config.sample):
        config = config.model_copy(update={"limit": USUAL})
    chosen = choose_tasks(task_set, config)
    shown = Group(
        *(task_picture(task, answers.get(task.id, ()), chosen.solutions.get(task.id), None) for task in chosen.tasks)
    )
    of = f"{counted(len(task_set.tasks), 'task')} of {task_set.name}"
    said = f"{len(chosen.tasks)} of the {of}; --ids, --limit and --sample choose others"
    if args.svg:
        try:
            save_picture(shown, args.svg, task_set.name)
        except OSError as error:
            raise MachineError(f"{args.svg} cannot be written: {error.strerror}") from None
        print(f"{args.svg}: {said}")
    else:
        Console().print(shown)
        print(said)
    return 0


def _of_run(run_dir: Path) -> tuple[TaskSet, Submission]:
    """The tasks of a run, and the answers to those that it has come to."""
    task_set = tasks_of_run(run_dir, saved_config(run_dir).tasks)
    answers = read_submission(run_dir / "submission.json", task_set.tasks)
    return task_set, {i: of for i, of in answers.items() if any((run_dir / at / f"{i}.json").exists() for at in STAGES)}
