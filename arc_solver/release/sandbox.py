"""A machine within this one: no network, only the files it is given, processes of its own, bounds of time and memory.

It is made of Linux namespaces by `unshare` (util-linux), for root and for users whom the system lets have their own.
Its root folder is new and empty, and gets the system's folders (read-only), /dev, and what the caller names; whatever
is written elsewhere is gone with it. So nothing has to be searched for and hidden but in the system's folders.

`run_inside` starts this module once more in the new namespaces. There, `main` is process 1: it mounts, starts the
command, and watches its memory. When it ends, however it ends, the kernel ends every other process of the sandbox.
"""

import ctypes
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import MachineError
from ..waiting import Wait

SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "nix", "sys")  # where there are such folders
PIP_FILES = ("/etc/pip.conf", "/etc/xdg/pip/pip.conf")  # they would tell of packages that the real machine has not
NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--ipc", "--fork", "--kill-child")
USER_NAMESPACE = ("--user", "--map-root-user")
LOOK_S = 0.1  # between looks at whether the command has ended
MEASURE_S = 1.0  # between looks at its memory, which cost some milliseconds for each GiB
SHOW_S = 1.0  # between looks at its log from outside
TAIL = 4096  # bytes of that, in which the last line is looked for
STUCK_S = 120.0  # in which the sandbox must come up and end, besides the command's time

LIBC = ctypes.CDLL(None, use_errno=True)
MS_BIND, MS_REC = 4096, 16384
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = 442, -100, 0x8000, 1  # the call has this number on every processor
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
GIB = 1 << 30


@dataclass(frozen=True)
class Bind:
    """A file or folder of this machine, and where it is found in the sandbox."""

    source: str
    target: str
    writable: bool = False


@dataclass(frozen=True)
class Sandbox:
    """What there is in it besides the system."""

    binds: tuple[Bind, ...]
    hidden: tuple[str, ...]  # folders that are empty in it, if they are there at all; binds lie above them
    read_only: tuple[str, ...]  # folders of it in which nothing can be made, not even between the binds
    env: Mapping[str, str]
    cwd: str


@dataclass(frozen=True)
class CommandResult:
    """How a command ended: by itself, or because it took too long or too much."""

    how: Literal["exit", "time", "memory"]
    code: int  # exit status; minus the signal that killed it
    seconds: float
    peak_gib: float  # most memory of all its processes together, as far as seen


def namespaces() -> tuple[str, ...]:
    """The command that makes namespaces here.

    Raises:
        MachineError: the system lets us have none; says what is needed.
    """
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        raise MachineError("a rehearsal needs Linux with the commands of util-linux (unshare, setpriv): install it")
    trial = "mount -t tmpfs tmpfs /tmp && mount -t proc proc /proc"
    for command in (NAMESPACES, NAMESPACES + USER_NAMESPACE):
        if not subprocess.run([*command, "sh", "-c", trial], capture_output=True).returncode:
            return command
    raise MachineError(
        "a rehearsal needs Linux namespaces, which this system refuses: run it as root (Docker: --privileged), or let"
        " users have them (sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0)"
    )


def run_inside(
    command: Sequence[str],
    sandbox: Sandbox,
    seconds: float,
    memory_gib: float | None,
    log: Path,
    wait: Wait,
) -> CommandResult:
    """Runs a command in the sandbox to its end, or kills it there with all that it started.

    Args:
        memory_gib: of all its processes together; None = what there is.
        log: file for what it prints.
        wait: shows the last line of that.

    Raises:
        MachineError: the sandbox could not be made.
    """
    with tempfile.TemporaryDirectory() as folder:
        root, plan, verdict = (Path(folder, name) for name in ("root", "plan.json", "verdict.json"))
        root.mkdir()
        content = {"command": list(command), "root": str(root), "verdict": str(verdict), **asdict(sandbox)}
        plan.write_text(json.dumps({**content, "seconds": seconds, "memory_gib": memory_gib}))
        # should we be killed, it is too
        inside = ["setpriv", "--pdeathsig", "KILL", *namespaces(), sys.executable, "-P", "-m", __name__, str(plan)]
        _wait_for(inside, seconds + STUCK_S, log, wait)
        if not verdict.exists() or not verdict.read_text():
            raise MachineError(f"the sandbox could not be made, or was killed: {log.read_text()[-1000:].strip()}")
        return CommandResult(**json.loads(verdict.read_text()))


def _wait_for(command: Sequence[str], seconds: float, log: Path, wait: Wait) -> None:
    """Runs a command that ends by itself; it is killed if it does not, or if we are interrupted."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            until = time.monotonic() + seconds
            while not _has_ended(process, SHOW_S):
                if time.monotonic() > until:
                    raise MachineError(f"the sandbox has not ended after {seconds:.0f} s; see {log}")
                wait.quote(_last_line(log))
        finally:
            process.kill()
            process.wait()


def _has_ended(process: subprocess.Popen[bytes], within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _last_line(file: Path) -> str:
    """Of a file that is being written, which may be long; "" as long as there is none."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL))
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


# ---- inside ----


def main(plan_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    with Path(plan["verdict"]).open("w") as verdict:  # open already, because it cannot be reached from inside
        _mount_all(Path(plan["root"]), plan)
        _raise_loopback()
        os.chroot(plan["root"])
        os.chdir(plan["cwd"])
        child = os.spawnve(os.P_NOWAIT, plan["command"][0], plan["command"], plan["env"])
        json.dump(asdict(_watch(child, plan["seconds"], plan["memory_gib"])), verdict)


def _mount_all(root: Path, plan: Mapping[str, Any]) -> None:
    """Fills the folder that becomes the root."""
    _mount("tmpfs", root, "tmpfs")
    for name in SYSTEM:
        source = Path("/", name)
        if source.is_symlink():
            (root / name).symlink_to(source.readlink())
        elif source.is_dir():
            _bind(str(source), root / name)
    _bind("/dev", root / "dev")
    _mount("tmpfs", root / "dev" / "shm", "tmpfs")
    (root / "proc").mkdir()
    _mount("proc", root / "proc", "proc")
    for folder in ("root", "run", "var/tmp"):
        (root / folder).mkdir(parents=True)
    for hidden in plan["hidden"]:
        if _at(root, hidden).is_dir():
            _mount("tmpfs", _at(root, hidden), "tmpfs")
    for file in filter(os.path.exists, PIP_FILES):
        _bind(os.devnull, _at(root, file))
    for bind in plan["binds"]:
        _bind(bind["source"], _at(root, bind["target"]), bind["writable"])
    for folder in plan["read_only"]:
        _at(root, folder).mkdir(parents=True, exist_ok=True)
        _bind(str(_at(root, folder)), _at(root, folder))


def _at(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _bind(source: str, target: Path, writable: bool = False) -> None:
    if os.path.isdir(source):
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _mount(source, target, flags=MS_BIND | MS_REC)
    if not writable:
        attributes = struct.pack("4Q", RDONLY, 0, 0, 0)
        path = os.fsencode(target)
        if LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, attributes, len(attributes)):
            raise MachineError(f"{target} cannot be made read-only (Linux 5.12 or newer is needed): {_why()}")


def _mount(source: str, target: Path, kind: str = "", flags: int = 0) -> None:
    if LIBC.mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, None):
        raise MachineError(f"{kind or source} cannot be mounted at {target}: {_why()}")


def _why() -> str:
    return os.strerror(ctypes.get_errno())


def _raise_loopback() -> None:
    """Processes may talk to each other, and to nobody else."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def _watch(child: int, seconds: float, memory_gib: float | None) -> CommandResult:
    """Waits for the command, as process 1 must for all that were left behind, and measures what they take."""
    started, measured_at, peak_gib = time.monotonic(), -math.inf, 0.0
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        if ended == child:
            return CommandResult("exit", os.waitstatus_to_exitcode(status), now - started, peak_gib)
        if now - started > seconds:
            return CommandResult("time", -signal.SIGKILL, now - started, peak_gib)
        if now - measured_at > MEASURE_S:
            peak_gib = max(peak_gib, _memory() / GIB)
            measured_at = time.monotonic()
        if memory_gib is not None and peak_gib > memory_gib:
            return CommandResult("memory", -signal.SIGKILL, now - started, peak_gib)
        if not ended:
            time.sleep(LOOK_S)


def _memory() -> int:
    """Bytes that only these processes have: shared ones are counted once, files that can be read again are not."""
    total = 0
    for file in Path("/proc").glob("[0-9]*/smaps_rollup"):
        try:
            text = file.read_text() if file.parent.name != "1" else ""
        except OSError:  # it has just ended
            continue
        counted = [line.split() for line in text.splitlines() if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
        total += sum(int(kib) << 10 for _, kib, _ in counted)
    return total


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (MachineError, OSError) as error:
        sys.exit(f"{error}")
