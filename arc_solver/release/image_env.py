"""An environment that stands for Kaggle's image: what of it a run needs, at its versions where they can be had."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from ..command import Say
from ..errors import MachineError
from ..waiting import Wait, waiting
from .image import IMAGE_FILE, read_image, run_pip

IMAGE_PYTHON = (3, 12)
NEEDED = (
    *("torch", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "numpy", "pydantic", "rich"),
    *("matplotlib", "jinja2", "packaging", "nbclient", "ipykernel"),
)
TORCH = re.compile(r"torch|torchvision|torchaudio|triton|nvidia-.*|cuda-.*")  # what goes with a build of PyTorch


def make_image_env(
    folder: Path, say: Say, needed: Sequence[str] = NEEDED, image: Path = IMAGE_FILE
) -> tuple[Path, tuple[str, ...]]:
    """Makes a virtual environment that imitates Kaggle's image; its Python, and what differs.

    PyTorch is the build that this process has, because any other brings gigabytes. All else is at the image's version
    if pip can install that together. It is made once, and again when what is asked for changed.

    Args:
        needed: packages of the image that are installed, with what they need.
        image: file of name==version lines.

    Raises:
        MachineError: pip or venv failed.
    """
    versions = {name: str(version) for name, version in read_image(image).items()}
    newer, python = _image_base(), folder / "bin" / "python"
    fixed = {"torch": importlib.metadata.version("torch")} if "torch" in needed else {}
    asked = {"needed": list(needed), "fixed": fixed, "image": versions, "pythons": [sys.version, newer]}
    stamp = folder / "image.json"
    if stamp.exists() and python.exists() and (made := json.loads(stamp.read_text()))["asked"] == asked:
        return python, tuple(made["differences"])
    say(f"making {folder}, which stands for Kaggle's image; this takes some minutes")
    with waiting(say, f"making {folder}") as wait:
        base, differences = _choose_base(newer, fixed, wait)
        output_of([base, "-m", "venv", "--clear", str(folder)], f"{base} cannot make a virtual environment")
        _install(python, needed, fixed, versions, folder / "versions.txt", wait)
        differences += _version_differences(_installed(python), needed, versions)
    stamp.write_text(json.dumps({"asked": asked, "differences": differences}))
    return python, tuple(differences)


def _image_base() -> str | None:
    """A Python of the image's version, if there is one."""
    name = "python{}.{}".format(*IMAGE_PYTHON)
    asked = "import sys, ensurepip; print(sys.version_info[:2], sys.executable, sep='\\n')"
    beside = sorted(Path(sys.base_prefix).parent.glob(f"*{name.removeprefix('python')}.*/bin/{name}"))  # pyenv, uv
    for found in (sys.executable, shutil.which(name), *map(str, beside)):
        result = subprocess.run([found, "-c", asked], capture_output=True, text=True) if found else None
        if result and not result.returncode and result.stdout.startswith(str(IMAGE_PYTHON)):
            return result.stdout.splitlines()[1]
    return None


def _choose_base(newer: str | None, fixed: Mapping[str, str], wait: Wait) -> tuple[str, list[str]]:
    """The Python to use, and how it differs from the image's."""
    wanted, running = "{}.{}".format(*IMAGE_PYTHON), "{}.{}".format(*sys.version_info)
    if newer is None:
        return sys.executable, [f"Python {running} instead of {wanted}, which is not found here"]
    had = ["--python-version", wanted, "--target", "/nowhere", "--no-deps", *_pinned(fixed)]
    if fixed and sys.version_info[:2] != IMAGE_PYTHON and _pip(wait, sys.executable, "--dry-run", *had).returncode:
        why = f"for which {' '.join(_pinned(fixed))} is not to be had"
        return sys.executable, [f"Python {running} instead of {wanted}, {why}"]
    return newer, []


def _pinned(versions: Mapping[str, str]) -> list[str]:
    return [f"{name}=={version}" for name, version in versions.items()]


def _pip(wait: Wait, python: str | Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--only-binary=:all:"]
    return run_pip([*command, *words], wait, env=_own_environment())


def _install(
    python: Path,
    needed: Sequence[str],
    fixed: Mapping[str, str],
    versions: Mapping[str, str],
    constraints: Path,
    wait: Wait,
) -> None:
    """Installs what is needed: all as in the image if that goes together, else as many as can be, the first first."""
    others = [name for name in needed if name not in fixed]
    constraints.write_text("\n".join(_pinned({k: v for k, v in versions.items() if not TORCH.fullmatch(k)})))
    if not _pip(wait, python, *_pinned(fixed), *others, "--constraint", str(constraints)).returncode:
        return
    listed = {name: versions[name] for name in others if name in versions}
    free = [name for name in others if name not in listed]
    if not _pip(wait, python, *_pinned({**fixed, **listed}), *free).returncode:
        return
    chosen = dict(fixed)
    for name in (name for name in others if name in versions):
        tried = {**chosen, name: versions[name]}
        rest = [other for other in others if other not in tried]
        if not _pip(wait, python, "--dry-run", *_pinned(tried), *rest).returncode:
            chosen = tried
    result = _pip(wait, python, *_pinned(chosen), *(name for name in others if name not in chosen))
    if result.returncode:
        raise MachineError(f"pip could not install what stands for Kaggle's image: {_last(result.stderr)}")


def _installed(python: Path) -> dict[str, str]:
    words = [str(python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(output_of(words, f"pip of {python} does not work"))
    return {canonicalize_name(package["name"]): package["version"] for package in listed}


def _version_differences(found: Mapping[str, str], needed: Sequence[str], versions: Mapping[str, str]) -> list[str]:
    """One line for each package that a run names, one for all others, which versions.txt beside the image has."""
    theirs = {name: version for name, version in sorted(found.items()) if name not in ("pip", "setuptools")}
    unknown = [f"{name} {version}" for name, version in theirs.items() if name not in versions]
    other = {k: f"{k} {v} instead of {versions[k]}" for k, v in theirs.items() if versions.get(k, v) != v}
    named = [line for name, line in other.items() if name in needed]
    rest = len(other) - len(named)
    more = [f"versions of what comes with these: {rest} differ"] if rest else []
    return named + more + ([f"not in the image: {', '.join(unknown)}"] if unknown else [])


def output_of(command: Sequence[str], failed: str) -> str:
    """What a command prints.

    Raises:
        MachineError: it failed; the sentence begins with `failed`.
    """
    result = _done(command)
    if result.returncode:
        raise MachineError(f"{failed}: {_last(result.stderr or result.stdout)}")
    return result.stdout


def _done(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=_own_environment())


def _own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # of whoever calls, and no part


def _last(text: str) -> str:
    lines = text.strip().splitlines() or ["it says nothing"]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])  # pip's, before its notices
