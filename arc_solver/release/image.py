"""What Kaggle's image has, and what wheels would change in it, without the image.

    python -m arc_solver.release.image [WORD ...]   prints a lock: what our dependencies, and these words of pip, need

Kaggle's notebooks have no network, so what the image lacks travels as wheels, and is installed with --no-deps: pip then
asks nothing and changes nothing else. What it would have asked is answered here beforehand, from a list of the image's
packages (`kaggle/image.txt`) and from what the wheels say of themselves: is there a wheel that cannot be installed on
Python 3.12 and glibc 2.35, which packages are added and which replaced, and does a wheel need what will not be there?

Locks are made by pip itself in an empty environment that claims to have the image's packages (`make_stub_env`). The
same environment shows in the tests that pip and `simulate` agree.
"""

import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from ..command import run_main
from ..config import PACKAGE_DIR
from ..errors import MachineError, UserError, first_line
from ..waiting import Wait

KAGGLE_DIR = PACKAGE_DIR.parent / "kaggle"  # of the checkout
IMAGE_FILE = KAGGLE_DIR / "image.txt"
PYTHON = "3.12.13"
GLIBC = 35  # 2.35
_LEGACY = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")
# Not linux_x86_64: what was built on some machine without saying for which glibc may not even load there.
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)), *_LEGACY)
_MINOR = (3, 12)
ENVIRONMENT = {
    "implementation_name": "cpython",
    "implementation_version": PYTHON,
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_release": "",
    "platform_system": "Linux",
    "platform_version": "",
    "python_full_version": PYTHON,
    "python_version": "3.12",
    "sys_platform": "linux",
}

Packages = Mapping[str, Version]  # by name, as PEP 503 writes it


@dataclass(frozen=True)
class Wheel:
    """A wheel, as far as it says what it is and needs."""

    file: str
    name: str
    version: Version
    tags: frozenset[Tag]
    python: SpecifierSet
    requirements: tuple[Requirement, ...]


@dataclass(frozen=True)
class Changes:
    """What installing wheels with --no-deps does to the image. All sorted."""

    added: dict[str, str]  # name -> version
    replaced: dict[str, tuple[str, str]]  # name -> version there, version that comes
    unmet: tuple[str, ...]  # sentences: what a wheel needs and will not have
    unfit: tuple[str, ...]  # sentences: wheels that pip would refuse there


def read_image(file: Path = IMAGE_FILE) -> dict[str, Version]:
    """The packages of the image, from `name==version` lines.

    Raises:
        UserError: a line is no such thing.
    """
    return {name: version for name, version, _ in _pins(file)}


def read_lock(file: Path) -> dict[str, tuple[Version, frozenset[str]]]:
    """Versions and SHA-256 hashes by name, from lines `name==version --hash=sha256:...`.

    Raises:
        UserError: a line is no such thing, or has no hash.
    """
    lock = {}
    for name, version, rest in _pins(file):
        hashes = frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})(?=\s|$)", rest))
        if not hashes:
            raise UserError(f"{file.name} has no sha256 for {name}: make it with python -m arc_solver.release.image")
        lock[name] = (version, hashes)
    return lock


def _pins(file: Path) -> Iterator[tuple[str, Version, str]]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from None
    for line in text.replace("\\\n", " ").splitlines():
        pin, _, rest = line.partition("#")[0].strip().partition(" ")
        name, _, version = pin.partition("==")
        if not pin:
            continue
        try:
            yield canonicalize_name(name, validate=True), Version(version), rest
        except ValueError:
            raise UserError(f"{file.name} has a line that is no name==version: {line}") from None


def read_wheel(file: Path) -> Wheel:
    """What a wheel says of itself.

    Raises:
        UserError: it is no wheel, or says nothing, or something else than its name.
    """
    try:
        name, version, _, tags = parse_wheel_filename(file.name)
        with zipfile.ZipFile(file) as archive:
            (inside,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
            headers = BytesParser().parse(io.BytesIO(archive.read(inside)), headersonly=True)
        said = canonicalize_name(headers["Name"]), Version(headers["Version"])
        if said != (name, version):
            raise ValueError(f"it says that it is {headers['Name']} {headers['Version']}")
        python = SpecifierSet(headers["Requires-Python"] or "")
        requirements = tuple(Requirement(line) for line in headers.get_all("Requires-Dist", ()))
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file.name} is no wheel that pip could read: {first_line(error)}") from None
    return Wheel(file.name, name, version, tags, python, requirements)


def simulate(image: Packages, wheels: Sequence[Wheel]) -> Changes:
    """What installing exactly these wheels with --no-deps would do.

    What the image's own packages need, under extras that a wheel asks for or beside what is replaced, is not known.
    """
    coming = {wheel.name: wheel.version for wheel in wheels}
    there = {**image, **coming}
    unmet = {
        f"{wheel.name} {wheel.version} needs {needed}, and there will be {there.get(_key(needed), 'none')}"
        for wheel, extras in _with_extras(wheels)
        for needed in _needed(wheel, extras)
        if not _met(needed, there)
    }
    return Changes(
        {name: str(version) for name, version in sorted(coming.items()) if name not in image},
        {
            name: (str(image[name]), str(version))
            for name, version in sorted(coming.items())
            if name in image and image[name] != version
        },
        tuple(sorted(unmet)),
        tuple(sorted(_unfit(wheels))),
    )


def _unfit(wheels: Sequence[Wheel]) -> Iterator[str]:
    fits = {*cpython_tags(_MINOR, ["cp312"], PLATFORMS), *compatible_tags(_MINOR, "cp312", PLATFORMS)}
    for wheel in wheels:
        if not wheel.tags & fits:
            yield f"{wheel.file} is for another Python or platform than CPython 3.12 on x86-64 with glibc 2.{GLIBC}"
        if not wheel.python.contains(PYTHON):
            yield f"{wheel.file} needs Python {wheel.python}, and the image has {PYTHON}"
    names = [wheel.name for wheel in wheels]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"there are several wheels of {name}: leave one"


def _key(needed: Requirement) -> str:
    return canonicalize_name(needed.name)


def _met(needed: Requirement, there: Packages) -> bool:
    version = there.get(_key(needed))
    return version is not None and needed.specifier.contains(version, prereleases=True)


def _with_extras(wheels: Sequence[Wheel]) -> list[tuple[Wheel, frozenset[str]]]:
    """The wheels, each with the extras under which others of them ask for it."""
    extras: dict[str, frozenset[str]] = {wheel.name: frozenset() for wheel in wheels}
    while True:
        before = dict(extras)
        for wheel in wheels:
            for needed in _needed(wheel, extras[wheel.name]):
                if (name := _key(needed)) in extras:
                    extras[name] |= needed.extras
        if extras == before:
            return [(wheel, extras[wheel.name]) for wheel in wheels]


def _needed(wheel: Wheel, extras: frozenset[str]) -> Iterator[Requirement]:
    """What a wheel requires there, under these extras."""
    for needed in wheel.requirements:
        marker = needed.marker
        if marker is None or any(marker.evaluate({**ENVIRONMENT, "extra": extra}) for extra in ("", *extras)):
            yield needed


# ---- locks ----------------------------------------------------------------------------------------------------------


def run_pip(command: Sequence[str], wait: Wait, **how: Any) -> subprocess.CompletedProcess[str]:
    """Runs pip to its end, and shows what it says meanwhile. `how`: arguments of `Popen`."""
    pipe, said = subprocess.PIPE, []
    with TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=pipe, stderr=errors, text=True, **how) as process:
            try:
                for line in process.stdout or ():
                    said.append(line)
                    wait.quote(line)
            except BaseException:
                process.kill()
                raise
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, "".join(said), errors.read())


def download(lock: Path, folder: Path, wait: Wait) -> None:
    """Fetches the wheels of a lock, as they are for the image, from where pip is set up to look.

    Raises:
        MachineError: pip could not get one, or got one with another hash.
    """
    words = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    words += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    words += [word for abi in ("cp312", "abi3", "none") for word in ("--abi", abi)]
    words += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = run_pip([*words, "-r", str(lock), "-d", str(folder)], wait)
    if done.returncode:
        raise MachineError(f"the wheels of {lock.name} could not be downloaded; pip said: {_end(done.stderr)}")


def make_stub_env(image: Packages, folder: Path) -> Path:
    """Makes an environment with metadata of the image's packages only, so that pip takes them as installed; its Python.

    Raises:
        MachineError: there is no Python 3.12, whose markers pip needs.
    """
    if not (python := shutil.which("python3.12")):
        raise MachineError("there is no python3.12: install Python 3.12, as pip answers for the Python that runs it")
    done = subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise MachineError(f"{python} could not make an environment: {_end(done.stderr + done.stdout)}")
    for name, version in image.items():
        about = folder / "lib/python3.12/site-packages" / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder / "bin" / "python"


def pip_plan(python: Path, words: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, version and SHA-256 ("" if it is not known) of the wheels that pip would install in an environment.

    Args:
        python: of that environment, which needs no pip of its own.
        words: requirements and options of `pip install`.

    Raises:
        MachineError: pip found no answer.
    """
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        call = [sys.executable, "-m", "pip", "--python", str(python), "install", "--disable-pip-version-check"]
        call += ["--dry-run", "--no-input", "--only-binary=:all:", "--report", str(report), *words]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            raise MachineError(f"pip found no wheels that fit the image; it said: {_end(done.stderr)}")
        plan = json.loads(report.read_text())["install"]
    return sorted(
        (
            canonicalize_name(item["metadata"]["name"]),
            item["metadata"]["version"],
            item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256", ""),
        )
        for item in plan
    )


def make_lock(words: Sequence[str]) -> str:
    """The text of a lock: the wheels that our own dependencies and `words` add to the image, or replace there.

    Args:
        words: requirements and options of `pip install`.

    Raises:
        MachineError: there is no Python 3.12, or no such wheels, or their hashes are not known.
    """
    with TemporaryDirectory() as folder:
        python = make_stub_env(read_image(), Path(folder) / "image")
        plan = pip_plan(python, ["--use-feature=fast-deps", *own_requirements(), *words])
    if bare := [name for name, _, digest in plan if not digest]:
        raise MachineError(
            f"pip knows no sha256 for {', '.join(bare)}: use an index that states them, as pypi.org does"
        )
    return "".join(f"{name}=={version} --hash=sha256:{digest}\n" for name, version, digest in plan)


def own_requirements() -> list[str]:
    """What our own wheel requires, extras aside."""
    return tomllib.loads((PACKAGE_DIR.parent / "pyproject.toml").read_text())["project"]["dependencies"]


def _end(said: str) -> str:
    """The last lines of what pip said."""
    return " ".join(said.strip().splitlines()[-6:]).strip()[-1500:]


def main(words: list[str]) -> int:
    command = " ".join(("python -m arc_solver.release.image", *words))
    print(f"# {command}\n{make_lock(words)}", end="")
    return 0


if __name__ == "__main__":
    run_main(main)
