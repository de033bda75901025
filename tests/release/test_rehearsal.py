"""A notebook sees what Kaggle would show it and nothing else, leaves nothing behind, and fails for known reasons."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import arc_solver.release.image_env
from arc_solver.config import PACKAGE_DIR, TasksConfig
from arc_solver.errors import MachineError, UserError
from arc_solver.puzzles.task_files import load_tasks, read_file
from arc_solver.puzzles.tasks import TaskSet, same_grid
from arc_solver.release.image_env import make_image_env
from arc_solver.release.rehearsal import (
    CHALLENGES,
    SOLUTIONS,
    Layout,
    Mode,
    Rehearsal,
    RehearsalFailed,
    RehearsalSettings,
    competition_files,
    rehearse,
)
from arc_solver.release.sandbox import USER_NAMESPACE, _wait_for, namespaces
from arc_solver.waiting import Wait

IMAGE = ("nbclient==0.10.2", "packaging==25.0")
ANSWER = """
import shutil
from pathlib import Path
shutil.copy(next(Path("/kaggle/input").rglob("sample_submission.json")), "/kaggle/working/submission.json")
"""
FACTS = """
import errno, json, os, socket, subprocess, sys
from pathlib import Path

given = json.loads(next(Path("/kaggle/input").rglob("given.json")).read_text())

def error(action):
    try:
        action()
    except OSError as found:
        return errno.errorcode.get(found.errno, "no name")
    return "none"

def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True)

def connect(*address):
    socket.create_connection(address, timeout=5).close()

server = socket.create_server(("127.0.0.1", 0))
wheels = str(next(Path("/kaggle/input").rglob("*.whl")).parent)
before = run("-c", "import packaging; print(packaging.__version__)").stdout.strip()
installed = run("-m", "pip", "install", "--no-index", "--no-deps", "--find-links", wheels, "packaging==99.0")
for place in given["places"]:
    Path(place, given["token"]).touch()
facts = {
    "environment": dict(os.environ),
    "working in": os.getcwd(),
    "input": sorted(str(file) for file in Path("/kaggle/input").rglob("*") if file.is_file()),
    "writing": [error(lambda: Path(file).write_text("")) for file in ("/kaggle/input/new", wheels + "/given.json")],
    "interfaces": [name for _, name in socket.if_nameindex()],
    "itself": error(lambda: connect(*server.getsockname())),
    "outside": error(lambda: connect("192.0.2.1", 80)),
    "host": error(lambda: connect("127.0.0.1", given["port"])),
    "seen": [path for path in given["hidden"] if os.path.exists(path)],
    "home": [str(path) for path in Path(given["home"]).rglob("*") if given["base"] not in str(path)
             and not given["base"].startswith(str(path)) and not {given["token"], ".ipython"} & set(path.parts)],
    "pip": run("-m", "pip", "config", "list").stdout,
    "installing": [before, installed.returncode,
                   run("-c", "import packaging; print(packaging.__version__)").stdout.strip()],
    "processes": len([path for path in Path("/proc").glob("[0-9]*")]),
}
print("FACTS", json.dumps(facts))
"""


def refused() -> str:
    """Why there is no sandbox here, or ""."""
    try:
        namespaces()
    except MachineError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(refused()), reason=refused() or "not skipped")


@dataclass(frozen=True)
class Bench:
    """What the tests share: a release whose notebook each replaces, a competition, and what stands for the image."""

    release: Path
    competition: Path
    task_set: TaskSet
    python: Path
    differences: tuple[str, ...]

    def rehearse(self, cells: list[str], out: Path, terms: RehearsalSettings | None = None) -> Rehearsal:
        write_notebook(self.release / "kernel" / "main.ipynb", cells)
        return rehearse(self.release, self.competition, self.python, out, terms or RehearsalSettings("commit"), print)


def write_notebook(file: Path, cells: list[str]) -> None:
    empty: dict[str, Any] = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    content = [{**empty, "id": f"cell-{i}", "source": source} for i, source in enumerate(cells)]
    file.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": content}))


def test_the_last_line_of_a_log_is_shown(tmp_path, monkeypatch):
    """The command ends once that was seen."""

    class Ending(Wait):
        def quote(self, line: str) -> None:
            super().quote(line)
            if line == "2 of 2 tasks":
                (tmp_path / "end").touch()

    monkeypatch.setattr("arc_solver.release.sandbox.SHOW_S", 0.001)
    script = f"echo 1 of 2 tasks; echo 2 of 2 tasks; until [ -e {tmp_path}/end ]; do sleep 0.01; done"
    _wait_for(["sh", "-c", script], 60, tmp_path / "log.txt", wait := Ending("it"))
    assert wait.note == "2 of 2 tasks"


def write_wheel(folder: Path, name: str, version: str, needs: Sequence[str] = ()) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", f"__version__ = '{version}'\n")
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {n}" for n in needs),
        ]
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def base_prefix(python: Path) -> str:
    """Where the Python of an environment is installed."""
    asked = "import sys; print(sys.base_prefix)"
    return subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, but of those that Python makes when it imports."""
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    release, competition = folder / "release", folder / "competition"
    wheels = release / "datasets" / "arc-solver-wheels"
    for made in (release / "kernel", wheels, wheels / "folder"):
        made.mkdir(parents=True)
    (wheels / "dataset-metadata.json").write_text("{}")
    (wheels / "folder" / "file").write_text("not sent")
    (wheels / "given.json").write_text("{}")
    write_wheel(wheels, "packaging", "99.0")
    metadata = {
        "code_file": "main.ipynb",
        "dataset_sources": ["someone/arc-solver-wheels"],
        "competition_sources": ["arc-prize"],
        "machine_shape": "NvidiaL4",
    }
    (release / "kernel" / "kernel-metadata.json").write_text(json.dumps(metadata))
    found = load_tasks(TasksConfig(spec="demo", limit=3))
    competition_files(competition, found)
    (folder / "image.txt").write_text("\n".join(IMAGE))
    python, differences = make_image_env(folder / "image", print, ("nbclient", "ipykernel"), folder / "image.txt")
    return Bench(release, competition, found, python, differences)


# ---- what a notebook sees ----


@pytest.fixture(scope="module", params=[("commit", "today"), ("rerun", "older")], ids=lambda p: "-".join(p))
def seen(
    request: pytest.FixtureRequest, bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RehearsalSettings, Rehearsal, dict[str, Any], dict[str, Any]]]:
    """A run that tells what it found: the terms, the run, what it was told to look for, what it says."""
    mode: Mode
    layout: Layout
    mode, layout = request.param
    terms = RehearsalSettings(mode, layout, clock=0.25)
    out = tmp_path_factory.mktemp(mode)
    given_file = bench.release / "datasets" / "arc-solver-wheels" / "given.json"
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_FIND_LINKS", str(out))
        patch.setenv("KAGGLE_KEY", "a secret")
        given = {
            "token": f"left-by-{os.getpid()}-{mode}",
            "places": ["/kaggle/temp", "/kaggle/working", "/tmp", "/root", "/opt", "/var/tmp", "/dev/shm"],
            "port": server.getsockname()[1],
            "hidden": [str(PACKAGE_DIR), sys.prefix, str(bench.release), str(out), "/kaggle/input/new"],
            "home": str(Path.home()),
            "base": base_prefix(bench.python),
        }
        given_file.write_text(json.dumps(given))
        before = listing(bench.python.parent.parent)
        result = bench.rehearse([FACTS, ANSWER], out, terms)
        assert listing(bench.python.parent.parent) == before
    line = next(line for line in result.log.read_text().splitlines() if line.startswith("FACTS "))
    yield terms, result, given, json.loads(line.removeprefix("FACTS "))


def test_there_is_no_network(seen):
    facts = seen[3]
    assert facts["interfaces"] == ["lo"]
    assert facts["itself"] == "none"
    assert facts["outside"] == "ENETUNREACH"
    assert facts["host"] == "ECONNREFUSED"


def test_input_lies_where_kaggle_puts_it(seen, bench):
    terms, facts = seen[0], seen[3]
    today = terms.layout == "today"
    of_competition = "/kaggle/input/competitions/arc-prize" if today else "/kaggle/input/arc-prize"
    dataset = "/kaggle/input/datasets/someone/arc-solver-wheels" if today else "/kaggle/input/arc-solver-wheels"
    shown = {file.name for file in bench.competition.iterdir()} - {SOLUTIONS}
    wheels = {"given.json", "packaging-99.0-py3-none-any.whl"}
    wanted = {f"{of_competition}/{name}" for name in shown} | {f"{dataset}/{name}" for name in wheels}
    assert set(facts["input"]) == wanted
    assert facts["writing"] == ["EROFS", "EROFS"]


def test_nothing_of_this_machine_is_in_sight(seen):
    facts = seen[3]
    assert not facts["seen"]
    assert not facts["home"]
    assert not facts["pip"]
    assert facts["processes"] < 12


def test_the_environment_is_kaggles(seen):
    terms, facts = seen[0], seen[3]
    environment = facts["environment"]
    assert environment["KAGGLE_KERNEL_RUN_TYPE"] == "Batch"
    assert environment.get("KAGGLE_IS_COMPETITION_RERUN") == {"commit": None, "rerun": "1"}[terms.mode]
    assert environment["ARC_SOLVER_CLOCK"] == "0.25"
    assert isinstance(json.loads(environment["ARC_SOLVER_GPUS"]), list)
    assert facts["working in"] == "/kaggle/working"
    assert not environment.keys() & {"PIP_FIND_LINKS", "KAGGLE_KEY", "PYTHONPATH", "VIRTUAL_ENV"}


def test_installing_works_and_is_gone_afterwards(seen, bench):
    assert seen[3]["installing"][1:] == [0, "99.0"]
    asked = "from importlib.metadata import version; print(version('packaging'))"
    now = subprocess.run([str(bench.python), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    assert now == seen[3]["installing"][0] != "99.0"


def test_nothing_is_left_behind(seen):
    _, result, given, _ = seen
    assert [str(p) for p in ("/kaggle", *given["places"]) if Path(p, given["token"]).exists()] == []
    assert (result.submission.parent / given["token"]).exists()  # what the notebook made is kept here
    assert {path.name for path in result.log.parent.iterdir()} == {"log.txt", "notebook.ipynb", "working"}


def test_the_run_is_scored_and_kept(seen, bench):
    result = seen[1]
    assert result.mode == seen[0].mode
    assert result.score is not None
    assert result.score.outputs == sum(len(task.test) for task in bench.task_set.tasks)
    assert result.score.outputs_solved == 0
    assert "FACTS" in result.notebook.read_text()
    assert 0.01 < result.peak_gib < 2
    assert any("GPUs" in line and "L4, L4, L4, L4" in line for line in result.differences)


# ---- how a notebook fails ----


def why(bench: Bench, cells: list[str], out: Path, terms: RehearsalSettings | None = None) -> str:
    with pytest.raises(RehearsalFailed) as failure:
        bench.rehearse(cells, out, terms)
    return str(failure.value)


def test_a_cell_that_raises(bench, tmp_path):
    text = why(bench, [ANSWER, "print('before')\nraise ValueError('no such colour')", "print('after')"], tmp_path)
    assert text.startswith("commit run: the notebook failed (exit code 1)")
    assert "before" in text
    assert "cell 2 raised" in text
    assert "ValueError: no such colour" in text
    assert "after" not in text
    assert "no such colour" in (tmp_path / "notebook.ipynb").read_text()


def test_a_child_that_is_killed_where_the_notebook_looks(bench, tmp_path):
    child = "import os, subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import os; os.abort()'], check=True)"
    assert "SIGABRT" in why(bench, [ANSWER, child], tmp_path)


def test_a_kernel_that_dies(bench, tmp_path):
    assert "the kernel died" in why(bench, [ANSWER, "import os\nos.abort()"], tmp_path)


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        ("Path('/kaggle/working/submission.json').unlink()", "left no file /kaggle/working/submission.json"),
        ("Path('/kaggle/working/submission.json').write_text('{}')", "no answer to 3 of 3 tasks"),
        ("Path('/kaggle/working/notes.csv').touch()", "Kaggle would offer notes.csv"),
    ],
)
def test_what_is_left_in_working(bench, tmp_path, last, sentence):
    assert sentence in why(bench, [ANSWER + last], tmp_path)


def test_a_link_is_no_submission(bench, tmp_path):
    """It would lead to a file of this machine."""
    (tmp_path / "elsewhere.json").write_text((bench.competition / "sample_submission.json").read_text())
    link = f"import os\nos.symlink({str(tmp_path / 'elsewhere.json')!r}, '/kaggle/working/submission.json')"
    assert "left no file" in why(bench, [link], tmp_path / "out")


def sleeper(name: str) -> list[str]:
    """Cells that never end, with a child of that name."""
    child = f"subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', {name!r}])"
    return ["print('still here', flush=True)", f"import subprocess, sys\n{child}"]


def running(name: str) -> bool:
    """Whether a process has the name as its last word."""
    return any(read(file).endswith(f"\0{name}\0".encode()) for file in Path("/proc").glob("[0-9]*/cmdline"))


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # the process has ended
        return b""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_too_much_time(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(arc_solver.release.rehearsal, "START_S", 6.0)
    text = why(bench, sleeper(tmp_path.name), tmp_path, RehearsalSettings("rerun", clock=1e-6))
    assert text.startswith("rerun run: the notebook was not done after 6 s")
    assert "still here" in text
    assert not running(tmp_path.name)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_the_sandbox_ends_with_who_made_it(bench, tmp_path, by):
    write_notebook(bench.release / "kernel" / "main.ipynb", sleeper(tmp_path.name))
    paths = map(str, (bench.release, bench.competition, bench.python, tmp_path))
    with subprocess.Popen([sys.executable, "-P", "-c", IN_ANOTHER, *paths], stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: running(tmp_path.name))
        process.send_signal(by)
    wait_until(lambda: not running(tmp_path.name))


def test_too_much_memory_of_all_processes_together(bench, tmp_path):
    eater = "[sys.executable, '-c', 'import time; kept = b\"x\" * (300 << 20); time.sleep(600)']"
    cell = f"import subprocess, sys\nfor child in [subprocess.Popen({eater}) for _ in range(2)]:\n    child.wait()"
    text = why(bench, [cell], tmp_path, RehearsalSettings("commit", memory_gib=0.5))
    assert "of memory, the limit is 0.5 GiB" in text


# ---- other users, broken releases ----

IN_ANOTHER = """
import sys
from pathlib import Path
from arc_solver.release.rehearsal import RehearsalSettings, rehearse
from arc_solver.release.sandbox import namespaces
print(namespaces())
paths = [Path(word) for word in sys.argv[1:]]
print(rehearse(*paths, RehearsalSettings("rerun"), print).score.outputs)
"""


def test_without_privileges(bench, tmp_path):
    """Root without capabilities is what a user is, but may read the tests' files; one lets it have a user namespace."""
    if os.geteuid():
        pytest.skip("this user has no privileges, so all tests here run without")
    write_notebook(bench.release / "kernel" / "main.ipynb", [ANSWER])
    paths = map(str, (bench.release, bench.competition, bench.python, tmp_path))
    command = [
        "setpriv",
        "--bounding-set=-all,+setfcap",
        "--inh-caps=-all",
        sys.executable,
        "-P",
        "-c",
        IN_ANOTHER,
        *paths,
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "refuses" in run.stderr:
        pytest.skip(run.stderr.splitlines()[-1])
    assert run.returncode == 0, run.stderr
    assert USER_NAMESPACE[0] in run.stdout
    assert run.stdout.splitlines()[-1] == str(sum(len(task.test) for task in bench.task_set.tasks))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("code_file", "other.ipynb", "build the release again"),
        ("dataset_sources", ["someone/elses"], "mounts someone/elses"),
        ("model_sources", ["a/b/c/d/1"], "mounts model_sources"),
    ],
)
def test_a_release_that_is_not_whole(bench, tmp_path, key, value, sentence):
    (tmp_path / "kernel").mkdir()
    metadata = json.loads((bench.release / "kernel" / "kernel-metadata.json").read_text())
    (tmp_path / "kernel" / "main.ipynb").touch()
    (tmp_path / "kernel" / "kernel-metadata.json").write_text(
        json.dumps({**metadata, "dataset_sources": [], key: value})
    )
    with pytest.raises(UserError, match=sentence):
        rehearse(tmp_path, bench.competition, bench.python, tmp_path / "out", RehearsalSettings("commit"), print)


# ---- the competition, the image ----


def test_competition_files_hold_the_tasks_and_no_solution_in_sight(bench):
    back = read_file(bench.competition / CHALLENGES)
    assert [task.id for task in back.tasks] == sorted(task.id for task in bench.task_set.tasks)
    for task in bench.task_set.tasks:
        assert all(
            same_grid(*both) for both in zip(back.solutions[task.id], bench.task_set.solutions[task.id], strict=True)
        )
    assert '"test": [{"input"' in (bench.competition / CHALLENGES).read_text()
    answered = {file.name: json.loads(file.read_text()) for file in bench.competition.glob("*_solutions.json")}
    mine = answered.pop(SOLUTIONS).keys()
    assert {name: len(content) for name, content in answered.items()} == {
        "arc-agi_training_solutions.json": 400,
        "arc-agi_evaluation_solutions.json": 400 - len(mine),
    }
    assert not any(mine & content.keys() for content in answered.values())


def test_the_image_is_as_near_as_can_be(tmp_path, monkeypatch):
    """Of its list, one package is had, one cannot be, one does not go with the first, one only comes with them."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, version, needs in (
        ("first", "1", ["second<3", "beside"]),
        ("first", "2", ["second<3", "beside"]),
        ("second", "2", []),
        ("second", "3", []),
        ("third", "5", []),
        ("beside", "1", []),
        ("unlisted", "1", []),
    ):
        write_wheel(wheels, name, version, needs)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    (tmp_path / "image.txt").write_text("first==1\nsecond==3\nthird==4\nbeside==7\nabsent==1")
    needed = ("first", "second", "third", "unlisted")
    _, differences = make_image_env(tmp_path / "image", print, needed, tmp_path / "image.txt")
    assert [line for line in differences if "Python" not in line] == [
        "second 2 instead of 3",
        "third 5 instead of 4",
        "versions of what comes with these: 1 differ",
        "not in the image: unlisted 1",
    ]


def test_the_image_is_made_once(bench, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("it is made again")

    monkeypatch.setattr(arc_solver.release.image_env, "_choose_base", fail)
    folder = bench.python.parent.parent
    again = make_image_env(folder, print, ("nbclient", "ipykernel"), folder.parent / "image.txt")
    assert again == (bench.python, bench.differences)
    assert not any(line.startswith("nbclient") for line in bench.differences)  # it is as the list says
    with pytest.raises(AssertionError, match="made again"):
        make_image_env(folder, print, ("nbclient",), folder.parent / "image.txt")
