"""`bin/study`: its words, and what they ask for.

bin/study configs/studies/NAME.toml [--out DIR] [--seeds 3] [--hours 2] [section.key=value ...]
"""

import math
import signal
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryFile
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
    if args.hours is not None and not 0 < args.hours < math.inf:
        raise UserError(f"--hours must be above 0, and finite, got {args.hours:g}")
    if args.hours and args.seeds:
        raise UserError("--hours gives seeds to the arms of which least is known: leave it or --seeds out")
    if args.address and args.executor != "ray":
        raise UserError("--address is for a Ray cluster: give --executor ray")
    found = read_study(args.study, args.overrides, args.seeds, args.hours)
    out = args.out or Path("runs") / f"study-{found.name}"
    if args.resume and not (out / "results").is_dir():
        raise UserError(f"{out} holds no study to resume: leave --resume out to begin one")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return _run(found, out, args)


def _run(found: StudyFile, out: Path, args: Namespace) -> int:
    _require_page(found, args.page)
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
            _require_different(found, out)
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
        failed: list[MachineError] = []
        try:
            with waiting(say, "runs", total, quiet_s=LINE_S) as wait:
                wait.done = before
                wait.expect_end_in(plan.left_s)
                for job, result in run_all(plan, runner):
                    wait.expect_end_in(plan.left_s)
                    if isinstance(result, MachineError):
                        failed.append(result)
                        say(f"failed, and other arms go on: {result}")
                        continue
                    wait.done += 1
                    say(f"{job.arm}, seed {job.seed}: {measured(result, found.study)}")
        except KeyboardInterrupt:
            say(f"interrupted; {counted(len(plan.results), 'run')} kept in {out}, and the same command goes on")
            if plan.results:
                _tell(found, plan, out, args.page, say)  # what is known so far
            return 1
        if len(plan.results) == before and not failed:
            say(f"nothing was left to do{'' if args.hours is None else f' within {args.hours:g} hours'}")
        _tell(found, plan, out, args.page, say, is_whole=True)
        if failed:
            more = f" (and {len(failed) - 1} more failed)" if len(failed) > 1 else ""
            raise MachineError(f"{failed[0]}{more}; the same command tries it again")
    return 0


def _tell(found: StudyFile, plan: "Plan", out: Path, pages: Path, say: Reporter, is_whole: bool = False) -> None:
    """Writes the page, and says what it says."""
    from .page import History, answer, runs_of_page, write_page

    outcome, file = plan.outcome, page_file(found, pages)
    kept = read_object(out / "study.json")
    read_with = kept.get("read_with", [])
    if is_whole and (seeds := len(outcome.by_arm.get(outcome.first.name, ()))) and seeds not in read_with:
        read_with = [*read_with, seeds]
        write_json(out / "study.json", {**kept, "read_with": read_with})
    say(answer(outcome).strip("*"))
    if (more := runs_of_page(file)) > len(plan.results):
        say(f"{file} is of {counted(more, 'run')}, and was left as it is: --page DIR takes this one; runs in {out}")
        return
    try:
        write_page(found, outcome, out, file, History(kept["hypothesis"], read_with, plan.spent_s))
    except OSError as error:
        raise MachineError(f"the page cannot be written to {pages} ({error.strerror}): give another --page") from None
    if kept["hypothesis"] != found.study.hypothesis:
        say(f"{found.file} has another hypothesis by now: the page has the one from before the first run")
    say(f"{file}; runs in {out}")


def page_file(found: StudyFile, pages: Path) -> Path:
    return pages / f"{found.name}.md"


def _require_page(found: StudyFile, pages: Path) -> None:
    """Refuses a place where no page can be written, or where something else would be lost, before anything is done."""
    file = page_file(found, pages)
    try:
        pages.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=pages):  # root may write by the bits of any folder, and cannot in all of them
            pass
        begins = file.read_text(errors="replace").partition("\n")[0] if file.exists() else None
    except OSError as error:
        raise UserError(f"the page cannot be written to {pages} ({error.strerror}): give another --page") from None
    if begins is not None and begins != f"# {found.study.question}":
        raise UserError(
            f"{file} is no page of this question: give another --page, or rename {found.file.name}, whose name it has"
        )


def _claim(found: StudyFile, out: Path) -> None:
    """Makes the folder of a study, or refuses that of another."""
    file = out / "study.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    if not file.exists():
        file.with_name(f"{file.name}.part").unlink(missing_ok=True)  # a call that was killed as it wrote it
        require_new_dir(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            asked = {"name": found.name, "question": found.study.question, "hypothesis": found.study.hypothesis}
            write_json(file, asked)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error.strerror}): give another folder") from None
        return
    if not (kept := read_object(file)):
        raise UserError(f"{file} is damaged: delete it if {out} holds the runs of this study, or give another --out")
    if (name := kept.get("name")) != found.name:
        raise UserError(f"{out} holds the study '{name}': give another --out")
    if (question := kept.get("question")) != found.study.question:
        raise UserError(f"{out} holds a study of another question ('{question}'): give another --out and --page")
    if "hypothesis" not in kept or not any((out / "results").glob("*.json")):
        write_json(file, {**kept, "hypothesis": found.study.hypothesis})


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


def _require_different(found: StudyFile, out: Path) -> None:
    """Refuses two arms that come to the same runs, whose difference is nothing by themselves."""
    from .runs import make_job

    names: dict[str, str] = {}
    for arm in found.study.arms if found.study.kind != "spread" else ():
        other = names.setdefault(make_job(found, out, arm, 0).key, arm.name)
        if other != arm.name:
            raise UserError(
                f"arms '{other}' and '{arm.name}' come to the same runs: change a setting that they depend on, or give"
                " one of them again = true, to do it anew"
            )
