import copy
import json

import pytest
from conftest import grid

from arc_solver.config import UserError
from arc_solver.submission import main, merge, read_submission, score, write_submission
from arc_solver.tasks import Pair, Task

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


def test_a_task_without_an_answer_is_no_pass():
    with pytest.raises(KeyError):
        score({"aa": SUBMISSION["aa"]}, SOLUTIONS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("bb"), "no answer to 1 of 2 tasks, e.g. bb"),
        (lambda c: c.update(zz=[]), "1 tasks that --tasks does not hold, e.g. 'zz'"),
        (lambda c: c["aa"].pop(), "task aa: expected a list of 2 answers.*got 1"),
        (lambda c: c["aa"][1].pop("attempt_2"), "task aa, test input 1: expected exactly"),
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
    assert json.loads(capsys.readouterr().out) == {
        "tasks": 2,
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
    assert "3 of 4" in capsys.readouterr().out


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
