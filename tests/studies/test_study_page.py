"""What a page says of results that are made up, so that the answer is known."""

from dataclasses import replace

import pytest

from arc_solver.studies.outcome import Outcome
from arc_solver.studies.page import History, answer, write_page
from arc_solver.studies.runs import Result
from arc_solver.studies.study import read_study

HEAD = 'question = "q?"\nhypothesis = "h"\n'


def study_of(tmp_path, kind: str, arms: dict[str, str], metric: str, more: str = ""):
    text = f'kind = "{kind}"\n{more}metrics = ["{metric}"]\n{HEAD}'
    text += "".join(f'[[arms]]\nname = "{name}"\n{of}\n' for name, of in arms.items())
    file = tmp_path / "made.toml"
    file.write_text(text)
    return read_study(file)


def solved(arm: str, seed: int, share: float, **about) -> Result:
    tasks = {f"{i:03d}": float(i < 100 * share) for i in range(100)}
    return Result(arm, seed, "", {"pass@2": tasks}, {"solve": 60.0}, about)


def page_of(found, results, tmp_path) -> str:
    write_page(found, Outcome(found.study, results), tmp_path, tmp_path / "made.md", History("h", (), 60.0))
    return (tmp_path / "made.md").read_text()


def test_arms_that_cannot_be_told_are_named_together_if_they_are_many(tmp_path):
    arms = {name: f'set = ["adapt.steps={steps}"]' for steps, name in enumerate("abcdef", 1)}
    found = study_of(tmp_path, "compare", arms, "pass@2", "train = false\n")
    results = [solved(arm, seed, 0.5 + 0.3 * (arm == "f") + 0.01 * seed) for arm in arms for seed in range(3)]
    said = answer(Outcome(found.study, results))
    assert said.startswith(
        "**Better than `a`: `f` (+30.0, +21.3 to +39.0). Cannot be told from `a`: `b`, `c`, `d`, `e` ("
    )
    assert said.endswith(
        "(all within +0.0 to +0.0). Solved by two attempts: differences in percentage points with 95% intervals;"
        " `a` has 51.0%.**"
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {1: 1.5, 2: 1.0, 4: 0.75, 8: 0.625},
            "falls with the number of rules, x, as a + b / x^p: p is 1.00 (1.0",
        ),
        ({1: 0.2, 2: 0.5, 4: 0.65, 8: 0.725}, "rises with the number of rules, x, as a + b / x^p: p is 1.00"),
    ],
)
def test_a_power_law_is_written_out(tmp_path, values, said):
    arms = {f"{x}": f'x = {x}\nset = ["train.steps={x}"]' for x in values}
    found = study_of(tmp_path, "scaling", arms, "validation_loss", 'axis = "number of rules"\n')
    results = [Result(f"{x}", 0, "", {"validation_loss": {"a": y}}) for x, y in values.items()]
    assert said in answer(Outcome(found.study, results))


def test_an_exponent_of_which_nothing_is_known_has_no_interval(tmp_path):
    arms = {f"{x}": f'x = {x}\nset = ["train.steps={x}"]' for x in (1, 2, 4)}
    found = study_of(tmp_path, "scaling", arms, "validation_loss")
    noise = {(1, 0): 1.0, (1, 1): 2.0, (2, 0): 1.9, (2, 1): 1.0, (4, 0): 2.1, (4, 1): 0.9}
    results = [Result(f"{x}", seed, "", {"validation_loss": {"a": y}}) for (x, seed), y in noise.items()]
    assert "p is not known (any fits)" in answer(Outcome(found.study, results))


def test_what_was_not_measured_yet_is_said(tmp_path):
    arms = {name: f'set = ["adapt.steps={steps}"]' for steps, name in enumerate("abc", 1)}
    found = study_of(tmp_path, "compare", arms, "pass@2", "train = false\n")
    results = [solved(arm, seed, 0.5) for arm in "ab" for seed in range(2)]
    page = page_of(found, results, tmp_path)
    assert page.splitlines()[2].endswith(" Not measured yet: `c`.**")
    assert page.splitlines()[-1] == "- Seeds: `a` 0, 1; `b` 0, 1; `c` none: 4 runs"


@pytest.mark.parametrize(("calm", "is_told"), [(0.01, False), (0.0001, True)])
def test_spreads_whose_intervals_overlap_cannot_be_told(tmp_path, calm, is_told):
    found = study_of(tmp_path, "spread", {"wild": "", "calm": 'vary = ["model.seed"]'}, "validation_loss")
    spreads = {"wild": 0.02, "calm": calm}
    results = [
        Result(arm, seed, "", {"validation_loss": {"a": 1 + spread * seed}})
        for arm, spread in spreads.items()
        for seed in range(3)
    ]
    said = answer(Outcome(found.study, results))
    assert ("Which is larger cannot be told: the intervals overlap." in said) != is_told


def test_no_interval_has_what_shares_cannot_be(tmp_path):
    found = study_of(tmp_path, "compare", {"a": "", "b": 'set = ["adapt.steps=7"]'}, "pass@2", "train = false\n")
    results = [solved("a", 0, 0.5), solved("a", 1, 0.5), solved("b", 0, 0.2), solved("b", 1, 0.9)]
    outcome = Outcome(found.study, results)
    difference, spread = outcome.difference("b", "pass@2"), outcome.spread("b", "pass@2")
    assert (difference.low, difference.high, difference.verdict) == (-1.0, 1.0, "cannot tell")
    assert spread.high == 0.5 > spread.value > spread.low > 0


def test_what_differs_between_arms_is_said_of_each(tmp_path):
    arms = {"a": "", "b": 'set = ["adapt.steps=7"]'}
    found = study_of(tmp_path, "compare", arms, "pass@2", "train = false\n")
    results = [solved("a", 0, 0.5, audit="passed", model="small"), solved("b", 0, 0.4, audit="none", model="small")]
    text = page_of(found, results, tmp_path)
    assert "The model: small." in text
    assert "The leak audit of what was trained on and these tasks: of `a`: passed; of `b`: none." in text


def test_what_is_counted_are_the_tasks_of_each_metric(tmp_path):
    arms = {"a": "", "b": 'set = ["adapt.steps=7"]'}
    found = study_of(tmp_path, "compare", arms, "pass@2")
    losses = {f"held out {i}": 1.0 for i in range(20)}
    results = [solved(arm, 0, 0.5, tasks="ours.json", trained=arm) for arm in arms]
    results = [replace(result, tasks={"validation_loss": losses, **result.tasks}) for result in results]
    text = page_of(found, results, tmp_path)
    assert "100 tasks of `ours.json`" in text and "held-out tasks" not in text
    both = study_of(tmp_path, "compare", arms, 'validation_loss", "pass@2')
    assert "The loss is of 20 held-out tasks" in page_of(both, results, tmp_path)


def test_arms_that_choose_among_the_same_candidates_have_no_luck_of_seeds(tmp_path):
    arms = {name: f'set = ["vote.rule={name}"]' for name in ("votes", "product")}
    found = study_of(tmp_path, "compare", arms, "pass@2", "train = false\n")
    shared = page_of(found, [solved(arm, 0, 0.5, solved="run") for arm in arms], tmp_path)
    assert "share the luck of the seeds" in shared and "- Cost: 1 run of bin/solve, 60 s" in shared
    apart = page_of(found, [solved(arm, 0, 0.5, solved=arm) for arm in arms], tmp_path)
    assert "the luck of the seeds is added" in apart and "- Cost: 2 runs of bin/solve" in apart
    assert apart.splitlines()[-1] == "- Seeds: 0 in each arm: 2 runs"


def test_the_command_has_the_seeds_that_the_page_has(tmp_path):
    arms = {"a": "", "b": 'set = ["adapt.steps=7"]'}
    found = study_of(tmp_path, "compare", arms, "pass@2", "train = false\n")
    for seeds, option in ((2, " --seeds 2"), (3, "")):
        results = [solved(arm, seed, 0.5) for arm in arms for seed in range(seeds)]
        assert f"made.toml{option}\n" in page_of(found, results, tmp_path)


def test_what_can_be_told_by_another_metric_is_in_the_answer(tmp_path):
    arms = {"a": 'set = ["adapt.steps=1"]', "b": 'set = ["adapt.steps=2"]', "c": 'set = ["adapt.steps=3"]'}
    found = study_of(tmp_path, "compare", arms, 'pass@2", "coverage', "train = false\n")
    results = []
    for seed in range(3):
        for arm in arms:
            run = solved(arm, seed, 0.5)
            covered = {f"{i:03d}": float(i < 50 + 30 * (arm == "b")) for i in range(100)}
            results.append(replace(run, tasks={**run.tasks, "coverage": covered}))
    said = answer(Outcome(found.study, results))
    assert said.startswith("**Cannot be told from `a`: `b` (")
    assert "Better than `a`: `b` (+30.0" in said
    assert said.endswith(
        "Solved by any candidate: differences in percentage points with 95% intervals; `a` has 50.0%.**"
    )
    assert said.count("Cannot be told") == 1  # what the other metrics cannot tell stands in their tables
