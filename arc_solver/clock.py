"""Time as a promise: when a command began, and how much of its time must be kept for its end.

What the end of a run takes is guessed first; once a part of it was measured in the run, that counts instead.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SPARE = 1.25  # times what a part took is kept for it: a machine is not always equally busy
END_S, END_SHARE = 2.0, 0.01  # of the time limit: kept for the end of the processes, and for all that is not measured


def process_age_s(process: int | None = None) -> float:
    """Seconds since a process began, by default this one: importing PyTorch takes some. 0 where that cannot be read."""
    try:
        stat = Path("/proc", "self" if process is None else str(process), "stat").read_text()
        started = int(stat.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def command_age_s() -> float:
    """Seconds since the command began: this process, or the launcher of several (torchrun, accelerate)."""
    return process_age_s(os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)


def format_duration(seconds: float) -> str:
    """A duration rounded for reading, in seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes" if seconds < 2.5 * 3600 else f"{seconds / 3600:.3g} h"


def format_clock(seconds: float) -> str:
    """A duration as a clock shows it: 1:05, or 2:00:00."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_guess(seconds: float) -> str:
    """A guess of a duration, as round as a guess is."""
    steps = ((20, 5), (90, 10), (600, 60), (3600, 300), (9000, 600), (math.inf, 1800))
    step = next(step for limit, step in steps if seconds < limit)
    return format_duration(step * max(1, round(seconds / step)))


def duration_s(text: str) -> float:
    """Seconds of a duration such as 11h30m, 40m, 1.5h or 90s.

    Raises:
        ValueError: it is none.
    """
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text)
    if not found or not text:
        raise ValueError(f"'{text}' is no duration: write it as 11h30m, 40m or 90s")
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


class RunClock:
    """A run's time limit, with time reserved for its closing parts: last validation, checkpoint, results.

    All processes are to call it alike.

    Args:
        began: by `time.monotonic()`, as if the run had never been interrupted.
        max_s: when it must have ended; infinite: it may take as long as it takes.
        broadcast: gives all processes the main one's number.
    """

    def __init__(
        self, began: float, max_s: float = math.inf, broadcast: Callable[[float], float] = lambda value: value
    ):
        self.began, self.max_s, self.broadcast = began, max_s, broadcast
        self.end_s: dict[str, float] = {}  # what each part of the end takes
        self._measured: set[str] = set()

    @property
    def limited(self) -> bool:
        return self.max_s < math.inf

    def now_s(self) -> float:
        spent_s = time.monotonic() - self.began
        return self.broadcast(spent_s) if self.limited else spent_s

    def set_estimate(self, part: str, seconds: float) -> None:
        """What a part of the end is thought to take, as long as it was not measured."""
        if part not in self._measured:
            self.end_s[part] = self.broadcast(seconds) if self.limited else seconds

    def drop_part(self, part: str) -> None:
        """There is never room for that part, and none is kept for it."""
        self.end_s.pop(part, None)

    def is_measured(self, part: str) -> bool:
        return part in self._measured

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Context manager: times one closing part; the longest time measured becomes its estimate."""
        began_s = self.now_s()
        yield
        took_s = self.now_s() - began_s
        self.end_s[part] = max(took_s, self.end_s[part]) if part in self._measured else took_s
        self._measured.add(part)

    def steps_until_s(self) -> float:
        """When the last step must have ended, for all parts of the end to be done in time."""
        return self._until_s(self.end_s.values())

    def has_time_for(self, part: str, then: tuple[str, ...] | None = None) -> bool:
        """Whether there is time for a part of the end now, and for what must follow: the whole end, or some parts."""
        if not self.limited:
            return True
        follows = self.end_s.values() if then is None else [self.end_s.get(name, 0.0) for name in then]
        return part in self.end_s and self.now_s() + SPARE * self.end_s[part] <= self._until_s(follows)

    def _until_s(self, parts_s: Iterable[float]) -> float:
        return self.max_s - END_S - END_SHARE * self.max_s - SPARE * sum(parts_s) if self.limited else math.inf
