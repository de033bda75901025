"""How long a job may take, when a run has only so much time.

Work has its share of the time that is left, in proportion to what it costs; where there is enough for all, that is
more than it takes. Adaptation never has so little that it is of no use, and asking always has what it wants: it is
cheap beside that, and what was learnt is lost without it. What a token costs is measured on the machine in hand; and
as shares are worked out anew for every job, what one leaves over or a new estimate brings goes to those after it.
"""

import math
import time
from dataclasses import dataclass, field
from typing import NamedTuple

TRAINING = 3.0  # what a token of training costs beside one that is asked, until it was measured
LEAST_SHARE = 1 / 3  # of the time that a job wants; with less it is of little use
FIRST_SHARE = 1 / 8  # of the time that is left, at least, for a job whose cost is not known yet
ASKING = 3.0  # times the estimate is what asking wants: replies differ in length and in agreement


class Work(NamedTuple):
    """Tokens that are to go through the model."""

    adapting: float = 0.0
    asking: float = 0.0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.adapting + other.adapting, self.asking + other.asking)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.adapting - other.adapting, self.asking - other.asking)


@dataclass(eq=False)
class Budget:
    """The time that is left.

    Args:
        deadline: of `time.monotonic()`, by which the last job must have ended; infinite: there is no hurry.
    """

    workers: int
    deadline: float = math.inf
    done: Work = field(default_factory=Work)  # that was measured, and the seconds of one worker that it took
    done_s: Work = field(default_factory=Work)

    @property
    def limited(self) -> bool:
        return self.deadline < math.inf

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def s_per_predicted_token(self) -> float:
        """What a token costs that is asked, seconds of one worker; 0: not measured yet."""
        return self.done_s.asking / max(1.0, self.done.asking)

    @property
    def s_per_trained_token(self) -> float:
        """What a token of training costs."""
        return self.done_s.adapting / max(1.0, self.done.adapting)

    def equivalent_tokens(self, work: Work) -> float:
        """The work in prediction tokens; a training token counts as many times as it costs more."""
        ratio = (
            self.s_per_trained_token / self.s_per_predicted_token
            if self.s_per_trained_token and self.s_per_predicted_token
            else TRAINING
        )
        return work.asking + ratio * work.adapting

    def estimated_s(self, work: Work) -> float:
        """The seconds of a worker that it would take; NaN as long as that was not measured."""
        adapting = work.adapting * (self.s_per_trained_token or math.nan) if work.adapting else 0.0
        return adapting + work.asking * (self.s_per_predicted_token or self.s_per_trained_token / TRAINING or math.nan)

    def is_worthwhile(self, work: Work, then: Work, share: float = 0.0) -> bool:
        """Whether there is time for so much of some work, and for all that must follow it."""
        wants = share * self.estimated_s(work) if share else 0.0
        return not self.limited or not self.left_s < wants + ASKING * self.estimated_s(then)

    def time_limit_s(self, work: Work, then: Work, waiting: Work, busy_s: float) -> float:
        """The time limit in seconds for a job, its share of what is left.

        Args:
            then: what must follow it.
            waiting: all that has not begun, this work included.
            busy_s: what the jobs that run may still take, at most, together.
        """
        if not self.limited:
            return math.inf
        left, wants = self.left_s, self.estimated_s(work)
        share = (
            (self.workers * left - busy_s) * self.equivalent_tokens(work) / max(self.equivalent_tokens(waiting), 1.0)
        )
        if math.isnan(wants):
            least = left / 2 if work.asking else FIRST_SHARE * left
        elif work.asking:
            least = ASKING * wants
        else:
            least = LEAST_SHARE * wants
            left -= min(left / 2, self.estimated_s(then))
        return max(0.0, min(max(share, least), left))

    def record(self, work: Work, seconds: float) -> None:
        """What some work took, all of it adapting or all asking."""
        self.done += work
        self.done_s += Work(asking=seconds) if work.asking else Work(adapting=seconds)
