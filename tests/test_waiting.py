import io
import math
import time

import pytest
from rich.console import Console

from arc_solver.waiting import Reporter, Wait, waiting


def terminal() -> Reporter:
    return Reporter(Console(file=io.StringIO(), force_terminal=True, width=100))


def shown(say: Reporter) -> str:
    """What the rows look like now."""
    console = Console(file=io.StringIO(), width=100)
    console.print(say)
    return console.file.getvalue()


def test_the_time_that_is_left():
    wait = Wait("it", total=4, began=time.monotonic() - 10)
    assert wait.eta_s is None and str(wait) == "it ... 10 s so far"
    wait.done, wait.note = 1, "1 of 4"
    assert wait.eta_s == pytest.approx(30, abs=1) and str(wait) == "it ... 1 of 4, 10 s so far, ETA 30 s"
    wait.expect_end_in(600)
    assert str(wait).endswith("ETA 10 minutes")
    wait.expect_end_in(math.inf)
    assert str(wait).endswith("ETA 30 s")


def test_a_log_file_has_a_line_now_and_then():
    lines: list[str] = []
    with waiting(lines.append, "reading", total=3, quiet_s=0, line_s=0.001) as wait:
        for _ in wait.over(range(3)):
            pass
        while len(lines) < 3 or "3 of 3" not in lines[-1]:
            time.sleep(0.001)
    assert lines[0].startswith("reading ... ") and lines[-1] == "reading ... 3 of 3, 1 s so far"
    count = len(lines)
    time.sleep(0.01)
    assert len(lines) == count, "it goes on after its end"


def test_what_is_done_soon_has_no_line_in_a_log_file():
    say = Reporter(Console(file=io.StringIO()), stamp=lambda: "[12:00:00] ")
    with waiting(say, "reading"):
        say("a line of [lora] that is " + 90 * "x")
    assert say.console.file.getvalue() == f"[12:00:00] a line of [lora] that is {90 * 'x'}\n"


def test_a_terminal_has_a_row_for_each_until_it_is_done():
    say = terminal()
    with waiting(say, "training") as outer:
        outer.quote("step 7 of [lora]\n")
        with pytest.raises(ValueError), waiting(say, "validating", total=2) as inner:
            next(parts := inner.over(range(2)))
            next(parts)
            say("a line")
            first, second = shown(say).splitlines()
            assert "training" in first and "step 7 of [lora]" in first and "0:00" in first
            assert "validating" in second and "1 of 2" in second and "ETA 0:00" in second
            raise ValueError
        assert "training" in shown(say) and "validating" not in shown(say)
    assert shown(say).strip() == ""
    drawn = say.console.file.getvalue()
    assert "a line\n" in drawn and "validating" in drawn
    with waiting(say.plain, "fetching", quiet_s=60):  # another program draws
        assert shown(say).strip() == ""
