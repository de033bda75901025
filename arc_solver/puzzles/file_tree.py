"""Folders and archives alike: what JSON files are in them, and what each holds.

Archives are read in memory and never unpacked, so no name in one reaches the disk; their sizes are checked before
they are believed. Hidden files (`.DS_Store`, `._task.json`) and what macOS puts into archives are not there at all.
"""

import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError, first_line

_JSON_ENDING = re.compile(r"\.jsonl?(\.gz)?\Z", re.IGNORECASE)
ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PACKED = (b"PK", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # how they begin
# What other tools keep beside tasks.
NO_TASKS = ("dataset-metadata", "kernel-metadata", "metadata", "package", "package-lock")
MOST_BYTES = 1 << 30  # of a file once it is unpacked: JSON of that size would take ten times as much memory
DAMAGED = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
MOST_MEMBERS = 200_000  # of an archive
DEEPEST = 4  # folders below the one that is named, in which files are looked for


class FileTree(ABC):
    """A folder, on disk or in an archive."""

    path: str  # as messages name it

    @property
    @abstractmethod
    def json_files(self) -> list[str]:
        """Names of the JSON files directly in it, in order."""

    @property
    @abstractmethod
    def folders(self) -> "list[FileTree]":
        """The folders directly in it, by name."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """What a file directly in it holds.

        Raises:
            UserError: it cannot be read.
        """

    def __contains__(self, name: str) -> bool:
        return name in self.json_files

    def where(self, name: str) -> str:
        """A file directly in it, as messages name it."""
        return f"{self.path}/{name}"

    def load(self, name: str) -> Any:
        """The parsed content of a JSON file directly in it; see `parse_json`."""
        return parse_json(self.read(name), self.where(name))

    def leaves(self, deeper: int = DEEPEST) -> "list[FileTree]":
        """The nearest folders that hold JSON files: this one, or else those below it."""
        if self.json_files:
            return [self]
        return [leaf for folder in self.folders for leaf in folder.leaves(deeper - 1)] if deeper else []


class Folder(FileTree):
    """A folder on disk."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, str(folder)

    @cached_property
    def json_files(self) -> list[str]:
        return _json_names([entry.name for entry in self._entries if not entry.is_dir()], self.path)

    @cached_property
    def folders(self) -> list[FileTree]:
        names = sorted(entry.name for entry in self._entries if entry.is_dir() and _is_visible(entry.name))
        return [Folder(self.folder / name) for name in names]

    @cached_property
    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.folder) as entries:
                return list(entries)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read: {error.strerror}") from None

    def read(self, name: str) -> bytes:
        return read_bytes(self.folder / name)


class Archive(FileTree):
    """A folder in an archive, by default its root."""

    def __init__(self, path: str, members: Mapping[str, Any], read: Any):
        """`members`: name -> what `read` makes bytes of."""
        self.path, self.members, self._read = path, members, read

    @cached_property
    def json_files(self) -> list[str]:
        return _json_names([name for name in self.members if "/" not in name], self.path)

    @cached_property
    def folders(self) -> list[FileTree]:
        below: dict[str, dict[str, Any]] = {}
        for name, member in self.members.items():
            first, slash, rest = name.partition("/")
            if slash:
                below.setdefault(first, {})[rest] = member
        return [Archive(f"{self.path}/{first}", below[first], self._read) for first in sorted(below)]

    def read(self, name: str) -> bytes:
        try:
            return self._read(self.members[name])
        except RuntimeError as error:  # a zip with a password, or packed in a way that Python does not know
            raise UserError(f"{self.where(name)} cannot be unpacked here ({first_line(error)}): unpack it") from None
        except DAMAGED as error:
            raise UserError(f"{self.where(name)} is damaged, get it again: {first_line(error)}") from None


def open_tree(path: Path) -> FileTree | None:
    """A folder or an archive; None: it is a file of another kind.

    Raises:
        UserError: an archive is damaged, or claims sizes that no task file has.
    """
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        return None
    try:
        if zipfile.is_zipfile(path):
            return _zip(path)
        if not is_json_name(path.name) and tarfile.is_tarfile(path):
            return _tar(path)
    except DAMAGED as error:
        raise UserError(f"{path} is a damaged archive: {first_line(error)}; get it again") from None
    if path.name.endswith(ARCHIVE_ENDINGS):
        start = read_bytes(path)[:32]
        if start.startswith(PACKED):
            raise UserError(f"{path} is an archive that is not whole: get it again")
        raise UserError(f"{path} is {_foreign(start) or 'no archive, whatever its name says: get it again'}")
    return None


def open_inside(path: Path) -> tuple[FileTree, str] | None:
    """A folder in an archive, or a file's folder and its name, of a path that goes on after the archive's.

    None: there is no such archive, or nothing of that name in it.
    """
    outer = next((parent for parent in path.parents if parent.is_file()), None)
    tree = open_tree(outer) if outer else None
    if not outer or not tree:
        return None
    names = path.relative_to(outer).parts
    for i, name in enumerate(names):
        below = {folder.path.rpartition("/")[2]: folder for folder in tree.folders}
        if name not in below:
            return (tree, name) if i == len(names) - 1 and name in tree else None
        tree = below[name]
    return tree, ""


def _zip(path: Path) -> Archive:
    archive = zipfile.ZipFile(io.BytesIO(read_bytes(path)))  # so that no file stays open
    members = {info.filename: (info, info.file_size) for info in archive.infolist() if not info.is_dir()}
    return Archive(str(path), _checked(path, members), archive.read)


def _tar(path: Path) -> Archive:
    """All of it is read at once, as most tars are compressed and cannot be read in any other order."""
    with tarfile.open(path) as archive:
        members = {info.name: (info, info.size) for info in archive if info.isfile()}  # a link or a device is no file
        files = {}
        for name, info in _checked(path, members).items():
            stream = archive.extractfile(info)
            assert stream
            files[name] = stream.read()
    return Archive(str(path), files, bytes)


def _checked(path: Path, members: Mapping[str, tuple[Any, int]]) -> dict[str, Any]:
    """The visible JSON files among an archive's members, by clean names. `members`: each with its size, unpacked."""
    if len(members) > MOST_MEMBERS:
        raise UserError(f"{path} has {len(members):,} files, more than the {MOST_MEMBERS:,} that are read: unpack it")
    kept = {}
    for name, (member, size) in members.items():
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if parts and parts[0] in ("/", "."):
            parts = parts[1:]
        if not all(map(_is_visible, parts)) or not is_json_name(name):
            continue
        if size > MOST_BYTES:
            raise UserError(f"{path}: {name} would have {size:,} bytes, and {MOST_BYTES:,} are the most that are read")
        if (clean := "/".join(parts)) in kept:
            raise UserError(f"{path} has {clean} twice: unpack it, and keep the right one")
        kept[clean] = member
    return kept


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _json_names(names: list[str], where: str) -> list[str]:
    """The visible JSON files among names, by name; `where` they are.

    Raises:
        UserError: one is there in two forms.
    """
    found = sorted(n for n in names if _is_visible(n) and is_json_name(n) and json_stem(n) not in NO_TASKS)
    for before, name in pairwise(sorted(found, key=json_stem)):
        if json_stem(before) == json_stem(name):
            raise UserError(f"{where}/{before} and {where}/{name} are the same task: remove one of them")
    return found


def is_json_name(name: str) -> bool:
    return bool(_JSON_ENDING.search(name))


def json_stem(name: str) -> str:
    """A file's name without .json, .jsonl and .gz: of a task's own file, the task's id."""
    return _JSON_ENDING.sub("", name)


# ---- one file ------------------------------------------------------------------------------------------------------


def read_bytes(file: Path) -> bytes:
    """What a file holds.

    Raises:
        UserError: it does not exist, or cannot be read.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON object in a file says; nothing where it is not there or cannot be read."""
    try:
        content = read_json(file)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def read_json(file: Path) -> Any:
    """The parsed content of a JSON file; see `parse_json`."""
    return parse_json(read_bytes(file), str(file))


def parse_json(content: bytes, file: str) -> Any:
    """Parsed JSON, gzipped or not, with or without a byte order mark. JSON lines become a list.

    A key that appears twice is an error, because one of the two would vanish.

    Args:
        file: as messages name it.

    Raises:
        UserError: it is something else; what it is, if that can be told.
    """

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            keys = [key for key, _ in items]
            raise UserError(
                f"{file}: '{next(k for k in keys if keys.count(k) > 1)}' appears twice: remove one of the two"
            )
        return result

    content = _unpacked(content, file)
    if what := _foreign(content) or _NOT_JSON.get(PurePosixPath(file.lower()).suffix, ""):
        raise UserError(f"{file} is {what}")
    try:
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        if file.lower().removesuffix(".gz").endswith(".jsonl"):
            return _lines(text, file, unique)
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise UserError(f"{file} is not JSON: it is empty") from None
        if error.msg == "Extra data" and _is_json(text.splitlines()[0]):
            raise UserError(
                f"{file} holds one JSON value a line, and its name says that it is one: rename it to end in .jsonl"
            ) from None
        raise UserError(f"{file} is not JSON: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not JSON: it is no UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{file} is not JSON: its brackets are nested too deeply") from None
    except ValueError:
        raise UserError(f"{file} is not JSON: it has a number of thousands of digits") from None


def _lines(text: str, file: str, unique: Any) -> list[Any]:
    """What the lines of JSON lines hold."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(json.loads(line, object_pairs_hook=unique))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{file}: line {number} is not JSON: {error.msg} at character {error.pos + 1}"
                ) from None
    return found


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _unpacked(content: bytes, file: str) -> bytes:
    """What a gzipped file holds; of others, what they are."""
    if not content.startswith(b"\x1f\x8b"):
        if file.endswith(".gz"):
            raise UserError(f"{file} is not gzipped, whatever its name says: rename it without .gz, or get it again")
        return content
    try:
        with gzip.open(io.BytesIO(content)) as stream:
            unpacked = stream.read(MOST_BYTES + 1)
    except EOFError:
        raise UserError(f"{file} is not whole, its end is missing: get it again") from None
    except (OSError, zlib.error) as error:
        raise UserError(f"{file} is a damaged gzip file, get it again: {first_line(error)}") from None
    if len(unpacked) > MOST_BYTES:
        raise UserError(f"{file} would have more than {MOST_BYTES:,} bytes unpacked, the most that are read")
    return unpacked


_FOREIGN = {  # how files of other kinds begin, and what to say of them
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: run `git lfs pull` in that repository",
    b"PK\x03\x04": "a zip archive, not JSON: unpack it, and give the file in it that is meant",
    b"<!DOCTYPE": "a web page, not JSON: what was downloaded is the page around the file (of GitHub's take `raw`)",
    b"<html": "a web page, not JSON: what was downloaded is the page around the file (of GitHub's take `raw`)",
    b"<?xml": "XML, not JSON: maybe a server's answer that it has no such file, or does not give it",
    b"404": "no JSON but a server's answer that it has no such file",
    b"Rar!": "a RAR archive, not JSON: unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive, not JSON: unpack it",
    b"\x28\xb5\x2f\xfd": "packed by Zstandard, not JSON: unpack it",
    b"\x80\x04\x95": "a Python pickle, not JSON, and may run any code: export it as JSON",
    b"\x89HDF": "an HDF5 file, not JSON: export it as JSON",
    b"ARROW1": "an Arrow file, not JSON: export it as JSON lines, one task a line",
    b"GGUF": "a model in GGUF format, not JSON",
    b"\x93NUMPY": "a NumPy array, not JSON",
    b"PAR1": "a Parquet file, not JSON: export it as JSON lines, one task a line",
    b"SQLite format 3": "an SQLite database, not JSON",
}


_NOT_JSON = {  # endings that say it
    ".csv": "a CSV file, not JSON: export it as JSON, one object of tasks by id",
    ".tsv": "a TSV file, not JSON: export it as JSON, one object of tasks by id",
    ".yaml": "YAML, not JSON: export it as JSON",
    ".yml": "YAML, not JSON: export it as JSON",
    ".toml": "a config, not JSON: it stands for itself, in front of the settings",
    ".py": "a Python program, not JSON",
}


def _foreign(content: bytes) -> str:
    return next((what for begin, what in _FOREIGN.items() if content[:32].lstrip().startswith(begin)), "")
