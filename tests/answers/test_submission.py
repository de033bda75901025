import copy
import json

import pytest
from toys import grid

from arc_solver.answers.submission import main, merge, read_submission, score, score_first, wilson, write_submission
from arc_solver.config import TasksConfig
from arc_solver.errors import UserError
from arc_solver.puzzles.task_files import load_tasks
from arc_solver.puzzles.tasks import Pair, Task
from arc_solver.solving.command import parse

X, Y, Z = grid("12", "34"), grid("5"), grid("67")
TASKS = [Task("aa", (Pair(X, Y),), (X, Y)), Task("bb", (Pair(X, Y),), (Z,))]
SUBMISSION = {"aa": [(X, Y), (Z, Z)], "bb": [(Z, Y)]}
SOLUTIONS = {"aa": (Y, X), "bb": (Z,)}


def write(tmp_path, change=lambda content: None):
    file = tmp_path / "submission.json"
    write_submission(SUBMISSION, file)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def test_the_file_is_kaggles_and_reads_back(tmp_path):
    file = tmp_path / "submission.json"
    write_submission(SUBMISSION, file)
    assert json.loads(file.read_text()) == {
        "aa": [
            {"attempt_1": [[1, 2], [3, 4]], "attempt_2": [[5]]},
            {"attempt_1": [[6, 7]], "attempt_2": [[6, 7]]},
        ],
        "bb": [{"attempt_1": [[6, 7]], "attempt_2": [[5]]}],
    }
    again = read_submission(file, TASKS)
    assert {i: [[a.tolist() for a in both] for both in o] for i, o in again.items()} == {
        i: [[a.tolist() for a in both] for both in o] for i, o in SUBMISSION.items()
    }
    assert list(tmp_path.iterdir()) == [file]


def test_scores_worked_by_hand():
    """aa: the first of two outputs, by attempt 2; bb: its one output, by attempt 1."""
    result = score(SUBMISSION, SOLUTIONS)
    assert (result.outputs, result.outputs_solved, result.tasks_solved) == (3, 2, 1)
    assert result.share_of_outputs == pytest.approx(2 / 3)
    assert result.mean_over_tasks == pytest.approx((0.5 + 1) / 2)
    assert result.per_task == {"aa": 0.5, "bb": 1.0}


def test_one_attempt_is_the_first():
    result = score_first(SUBMISSION, SOLUTIONS)
    assert (result.outputs_solved, result.per_task) == (1, {"aa": 0.0, "bb": 1.0})


@pytest.mark.parametrize(
    ("solved", "tasks", "interval"),
    [
        (0, 10, (0.0, 0.2775)),  # as tables and other programs have it
        (10, 10, (0.7225, 1.0)),
        (5, 10, (0.2366, 0.7634)),
        (1, 1, (0.2065, 1.0)),
        (81, 263, (0.2553, 0.3662)),  # Newcombe 1998, table I
        (15, 148, (0.0624, 0.1605)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_intervals_that_are_published(solved, tasks, interval):
    assert wilson(solved, tasks) == pytest.approx(interval, abs=6e-5)


def test_a_wilson_interval_ends_where_chance_would_just_allow_it():
    """At its ends the share that was found is 1.96 standard deviations away."""
    for tasks in (1, 20, 400):
        for solved in range(tasks + 1):
            low, high = wilson(solved, tasks)
            assert 0 <= low <= solved / tasks <= high <= 1
            for end in {low, high} - {0.0, 1.0}:
                if min(end, 1 - end) > 1e-9:
                    away = abs(solved / tasks - end) / (end * (1 - end) / tasks) ** 0.5
                    assert away == pytest.approx(1.959964, abs=1e-4)


def test_a_task_without_an_answer_is_no_pass():
    with pytest.raises(KeyError):
        score({"aa": SUBMISSION["aa"]}, SOLUTIONS)


def test_another_file_of_a_run_is_no_submission(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"tasks": 2, "expected": [1.0, 0.5, 2.0], "score": None}))
    with pytest.raises(UserError, match=r"summary\.json is no submission: expected a JSON object"):
        read_submission(tmp_path / "summary.json", TASKS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("bb"), "no answer to 1 of 2 tasks, e.g. bb"),
        (lambda c: c.update(zz=[]), "1 task that --tasks does not hold, e.g. 'zz'"),
        (lambda c: c["aa"].pop(), "task aa: expected a list of 2 answers.*got 1"),
        (lambda c: c["aa"][1].pop("attempt_2"), "task aa, test input 1: attempt_2 is missing"),
        (lambda c: c["aa"][1].update(attempt_2=[]), "attempt_2: expected a grid"),
        (lambda c: c["aa"][0].update(attempt_1=[[1], [2, 3]]), "attempt_1, row 1"),
        (lambda c: c["aa"][0].update(attempt_1=[[1.0]]), "attempt_1, row 0: expected whole numbers"),
        (lambda c: c["aa"][0].update(attempt_1=[[0]] * 31), "at most 30 rows"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        read_submission(write(tmp_path, change), TASKS)


def test_merge_takes_the_first_attempts():
    first = {"aa": [(X, Y)], "bb": [(X, Y)], "cc": [(X, X)]}
    second = {"aa": [(Z, Y)], "bb": [(X, Z)], "cc": [(X, X)]}
    merged = merge(first, second)
    assert [[a.tolist() for a in merged[i][0]] for i in merged] == [
        [X.tolist(), Z.tolist()],  # they differ: both first attempts
        [X.tolist(), Z.tolist()],  # they agree: what the second says next
        [X.tolist(), X.tolist()],
    ]
    with pytest.raises(UserError, match="same tasks"):
        merge(first, {"aa": second["aa"]})


def test_bin_score(tmp_path, capsys):
    task = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}, {"input": [[4]]}]}
    challenges = {"aa": task, "bb": copy.deepcopy(task)}
    solutions = {i: [[[5]], [[6]]] for i in challenges}
    answers = {
        i: [{"attempt_1": [[5]], "attempt_2": [[0]]}, {"attempt_1": [[0]], "attempt_2": [[0]]}] for i in challenges
    }
    answers["bb"][1]["attempt_2"] = [[6]]
    for name, content in (("x_challenges", challenges), ("x_solutions", solutions), ("s", answers)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "s.json"), "--tasks", str(tmp_path / "x_challenges.json"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = load_tasks(TasksConfig(spec=str(tmp_path / "x_challenges.json")))
    assert printed.pop("data") == found.data
    first = printed.pop("pass@1")
    assert (first["tasks_solved"], first["outputs_solved"]) == (0, 2)
    assert printed == {
        "tasks": 2,
        "tasks_solved": 1,
        "share_of_tasks": 0.5,
        "share_of_tasks_wilson_95": list(wilson(1, 2)),
        "outputs": 4,
        "outputs_solved": 3,
        "share_of_outputs": 0.75,
        "mean_over_tasks": 0.75,
        "per_task": {"aa": 0.5, "bb": 1.0},
    }
    (tmp_path / "x_solutions.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="--solutions FILE"):
        main([str(tmp_path / "s.json"), "--tasks", str(tmp_path / "x_challenges.json")])
    main(
        [
            str(tmp_path / "s.json"),
            "--tasks",
            str(tmp_path / "x_challenges.json"),
            "--solutions",
            str(tmp_path / "elsewhere.json"),
        ]
    )
    said = capsys.readouterr().out
    for text in ("0 of 2 tasks, 2 of 4 outputs", "1 of 2 tasks, 3 of 4 outputs", "Wilson", "50.0%, 9.5% to 90.5%"):
        assert text in said
    assert found.digest in said


def test_bin_score_draws_the_sample_that_bin_solve_draws(tmp_path, capsys):
    words = ["--tasks", "arc-agi-1/evaluation", "--sample", "6", "--sample-seed", "5"]
    config, _ = parse(words)
    found = load_tasks(config.tasks)
    file = tmp_path / "submission.json"
    write_submission({i: [(g, g) for g in grids] for i, grids in found.solutions.items()}, file)
    assert main([str(file), *words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["tasks"], printed["tasks_solved"], printed["data"]) == (6, 6, found.data)
    with pytest.raises(UserError, match="--ids, --limit, or --sample"):
        main([str(file), *words[:2]])
    with pytest.raises(UserError, match="--sample only if it was made with that"):
        main([str(file), *words[:2], "--ids", found.tasks[0].id])


def test_bin_score_validates_without_solutions(tmp_path, capsys):
    task = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[3]]}]}
    (tmp_path / "challenges.json").write_text(json.dumps({"aa": task}))
    answers = {"aa": [{"attempt_1": [[5]], "attempt_2": [[0]]}]}
    words = [str(tmp_path / "s.json"), "--tasks", str(tmp_path / "challenges.json"), "--validate"]
    (tmp_path / "s.json").write_text(json.dumps(answers))
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"valid": True, "tasks": 1, "outputs": 1}
    (tmp_path / "s.json").write_text(json.dumps({"aa": []}))
    with pytest.raises(UserError, match="aa"):
        main(words)


def test_bin_score_compares_submissions_pair_by_pair(tmp_path, capsys):
    """Two runs each: in one ours solves a task that the other does not, in the other it lacks two."""
    found = load_tasks(TasksConfig(spec="arc-agi-1/evaluation", limit=6))
    ids = [task.id for task in found.tasks]

    def run(name: str, *right: int) -> str:
        answers = {i: [(g, g) if ids.index(i) in right else (Y, Y) for g in found.solutions[i]] for i in ids}
        write_submission(answers, tmp_path / name)
        return str(tmp_path / name)

    ours, others = [run("a", 0, 1), run("b", 0)], [run("c", 0), run("d", 0, 2, 3)]
    words = ["--tasks", "arc-agi-1/evaluation", "--limit", "6"]
    assert main([*ours, "--against", *others, *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    outputs = {n: len(found.solutions[ids[n]]) for n in range(6)}
    assert (said["won"], said["lost"], said["tasks"]) == (outputs[1], outputs[2] + outputs[3], 6)
    low, high = said["interval"]
    assert low <= said["won"] - said["lost"] <= high
    assert main([*ours, "--against", *others, *words]) == 0
    assert "paired bootstrap over tasks" in (shown := " ".join(capsys.readouterr().out.split()))
    assert "2 runs of each" in shown and found.digest in shown and said["data"] == found.data
    for files in ([*ours, "--against", others[0]], ours):
        with pytest.raises(UserError, match="give one, or as many of both"):
            main([*files, *words])
    with pytest.raises(UserError, match="--validate: not allowed with argument --against"):
        main([*ours, "--against", *others, *words, "--validate"])
