"""`bin/study` on real trainings and real runs of bin/solve, small ones: killed, continued, on Ray; and its page."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
from forked import Forked
from small_runs import small, write_config
from solve_runs import finish, some_tasks
from toys import write_challenges

from arc_solver.files import is_locked, lock

HEAD = """question = "Does a longer training help?"
hypothesis = "It does."
metrics = ["validation_loss", "pass@2"]
config = "small.toml"
set = ["tasks.spec={tasks}", "adapt.steps=4", "adapt.rank=2", "predict.views=2", "predict.score_all=true"]
seeds = 2
[[arms]]
name = "short"
[[arms]]
name = "long"
set = ["train.steps=9"]
"""


@pytest.fixture
def study(tmp_path) -> Path:
    challenges = write_challenges(tmp_path, some_tasks(3))
    write_config(small(), tmp_path)
    file = tmp_path / "mine.toml"
    file.write_text(HEAD.format(tasks=challenges))
    return file


def words(study: Path, out: str = "out", *more: str) -> list[str]:
    return [str(study), "--out", str(study.parent / out), "--page", str(study.parent / f"{out}-page"), *more]


def page_of(study: Path, out: str = "out") -> str:
    """Without what a run cost, and where it was done."""
    text = (study.parent / f"{out}-page" / "mine.md").read_text()
    return re.sub(r"- Cost: .*", "", text)


def test_a_study_answers_its_question_and_does_nothing_twice(study):
    said = finish(Forked("arc_solver.study", words(study)))
    assert "2 arms; 0 runs of 4 done before" in said and "Against `short`" in said
    text = page_of(study)
    first = text.splitlines()
    assert first[0] == "# Does a longer training help?" and first[2].startswith("**Against `short`, loss on held-out")
    order = [
        text.index(part) for part in ("**Hypothesis**", "## What was measured", "## How", "## Machine, cost, seeds")
    ]
    assert order == sorted(order) and text.count("leak audit passed") == 2
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 2
    assert all((study.parent / "out-page" / name).stat().st_size < 300_000 for name in pictures)
    again = finish(Forked("arc_solver.study", words(study)))
    assert "4 runs of 4 done before" in again and "nothing was left to do" in again and page_of(study) == text


def test_killed_and_continued_it_gives_the_same_page(study):
    finish(Forked("arc_solver.study", words(study, "whole")))
    kills = 0
    for wait_s in (2.5, 4.0, 6.0):
        process = Forked("arc_solver.study", words(study))
        time.sleep(wait_s)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        wait_for_what_it_left(study.parent / "out")
    assert kills
    finish(Forked("arc_solver.study", words(study)))
    assert page_of(study) == page_of(study, "whole")


def wait_for_what_it_left(out: Path) -> None:
    """The commands that a killed study had begun go on, and hold the locks of what they work on."""
    for file in [*out.glob("trained/*.lock"), *out.glob("solved/*.lock")]:
        while not (held := lock(file)):
            time.sleep(0.05)
        held.close()


def test_an_interrupted_one_ends_its_runs_and_goes_on(study):
    process = Forked("arc_solver.study", words(study))
    while not list((study.parent / "out").glob("trained/*/log.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate()
    assert process.returncode == 1 and "the same command goes on" in said[0] and "Traceback" not in said[1]
    assert not any(is_locked(file) for file in (study.parent / "out").glob("trained/*.lock"))  # nobody is left
    assert "nothing was left" not in finish(Forked("arc_solver.study", words(study)))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--hours", "0"], "--hours must be above 0"),
        (["--resume"], "holds no study to resume"),
        (["--address", "auto"], "--address is for a Ray cluster"),
        (["train.stepz=3"], "arm 'short': unknown setting train.stepz; did you mean train.steps"),
        (["model.path=/nowhere"], "arm 'short', seed 0: "),
    ],
)
def test_what_is_wrong_is_one_sentence(study, more, said):
    errors = finish(Forked("arc_solver.study", words(study, "out", *more)), expect=2).splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:] and said in errors[-1]


def test_a_folder_is_one_studys(study, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(study.read_text())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.json").write_text('{"name": "mine"}')
    said = finish(Forked("arc_solver.study", words(other)), expect=2)
    assert "holds the study 'mine'" in said


def test_what_the_arms_share_is_done_once(study):
    """Arms that only select differently have one run of bin/solve, and are compared as such: by one seed too."""
    text = study.read_text().partition("[[arms]]")[0].replace("seeds = 2", "seeds = 1")
    arms = [f'[[arms]]\nname = "{rule}"\nset = ["vote.rule={rule}"]\n' for rule in ("product", "votes", "kgmon")]
    study.write_text(text.replace('metrics = ["validation_loss", "pass@2"]', 'metrics = ["pass@2"]') + "".join(arms))
    finish(Forked("arc_solver.study", words(study)))
    for what in ("trained", "solved"):
        assert len(list((study.parent / "out").glob(f"{what}/*/done.json"))) == 1
    assert "one seed" not in page_of(study).partition("## What was measured")[0]


def test_the_same_settings_again_leave_the_same_weights(study):
    head = study.read_text().partition("[[arms]]")[0].replace(', "pass@2"', "")
    arms = {"once": "", "again": "again = true\n", "weights": 'vary = ["model.seed"]\n'}
    study.write_text(f'kind = "spread"\n{head}' + "".join(f'[[arms]]\nname = "{n}"\n{of}' for n, of in arms.items()))
    finish(Forked("arc_solver.study", words(study)))
    assert "Of 2 pairs of runs with the same seed, 2 left the same weights" in page_of(study)
    results = [json.loads(file.read_text()) for file in (study.parent / "out" / "results").iterdir()]
    weights = {(r["arm"], r["seed"]): r["about"]["weights"] for r in results}
    assert len({*weights.values()}) == 3 and weights["once", 0] == weights["weights", 0]


def test_on_ray(study):
    finish(Forked("arc_solver.study", words(study, "out", "--executor", "ray")))
    finish(Forked("arc_solver.study", words(study, "local")))
    assert page_of(study) == page_of(study, "local")
