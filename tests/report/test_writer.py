"""The page of a run that goes on: written at its times, and never a reason to lose the run."""

import shutil
import time

import pytest
from forked import Forked
from solve_runs import events, words_for

from arc_solver.report.collect import RunReader
from arc_solver.report.command import main
from arc_solver.report.writer import PAGE, pages_of_run


@pytest.fixture
def writer(whole, tmp_path):
    run_dir = shutil.copytree(whole, tmp_path / "run")
    (run_dir / PAGE).unlink(missing_ok=True)
    said = []
    made = pages_of_run(run_dir, RunReader(run_dir).task_set, said.append)
    made.said = said
    return made


def test_a_run_leaves_its_page(whole):
    page = (whole / PAGE).read_text()
    assert "data-running" not in page.partition("<main>")[0]
    assert page.count('<script type="application/json"') == 12


def test_a_run_has_its_page_before_a_job_has_ended_and_says_when_it_was_killed(
    checkpoint, challenges, tmp_path, capsys
):
    """One that never ends its first jobs, and writes a page whenever it may."""
    file, out = tmp_path / "eager.py", tmp_path / "run"
    file.write_text(
        "from arc_solver.command import run_main\nfrom arc_solver.report import writer\n"
        "from arc_solver.solving.command import main\nwriter.EVERY_S, writer.SHARE = 0.0, 1.0\n"
        'if __name__ == "__main__":\n    run_main(main)\n'
    )
    endless = ["adapt.steps=1000000", "adapt.stop=never", "adapt.budget_tokens=1000000000000"]
    run = Forked(file, words_for(checkpoint, challenges, out, *endless))
    seen = set()
    for _ in range(3000):
        assert run.poll() is None, run.communicate()
        if (out / PAGE).exists():
            seen.add((out / PAGE).stat().st_mtime_ns)
        if len(seen) == 3:
            break
        time.sleep(0.04)
    run.kill()
    run.wait()
    assert len(seen) == 3
    assert {event["event"] for event in events(out)} == {"begin"}
    page = (out / PAGE).read_text()
    assert "<body data-running=" in page and "0 of 12 tasks answered" in page
    assert (out / "summary.json").exists()
    assert main([str(out)]) == 0
    assert "not finished: 0 of 12 tasks answered, and no process works on it" in capsys.readouterr().err
    assert "<body data-running=" not in (out / PAGE).read_text()


def test_a_page_reloads_itself_while_the_run_goes_on_and_is_not_written_all_the_time(writer):
    file = writer.folder / PAGE
    writer.refresh()
    assert "<body data-running=" in file.read_text()
    file.unlink()
    writer.refresh()  # it was a moment ago
    assert not file.exists()
    writer._written_at -= 3600
    writer.refresh()
    assert file.exists()
    writer.finish()
    assert "<body data-running=" not in file.read_text()
    assert writer.said == []


def test_a_page_that_cannot_be_written_is_said_once(writer):
    (writer.folder / PAGE).mkdir()
    for _ in range(2):
        writer.refresh()
        writer._written_at -= 3600
    writer.finish()
    (said,) = writer.said
    assert "report.html cannot be written (Is a directory)" in said and f"bin/report {writer.folder}" in said
    (writer.folder / PAGE).rmdir()
    writer.finish()
    assert (writer.folder / PAGE).is_file()


def test_a_deadline_comes_before_the_page(writer):
    writer.finish(until=time.monotonic() - 1)
    assert not (writer.folder / PAGE).exists()
    assert writer.said == [f"no time to write report.html: bin/report {writer.folder} does"]
