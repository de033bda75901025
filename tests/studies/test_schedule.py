"""Which runs are done, in which order, and what a budget is spent on; with a trainer that is made up."""

import os
from dataclasses import replace

import numpy as np
import pytest

from arc_solver.errors import MachineError, UserError
from arc_solver.studies.runs import Result, _asked, make_job, read_result, result_file
from arc_solver.studies.schedule import LocalRunner, Plan, run_all
from arc_solver.studies.study import read_study

STUDY = """question = "q?"
hypothesis = "h"
metrics = ["validation_loss"]
seeds = 3
[[arms]]
name = "first"
[[arms]]
name = "calm"
set = ["train.steps=7"]
[[arms]]
name = "wild"
set = ["train.steps=8"]
"""
SPREADS = {"first": 0.01, "calm": 0.01, "wild": 1.0}


@pytest.fixture
def found(tmp_path):
    (tmp_path / "made.toml").write_text(STUDY)
    return read_study(tmp_path / "made.toml")


def made_up(job, processes=None, env=None) -> Result:
    value = 1.0 + float(np.random.default_rng(job.seed + 1).normal(0, SPREADS[job.arm]))
    return Result(job.arm, job.seed, job.key, {"validation_loss": {"a": value}}, {"train": 60.0})


def do(plan, perform=made_up, count=1) -> list[tuple[str, int]]:
    return [(job.arm, job.seed) for job, _ in run_all(plan, LocalRunner(count, perform))]


def test_each_arm_has_its_seeds_one_after_another(found, tmp_path):
    done = do(Plan(found, tmp_path / "out"))
    assert done == [(arm, seed) for seed in range(3) for arm in SPREADS]
    assert do(Plan(found, tmp_path / "out")) == []


def test_what_is_done_is_kept_and_what_changed_is_done_again(found, tmp_path):
    do(Plan(found, tmp_path / "out"))
    (tmp_path / "made.toml").write_text(STUDY.replace("steps=8", "steps=9").replace("seeds = 3", "seeds = 4"))
    changed = read_study(tmp_path / "made.toml")
    assert do(Plan(changed, tmp_path / "out")) == [
        ("wild", 0), ("wild", 1), ("wild", 2), ("first", 3), ("calm", 3), ("wild", 3),
    ]  # fmt: skip


def test_a_page_does_not_depend_on_which_run_ended_first(found, tmp_path):
    plan = Plan(found, tmp_path / "out")
    do(plan)
    plan.results = dict(reversed(plan.results.items()))
    assert [(of.arm, of.seed) for of in plan.outcome.results] == [(arm, seed) for arm in SPREADS for seed in range(3)]


def test_what_another_run_does_already_is_left_for_later(tmp_path):
    """Arms that share a training have it once: meanwhile other seeds are trained."""
    (tmp_path / "made.toml").write_text(STUDY.replace("validation_loss", "pass@2").replace("train.", "adapt."))
    plan = Plan(read_study(tmp_path / "made.toml"), tmp_path / "out", count=3)
    jobs = [plan.next() for _ in range(4)]
    assert [(job.arm, job.seed) for job in jobs] == [("first", 0), ("first", 1), ("first", 2), ("calm", 0)]
    plan.done(jobs[0], made_up(jobs[0]))
    for folder in (jobs[0].trained, jobs[0].solved):
        folder.mkdir(parents=True)
        (folder / "done.json").touch()
    later = plan.next()
    assert (later.arm, later.seed) == ("wild", 0) and len(later.undone) == 1


def test_what_is_left_takes_as_long_as_what_was_done(found, tmp_path):
    assert Plan(found, tmp_path / "out", count=2).left_s == np.inf
    runs = run_all(Plan(found, tmp_path / "out"), LocalRunner(1, made_up))
    for _ in range(4):
        next(runs)
    runs.close()
    plan = Plan(found, tmp_path / "out", count=2)
    assert plan.left_s == 5 * 60 / 2  # 5 of 9, one minute each, two at once
    for _ in range(2):
        plan.next()
    for place in plan.in_flight:
        plan.began[place] -= 3600  # of the two under way nothing can be left
    assert plan.left_s == 3 * 60 / 2
    assert Plan(found, tmp_path / "out", count=9).left_s == 60  # one run is never faster than itself
    assert Plan(found, tmp_path / "out", budget_s=60).left_s == np.inf
    do(Plan(found, tmp_path / "out"))
    assert Plan(found, tmp_path / "out").left_s == 0


def test_what_several_runs_share_is_left_once(tmp_path):
    (tmp_path / "made.toml").write_text(STUDY.replace("validation_loss", "pass@2").replace("train.", "adapt."))
    plan = Plan(read_study(tmp_path / "made.toml"), tmp_path / "out")
    job = plan.next()
    plan.done(job, replace(made_up(job), seconds={"train": 600.0, "solve": 30.0}))
    for folder in (job.trained, job.solved):
        folder.mkdir(parents=True)
        (folder / "done.json").touch()
    assert plan.left_s == 2 * 600 + 8 * 30


def test_a_result_is_that_of_its_settings(found, tmp_path):
    do(Plan(found, tmp_path / "out"))
    jobs = [make_job(found, tmp_path / "out", arm, 0) for arm in found.study.arms]
    assert all(read_result(job) for job in jobs)
    assert len({job.key for job in jobs}) == len({job.train_key for job in jobs}) == 3
    file = result_file(tmp_path / "out", "wild", 0)
    file.write_text(file.read_text().replace(jobs[2].key, jobs[1].key))
    assert read_result(jobs[2]) is None


def keys_of(tmp_path, text: str) -> list[str]:
    (tmp_path / "made.toml").write_text(text)
    found = read_study(tmp_path / "made.toml")
    return [make_job(found, tmp_path, arm, 0).key for arm in found.study.arms]


@pytest.mark.parametrize(("place", "setting"), [("", "model.path"), ("adapter", "model.adapter")])
def test_another_model_in_the_same_place_is_another_run(tmp_path, place, setting):
    text = STUDY.replace("validation_loss", "pass@2").replace("steps=7", "steps=1").replace("train.", "adapt.")
    (tmp_path / place).mkdir(exist_ok=True)
    check_that_content_counts(
        tmp_path,
        tmp_path / place / "model.safetensors",
        f'train = false\nset = ["{setting}={tmp_path / place}"]\n{text}',
    )


def test_other_tasks_in_the_same_place_are_another_run(tmp_path):
    file = tmp_path / "tasks.json"
    source = f"corpus.sources=[{{kind='tasks', path='{file}'}}]"
    check_that_content_counts(tmp_path, file, f'set = ["{source}"]\n{STUDY}')
    text = STUDY.replace("validation_loss", "pass@2")
    check_that_content_counts(tmp_path, file, f'set = ["tasks.spec={file}"]\n{text}')


def check_that_content_counts(tmp_path, file, text):
    keys = []
    for i, content in enumerate((b"one", b"other", b"one")):
        file.write_bytes(content)
        os.utime(file, ns=(i, i))
        keys.append(keys_of(tmp_path, text)[0])
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    ("head", "setting", "differs"),
    [
        ("", "vote.rule=votes", False),  # nothing is solved
        ("", "model.width=64", True),
        ('train = false\nmetrics = ["pass@2"]\n', "model.width=64", False),  # nothing is trained
        ('train = false\nmetrics = ["pass@2"]\n', "lora.rank=2", False),
        ('train = false\nset = ["adapt.joint=0.1"]\nmetrics = ["pass@2"]\n', "lora.rank=2", True),
        ('train = false\nmetrics = ["pass@2"]\n', "model.quantize=4bit", True),
        ('train = false\nmetrics = ["pass@2"]\n', "vote.rule=votes", True),
    ],
)
def test_a_run_depends_on_what_it_uses(tmp_path, head, setting, differs):
    metrics = "" if "metrics" in head else 'metrics = ["validation_loss"]\n'
    arms = f'[[arms]]\nname = "a"\n[[arms]]\nname = "b"\nset = ["{setting}"]\n'
    a, b = keys_of(tmp_path, f'question = "q?"\nhypothesis = "h"\n{head}{metrics}{arms}')
    assert (a != b) == differs


def test_what_a_model_is_quantised_to_reaches_it(tmp_path):
    (tmp_path / "made.toml").write_text(
        'question = "q?"\nhypothesis = "h"\ntrain = false\nkind = "spread"\nmetrics = ["pass@2"]\n'
        '[[arms]]\nname = "a"\nset = ["model.quantize=4bit"]\n'
    )
    found = read_study(tmp_path / "made.toml")
    assert _asked(make_job(found, tmp_path, found.study.arms[0], 0))["quantize"] == "4bit"


def test_a_budget_goes_where_the_interval_is_widest(found, tmp_path):
    """Two seeds for each arm; then the wild one has more, and the one that it is compared with."""
    plan = Plan(found, tmp_path / "out", budget_s=12 * 60)
    done = do(plan)
    assert len(done) == 12 and plan.spent_s == 12 * 60
    seeds = {arm: sum(arm == of for of, _ in done) for arm in SPREADS}
    assert seeds == {"first": 5, "calm": 2, "wild": 5}
    assert do(Plan(found, tmp_path / "out", budget_s=12 * 60)) == []
    assert len(do(Plan(found, tmp_path / "out", budget_s=14 * 60))) == 2


def test_two_runs_at_once_take_half_of_a_budget(found, tmp_path):
    plan = Plan(found, tmp_path / "out", budget_s=6 * 60, count=2)
    assert len(do(plan, count=2)) == 12


def failing(error: Exception):
    def perform(job, processes, env):
        if (job.arm, job.seed) == ("calm", 1):
            raise error
        return made_up(job)

    return perform


@pytest.mark.parametrize("error", [MachineError("it is not finite"), OSError("it is not finite")])
def test_where_a_run_fails_the_other_arms_go_on(found, tmp_path, error):
    plan = Plan(found, tmp_path / "out")
    outputs = [result for _, result in run_all(plan, LocalRunner(1, failing(error)))]
    errors = [str(result) for result in outputs if isinstance(result, MachineError)]
    assert errors == ["arm 'calm', seed 1: it is not finite"]
    assert {*plan.results} == {(arm, seed) for arm in SPREADS for seed in range(3)} - {("calm", 1), ("calm", 2)}
    assert do(Plan(found, tmp_path / "out")) == [("calm", 1), ("calm", 2)]


def test_with_a_budget_the_other_arms_go_on_too(found, tmp_path):
    plan = Plan(found, tmp_path / "out", budget_s=12 * 60)
    done = do(plan, failing(MachineError("it is not finite")))
    assert sum(arm == "wild" for arm, _ in done) > 3 and ("calm", 2) not in plan.results


def test_a_refused_run_ends_the_study_and_loses_nothing(found, tmp_path):
    plan = Plan(found, tmp_path / "out")
    with pytest.raises(UserError, match="arm 'calm', seed 1: there is no such file"):
        do(plan, failing(UserError("there is no such file")))
    assert len(plan.results) == 4
    assert len(do(Plan(found, tmp_path / "out"))) == 5


def test_a_damaged_result_is_named(found, tmp_path):
    do(Plan(found, tmp_path / "out"))
    result_file(tmp_path / "out", "calm", 1).write_text('{"arm": ')
    with pytest.raises(UserError, match=r"calm\.1\.json is damaged: delete it"):
        Plan(found, tmp_path / "out")


def test_what_was_spent_does_not_depend_on_how_many_run_at_once_later(found, tmp_path):
    def shared(job, processes, env):
        return replace(made_up(job), about={"share": job.share})

    do(Plan(found, tmp_path / "out", count=2), shared, count=2)
    assert Plan(found, tmp_path / "out").spent_s == Plan(found, tmp_path / "out", count=3).spent_s == 9 * 30
