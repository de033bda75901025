"""`bin/study`: its words, and what they ask for.

bin/study configs/studies/NAME.toml [--out DIR] [--seeds 3] [--hours 2] [section.key=value ...]
"""

import math
import signal
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..command import Parser, require_new_dir, user_path
from ..errors import MachineError, UserError, counted, few
from ..files import lock, write_json
from ..puzzles import load_tasks, read_object
from ..waiting import IMPORTING_S, LINE_S, Reporter, waiting
from .study import StudyFile, read_study

if TYPE_CHECKING:
    from .schedule import Plan

PAGES = Path("docs/studies")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/study", description="Answer a question by repeated runs, with confidence intervals.")
    parser.add_argument("study", type=user_path, metavar="STUDY.toml", help="such as configs/studies/noise.toml")
    parser.add_argument("--out", type=user_path, metavar="DIR", help="for the runs; default runs/study-NAME")
    parser.add_argument("--seeds", type=int, metavar="N", help="of each arm; default: as the study says")
    parser.add_argument("--hours", type=float, metavar="H", help="of this machine, spent where the interval is widest")
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help="where the runs are done")
    parser.add_argument("--address", help="of a Ray cluster, e.g. auto; default: a Ray of this machine")
    parser.add_argument("--parallel", type=int, metavar="N", help="runs at once; default: one a GPU, else a core")
    parser.add_argument("--resume", action="store_true", help="only if it was begun before; it always goes on")
    parser.add_argument("--page", type=user_path, default=PAGES, metavar="DIR", help=f"for the page; default {PAGES}")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="settings of all arms")
    args = parser.parse_intermixed_args(arguments)
    for name, number in (("--seeds", args.seeds), ("--parallel", args.parallel)):
        if number is not None and number < 1:
            raise UserError(f"{name} is at least 1, got {number}")
    if args.hours is not None and not args.hours > 0:
        raise UserError(f"--hours must be above 0, got {args.hours:g}")
    if args.address and args.executor != "ray":
        raise UserError("--address is for a Ray cluster: give --executor ray")
    given = {"--seeds": args.seeds, "--hours": args.hours}
    options = [word for name, value in given.items() if value is not None for word in (name, f"{value:g}")]
    found = read_study(args.study, args.overrides, args.seeds, options)
    out = args.out or Path("runs") / f"study-{found.name}"
    if args.resume and not (out / "results").is_dir():
        raise UserError(f"{out} holds no study to resume: leave --resume out to begin one")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return _run(found, out, args)


def _run(found: StudyFile, out: Path, args: Namespace) -> int:
    _claim(found, out)
    held = lock(out / "lock")
    if held is None:
        raise MachineError(f"another bin/study works in {out}: wait for it, or give another --out")
    say = Reporter(Console())
    with held:
        with waiting(say, "starting", quiet_s=IMPORTING_S):
            from .page import measured
            from .runs import left_running
            from .schedule import LocalRunner, Plan, RayRunner, run_all

            _require_tasks(found)
            count = args.parallel or 0
            runner = RayRunner(count, args.address) if args.executor == "ray" else LocalRunner(count)
            budget_s = math.inf if args.hours is None else 3600 * args.hours
            plan = Plan(found, out, budget_s, runner.count, runner.threads)
        before, arms = len(plan.results), len(found.study.arms)
        total = before + plan.left if args.hours is None else 0
        of = f" of {total}" if total else ""
        say(f"{counted(arms, 'arm')}; {counted(before, 'run')}{of} done before; {runner.count} at once, in {out}")
        if left := left_running(out):
            say(f"{counted(len(left), 'run')} of an earlier call still going on, and waited for: {few(left, 2)}")
        try:
            with waiting(say, "runs", total, quiet_s=LINE_S) as wait:
                wait.done = before
                for job, result in run_all(plan, runner):
                    wait.done += 1
                    say(f"{job.arm}, seed {job.seed}: {measured(result, found.study)}")
        except KeyboardInterrupt:
            say(f"interrupted; {counted(len(plan.results), 'run')} kept in {out}, and the same command goes on")
            if plan.results:
                _tell(found, plan, out, args.page, say)  # what is known so far
            return 1
        if len(plan.results) == before:
            say(f"nothing was left to do{'' if args.hours is None else f' within {args.hours:g} hours'}")
        _tell(found, plan, out, args.page, say)
    return 0


def _tell(found: StudyFile, plan: "Plan", out: Path, pages: Path, say: Reporter) -> None:
    """Writes the page, and says what it says."""
    from .page import answer, write_page

    outcome = plan.outcome
    try:
        page = write_page(found, outcome, out, pages, plan.spent_s)
    except OSError as error:
        raise MachineError(f"the page cannot be written to {pages} ({error.strerror}): give another --page") from None
    say(answer(outcome).strip("*"))
    say(f"{page}; runs in {out}")


def _claim(found: StudyFile, out: Path) -> None:
    """Makes the folder of a study, or refuses that of another."""
    file = out / "study.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    if not file.exists():
        require_new_dir(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(file, {"name": found.name, "question": found.study.question})
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error.strerror}): give another folder") from None
    elif (name := read_object(file).get("name")) != found.name:
        raise UserError(f"{out} holds the study '{name}': give another --out")
    elif (question := read_object(file).get("question")) != found.study.question:
        raise UserError(f"{out} holds a study of another question ('{question}'): give another --out and --page")


def _require_tasks(found: StudyFile) -> None:
    """Refuses tasks that are not there, whose solutions nobody knows, or that a model which is asked as it is was
    trained on, before anything is done for them."""
    if not found.study.solves:
        return
    from .runs import audit

    configs = [found.config(arm, 0) for arm in found.study.arms]
    for tasks, model in {(config.tasks, config.model) for config in configs}:
        task_set = load_tasks(tasks)
        if not task_set.solutions:
            raise UserError(f"no solution of {tasks.spec} is known: give tasks.solutions, or other tasks")
        if not found.study.train:
            audit(model.model_dump(), task_set, found.study.seen)
