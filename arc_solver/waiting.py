"""What a person sees while a thing takes its time.

    say = Reporter(Console(stderr=True))
    say("a line")
    with waiting(say, "validating", total=12) as wait:
        wait.done = 3

In a terminal what is waited for has a row beneath the lines, which moves and goes when the thing is done. Elsewhere, as
in a log file, it is a line now and then, and none for what is done within seconds.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .clock import format_clock, format_duration
from .command import Say

QUIET_S = 5.0  # without a word are enough where no row can be seen
IMPORTING_S = 1.5  # the same, for what is imported first
LINE_S = 60.0  # between two lines on the same thing there
BAR = 24  # columns
QUOTED = 60  # characters of another program's line

T = TypeVar("T")


@dataclass(eq=False)
class Wait:
    """What is waited for, and how far it is. Its fields may be set at any time."""

    what: str
    total: float = 0.0  # in any unit; 0: nobody knows
    done: float = 0.0
    note: str = ""  # how far it is, in words
    ends: float = math.nan  # of `time.monotonic()`, if that is known better than from the share that is done
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    @property
    def eta_s(self) -> float | None:
        """Seconds to its end, as far as that is known."""
        if not math.isnan(self.ends):
            return max(0.0, self.ends - time.monotonic())
        known = 0 < self.done < self.total
        return self.elapsed_s * (self.total - self.done) / self.done if known else None

    def quote(self, line: str) -> None:
        """Notes what another program says."""
        self.note = line.strip()[:QUOTED]

    def over(self, parts: Iterable[T]) -> Iterator[T]:
        """The parts; each counts as done when the next is asked for."""
        for part in parts:
            yield part
            self.done += 1
            self.note = f"{self.done:.0f} of {self.total:.0f}"

    def expect_end_in(self, seconds: float) -> None:
        """What is left takes so long, by what is known elsewhere; infinite: nobody knows."""
        self.ends = time.monotonic() + seconds if seconds < math.inf else math.nan

    def __str__(self) -> str:
        eta = "" if self.eta_s is None else f"ETA {format_duration(self.eta_s)}"
        parts = filter(None, (self.note, f"{format_duration(self.elapsed_s)} so far", eta))
        return f"{self.what} ... {', '.join(parts)}"


class Reporter:
    """Says lines on a console, and shows what is waited for.

    Args:
        stamp: what each line begins with.
    """

    def __init__(self, console: Console, stamp: Callable[[], str] = str):
        self.console, self.stamp = console, stamp
        self.waits: list[Wait] = []
        self._live: Live | None = None

    def __call__(self, line: str) -> None:
        self.console.print(f"{self.stamp()}{line}", markup=False, highlight=False, soft_wrap=True)

    def plain(self, line: str) -> None:
        """The same, without a row for what is waited for: another program has its own in the terminal."""
        self(line)

    def __rich__(self) -> Table:
        rows = Table.grid(padding=(0, 1))
        for wait in tuple(self.waits):
            bar = ProgressBar(wait.total or None, wait.done, BAR, not wait.total, animation_time=time.monotonic())
            eta = "" if wait.eta_s is None else f"ETA {format_clock(wait.eta_s)}"
            rows.add_row(Text(wait.what), bar, Text(wait.note), format_clock(wait.elapsed_s), eta)
        return rows

    @contextmanager
    def row(self, wait: Wait) -> Iterator[None]:
        """Context manager: shows it beneath the lines."""
        self.waits.append(wait)
        if not self._live:
            self._live = Live(self, console=self.console, transient=True)
            self._live.start()
        self._live.refresh()
        try:
            yield
        finally:
            self.waits.remove(wait)
            if self._live and not self.waits:
                self._live.stop()
                self._live = None


@contextmanager
def waiting(
    say: Say, what: str, total: float = 0.0, *, quiet_s: float = QUIET_S, line_s: float = LINE_S
) -> Iterator[Wait]:
    """Context manager: shows that something is waited for, and how far it is.

    Args:
        say: a `Reporter` on a terminal shows it from the beginning; anything else is told a line now and then.
        quiet_s: seconds until the first line.
        line_s: seconds between the others.
    """
    wait = Wait(what, total)
    has_rows = isinstance(say, Reporter) and say.console.is_terminal
    with say.row(wait) if has_rows else _lines(say, wait, quiet_s, line_s):  # type: ignore[attr-defined]
        yield wait


@contextmanager
def _lines(say: Say, wait: Wait, quiet_s: float, line_s: float) -> Iterator[None]:
    ended = threading.Event()

    def tell() -> None:
        pause = quiet_s
        while not ended.wait(pause):
            say(str(wait))
            pause = line_s

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
