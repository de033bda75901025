"""`bin/study` on real trainings and real runs of bin/solve, small ones: killed, continued, on Ray; and its page."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from forked import Forked
from small_runs import small, write_config
from solve_runs import finish, some_tasks
from toys import write_challenges

from arc_solver.errors import MachineError
from arc_solver.files import is_locked, lock
from arc_solver.studies.runs import Processes, make_job, perform
from arc_solver.studies.study import read_study
from arc_solver.training.train import BEGINNING

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


def write_study(folder: Path) -> Path:
    challenges = write_challenges(folder, some_tasks(3))
    write_config(small(), folder)
    file = folder / "mine.toml"
    file.write_text(HEAD.format(tasks=challenges))
    return file


@pytest.fixture
def study(tmp_path) -> Path:
    return write_study(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A study whose runs are all done; what they said is beside it."""
    file = write_study(tmp_path_factory.mktemp("done"))
    file.with_suffix(".said").write_text(finish(Forked("arc_solver.study", words(file))))
    return file


def words(study: Path, *more: str) -> list[str]:
    return [str(study), "--out", str(study.parent / "out"), "--page", str(study.parent / "page"), *more]


def page_of(study: Path) -> str:
    """Without what a run cost, and from where the study came."""
    text = (study.parent / "page" / "mine.md").read_text()
    return re.sub(r"- (Cost: |A run took).*", "", text).replace(str(study.parent), "")


def test_a_study_answers_its_question_and_does_nothing_twice(done):
    said = done.with_suffix(".said").read_text()
    assert "2 arms; 0 runs of 4 done before" in said
    assert re.search("(Better than|Worse than|Cannot be told from) `short`: `long`", said)
    text = page_of(done)
    first = text.splitlines()
    assert first[0] == "# Does a longer training help?" and re.match(r"\*\*(Better|Worse|Cannot)", first[2])
    says = "Loss on held-out tasks, nats a token, less is better: differences with 95% intervals; `short` has "
    assert re.fullmatch(rf".*\. {says}\d\.\d{{4}}\.\*\*", first[2])
    parts = ("**Hypothesis**", "## What was measured", "## How", "## Machine, cost, seeds")
    order = [text.index(part) for part in parts]
    assert order == sorted(order) and text.count("leak audit passed") == 2
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 2
    assert all((done.parent / "page" / name).stat().st_size < 300_000 for name in pictures)
    again = finish(Forked("arc_solver.study", words(done, "--resume")))
    assert "4 runs of 4 done before" in again and "nothing was left to do" in again and page_of(done) == text


def test_killed_and_continued_it_gives_the_same_page(study, done):
    process = Forked("arc_solver.study", words(study))
    for place in ("trained/*/log.jsonl", "trained/*/done.json", "solved/*/log.jsonl"):
        while not list((study.parent / "out").glob(place)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_for_what_it_left(study.parent / "out")
        process = Forked("arc_solver.study", words(study))
    finish(process)
    assert page_of(study) == page_of(done)


@pytest.mark.parametrize("large", ["checkpoints", "adapters"])
def test_killed_while_it_deletes_what_is_large_it_goes_on(study, monkeypatch, large):
    job = make_job(found := read_study(study), study.parent / "out", found.study.arms[0], 0)

    class Killed(BaseException):
        pass

    def killed_halfway(folder, **_):
        if folder.name == large:
            for file in folder.rglob("*.json"):
                file.unlink()
            raise Killed

    (job.trained / "partition").mkdir(parents=True)
    (job.trained / BEGINNING).touch()  # as by a training that was killed then
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", killed_halfway)
        perform(job, Processes(), {})
    assert perform(job, Processes(), {}).tasks.keys() == {"validation_loss", "pass@1", "pass@2", "coverage"}
    assert not list((study.parent / "out").glob(f"*/*/{large}"))


def test_tasks_that_fell_back_or_lost_their_answers_are_solved_again(study):
    head, *arms = study.read_text().replace('"validation_loss", ', "").partition("[[arms]]")
    study.write_text(f"train = false\n{head}{''.join(arms).replace('train.steps', 'adapt.steps')}")
    job = make_job(found := read_study(study), study.parent / "out", found.study.arms[0], 0)
    first = perform(job, Processes(), {})
    one, other, _ = sorted(job.solved.glob("tasks/*.json"))
    (job.solved / "done.json").unlink()
    one.write_text(json.dumps({**json.loads(one.read_text()), "fallback": "unadapted"}))
    assert perform(job, Processes(), {}).tasks == first.tasks
    assert json.loads(one.read_text())["fallback"] is None
    other.unlink()
    with pytest.raises(MachineError, match=r"the answers to 1 task of .* were lost"):
        perform(job, Processes(), {})
    assert perform(job, Processes(), {}).tasks == first.tasks


def wait_for_what_it_left(out: Path) -> None:
    """The commands that a killed study had begun go on, and hold the locks of what they work on."""
    for file in [*out.glob("trained/*.lock"), *out.glob("solved/*.lock")]:
        while is_locked(file):
            time.sleep(0.05)


def test_what_an_earlier_call_left_running_is_waited_for(study):
    study.write_text(study.read_text().replace(', "pass@2"', "").replace("seeds = 2", "seeds = 1"))
    out, found = study.parent / "out", read_study(study)
    (out / "trained").mkdir(parents=True)
    (out / "study.json").write_text(json.dumps({"name": "mine", "question": found.study.question}))
    short = make_job(found, out, found.study.arms[0], 0)
    with lock(out / "trained" / f"{short.train_key}.lock"):
        process = Forked("arc_solver.study", words(study))
        while not (out / "results" / "long.0.json").exists():
            assert process.poll() is None
            time.sleep(0.02)
        assert not (out / "trained" / short.train_key).exists()
    said = finish(process)
    assert f"1 run of an earlier call still going on, and waited for: {out}/trained/{short.train_key}" in said
    assert (out / "results" / "short.0.json").exists()


def test_an_interrupted_one_ends_its_runs_and_says_what_is_known(study):
    process = Forked("arc_solver.study", words(study, "--parallel", "1"))
    while not list((study.parent / "out").glob("results/*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate()
    assert process.returncode == 1 and "the same command goes on" in said[0] and "Traceback" not in said[1]
    assert not any(is_locked(file) for file in (study.parent / "out").glob("*/*.lock"))  # nobody is left
    assert "Nothing is known yet" in page_of(study) or "cannot tell" in page_of(study)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--hours", "0"], "--hours must be above 0"),
        (["--hours", "inf"], "--hours must be above 0, and finite"),
        (["--hours", "1", "--seeds", "2"], "leave it or --seeds out"),
        (["--page", "/proc"], "the page cannot be written to /proc"),
        (["--resume"], "holds no study to resume"),
        (["--address", "auto"], "--address is for a Ray cluster"),
        (["train.stepz=3"], "arm 'short': unknown setting train.stepz; did you mean train.steps"),
        (["model.path=/nowhere"], "arm 'short', seed 0: "),
        (["train.steps=5"], "arm 'long' sets train.steps itself: leave train.steps=5 out"),
        (["--seeds", "0"], "--seeds is at least 1"),
        (["tasks.spec=/nowhere.json"], "'/nowhere.json' not found"),
    ],
)
def test_what_is_wrong_is_one_sentence(study, more, said):
    errors = finish(Forked("arc_solver.study", words(study, "--parallel", "1", *more)), expect=2).splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:] and said in errors[-1]


def test_a_folder_is_one_studys(done, tmp_path):
    other = done.with_name("other.toml")
    other.write_text(done.read_text())
    assert "holds the study 'mine'" in finish(Forked("arc_solver.study", words(other)), expect=2)
    again = tmp_path / "mine.toml"
    text = done.read_text().replace("Does a longer", "Why does a longer")
    again.write_text(text.replace("small.toml", f"{done.parent}/small.toml"))
    said = finish(Forked("arc_solver.study", [str(again), "--out", str(done.parent / "out")]), expect=2)
    assert "holds a study of another question ('Does a longer training help?')" in said


def test_a_page_of_something_else_is_never_lost(study):
    page = study.parent / "page" / "mine.md"
    page.parent.mkdir()
    page.write_text("# My notes\n")
    said = finish(Forked("arc_solver.study", words(study)), expect=2)
    assert f"{page} is no page of this question: give another --page" in said and page.read_text() == "# My notes\n"
    assert not (study.parent / "out").exists()


def test_a_page_of_more_runs_is_left_as_it_is(done, tmp_path):
    more = page_of(done).replace(": 4 runs", ": 44 runs")
    (tmp_path / "mine.md").write_text(more)
    said = finish(Forked("arc_solver.study", [*words(done), "--page", str(tmp_path)]))
    assert "is of 44 runs, and was left as it is" in said and (tmp_path / "mine.md").read_text() == more


def test_a_page_has_the_hypothesis_from_before_the_first_run_and_says_how_often_it_was_read(study):
    text = study.read_text().replace(', "pass@2"', "")
    study.write_text(text)
    finish(Forked("arc_solver.study", words(study)))
    assert "The answer was read with" not in page_of(study)
    study.write_text(text.replace("It does.", "I knew it."))
    said = finish(Forked("arc_solver.study", words(study, "--seeds", "3")))
    assert "another hypothesis by now" in said
    assert "written before the first run: It does.\n" in page_of(study)
    assert "The answer was read with 2, then 3 seeds of the first arm" in page_of(study)
    assert "bin/study /mine.toml --seeds 3\n" in page_of(study)


def test_arms_that_come_to_the_same_runs_are_refused(study):
    study.write_text(study.read_text().replace("train.steps=9", "kaggle.owner=me"))
    (study.parent / "out").mkdir()
    (study.parent / "out" / "study.json.part").touch()  # of a call that was killed as it began
    said = finish(Forked("arc_solver.study", words(study)), expect=2)
    assert "arms 'short' and 'long' come to the same runs: change a setting that they depend on" in said


def test_tasks_without_solutions_are_refused_before_anything_is_trained(study):
    study.with_name("toy_solutions.json").unlink()
    assert "no solution of" in finish(Forked("arc_solver.study", words(study)), expect=2)
    assert not (study.parent / "out" / "trained").exists()


def test_tasks_that_were_trained_on_are_refused_unless_that_is_the_question(study):
    tasks = study.with_name("toy_challenges.json")
    source = f'corpus.sources=[{{kind="tasks", path="{tasks}"}}]'
    head = study.read_text().partition("[[arms]]")[0].replace("seeds = 2", "seeds = 1")
    study.write_text(f'kind = "spread"\n{head}[[arms]]\nname = "one"\n')
    said = finish(Forked("arc_solver.study", words(study, source)), expect=2)
    assert "training task" in said and not list((study.parent / "out").glob("trained/*/log.jsonl"))
    study.write_text(f"seen = true\n{study.read_text()}")
    finish(Forked("arc_solver.study", words(study, source)))
    assert "Training on them is part of the question: what is measured is no score." in page_of(study)


def test_a_model_that_was_trained_on_the_tasks_is_refused_before_it_is_asked(study):
    text = study.read_text().replace('"validation_loss", ', "").replace("train.steps", "adapt.steps")
    text = re.sub(r'"tasks.spec=[^"]*", "adapt.steps=4"', '"tasks.spec=arc-agi-1/training", "tasks.limit=3"', text)
    study.write_text(f"train = false\n{text}")
    said = finish(Forked("arc_solver.study", words(study)), expect=2)
    assert "leak audit: 3 of 3 tasks found" in said and "a study measures what was not trained on" in said
    assert not (study.parent / "out" / "solved").exists()


def test_what_the_arms_share_is_done_once(study):
    """Arms that only select differently have one run of bin/solve, and are compared as such: by one seed too."""
    head = study.read_text().partition("[[arms]]")[0].replace("seeds = 2", "seeds = 1")
    head = head.replace('"validation_loss", ', "")
    arms = [f'[[arms]]\nname = "{rule}"\nset = ["vote.rule={rule}"]\n' for rule in ("product", "votes", "kgmon")]
    study.write_text(head + "".join(arms))
    finish(Forked("arc_solver.study", words(study)))
    for what in ("trained", "solved"):
        assert len(list((study.parent / "out").glob(f"{what}/*/done.json"))) == 1
    assert "one seed" not in page_of(study).partition("## What was measured")[0]


def test_an_adapter_that_was_trained_is_merged_or_continued(study, done):
    base = next((done.parent / "out" / "trained").glob("*/model"))
    head = study.read_text().partition("[[arms]]")[0].replace("seeds = 2", "seeds = 1")
    lora = [f"model.path={base}", "lora.enabled=true", "lora.rank=2", "train.optimizer=adamw"]
    head = head.replace("set = [", f"set = {json.dumps(lora)[:-1]}, ").replace('"validation_loss", ', "")
    study.write_text(f'{head}[[arms]]\nname = "fresh"\n[[arms]]\nname = "on"\nset = ["adapt.start=pretrained"]\n')
    finish(Forked("arc_solver.study", words(study)))
    (trained,) = (study.parent / "out" / "trained").glob("*/done.json")
    asked = [json.loads(file.read_text())["model"] for file in (study.parent / "out" / "solved").glob("*.json")]
    models = {(model["path"], model["adapter"]) for model in asked}
    assert models == {(str(trained.parent / "model"), ""), (str(base), str(trained.parent / "adapter"))}


def test_the_same_settings_again_leave_the_same_weights_and_give_the_same_answers(study):
    head = study.read_text().partition("[[arms]]")[0].replace('"pass@2"', '"accuracy"')
    head = head.replace('"adapt.steps=4"', '"validation.accuracy_every=6", "validation.accuracy_prompts=4"')
    arms = {"once": "", "again": "again = true\n", "weights": 'vary = ["model.seed"]\n'}
    study.write_text(f'kind = "spread"\n{head}' + "".join(f'[[arms]]\nname = "{n}"\n{of}' for n, of in arms.items()))
    finish(Forked("arc_solver.study", words(study)))
    assert "Of 2 pairs of runs with the same seed, 2 left the same weights" in page_of(study)
    results = [json.loads(file.read_text()) for file in (study.parent / "out" / "results").iterdir()]
    weights = {(r["arm"], r["seed"]): r["about"]["weights"] for r in results}
    assert len({*weights.values()}) == 3 and weights["once", 0] == weights["weights", 0]
    assert all(1 <= len(r["tasks"]["accuracy"]) <= 4 and not sum(r["tasks"]["accuracy"].values()) for r in results)
    assert "Answers generated to held-out tasks that are right (`accuracy`)" in page_of(study)


def test_on_ray_the_results_are_the_same(study, done):
    study.write_text(study.read_text().replace(', "pass@2"', ""))
    finish(Forked("arc_solver.study", words(study, "--executor", "ray")))
    for file in (study.parent / "out" / "results").iterdir():
        ours, theirs = (json.loads((of.parent / "out" / "results" / file.name).read_text()) for of in (study, done))
        assert ours["tasks"]["validation_loss"] == theirs["tasks"]["validation_loss"]
        assert ours["about"]["weights"] == theirs["about"]["weights"]
