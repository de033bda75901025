"""Python programs in processes that are forked from one which has imported PyTorch and transformers already.

Such an interpreter takes four seconds of a core to start, and the tests start some hundred. A process from here is like
any other: it has its own session, memory and signals, and ends as an interpreter ends. Only the seed of `hash` is that
of the server that it comes from; what might depend on it is compared with what a process started anew gave.

As a program this is the server: it takes requests from the socket whose number it is given.
"""

import atexit
import gc
import json
import multiprocessing.util
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 18  # of a request
IMPORTED = (
    "arc_solver.release.submit",
    "arc_solver.solving.solve",
    "arc_solver.training.train",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
)
IMPORTED_IF_THERE = ("bleach", "kagglesdk")  # not kaggle, whose import signs in


class Forked:
    """`python -m MODULE WORDS...` or `python FILE.py WORDS...`, with what the tests need of `subprocess.Popen`.

    What it says is kept in files, so that nobody has to read it.
    """

    def __init__(
        self,
        program: str | Path,
        words: Sequence[str | Path],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ):
        """`env`: its environment; None: ours."""
        self.returncode: int | None = None
        self._said = [""] * 2
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 # `wait` closes them
        self._status, theirs = socket.socketpair()
        request = {
            "program": str(program),
            "words": list(map(str, words)),
            "cwd": str(cwd or Path.cwd()),
            "environ": dict(os.environ if env is None else env),
        }
        fds = [theirs.fileno(), *(file.fileno() for file in self._files)]
        socket.send_fds(_server(), [json.dumps(request).encode()], fds)
        theirs.close()
        self.pid = self._receive()

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = self._receive()
            self._status.close()
            for i, file in enumerate(self._files):
                with file:
                    file.seek(0)
                    self._said[i] = file.read()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it said, on stdout and on stderr, when it has ended."""
        self.wait(timeout)
        out, errors = self._said
        return out, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def send_signal_to_all(self, number: int) -> None:
        """As a terminal does: to it and to those that it has started."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _receive(self) -> int:
        packed = self._status.recv(4, socket.MSG_WAITALL)
        assert packed, "the server of forked processes has ended"
        return int.from_bytes(packed, sys.byteorder, signed=True)


def output_of(process: "Forked | subprocess.Popen[str]", expect: int = 0) -> tuple[str, str]:
    """What a process says on stdout and on stderr until it ends, which must be with this exit code."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == expect, out + errors
    return out, errors


def is_alive(pid: int, kill: Callable[[int, int], None] = os.kill) -> bool:
    """Of a process; with os.killpg, of a group of them."""
    try:
        kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


_servers: list[tuple[subprocess.Popen[bytes], socket.socket]] = []  # at most one


def _server() -> socket.socket:
    """Where this process's server takes requests. It ends with this process."""
    if not _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        _servers.append((process, ours))
    return _servers[0][1]


# ---- the server ----------------------------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> dict[str, Any]:
    """Forks a process for each request; tells who asked its number, and later its exit code. Returns in the forks."""
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # the default wakes nobody
    signal.set_wakeup_fd(wake.fileno())
    askers: dict[int, int] = {}  # process -> socket of who asked for it
    with selectors.DefaultSelector() as selector, woken, wake, requests:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if woken in ready:
                woken.recv(4096)
                for pid in list(askers):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        asker = askers.pop(pid)
                        _tell(asker, os.waitstatus_to_exitcode(status))
                        os.close(asker)
            if requests in ready:
                request, fds, _, _ = socket.recv_fds(requests, MOST_BYTES, 3)
                if not request:
                    sys.exit()
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    break
                askers[pid] = fds[0]
                _tell(fds[0], pid)
                for fd in fds[1:]:
                    os.close(fd)
    for number, fd in enumerate(fds):
        if number:  # stdout and stderr
            os.dup2(fd, number)
        os.close(fd)
    for fd in askers.values():
        os.close(fd)
    return json.loads(request)


def _tell(asker: int, number: int) -> None:
    with suppress(OSError):  # it may be gone
        os.write(asker, number.to_bytes(4, sys.byteorder, signed=True))


def _begin(request: dict[str, Any]) -> None:
    """Makes a fork a process like one of a shell's."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.argv[1:] = request["words"]
    _handle_signals_anew()
    multiprocessing.util.spawnv_passfds = _fork_fork_servers


def _handle_signals_anew() -> None:
    """As a new interpreter does."""
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(code: int) -> None:
    """As an interpreter ends, but leaves memory to the system: taking all modules apart takes a third of a second."""
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_spawnv_passfds = multiprocessing.util.spawnv_passfds


def _fork_fork_servers(path: bytes, args: Sequence[str], passfds: Sequence[int]) -> int:
    """multiprocessing's way to start what it needs, but a fork server is a fork too. It must be started early."""
    if "forkserver" not in args[-1]:
        return _spawnv_passfds(path, args, passfds)
    if pid := os.fork():
        return pid
    try:
        _handle_signals_anew()
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in passfds:
                with suppress(OSError):  # that of the listing
                    os.close(fd)
        exec(args[-1], {})
    except SystemExit:
        os._exit(0)
    finally:
        os._exit(1)


if __name__ == "__main__":
    for name in IMPORTED:
        import_module(name)
    for name in filter(find_spec, IMPORTED_IF_THERE):
        import_module(name)
    gc.collect()
    gc.freeze()  # else each fork would look through all of it, and so copy it, when it ends
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    _begin(request)
    try:
        if request["program"].endswith(".py"):
            sys.argv[0] = request["program"]
            runpy.run_path(request["program"], run_name="__main__")
        else:
            runpy.run_module(request["program"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        _end(ended.code or 0)
    _end(0)
