"""Keeps the page of a run up to date while it goes on, and takes little of its time.

A page is no reason to lose a run: what goes wrong with it is said once, and the run goes on.
"""

import math
import time
from pathlib import Path

from ..command import Say, as_called
from ..errors import first_line
from ..files import write_whole
from ..puzzles import TaskSet
from .collect import RunReader
from .page import run_page

PAGE = "report.html"
EVERY_S = 10.0  # between two pages, at least
SHARE = 0.02  # of the time may go into them


class PageWriter:
    """`say` takes what is wrong, if something is."""

    def __init__(self, run_dir: Path, task_set: TaskSet, say: Say):
        self.run_dir, self.task_set, self.say = run_dir, task_set, say
        self._reader: RunReader | None = None
        self._written_at, self._took_s = -math.inf, 0.0
        self._has_failed = False

    def refresh(self) -> None:
        """Writes the page of a run that goes on, if it is time to. What failed is not tried again before the end."""
        since_s = time.monotonic() - self._written_at
        if since_s > max(EVERY_S, self._took_s / SHARE) and not self._has_failed:
            self._write(is_running=True)

    def finish(self, until: float = math.inf) -> None:
        """Writes the page of a run that has ended, unless it takes longer than until then, by `time.monotonic()`."""
        if time.monotonic() + self._took_s > until:
            self.say(as_called(f"no time to write {PAGE}: bin/report {self.run_dir} does"))
        else:
            self._write(is_running=False)

    def _write(self, is_running: bool) -> None:
        began = time.monotonic()
        try:
            self._reader = self._reader or RunReader(self.run_dir, self.task_set)
            write_whole(self.run_dir / PAGE, run_page(self._reader.read(is_running)), sync=False)
        except Exception as error:
            if not self._has_failed:
                why = getattr(error, "strerror", None) or first_line(error)
                self.say(as_called(f"{PAGE} cannot be written ({why}); bin/report {self.run_dir} tries again"))
            self._has_failed = True
        self._written_at = time.monotonic()
        self._took_s = self._written_at - began
