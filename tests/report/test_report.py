"""`bin/report`: a run, two runs, a training, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked, output_of
from pages import Reader, text_of, write_training
from solve_runs import finish

from arc_solver.errors import MachineError, UserError
from arc_solver.files import lock
from arc_solver.report import command
from arc_solver.report.command import main
from arc_solver.report.page import training_page
from arc_solver.report.training import read_training


@pytest.fixture
def training_dir(tmp_path):
    return write_training(tmp_path / "training")


def test_a_run_and_two_runs(whole, tmp_path, capsys):
    run_dir = shutil.copytree(whole, tmp_path / "run")
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir}/report.html\n"
    assert "12 tasks" in (run_dir / "report.html").read_text()
    other = shutil.copytree(whole, tmp_path / "other")
    assert main([str(run_dir), str(other)]) == 0
    page = (run_dir / "report-against-other.html").read_text()
    assert "A solves 0 tasks that B does not, and B 0 that A does not." in " ".join(page.split())
    assert main([str(run_dir), "--out", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").read_text() == (run_dir / "report.html").read_text()


def test_runs_of_one_name_are_told_apart_and_no_page_takes_another_s_place(whole, tmp_path, capsys):
    names = ("x/a", "y/a", "a", "x/b")
    ours, theirs, above, beside = (shutil.copytree(whole, tmp_path / name) for name in names)
    (theirs / "report.html").write_text("")
    (ours / "report.html").unlink(missing_ok=True)
    pages = []
    for other in (theirs, above, beside):
        assert main([str(ours), str(other)]) == 0
        pages.append(Path(capsys.readouterr().out.strip()))
    assert [page.name for page in pages] == [f"report-against-{name}.html" for name in ("y-a", "a", "b")]
    page = pages[0].read_text()
    assert "<h1>x/a and y/a</h1>" in page
    assert '<a href="../../y/a/report.html">y/a</a>' in page and page.count("report.html") == 1
    assert f"<h1>x/a and {tmp_path.name}/a</h1>" in pages[1].read_text()
    with pytest.raises(UserError, match="are the same run: give two"):
        main([str(ours), str(tmp_path / "y" / ".." / "x" / "a")])


def test_what_is_missing_of_a_run_is_said(whole, tmp_path, capsys):
    run_dir = shutil.copytree(whole, tmp_path / "run")
    files = sorted((run_dir / "tasks").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:300])
    files[1].unlink()
    assert main([str(run_dir), "--watch"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{run_dir}/report.html\n"
    assert f"10 of 12 tasks answered, and no process works on it; bin/solve --out {run_dir} goes on\n" in said.err
    assert f"1 file cannot be read (tasks/{files[0].name})" in said.err
    page = " ".join((run_dir / "report.html").read_text().split())
    assert "Not finished: 10 of 12 tasks answered" in page and f"tasks/{files[0].name}" in page
    main([str(whole), "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().err == ""


def test_where_no_browser_is_that_is_said(whole, tmp_path):
    page = tmp_path / "page.html"
    words = [whole, "--out", page, "--open"]
    out, errors = output_of(Forked("arc_solver.report", words, env={"PATH": ""}))
    assert (out, errors) == (f"{page}\n", f"no browser could be started here: open {page} in one\n")


def test_a_training_has_curves_and_its_mixture(training_dir):
    facts = read_training(training_dir)
    assert not facts.is_finished and facts.stages == [("a", 30), ("b", 40)]
    assert facts.rate[1][0] == 5e-4 and facts.rate[1][-1] == 2.5e-4
    assert (facts.validation, facts.accuracy) == (([0.002], [0.7]), ([0.002], [0.25]))
    assert set(facts.speed[1]) == {100.0}  # of steps alone: a second each, whatever lies between them
    assert main([str(training_dir)]) == 0
    page = Reader((training_dir / "report.html").read_text())
    text = " ".join(" ".join(page.text).split())
    for said in ("Loss", "Learning rate", "Generated answers", "Speed", "75.0%", "<b>mine", "up to step 40", "25.0%"):
        assert said in text, said
    assert page.loaded == []


def test_a_training_says_how_far_it_is_and_how_it_ended(training_dir):
    def says(every_s=None) -> str:
        return text_of(training_page(read_training(training_dir), every_s))

    assert "step 40 of 100, 40%" in says() and "the others take" not in says()
    assert "step 40 of 100, 40%; the others take about 2 minutes, if no clock ends it before" in says(10.0)  # 2 s each
    log = training_dir / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 40, "tokens": 4000, "finished": true}\n')
    again = "bin/train --out with this folder, --resume and more --max-minutes goes on"
    assert f"the clock ended it after 40 of 100 steps; {again}" in says()
    assert not read_training(training_dir).is_finished
    config = json.loads((training_dir / "config.json").read_text())
    config["stages"][1]["train"]["steps"] = 10
    (training_dir / "config.json").write_text(json.dumps(config))
    assert "finished: it took all of its 40 steps" in says() and read_training(training_dir).is_finished


def test_what_a_training_was_made_of_is_said_in_short(training_dir):
    held_out, commit = [f"task{i}" for i in range(20)], "0123456789abcdef" * 2 + "01234567-dirty"
    about = {"held_out": held_out, "left_out": {"RE-ARC": {"f76d97a5": "x"}}, "commit": commit, "began_with": ""}
    (training_dir / "model").mkdir()
    (training_dir / "model" / "training.json").write_text(json.dumps(about))
    text = text_of(training_page(read_training(training_dir)))
    for said in (
        "held-out tasks 20: task0, task1, task2, task3, task4 and 15 more",
        "tasks that the audit left out 1: f76d97a5 of RE-ARC",
        "commit 0123456789ab-dirty",
        "run.seed 3 0",
        "train.steps of stage b 70 30",
    ):
        assert said in text, said
    assert "train.lr of stage a" not in text
    (training_dir / "model" / "training.json").write_text(json.dumps(about | {"left_out": {}}))
    assert "the audit left out" not in text_of(training_page(read_training(training_dir)))


def test_the_first_step_of_a_training_is_seen(tmp_path):
    page = training_page(read_training(write_training(tmp_path / "training", steps=1)))
    assert "step 1 of 100, 1%" in page and page.count("<figure>") == 2
    assert len(re.findall("<use [^>]*fill: #3f83d6", page)) == 2  # a point in each chart


def test_the_same_training_has_the_same_page(training_dir):
    main([str(training_dir)])
    first = (training_dir / "report.html").read_bytes()
    main([str(training_dir)])
    assert (training_dir / "report.html").read_bytes() == first


def test_a_watched_run_is_written_until_it_has_ended(whole, tmp_path, monkeypatch):
    run_dir, page = shutil.copytree(whole, tmp_path / "run"), tmp_path / "page.html"
    held, seen = lock(run_dir / "lock"), []

    def a_moment(_: float) -> None:
        seen.append("<body data-running=" in page.read_text())
        if len(seen) == 2:
            held.close()

    monkeypatch.setattr(command.time, "sleep", a_moment)
    assert main([str(run_dir), "--watch", "--out", str(page)]) == 0
    assert seen == [True, True]
    assert "<body data-running=" not in page.read_text()


def test_a_watched_training_is_written_until_it_has_ended(training_dir, monkeypatch):
    log, page, seen = training_dir / "log.jsonl", training_dir / "report.html", []

    def a_moment(_: float) -> None:
        seen.append("<body data-running=" in page.read_text())
        if len(seen) == 2:
            log.write_text(log.read_text() + '{"step": 40, "tokens": 4000, "finished": true}\n')

    monkeypatch.setattr(command.time, "sleep", a_moment)
    assert main([str(training_dir), "--watch"]) == 0
    assert seen == [True, True]
    assert "<body data-running=" not in page.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is no run of bin/solve, a folder is missing"),
        (["a", "b", "c"], "give one folder, or two runs to compare"),
        (["a", "b", "--watch"], "give one folder, or two runs to compare, without --watch"),
    ],
)
def test_what_is_refused(words, said, training_dir, monkeypatch):
    monkeypatch.chdir(training_dir.parent)
    with pytest.raises(UserError, match=said):
        main(words)


def test_what_cannot_be_written_is_said(training_dir, tmp_path):
    with pytest.raises(MachineError, match=r"no/page\.html cannot be written"):
        main([str(training_dir), "--out", str(tmp_path / "no" / "page.html")])
    (training_dir / "log.jsonl").unlink()
    with pytest.raises(UserError, match="has taken no step"):
        main([str(training_dir)])


def test_it_starts_without_pytorch(whole, tmp_path):
    code = (
        "import sys\nfrom arc_solver.report.command import main\n"
        f"code = main([{str(whole)!r}, '--out', {str(tmp_path / 'page.html')!r}])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    file = tmp_path / "start.py"
    file.write_text(code)
    assert subprocess.run([sys.executable, "-P", file]).returncode == 0
    assert "usage: bin/report" in finish(Forked("arc_solver.report", ["--help"]))
