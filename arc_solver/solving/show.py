"""`bin/show`: tasks and what was answered to them, as coloured grids in the terminal or in a picture for a README.

    bin/show arc-agi-1/training:007bbfb7 --views 4 --encoded
    bin/show RUN_DIR --ids a,b,c --demonstrations 1 --picture solved.svg
    bin/show SPEC --submission FILE

Nothing is solved, and no model is loaded.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console, RenderableType
from rich.text import Text

from ..answers import Submission, best_file, read_submission, tasks_of_run
from ..command import Parser, add_choice_arguments, task_overrides, user_path
from ..config import Config, TasksConfig, load_config
from ..errors import MachineError, UserError, counted
from ..puzzles import IGNORE, Task, TaskSet, load_tasks
from ..puzzles.pictures import Drawing, needs_numbers, sample_text, save_pictures, task_picture, width_of
from ..puzzles.task_files import choose_tasks
from ..rng import named_rng
from .run_config import saved_config

USUAL = 3  # tasks that are shown if nobody says which


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/show", description="Show tasks and what was answered to them, as coloured grids.")
    parser.add_argument("tasks", metavar="SPEC[:ID] | RUN_DIR[:ID]", help="what --tasks takes, or the folder of a run")
    add_choice_arguments(parser)
    parser.add_argument("--submission", type=user_path, metavar="FILE", help="answers to show beside the solutions")
    parser.add_argument("--views", type=int, default=0, metavar="N", help="also N augmented views, as they are asked")
    parser.add_argument("--encoded", action="store_true", help="also a sample of the adaptation, token by token")
    parser.add_argument("--demonstrations", type=int, metavar="N", help="of each task the first N; default: all")
    parser.add_argument(
        "--numbers",
        action="store_true",
        help="also the number of each cell's colour, as always where a terminal has under 256 colours",
    )
    parser.add_argument("--picture", type=user_path, metavar="FILE", help="write a .png or .svg instead")
    args = parser.parse_args(arguments)
    spec, colon, task_id = args.tasks.rpartition(":")
    if colon and not Path(args.tasks).exists() and args.ids is None:
        args.tasks, args.ids = spec, task_id
    if args.picture and args.picture.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"--picture {args.picture}: give a name that ends in .png or .svg")
    if args.picture and args.encoded:
        raise UserError("--encoded is text for the terminal: leave --picture out")
    if args.views < 0:
        raise UserError(f"--views is at least 0, got {args.views}")
    if (args.demonstrations or 0) < 0:
        raise UserError(f"--demonstrations is at least 0, got {args.demonstrations}")
    config = load_config(None, task_overrides(args)).tasks
    run_dir = Path(config.spec)
    answers: Submission = {}
    settings = Config()  # by which it is asked and adapted to
    if (run_dir / "run.json").is_file():
        if args.submission or args.solutions:
            raise UserError(f"{run_dir} is a run, with answers and solutions of its own: leave the options out")
        settings = saved_config(run_dir)
        task_set, answers = _of_run(run_dir, settings)
    else:
        task_set = load_tasks(TasksConfig(spec=config.spec, solutions=config.solutions))
        if args.submission:
            answers = read_submission(args.submission, task_set.tasks)
    if not (config.ids or config.limit or config.sample):
        config = config.model_copy(update={"limit": USUAL})
    chosen = choose_tasks(task_set, config)
    drawings = {}
    for task in chosen.tasks:
        of_run, solution = answers.get(task.id, ()), chosen.solutions.get(task.id)
        drawings[task] = [
            Drawing(f"task {task.id}", task, of_run, solution, args.demonstrations),
            *_views(task, settings, args.views, args.demonstrations),
        ]
    count, name = counted(len(task_set.tasks), "task"), task_set.name
    said = f"{len(chosen.tasks)} of the {count} of {name}; --ids, --limit and --sample choose others"
    if len(chosen.tasks) == len(task_set.tasks):
        said = f"{count}, all of {name}"
    if args.picture:
        try:
            save_pictures([drawing for some in drawings.values() for drawing in some], args.picture, args.numbers)
        except OSError as error:
            raise MachineError(f"{args.picture} cannot be written: {error.strerror}") from None
        print(f"{args.picture}: {said}")
        return 0
    console = Console()
    numbers = args.numbers or needs_numbers(console)
    if not console.is_terminal:  # a pipe or a file, which is as wide as its text
        console.width = max(console.width, *(width_of(drawing) for some in drawings.values() for drawing in some))
    for task, some in drawings.items():
        for drawing in some:
            console.print(task_picture(drawing, numbers))
        if args.encoded:
            console.print(*_encoded(task, settings), sep="\n")
    print(said)
    return 0


def _views(task: Task, settings: Config, count: int, demonstrations: int | None) -> Iterator[Drawing]:
    """The first views under which a task is asked; the very first is the task as it is."""
    if not count:
        return
    from .predict import views_of

    rng = named_rng(settings.run.seed, task.id, "predict")
    predict = settings.predict.model_copy(update={"views": max(count, settings.predict.views)})
    for i, view in enumerate(views_of(task, predict, rng)[:count], 1):
        title = f"view {i} of task {task.id}: geometry {view.geometry}, colours {' '.join(map(str, view.colours))}"
        yield Drawing(title, view.apply_task(task), demonstrations=demonstrations)


def _encoded(task: Task, settings: Config) -> Iterator[RenderableType]:
    """The first sample that adaptation learns from."""
    from .adapt import held_out_samples

    rng = named_rng(settings.run.seed, task.id, "adapt")
    sample, held_out = next(held_out_samples(task, settings.adapt, settings.format, rng))
    learnt = int((sample.labels_T != IGNORE).sum())
    counts = f"{len(sample)} tokens, {learnt} of them learnt"
    yield Text(f"a sample of the adaptation, demonstration {held_out + 1} held out: {counts}", style="dim")
    yield sample_text(sample)


def _of_run(run_dir: Path, settings: Config) -> tuple[TaskSet, Submission]:
    """The tasks of a run, which is named for them, and the answers to those that it has come to."""
    task_set = replace(tasks_of_run(run_dir, settings.tasks), name=str(run_dir))
    answers = read_submission(run_dir / "submission.json", task_set.tasks)
    return task_set, {task_id: outputs for task_id, outputs in answers.items() if best_file(run_dir, task_id)}
