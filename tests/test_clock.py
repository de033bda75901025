"""What is kept of a run's time for its end."""

import math
import subprocess
import time

import pytest

from arc_solver.clock import SPARE, RunClock, format_duration, format_guess, process_age_s


def test_the_age_of_a_process():
    before = time.monotonic()
    with subprocess.Popen(["sleep", "60"]) as process:
        time.sleep(0.05)
        age_s = process_age_s(process.pid)
        assert 0 < age_s <= time.monotonic() - before + 0.01  # the kernel counts in hundredths
        assert process_age_s() > age_s
        process.kill()
    assert process_age_s(2**30) == 0.0  # there is none


class Ticking(RunClock):
    """A run's clock that stands still until it is told what something took."""

    def __init__(self, max_s: float):
        super().__init__(0.0, max_s)
        self.spent_s = 0.0

    def now_s(self) -> float:
        return self.spent_s

    def take(self, part: str, seconds: float) -> None:
        with self.measuring(part):
            self.spent_s += seconds


PARTS = {"checkpoint": 3.0, "validation": 20.0, "results": 5.0}


@pytest.mark.parametrize("slower", [1.0, SPARE])
def test_the_end_is_in_time_if_its_parts_take_what_was_thought_and_a_little_more(slower):
    clock = Ticking(100.0)
    for part, seconds in PARTS.items():
        clock.set_estimate(part, seconds)
    clock.spent_s = clock.steps_until_s()
    clock.take("checkpoint", slower * PARTS["checkpoint"])
    assert clock.has_time_for("validation", then=("results",))
    clock.take("validation", slower * PARTS["validation"])
    clock.take("results", slower * PARTS["results"])
    assert clock.now_s() < 100.0


def test_nothing_is_begun_in_the_middle_that_leaves_no_room_for_the_end():
    clock = Ticking(100.0)
    for part, seconds in PARTS.items():
        clock.set_estimate(part, seconds)
    for now_s in range(100):
        clock.spent_s = float(now_s)
        for part, seconds in PARTS.items():
            assert clock.has_time_for(part) == (now_s + SPARE * seconds <= clock.steps_until_s())
    assert not clock.has_time_for("answers")  # nobody said what they take


def test_a_measurement_replaces_the_guess_and_the_longest_counts():
    clock = Ticking(100.0)
    clock.set_estimate("validation", 20.0)
    until_s = []
    for seconds in (4.0, 6.0, 5.0):
        clock.take("validation", seconds)
        clock.set_estimate("validation", 20.0)
        until_s.append(clock.steps_until_s())
    assert until_s[0] - until_s[1] == pytest.approx(2.0 * SPARE) and until_s[1] == until_s[2]
    clock.drop_part("validation")
    assert not clock.has_time_for("validation") and clock.steps_until_s() > until_s[0]


def test_without_a_limit_there_is_room_for_all():
    clock = Ticking(math.inf)
    clock.spent_s = 1e9
    assert clock.steps_until_s() == math.inf and clock.has_time_for("validation")


def test_all_processes_have_the_time_of_the_main_one():
    clock = RunClock(time.monotonic(), 100.0, broadcast=lambda _: 12.5)
    clock.set_estimate("validation", 99.0)
    assert clock.now_s() == 12.5 and clock.end_s == {"validation": 12.5}


def test_durations_as_they_are_said():
    assert [format_duration(s) for s in (0.2, 40, 89, 95, 600)] == ["1 s", "40 s", "89 s", "2 minutes", "10 minutes"]
    guesses = ["5 s", "40 s", "2 minutes", "25 minutes", "120 minutes", "11.5 h"]
    assert [format_guess(s) for s in (1, 42, 100, 1400, 7250, 41_000)] == guesses
    assert [format_duration(3600 * h) for h in (1, 2.4, 11.5, 14)] == ["60 minutes", "144 minutes", "11.5 h", "14 h"]
