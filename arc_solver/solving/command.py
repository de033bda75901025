"""`bin/solve`: its words, and what they ask for.

They are understood, and the tasks read, before PyTorch is imported, so what is wrong with them is said at once.
"""

import json
import signal
import time
from pathlib import Path

from rich.console import Console

from ..answers import read_submission, revote, tasks_of_run
from ..command import Parser, add_task_arguments, task_overrides, user_path
from ..config import Config, ModelConfig, TasksConfig, load_config
from ..errors import UserError
from ..puzzles import TaskSet, load_tasks
from ..waiting import IMPORTING_S, Reporter, waiting
from .run_config import saved_config

_OF_RUN = ("seed", "time_budget", "submission", "smoke", "executor", "address")  # options that are settings of [run]


def parse(arguments: list[str]) -> tuple[Config, Path | None]:
    """The config that the command line asks for, and the run's folder, if it is named."""
    parser = Parser(
        prog="bin/solve",
        description="Solve ARC tasks and write submission.json. Also: --status, --revote and --reliability RUN_DIR.",
    )
    parser.add_argument("config", nargs="?", help="TOML file; without it, the defaults and the demo set")
    add_task_arguments(parser)
    parser.add_argument(
        "--out",
        type=user_path,
        metavar="RUN_DIR",
        help="a new folder, or that of a run to continue; default runs/<tasks>-<time>",
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--time-budget", metavar="TIME", help="such as 11h30m, 40m or 90s, from start to end")
    parser.add_argument("--submission", metavar="FILE", help="keep the submission up to date there too")
    parser.add_argument("--smoke", type=int, metavar="N", help="solve the N shortest tasks only")
    parser.add_argument("--executor", choices=("processes", "ray", "inprocess"), help="where the workers are")
    parser.add_argument("--address", help="of a Ray cluster, e.g. auto; default: a Ray of this machine")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(arguments)
    overrides = list(args.overrides)
    if args.config and "=" in args.config and not Path(args.config).exists():
        overrides, args.config = [args.config, *overrides], None
    given = {name: getattr(args, name) for name in _OF_RUN}
    overrides += [
        *task_overrides(args),
        *(f"run.{key}={json.dumps(value)}" for key, value in given.items() if value is not None),
    ]
    if args.out and not args.config and (args.out / "run.json").exists():  # to be continued as it was begun
        saved = saved_config(args.out)
        where = [] if args.executor in (None, "ray") else ["run.address="]
        config = with_whole_paths(load_config(args.out / "config.json", ["run.time_budget=", *where, *overrides]))
        _require_weights(args.out, saved.model, config.model)
        return config, args.out
    return with_whole_paths(load_config(args.config, overrides)), args.out


def _require_weights(run_dir: Path, saved: ModelConfig, now: ModelConfig) -> None:
    """Refuses to continue a run whose model or adapter is gone, unless others are asked for, which is refused later."""
    for what, before, path in (("model", saved.path, now.path), ("adapter", saved.adapter, now.adapter)):
        if path and path == before and not Path(path).exists():
            raise UserError(f"the {what} of {run_dir} is no longer at {path}: put it back, or give another --out")


def with_whole_paths(config: Config) -> Config:
    """The config with whole paths, so that a run is continued, and its status read, from any folder."""

    def whole(path: str) -> str:
        in_archive = path and any(parent.is_file() for parent in Path(path).parents)
        is_there = path and (in_archive or Path(path).exists())
        return str(Path(path).absolute()) if is_there else path

    second = Path(config.run.submission)
    if not second.parent.is_dir():
        raise UserError(f"--submission {second}: there is no folder {second.parent}: make it, or give another")
    if config.run.submission and second.is_dir():
        raise UserError(f"--submission {second} is a folder: give a file, such as {second}/submission.json")
    if config.run.submission and second.is_file():
        _require_submission(second)
    run = config.run.model_copy(update={"submission": config.run.submission and str(second.absolute())})
    tasks = config.tasks.model_copy(
        update={"spec": whole(config.tasks.spec), "solutions": whole(config.tasks.solutions)}
    )
    model = config.model.model_copy(update={"path": whole(config.model.path), "adapter": whole(config.model.adapter)})
    return config.model_copy(update={"run": run, "tasks": tasks, "model": model})


def _require_submission(file: Path) -> None:
    """Refuses to write a submission over what is none, such as the tasks."""
    try:
        read_submission(file, None)
    except UserError:
        raise UserError(f"--submission {file} exists and is no submission: give another name") from None


def default_run_dir(task_set: TaskSet) -> Path:
    """runs/<tasks>-<time>, one that does not exist yet."""
    name = f"{Path(task_set.name).stem if Path(task_set.name).exists() else task_set.name.replace('/', '-')}"
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidate, n = stem, 1
    while candidate.exists():
        n += 1
        candidate = stem.with_name(f"{stem.name}-{n}")
    return candidate


def main(arguments: list[str]) -> int:
    if any(word.partition("=")[0] == "--revote" for word in arguments):
        return revote.main(arguments)
    if any(word.partition("=")[0] == "--status" for word in arguments):
        from . import status

        return status.main(arguments)
    if any(word.partition("=")[0] == "--reliability" for word in arguments):
        from . import reliability

        return reliability.main(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config, out = parse(arguments)
    begun = out and (out / "run.json").exists() and saved_config(out).tasks.spec == config.tasks.spec
    task_set = tasks_of_run(out, config.tasks) if out and begun else load_tasks(config.tasks)
    remark = ""
    if out and not out.exists() and config.tasks == TasksConfig():  # as where a run was meant, whose name is mistyped
        remark = f"{out} is new: the demo set is solved there, as no --tasks say otherwise"
    with waiting(Reporter(Console()), "starting", quiet_s=IMPORTING_S):
        from .solve import run

    return run(config, task_set, out or default_run_dir(task_set), remark)
