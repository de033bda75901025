"""Keeps the page of a run or a training up to date while it goes on, and takes little of its time.

A page is no reason to lose a run: what goes wrong with it is said once, and the run goes on.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

from ..command import Say, as_called
from ..errors import first_line
from ..files import write_whole
from ..puzzles import TaskSet
from .collect import RunReader
from .page import EVERY_S, run_page, training_page
from .training import read_training

PAGE = "report.html"
SHARE = 0.02  # of the time may go into pages


class PageWriter:
    """The page of a folder.

    Args:
        page: makes it; it is given the seconds until the next one, at most, or None: there will be none.
        say: takes what is wrong, if something is.
    """

    def __init__(self, folder: Path, page: Callable[[float | None], str], say: Say):
        self.folder, self.page, self.say = folder, page, say
        self._written_at, self._took_s = -math.inf, 0.0
        self._has_failed = False

    @property
    def every_s(self) -> float:
        return max(EVERY_S, self._took_s / SHARE)

    def refresh(self) -> None:
        """Writes the page of a run that goes on, if it is time to. What failed is not tried again before the end."""
        if time.monotonic() - self._written_at > self.every_s and not self._has_failed:
            self._write(is_running=True)

    def finish(self, until: float = math.inf) -> None:
        """Writes the page of a run that has ended, unless it takes longer than until then, by `time.monotonic()`."""
        if time.monotonic() + self._took_s > until:
            self.say(as_called(f"no time to write {PAGE}: bin/report {self.folder} does"))
        else:
            self._write(is_running=False)

    def _write(self, is_running: bool) -> None:
        began = time.monotonic()
        try:
            write_whole(self.folder / PAGE, self.page(self.every_s if is_running else None), sync=False)
        except Exception as error:
            if not self._has_failed:
                why = getattr(error, "strerror", None) or first_line(error)
                self.say(as_called(f"{PAGE} cannot be written ({why}); bin/report {self.folder} tries again"))
            self._has_failed = True
        self._written_at = time.monotonic()
        self._took_s = self._written_at - began


def pages_of_run(run_dir: Path, task_set: TaskSet, say: Say) -> PageWriter:
    readers: list[RunReader] = []  # one, which knows the tasks that it has read

    def page(every_s: float | None) -> str:
        if not readers:
            readers.append(RunReader(run_dir, task_set))
        return run_page(readers[0].read(is_running=every_s is not None), every_s or EVERY_S)

    return PageWriter(run_dir, page, say)


def pages_of_training(out_dir: Path, say: Say) -> PageWriter:
    return PageWriter(out_dir, lambda every_s: training_page(read_training(out_dir), every_s), say)
