"""The page of a run that goes on: written at its times, and never a reason to lose the run."""

import shutil
import time

import pytest

from arc_solver.report.collect import RunReader
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
