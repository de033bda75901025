"""`bin/submit`: from a config to a scored submission on Kaggle, rehearsed offline first."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from ..clock import duration_s
from ..command import Parser, Say, as_called
from ..config import BUNDLED_DIR, Config, TasksConfig, load_config
from ..data import leak_audit, read_training_data
from ..errors import MachineError, UserError, counted
from ..files import lock
from ..puzzles import TaskSet, load_tasks
from ..waiting import Reporter, waiting
from .bundle import Release, build
from .check import Report, check
from .image_env import NEEDED, make_image_env
from .kaggle_client import connect
from .push import PollPolicy, Pusher, State, TimedOut
from .rehearsal import Layout, RehearsalFailed, RehearsalSettings, competition_files, rehearse
from .retry import RetryPolicy

RELEASES = Path("runs/submit")
STEPS = ("build", "check", "dry-run", "push", "submit")
REHEARSED = 240  # tasks: as many as Kaggle's placeholder has
SHOWN = "arc-agi-1/training", "arc-agi-1/evaluation"  # tasks of the rehearsed commit run, and of the scored one
CLOCK = 1 / 240  # of the rehearsed scored run: 12 h become 3 minutes
LEAST_S = 60.0  # of a rehearsed scored run: starting takes some of it, and is not scaled
KAGGLE_GIB = 30.0  # memory of a machine without GPUs or with two T4
UNNAMED_S, UNNAMED_POLLS = 300.0, 60  # in which a ready dataset may yet show its notes: the shorter of the two
FAILED, LATE = 3, 4  # exit codes: a dry run that failed; Kaggle takes longer than we wait


def main(arguments: list[str]) -> int:
    args = _parse(arguments)
    say = Reporter(Console(stderr=args.json), lambda: time.strftime("[%H:%M:%S] "))
    try:
        outcome = _status(args) if args.config == "status" else _steps(args, say)
    except (UserError, MachineError) as error:
        if args.json:
            print(json.dumps({"error": str(error)}))
        if not isinstance(error, RehearsalFailed | TimedOut):
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED if isinstance(error, RehearsalFailed) else LATE
    except KeyboardInterrupt:
        print("interrupted; nothing is lost: give the same command again", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(outcome))
    return 0


def _parse(arguments: list[str]) -> Any:
    parser = Parser(
        prog="bin/submit",
        description="Build what travels to Kaggle, check it, rehearse it offline, push it, enter it. Without a step:"
        " all of that but the last. Instead of a config, the folder of a release goes too: it is not built again then."
        " bin/submit status RUN says how a release stands.",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml | RUN | status")
    parser.add_argument("step", nargs="?", metavar="|".join(STEPS), help="or the folder of a release, after status")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--yes", action="store_true", help="really submit")
    parser.add_argument("--again", action="store_true", help="push: run the notebook once more, though it is there")
    parser.add_argument("--dry-run", action="store_true", help="push, submit: say what would be sent, and send nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object; all else goes to stderr")
    parser.add_argument(
        "--tasks", metavar="SPEC", help="those that the pushed run was shown, to check its output against"
    )
    parser.add_argument(
        "--timeout", type=_seconds, default="14h", metavar="TIME", help="how long to wait for Kaggle; default 14h"
    )
    parser.add_argument(
        "--poll", type=_seconds, default="5s", metavar="TIME", help="between two looks at first; default 5s"
    )
    parser.add_argument("--clock", type=float, default=CLOCK, help="dry-run: what becomes of 12 h; default 1/240")
    parser.add_argument("--rehearse", type=int, default=REHEARSED, metavar="N", help="dry-run: tasks; default 240")
    parser.add_argument(
        "--older-mounts", action="store_true", help="dry-run: folders where Kaggle had them before 2026"
    )
    args = parser.parse_intermixed_args(arguments)
    if not args.config:
        raise UserError("bin/submit needs a config, such as configs/kaggle-cpu.toml; see bin/submit --help")
    if args.step and args.config != "status" and args.step not in STEPS:
        if args.config in STEPS and "=" not in args.step:
            raise UserError(f"the config comes first: bin/submit {args.step} {args.config}")
        if "=" not in args.step:
            raise UserError(f"{args.step} is no step; they are {', '.join(STEPS)}")
        args.overrides, args.step = [args.step, *args.overrides], None
    if not 0 < args.clock <= 1 or args.rehearse < 1:
        raise UserError("--clock is over 0 and at most 1, and --rehearse at least 1")
    return args


def _seconds(text: str) -> float:
    try:
        seconds = duration_s(text)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not seconds:
        raise UserError(f"'{text}' is no time: give more than 0s")
    return seconds


def _steps(args: Any, say: Say) -> dict[str, Any]:
    if (Path(args.config) / "SHA256SUMS").is_file():
        if args.overrides:
            raise UserError(f"{args.config} is built: settings are given with a config file instead")
        release = Release(Path(args.config))
        config = _config_of(release)
    elif Path(args.config).is_dir():
        raise UserError(f"{args.config} is no folder that bin/submit built: give a config file, or runs/submit/NAME")
    else:
        config = load_config(args.config, args.overrides)
        if config.model.quantize:
            raise UserError("model.quantize needs bitsandbytes, which is not among what goes to Kaggle: leave it out")
        release = build(config, RELEASES, say)
    outcome: dict[str, Any] = {"release": str(release.folder), "content": release.content}
    held = lock(release.folder / "lock")
    if not held:
        raise UserError(f"another bin/submit works on {release.folder}: wait for it")
    with held:
        for step in [args.step] if args.step else STEPS[:-1]:
            outcome |= _DO[step](release, config, args, say)
    if not args.step:
        say(as_called(f"nothing was submitted; to enter: bin/submit {release.folder} submit --yes"))
    return outcome


def _config_of(release: Release) -> Config:
    try:
        return Config.model_validate(release.manifest["config"])
    except ValidationError:
        raise UserError(
            f"{release.folder} was built by another version of arc_solver: build it again from its config"
        ) from None


def _check(release: Release, config: Config, args: Any, say: Say) -> dict[str, Any]:
    report = _checked(release, config, say)
    for line in str(report).splitlines():
        say(line)
    return {"check": report.to_json()}


def _checked(release: Release, config: Config, say: Say) -> Report:
    with waiting(say, "checking all files of the release"):
        report = check(release.folder, config)
    if len(report.complaints) == 1:
        raise UserError(report.complaints[0])
    if report.complaints:
        lines = "".join(f"\n  {complaint}" for complaint in report.complaints)
        raise UserError(f"{len(report.complaints)} things are wrong in {release.folder}:{lines}")
    return report


def _rehearse(release: Release, config: Config, args: Any, say: Say) -> dict[str, Any]:
    """Twice, as Kaggle would: at the push, on tasks that are public; and when it is scored, on others."""
    began = time.monotonic()
    _checked(release, config, say)
    if duration_s(config.kaggle.time_budget) * args.clock < LEAST_S:
        raise UserError(f"--clock {args.clock} leaves {config.kaggle.time_budget} under {LEAST_S} s: give a larger one")
    ray = config.run.executor == "ray"
    python, differences = make_image_env(RELEASES / f".image{'-ray' * ray}", say, (*NEEDED, *(("ray",) if ray else ())))
    for line in differences:
        say(f"unlike Kaggle: {line}")
    layout: Layout = "older" if args.older_mounts else "today"
    memory = None if config.kaggle.machine else KAGGLE_GIB
    shown = (
        (RehearsalSettings("commit", layout, 1.0, memory), SHOWN[0]),
        (RehearsalSettings("rerun", layout, args.clock, memory), SHOWN[1]),
    )
    done = {
        terms.mode: _rehearse_once(release, config, python, terms, _some(spec, args.rehearse), say)
        for terms, spec in shown
    }
    say(f"rehearsed in {time.monotonic() - began:.0f} s")
    State(release).update(rehearsal=done)
    return {"rehearsal": done}


def _rehearse_once(
    release: Release, config: Config, python: Path, terms: RehearsalSettings, task_set: TaskSet, say: Say
) -> dict[str, Any]:
    title = "the run at a push" if terms.mode == "commit" else "the scored run"
    competition = release.folder / "rehearsal" / f"{terms.mode}-tasks"
    shutil.rmtree(competition, ignore_errors=True)
    competition_files(competition, task_set)
    count, spec = (
        len(task_set.tasks),
        f"the {counted(len(task_set.tasks), 'task')} of {task_set.name} with the fewest tokens",
    )
    say(f"rehearsing {title}: {spec}")
    ran = rehearse(release.folder, competition, python, release.folder / "rehearsal" / terms.mode, terms, say)
    for line in ran.differences:
        say(f"unlike Kaggle: {line}")
    answered = f"{ran.answered} of {counted(count, 'task')}"
    say(f"{title} took {ran.seconds:.0f} s, answered {answered}, and left {ran.submission}")
    done = {"seconds": round(ran.seconds, 1), "submission": str(ran.submission), "tasks": count}
    done |= {"answered": ran.answered}
    if ran.score:
        trained_on = read_training_data(Path(config.model.path or BUNDLED_DIR))
        audit = str(leak_audit(trained_on, task_set)) if trained_on else "no leak audit: the model does not say"
        solved = f"{ran.score.outputs_solved} of {ran.score.outputs} test outputs solved in this time"
        say(f"{solved}: {spec}, seed {config.run.seed}; {audit}")
        done |= {"score": ran.score.to_json(), "data": task_set.data, "seed": config.run.seed, "audit": audit}
    return done


def _some(spec: str, count: int) -> TaskSet:
    task_set = load_tasks(TasksConfig(spec=spec, limit=count))
    if count > len(task_set.tasks):
        raise UserError(f"--rehearse is at most {len(task_set.tasks)}, as many tasks as {spec} has")
    return task_set


def _push(release: Release, config: Config, args: Any, say: Say) -> dict[str, Any]:
    _checked(release, config, say)
    if not State(release)["rehearsal"]:
        say(as_called(f"this was not rehearsed: bin/submit {release.folder} dry-run tells what would fail at Kaggle"))
    tasks = list(load_tasks(TasksConfig(spec=args.tasks)).tasks) if args.tasks else None
    pusher = _pusher(release, config, args, say)
    pusher.push_datasets()
    pusher.push_notebook(args.again)
    if args.dry_run:
        return {"sent": False}
    pusher.wait_for_run()
    return {"output": str(pusher.fetch(tasks)), **pusher.state.content}


def _submit(release: Release, config: Config, args: Any, say: Say) -> dict[str, Any]:
    found = _pusher(release, config, args, say).submit(args.yes)
    return {"submission": found and asdict(found)}


def _pusher(release: Release, config: Config, args: Any, say: Say) -> Pusher:
    waiting = PollPolicy(args.timeout, args.poll, unnamed_s=min(UNNAMED_S, UNNAMED_POLLS * args.poll))
    kaggle = connect(RetryPolicy(first_wait_s=min(1.0, waiting.first_s), limit_s=min(900.0, waiting.limit_s)), say)
    owner = config.kaggle.owner or kaggle.owner
    if owner != kaggle.owner:
        say(f"signed in as {kaggle.owner}, for {owner}")
    return Pusher(release, kaggle, owner, waiting, say, config.kaggle.public, args.dry_run)


_DO = {"build": lambda *_: {}, "check": _check, "dry-run": _rehearse, "push": _push, "submit": _submit}


def _status(args: Any) -> dict[str, Any]:
    """What is known of a release, without asking Kaggle."""
    folder = Path(args.step or "")
    if not args.step:
        raise UserError("bin/submit status needs the folder of a release, such as runs/submit/NAME")
    if not (folder / "SHA256SUMS").is_file():
        raise UserError(f"{folder} is no folder that bin/submit built: give one such as runs/submit/NAME")
    file = folder / "state.json"
    try:
        known = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise MachineError(
            f"{file} cannot be read ({error}): remove it, and push again; Kaggle is asked first"
        ) from None
    state = {"release": str(folder), "content": Release(folder).content, **known}
    if not args.json:
        for key, value in _told(state):
            print(f"{key}: {value}")
    return state


def _told(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a person wants to know of a release."""
    yield from ((key, state[key]) for key in ("release", "content"))
    for mode, ran in state.get("rehearsal", {"dry run": None}).items():
        said = (
            f"answered {ran['answered']} of {counted(ran['tasks'], 'task')} in {ran['seconds']:.0f} s"
            if ran
            else "not made"
        )
        yield f"rehearsed {mode}" if ran else mode, said
    for ref, dataset in (state.get("datasets") or {}).items():
        yield "dataset", f"{ref} v{dataset['version']}"
    notebook = state.get("notebook")
    yield "notebook", f"{notebook['ref']} v{notebook['version']}" if notebook else "not pushed"
    yield from ((key, state[key]) for key in ("run", "output") if state.get(key))
    if submission := state.get("submission"):
        outcome = submission.get("score") or submission.get("error") or submission.get("status") or "no score yet"
        yield "submission", f"{submission['ref']}: {outcome}"
