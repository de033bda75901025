"""Selecting again: on run folders made up here, without a model."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from toys import grid

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.answers.comparison import paired_difference, sign_test
from arc_solver.answers.revote import compare, main, read_run, select
from arc_solver.answers.submission import coverage, read_submission, score
from arc_solver.answers.vote import RULES, choose_attempts
from arc_solver.config import Config, TasksConfig, VoteConfig, load_config
from arc_solver.errors import UserError
from arc_solver.puzzles.task_files import load_tasks
from arc_solver.puzzles.tasks import Pair, Task
from arc_solver.solving.command import main as solve_main

X, RIGHT, WRONG, WORSE = grid("12", "34"), grid("56", "78"), grid("9"), grid("00")


def write_tasks(folder, ids, solutions=True):
    """Kaggle's two files of tasks with two test inputs each, whose right outputs are all RIGHT."""
    task = {"train": [{"input": X.tolist(), "output": X.tolist()}], "test": [{"input": X.tolist()}] * 2}
    file = folder / "toy_challenges.json"
    file.write_text(json.dumps(dict.fromkeys(ids, task)))
    if solutions:
        (folder / "toy_solutions.json").write_text(json.dumps(dict.fromkeys(ids, [RIGHT.tolist()] * 2)))
    return file


def candidates(test, votes_finds, product_finds):
    """Whether RIGHT is among the first two by votes, and by the product; always three candidates, four views."""
    views = ([0, 1], [2, 3], []) if votes_finds else ([], [0, 1], [2, 3])
    sums = (-1.0, -2.0, -3.0) if product_finds else (-3.0, -1.0, -2.0)
    return [
        Candidate(test, cells, tuple(own), () if own else (0,), (total / 4,) * 4)
        for cells, own, total in zip((RIGHT, WRONG, WORSE), views, sums, strict=True)
    ]


def make_run(run_dir, challenges, per_task, vote=None):
    """A run's folder as bin/solve leaves it: per_task maps ids to (votes find it, product finds it) for each test."""
    config = Config(tasks=TasksConfig(spec=str(challenges)), vote=vote or VoteConfig())
    (run_dir / "tasks").mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    (run_dir / "submission.json").write_text("precious")
    for task_id, tests in per_task.items():
        found = Predictions((0, 1, 2, 3), tuple(c for t, both in enumerate(tests) for c in candidates(t, *both)))
        write_task(run_dir, task_id, **found.to_json())
    return run_dir


def write_task(run_dir, task_id, error=None, **content):
    fallback = "placeholder" if error else None
    content = {"task": task_id, "seconds": 1.5, "adaptation": None, "fallback": fallback, "error": error, **content}
    (run_dir / "tasks" / f"{task_id}.json").write_text(json.dumps(content))


@pytest.fixture
def run_dir(tmp_path):
    """Of four tasks one is not solved yet and one failed."""
    challenges = write_tasks(tmp_path, ["aa", "bb", "cc", "dd"])
    folder = make_run(
        tmp_path / "run", challenges, {"aa": [(True, True), (False, True)], "bb": [(True, False), (False, False)]}
    )
    write_task(folder, "cc", error="RuntimeError", **Predictions((), ()).to_json())
    return folder


@pytest.mark.parametrize("rule", RULES)
def test_it_is_what_voting_gives(run_dir, rule, capsys):
    assert main(["--revote", str(run_dir), f"vote.rule={rule}"]) == 0
    found = load_tasks(TasksConfig(spec=str(run_dir.parent / "toy_challenges.json")))
    answers = read_submission(run_dir / f"submission-{rule}.json", found.tasks)
    for task in found.tasks:
        file = run_dir / "tasks" / f"{task.id}.json"
        saved = Predictions((), ())
        if task.id in ("aa", "bb"):  # of the others one failed and one is not there
            saved = Predictions.from_json(json.loads(file.read_text()))
        expected = choose_attempts(saved, task, VoteConfig(rule=rule))
        assert [[a.tolist() for a in both] for both in answers[task.id]] == [
            [a.tolist() for a in both] for both in expected
        ]
    assert (run_dir / "submission.json").read_text() == "precious"
    assert f"{score(answers, found.solutions).outputs_solved} of 8 outputs" in capsys.readouterr().out


def test_score_and_coverage_are_said_beside_each_other(run_dir, capsys):
    assert main(["--revote", str(run_dir), "vote.rule=product"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("submission-product.json")
    assert "placeholders for 2 of 4 tasks: 1 not solved yet, 1 failed" in lines
    assert "score:    1 of 4 tasks, 2 of 8 outputs (25.0%)" in lines
    assert "coverage: 2 of 4 tasks, 4 of 8 outputs (50.0%) have the right answer as a candidate" in lines


def test_priors_are_in_the_name_and_in_the_answer(run_dir, capsys):
    """All outputs have the shape of their inputs, so RIGHT is the only candidate that is not odd."""
    assert main([f"--revote={run_dir}", "vote.rule=votes", "vote.shape_prior=true"]) == 0
    assert "votes+shape: " in capsys.readouterr().out
    found = load_tasks(TasksConfig(spec=str(run_dir.parent / "toy_challenges.json")))
    answers = read_submission(run_dir / "submission-votes+shape.json", found.tasks)
    assert score(answers, found.solutions).outputs_solved == 4


def test_without_solutions_there_is_no_score(tmp_path, capsys):
    challenges = write_tasks(tmp_path, ["aa"], solutions=False)
    folder = make_run(tmp_path / "run", challenges, {"aa": [(True, True)] * 2})
    assert main(["--revote", str(folder)]) == 0
    assert "no score: the solutions are not known" in capsys.readouterr().out
    solutions = tmp_path / "elsewhere.json"
    solutions.write_text(json.dumps({"aa": [RIGHT.tolist()] * 2}))
    assert main(["--revote", str(folder), f"tasks.solutions={solutions}"]) == 0
    assert "1 of 1 task," in capsys.readouterr().out


def test_the_command_needs_no_torch(run_dir):
    """It selects in the time that it takes to read the files."""
    code = (
        f"import sys; from arc_solver.answers.revote import main; main(['--revote', {str(run_dir)!r}, '--all-rules']);"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code + "assert 'torch' not in sys.modules"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_bin_solve_passes_it_on(run_dir, capsys):
    assert solve_main(["--revote", str(run_dir), "vote.rule=kgmon"]) == 0
    assert (run_dir / "submission-kgmon.json").is_file()


def test_it_says_so_where_not_all_scores_are_known(run_dir, capsys):
    """Of rules that need them. Solving with such a rule, and without all scores, is refused."""
    says = "1 of 12 candidates not scored in all views"
    content = json.loads((run_dir / "tasks" / "aa.json").read_text())
    assert main(["--revote", str(run_dir), "vote.rule=kgmon"]) == 0
    assert "not scored in all views" not in capsys.readouterr().out
    content["candidates"][0]["log_probabilities"][3] = None
    (run_dir / "tasks" / "aa.json").write_text(json.dumps(content))
    for words, is_said in ((["vote.rule=kgmon"], True), (["vote.rule=product"], False), (["--all-rules"], True)):
        assert main(["--revote", str(run_dir), *words]) == 0
        assert (says in capsys.readouterr().out) == is_said
    with pytest.raises(UserError, match=r"set predict\.score_all=true"):
        load_config(None, ["vote.rule=kgmon"])


def test_coverage_by_hand():
    solutions = {"aa": (RIGHT, WRONG), "bb": (X,), "cc": (RIGHT,)}
    found = {
        "aa": Predictions((0,), (Candidate(0, RIGHT, (0,), (), (-1.0,)), Candidate(0, WRONG, (), (), (-1.0,)))),
        "bb": Predictions((0,), (Candidate(0, WRONG, (0,), (), (-1.0,)), Candidate(0, X, (), (), (-9.0,)))),
    }
    result = coverage(found, solutions)
    assert (result.tasks_solved, result.outputs_solved, result.outputs) == (1, 2, 4)
    assert result.per_task == {"aa": 0.5, "bb": 1.0, "cc": 0.0}


# ---- the table -----------------------------------------------------------------------------------------------------


def text(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def row(table, name):
    (line,) = [line for line in text(table).splitlines() if line.strip().startswith(f"{name} ")]
    return re.split("  +", line.strip())


def test_the_table_by_hand(run_dir):
    """Of aa and bb, votes find the first outputs and the product both of aa's; cc failed, dd is not there yet."""
    table = compare([read_run(run_dir)])
    assert row(table, "votes")[:4] == ["votes", "0", "2", "33.3%"]
    product = row(table, "product")
    assert product[:4] == ["product", "1", "2", "33.3%"]
    assert product[4] == "+0 (-3 to +3)"  # of three tasks with +1, -1 and 0, one draw in 27 is +3
    assert product[5:] == ["1", "1", "1"]
    assert row(table, "coverage")[:4] == ["coverage", "2", "4", "66.7%"]
    title = " ".join(text(table).split())
    assert title.startswith("3 tasks of")
    assert "1 not solved yet or without a known solution" in title


def test_a_planted_difference_is_inside_the_interval(tmp_path):
    """Two runs of 40 tasks: in each the product wins both outputs of 8 tasks, and loses one of two of 2 others."""
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        ids = [f"{name}{i}" for i in range(40)]
        per_task = {i: [(True, True), (False, False)] for i in ids}
        per_task |= dict.fromkeys(ids[:8], [(False, True)] * 2)
        per_task |= {i: [(True, False), (True, True)] for i in ids[8:10]}
        runs.append(make_run(tmp_path / name / "run", write_tasks(tmp_path / name, ids), per_task))
    read = [read_run(run) for run in runs]
    product = row(compare(read), "product")
    assert product[1:3] == ["16", str(2 * (30 + 16 + 2))]
    change, low, high = map(int, re.findall("[+-][0-9]+", product[4]))
    assert change == 28
    assert low == pytest.approx(28 - 1.96 * 7.63, abs=2)  # the deviation of the sum of 16 times +2, 4 times -1 and 60 0
    assert high == pytest.approx(28 + 1.96 * 7.63, abs=2)
    assert product[5:7] == ["32", "4"]
    assert float(product[7]) == pytest.approx(0.012, abs=0.001)  # 16 tasks won, 4 lost


def test_the_interval_is_that_of_resampled_tasks(rng):
    """Known answer: the sum of n tasks drawn with replacement has the variance n times that of a task."""
    steps = rng.choice([-1, 0, 1, 2], p=[0.05, 0.7, 0.15, 0.1], size=400)
    ours = {(str(i), 0): [d >= 1, d == 2] for i, d in enumerate(steps)}
    other = {(str(i), 0): [False, d == -1] for i, d in enumerate(steps)}
    found = paired_difference(ours, other)
    assert found.won - found.lost == steps.sum()
    deviation = np.sqrt(len(steps)) * steps.std()
    assert found.interval[0] == pytest.approx(steps.sum() - 1.96 * deviation, abs=0.15 * deviation)
    assert found.interval[1] == pytest.approx(steps.sum() + 1.96 * deviation, abs=0.15 * deviation)
    assert paired_difference(ours, other) == found


def test_two_runs_of_one_task_count_as_one_task():
    """A resample that leaves the task out leaves out both: the interval is wider than of two tasks."""
    ours = {(str(i // 2), i % 2): [i < 20] for i in range(80)}
    apart = {(str(i), 0): [i < 20] for i in range(80)}
    together, alone = (paired_difference(o, {key: [False] for key in o}).interval for o in (ours, apart))
    assert together[1] - together[0] > 1.2 * (alone[1] - alone[0])


def test_the_sign_test_counts_a_task_once():
    """Five tasks won, each in both of two runs and with both of its outputs, are five fair coins and not twenty."""
    ours = {(str(i), run): [i < 5] * 2 for i in range(9) for run in (0, 1)}
    found = paired_difference(ours, {key: [False] * 2 for key in ours})
    assert (found.won, found.lost, found.p) == (20, 0, 2 / 2**5)


def test_the_sign_test_by_hand():
    assert sign_test(0, 0) == sign_test(3, 3) == 1
    assert sign_test(5, 0) == sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(7, 1) == pytest.approx(2 * (1 + 8) / 256)


# ---- what can be wrong ---------------------------------------------------------------------------------------------


def damage(change):
    def apply(run_dir):
        file = run_dir / "tasks" / "aa.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def of_another_version(run_dir):
    content = json.loads((run_dir / "config.json").read_text())
    content["vote"]["rule"] = "newest"
    (run_dir / "config.json").write_text(json.dumps(content))


def truncate(file):
    file.write_text(file.read_text()[:100])


@pytest.mark.parametrize(
    ("spoil", "words", "said"),
    [
        (lambda d: d.rename(d.with_name("moved")), [], "is no run of bin/solve, a folder is missing"),
        (lambda d: (d / "config.json").unlink(), [], "is no run of bin/solve, config.json is missing"),
        (lambda d: (d / "config.json").write_text("[]"), [], "sections tasks and vote are missing"),
        (lambda d: (d / "config.json").write_text("{"), [], "config.json is not JSON"),
        (lambda d: (d / "tasks").rename(d / "gone"), [], "is no run of bin/solve, tasks/ is missing"),
        (lambda d: [f.unlink() for f in (d / "tasks").iterdir()], [], "has no candidates yet: none of its 4 tasks"),
        (lambda d: truncate(d / "tasks" / "aa.json"), [], "aa.json is not JSON"),
        (damage(lambda c: c.pop("geometries")), [], "aa.json holds no candidates as .*'geometries' is missing.*remove"),
        (damage(lambda c: c["candidates"][0].pop("views")), [], "'views' is missing"),
        (damage(lambda c: c["candidates"][0].update(test=2)), [], "answers test input 2, and the task has 2"),
        (damage(lambda c: c["candidates"][0].update(views=[0, 4])), [], r"views \(0, 4\), each at most once, of 4"),
        (damage(lambda c: c["candidates"][0].update(searched=[0, 0])), [], r"views \(0, 0\), each at most once"),
        (damage(lambda c: c["candidates"][0]["log_probabilities"].pop()), [], "3 log-probabilities for 4 views"),
        (damage(lambda c: c["candidates"][0].update(log_probabilities=[0.5] * 4)), [], "is no number up to 0"),
        (damage(lambda c: c["candidates"][0].update(log_probabilities=["a"] * 4)), [], "is no number up to 0"),
        (damage(lambda c: c["candidates"][0].update(grid=[[1], [2, 3]])), [], "candidate, row 1: expected 1 cell as"),
        (damage(lambda c: c["candidates"].append(c["candidates"][0])), [], "a grid is there twice"),
        (lambda d: (d.parent / "toy_challenges.json").unlink(), [], "json: put them back, or give tasks.spec"),
        (lambda d: (d.parent / "toy_solutions.json").unlink(), ["--all-rules"], "give tasks.solutions=FILE"),
        (of_another_version, [], "was made by another version of arc_solver .setting vote.rule: .*got 'newest'"),
        (lambda d: None, ["vote.rule=best"], "setting vote.rule: .*'votes', 'product'.*got 'best'"),
        (lambda d: None, ["--all-rules", "vote.rule=votes"], "leave vote.rule out"),
        (lambda d: None, ["predict.views=3"], "only vote.* and tasks.* can be set"),
        (lambda d: None, ["nowhere"], "nowhere is no run of bin/solve"),
    ],
)
def test_what_is_wrong_is_one_sentence(run_dir, spoil, words, said):
    spoil(run_dir)
    with pytest.raises(UserError, match=said):
        main(["--revote", str(run_dir), *words])
    assert not list(run_dir.glob("submission-*"))


def test_a_run_must_be_named():
    with pytest.raises(UserError, match="--revote RUN_DIR"):
        main(["--revote", "vote.rule=votes"])


def test_an_odd_spec_survives_the_way_through_the_config(tmp_path):
    folder = tmp_path / 'odd "name" = ü\\'
    folder.mkdir()
    run = read_run(make_run(folder / "run", write_tasks(folder, ["aa"]), {"aa": [(True, True)] * 2}))
    assert run.config.tasks.spec == str(folder / "toy_challenges.json")
    assert isinstance(run.task_set.tasks[0], Task)
    assert isinstance(run.task_set.tasks[0].train[0], Pair)
    assert set(select(run, "votes")) == {"aa"}
