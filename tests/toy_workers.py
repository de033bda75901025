"""Workers for the tests of executors, in a module that other processes can import; and a program that runs them.

`python toy_workers.py processes FOLDER` starts two workers that never end; each writes its process id into FOLDER.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arc_solver.errors import MachineError, UserError
from arc_solver.solving.executors import TELL_S, Executor, Watchdog, make_executor, start_preloading, tell


class Toy:
    """A job is the name of a method below, and what it gets."""

    def __init__(self, number: int):
        self.number = number
        self.jobs = 0

    def run(self, job: tuple[Any, ...]) -> Any:
        self.jobs += 1
        name, *arguments = job
        return getattr(self, name)(*arguments)

    def double(self, number: int) -> int:
        return 2 * number

    def count(self) -> tuple[int, int]:
        return self.number, self.jobs

    def fail(self, message: str) -> None:
        raise RuntimeError(message)

    def leave(self, code: int) -> None:
        sys.exit(code)

    def long_text(self, text: str) -> str:
        return text + text

    def odd(self) -> Any:
        return threading.Lock()  # which no pickle takes

    def record(self, number: int, folder: Path, fatal: bool) -> int:
        """Leaves a line in a file; a fatal job kills its worker the first time."""
        with (folder / f"job{number}").open("a") as file:
            file.write("begun\n")
        if fatal and (folder / f"job{number}").read_text().count("begun") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    def advance(self, steps: int) -> int:
        """Says after each step how many it has done."""
        for step in range(steps):
            tell(step + 1)
            time.sleep(TELL_S / 4)
        return steps

    def stay(self, folder: Path) -> None:
        (folder / f"partial{self.number}").write_text(str(os.getpid()))
        (folder / f"partial{self.number}").rename(folder / f"pid{self.number}")
        while True:
            time.sleep(1)

    def hang(self, timeout_s: float) -> None:
        """Beats for a while, rests for longer than the timeout, then hangs."""
        watchdog = Watchdog(timeout_s)
        for _ in range(4):
            watchdog.beat()
            time.sleep(timeout_s / 2)
        watchdog.rest()
        time.sleep(1.5 * timeout_s)
        watchdog.beat()
        snooze()


def executor_of(kind: str, make_worker: Callable[[int], Toy], address: str | None = None) -> Executor:
    """Two workers; "forked": in processes that are forked from one that has imported this module."""
    if kind == "forked":
        return make_executor("processes", make_worker, 2, context=start_preloading(["toy_workers"]))
    return make_executor(kind, make_worker, 2, address)  # type: ignore[arg-type]


def snooze() -> None:
    while True:
        time.sleep(1)


def refuse(number: int) -> Toy:
    raise UserError("there is no such model")


def refuse_once(folder: Path, number: int) -> Toy:
    """The second one that is to be made is refused."""
    made = len(list(folder.iterdir()))
    (folder / f"made{made}").touch()
    if made == 1:
        raise MachineError("no room at present")
    return Toy(number)


def break_down(number: int) -> Toy:
    raise ValueError("bad luck")


def vanish(number: int) -> Toy:
    os._exit(3)


if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    with executor_of(kind, Toy) as executor:
        list(executor.map_unordered(iter([("stay", Path(folder))] * 2)))
