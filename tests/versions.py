"""The fast tests with other versions of the libraries than `.venv` has, and the table of what they said.

    bin/test --versions [oldest] [newest] [py3.12] [py3.13] [pytest arguments instead of the fast tests]

`oldest` has what `oldest.txt` pins, `newest` the newest that the registry has, whatever upper bounds pyproject.toml
sets; both see `.venv` behind that, PyTorch above all, which is not downloaded again. They are what runs if none is
named. `py3.13` is whole, on another Python: on Linux several GB, as PyTorch comes with CUDA there.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "tests" / "oldest.txt"
FOLDER = ROOT / ".venv-versions"
TABLE = ROOT / "docs" / "versions.md"
ENVIRONMENTS = ("oldest", "newest", "py3.12", "py3.13")
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "huggingface_hub", "safetensors", "numpy")
LIBRARIES += ("pydantic", "pytest")
TORCH = f"torch=={version('torch').partition('+')[0]}"
TESTS = [
    *(
        f"tests/models/test_{name}.py"
        for name in ("model", "fast_decoder", "architectures", "pretrained", "lora", "adapters")
    ),
    *(f"tests/decoding/test_{name}.py" for name in ("torch_engine", "engines")),
    *(f"tests/solving/test_{name}.py" for name in ("adapt", "predict")),
    "tests/data/test_sources.py",
    "tests/training/test_train.py::test_a_pretrained_model_is_cut_and_an_adapter_trained_continued_and_merged",
    "tests/training/test_train.py::test_full_weights_of_a_pretrained_model",
    "tests/training/test_train.py::test_logs_and_figures",
    "tests/training/test_train.py::test_compiled_equals_eager",
    "tests/training/test_train.py::test_checkpointing_gives_the_same_gradients",
    "tests/solving/test_solve.py::test_the_whole_sentence_is_reproducible",
    "tests/solving/test_solve.py::test_a_tiny_model_learns_five_tasks_by_heart",
]
HEAD = """# Versions

What `bin/test --versions` saw: the fast tests of models, engines, adapters, training and solving, with the libraries
named. `oldest` has the versions of Kaggle's image, as far as PyTorch {torch} goes with them; they are the lower bounds
in `pyproject.toml`. `newest` has the newest that the registry had; the upper bounds lie just above them. The others are
on another Python. Tests for which something is missing there, such as vLLM, are not tried. PyTorch 2.10, which Kaggle's
image has, is not tried here at all: `bin/submit`'s first run on Kaggle will tell.

Which architectures are served, on which layers their adapters go, and which are refused and why: the two tables in
`tests/models/test_architectures.py`. On any other, `adapt.targets` and `lora.targets` name the layers, and a wrong name
is answered with those that the model has.

This file is written by `bin/test --versions`; `bin/test --versions py3.13` adds that column.

"""


# ---- environments --------------------------------------------------------------------------------------------------


def make(name: str) -> Path:
    """The environment of that name, made or brought up to date. Returns its Python."""
    folder, wanted = FOLDER / name, requirements(name)
    python, stamp = folder / "bin" / "python", folder / "installed"
    shares = not name.startswith("py")
    behind = f"{sys.prefix} {sys.version}" if shares else ""
    installed = stamp.read_text().split("\n\n") if stamp.is_file() else [""]
    if name != "newest" and installed == [behind, *wanted]:
        return python
    if not python.exists() or installed[0] != behind:
        print(f"first use: making {folder}", file=sys.stderr)
        _make_empty(folder, name.removeprefix("py") if not shares else "")
    install = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*install, "--upgrade", TORCH, *wanted)
    if not shares:  # as bin/_env does, which says why
        run(*install, "--no-deps", "--editable", str(ROOT))
        run(*install, "--no-deps", "reasoning-gym==0.1.25")
    stamp.write_text("\n\n".join([behind, *wanted]))
    return python


def _make_empty(folder: Path, python: str) -> None:
    """An environment on a Python of that version, or one that sees what is in this one, if none is given."""
    if python:
        run(find_python(python), "-m", "venv", str(folder))
        return
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder))
    (site,) = folder.glob("lib/python*/site-packages")
    behind = str(Path(sys.prefix) / site.relative_to(folder))
    (site / "behind.pth").write_text(f"import site; site.addsitedir({behind!r})\n")


def requirements(name: str) -> list[str]:
    """What is installed into an environment besides PyTorch."""
    if name == "oldest":
        return [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    ours = [Requirement(text) for text in (*project["dependencies"], *extras["train"], *extras["test"])]
    return sorted(f"{r.name}{lowest(r)}" for r in ours if r.name not in ("torch", "arc_solver", "ruff", "mypy"))


def lowest(requirement: Requirement) -> str:
    """What it says of versions, upper bounds left out."""
    return ",".join(str(bound) for bound in requirement.specifier if not bound.operator.startswith("<"))


def find_python(wanted: str) -> str:
    """A Python of that version that runs: on PATH, or one of pyenv's."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{wanted}.*/bin/python"))
    for python in filter(None, (shutil.which(f"python{wanted}"), *map(str, pyenv))):
        if not subprocess.run([python, "-c", ""], capture_output=True).returncode:
            return python
    sys.exit(f"error: there is no Python {wanted}: install it, or leave py{wanted} out")


def run(*command: str) -> None:
    if subprocess.run(command).returncode:
        sys.exit(f"error: that did not work, see above: {' '.join(command)}")


# ---- tests and table -----------------------------------------------------------------------------------------------


def tried(name: str, python: Path, words: list[str]) -> bool:
    """Runs tests in an environment, and notes what the fast ones said there. Whether all passed."""
    print(f"with {name}:", flush=True)
    report = FOLDER / name / "results.xml"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # models are so small that threads only wait for each other
    spread = ["--numprocesses=auto", "--dist=loadfile"]
    command = [python, "-P", "-m", "pytest", f"--junitxml={report}", *spread, *(words or TESTS)]
    done = subprocess.run(command, cwd=ROOT, env=one_thread)
    if not words:
        code = f"import json; from importlib.metadata import version as v; print(json.dumps([*map(v, {LIBRARIES})]))"
        versions = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
        on = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
        about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "Python": on, **dict(zip(LIBRARIES, versions, strict=True))}
        record = {"about": about, "tests": counts(report)}
        (FOLDER / name / "tried.json").write_text(json.dumps(record, indent=1))
    return done.returncode == 0


def counts(report: Path) -> dict[str, dict[str, int]]:
    """How many tests of each file passed, failed, or were not tried, of pytest's JUnit report."""
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = (case.get("classname") or case.get("name") or "").rpartition(".")[2]
        outcomes = {child.tag for child in case}
        outcome = "failed" if outcomes & {"failure", "error"} else "not tried" if "skipped" in outcomes else "passed"
        found.setdefault(file, Counter())[outcome] += 1
    return {file: dict(of_file) for file, of_file in found.items()}


def table(records: dict[str, dict[str, dict]]) -> str:
    """The table of what is known of each environment. [environment]["about" | "tests"]"""
    columns = [records.get(name, {"about": {}, "tests": {}}) for name in ENVIRONMENTS]
    rows = [["", *(f"`{name}`" for name in ENVIRONMENTS)], ["---"] * (1 + len(ENVIRONMENTS))]
    for what in ("date", "Python", *LIBRARIES):
        rows.append([what, *(column["about"].get(what, "") for column in columns)])
    for file in dict.fromkeys(Path(test.partition("::")[0]).stem for test in TESTS):
        label = f"`{file}.py`" + (", a part" if any(f"{file}.py::" in test for test in TESTS) else "")
        rows.append([label, *(cell(column["tests"].get(file, {})) for column in columns)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(of_file: dict[str, int]) -> str:
    said = [f"{of_file[outcome]} {outcome}" for outcome in ("passed", "failed", "not tried") if of_file.get(outcome)]
    return ", ".join(said) or "not tried"


def write_table() -> None:
    files = {name: FOLDER / name / "tried.json" for name in ENVIRONMENTS}
    records = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    TABLE.write_text(HEAD.format(torch=TORCH.partition("==")[2]) + table(records))


def main(words: list[str]) -> int:
    names = [word for word in words if word in ENVIRONMENTS] or ["oldest", "newest"]
    words = [word for word in words if word not in ENVIRONMENTS]
    passed = [tried(name, make(name), words) for name in names]
    if not words:
        write_table()
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
