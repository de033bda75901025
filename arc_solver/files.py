"""Files that are never there in part, and the commit that the code is of."""

import fcntl
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import IO, Any

from .config import PACKAGE_DIR


def write_whole(file: Path, text: str, sync: bool = True) -> None:
    """Writes a file under another name, then renames it: whoever reads it sees the old one or the new one.

    Args:
        sync: not even after a power cut is it there in part.
    """
    part = file.with_name(file.name + ".part")
    try:
        with part.open("w") as stream:
            stream.write(text)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(file: Path, content: Any) -> None:
    write_whole(file, json.dumps(content, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Waits until all that is in a folder is on the disk, and no longer: what others write may take minutes."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(file: Path) -> IO[str] | None:
    """An open file that one process at a time can have; the system takes it back when that ends. None: another has it.

    Raises:
        OSError: it cannot be made.
    """
    stream = file.open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream


def is_locked(file: Path) -> bool:
    """Whether a process has the file by `lock`."""
    try:
        with file.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none
        return False
    return False


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_commit() -> str:
    """The git commit of this checkout, with -dirty if files were changed; "" outside a checkout."""
    try:
        words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(words, cwd=PACKAGE_DIR, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""
    except OSError:  # there is no git
        return ""
