"""Every kind of source, read from real files that are written here."""

import gzip
import hashlib
import json
import logging
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, get_args

import numpy as np
import pytest

from arc_solver.config import SourceConfig
from arc_solver.data.counting import COUNTING_TASKS
from arc_solver.data.sources import READERS, Source, re_arc_generators, re_arc_pair, read_source
from arc_solver.errors import UserError
from arc_solver.puzzles.tasks import Pair, grid_key, legal_pairs
from arc_solver.rng import named_rng

Raw = list[dict[str, Any]]
FILE_KINDS = ("tasks", "demonstrations", "pairs")

# Task id -> four pairs; in a task file the first two are its demonstrations.
RAW: dict[str, Raw] = {
    task_id: [{"input": [[first, i]], "output": [[i], [first]]} for i in range(4)]
    for task_id, first in (("aa", 5), ("bb", 7))
}


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def as_task(pairs: Raw, demonstrations: int = 2) -> dict[str, Raw]:
    return {"train": pairs[:demonstrations], "test": pairs[demonstrations:]}


def task_file(folder: Path) -> Path:
    return write(folder / "aa.json", as_task(RAW["aa"]))


def task_folder(folder: Path) -> Path:
    for task_id, pairs in RAW.items():
        write(folder / f"{task_id}.json", as_task(pairs))
    return folder


def tasks_in_one_file(folder: Path) -> Path:
    """As ConceptARC and Mini-ARC are kept: test outputs included."""
    return write(folder / "set.json", {i: as_task(pairs) for i, pairs in RAW.items()})


def kaggle_files(folder: Path) -> Path:
    tasks = {i: as_task(pairs) for i, pairs in RAW.items()}
    write(folder / "x_solutions.json", {i: [pair["output"] for pair in task["test"]] for i, task in tasks.items()})
    asked = {i: {**task, "test": [{"input": p["input"]} for p in task["test"]]} for i, task in tasks.items()}
    return write(folder / "x_challenges.json", asked)


def pairs_file(folder: Path) -> Path:
    return write(folder / "pairs.json", RAW)


def pairs_folder(folder: Path) -> Path:
    for task_id, pairs in RAW.items():
        write(folder / f"{task_id}.json", pairs)
    return folder


def re_arc_folder(folder: Path) -> Path:
    """RE-ARC as it is published: what lies beside the tasks is no task."""
    write(folder / "metadata.json", {"aa": {"n_examples": 4}})
    pairs_folder(folder / "tasks")
    return folder


TASK_LAYOUTS = [task_file, task_folder, tasks_in_one_file, kaggle_files]
LAYOUTS = [
    *(("tasks", layout) for layout in TASK_LAYOUTS),
    *(("pairs", layout) for layout in (pairs_file, pairs_folder, re_arc_folder)),
]
every_layout = pytest.mark.parametrize(("kind", "layout"), LAYOUTS, ids=lambda value: getattr(value, "__name__", value))

Layout = Callable[[Path], Path]
Keys = list[tuple[bytes, bytes]]


def source(kind: str, path: Path | str = "", **settings: Any) -> Source:
    return read_source(SourceConfig.model_validate({"kind": kind, "path": str(path), **settings}))


def keys(pairs: Sequence[Pair]) -> Keys:
    return [(grid_key(pair.input), grid_key(pair.output)) for pair in pairs]


def content(found: Source, seed: int = 0, count: int = 4) -> dict[str, Keys]:
    return {i: keys(maker(named_rng(seed, i), count)) for i, maker in found.tasks.items()}


def expected(ids: Sequence[str], count: int = 4) -> dict[str, Keys]:
    return {i: keys(legal_pairs(RAW[i][:count], i)[0]) for i in ids}


def test_every_kind_has_a_reader():
    assert set(READERS) == set(get_args(SourceConfig.model_fields["kind"].annotation))


# ---- files ---------------------------------------------------------------------------------------------------------


@every_layout
def test_every_layout_gives_all_pairs_of_the_same_tasks(kind, layout, tmp_path):
    found = source(kind, layout(tmp_path))
    ids = ["aa"] if layout is task_file else ["aa", "bb"]
    assert content(found) == expected(ids)
    assert content(found, seed=1, count=1) == expected(ids), "a file has the pairs that it has"
    assert not found.endless


@every_layout
def test_max_pairs_takes_the_first_of_each_task(kind, layout, tmp_path):
    found = source(kind, layout(tmp_path), max_pairs=3)
    assert content(found) == expected(list(found.tasks), 3)
    assert content(source(kind, layout(tmp_path), max_pairs=9)) == expected(list(found.tasks))


@pytest.mark.parametrize("layout", TASK_LAYOUTS)
def test_demonstrations_are_the_pairs_before_the_test(layout, tmp_path):
    found = source("demonstrations", layout(tmp_path))
    assert content(found) == expected(list(found.tasks), 2)
    assert content(source("demonstrations", layout(tmp_path), max_pairs=1)) == expected(list(found.tasks), 1)


@pytest.mark.parametrize(
    "garbage", ["secret", 3.5, [], [[77]], [[1], [2, 3]], {"grid": [[1]]}, [[[1]]], [[1] * 31]], ids=str
)
@pytest.mark.parametrize("layout", TASK_LAYOUTS)
def test_demonstrations_never_look_at_test_outputs(layout, garbage, tmp_path):
    """Test outputs that are no grids, as the kind "tasks" notices, change nothing and raise nothing."""
    path = layout(tmp_path)
    before = content(source("demonstrations", path))
    for file in [path] if path.is_file() else path.iterdir():
        parsed = json.loads(file.read_text())
        for task in [parsed] if "test" in parsed else parsed.values():
            for pair in task["test"]:
                pair["output"] = garbage
        write(file, parsed)
    if layout is kaggle_files:
        write(tmp_path / "x_solutions.json", {i: [garbage, garbage] for i in RAW})
    assert content(source("demonstrations", path)) == before
    with pytest.raises(UserError, match="output"):
        source("tasks", path)


def test_demonstrations_do_not_even_open_a_solutions_file(tmp_path):
    path = kaggle_files(tmp_path)
    write(tmp_path / "x_solutions.json", "{ no JSON")
    assert content(source("demonstrations", path)) == expected(["aa", "bb"], 2)
    with pytest.raises(UserError, match="x_solutions"):
        source("tasks", path)


def test_demonstrations_may_lack_some_test_outputs(tmp_path):
    pairs = [RAW["aa"][0], RAW["aa"][1], RAW["aa"][2], {"input": [[1]]}]
    file = write(tmp_path / "aa.json", as_task(pairs))
    assert content(source("demonstrations", file)) == expected(["aa"], 2)
    with pytest.raises(UserError, match="all test pairs"):
        source("tasks", file)


def test_demonstrations_of_arc_agi_1(arc):
    found = source("demonstrations", "arc-agi-1/evaluation")
    tasks = [task for task in arc["evaluation"].tasks if len(task.train) > 1]
    assert content(found) == {task.id: keys(task.train) for task in tasks}


def test_a_set_without_solutions_gives_its_demonstrations(tmp_path):
    path = kaggle_files(tmp_path)
    (tmp_path / "x_solutions.json").unlink()
    assert content(source("tasks", path)) == content(source("demonstrations", path)) == expected(["aa", "bb"], 2)


def test_single_demonstrations_are_left_out(tmp_path):
    """ConceptARC has tasks with one demonstration and three test pairs."""
    tasks = {"AboveBelow1_0": as_task(RAW["aa"], 1), "1_3_5_l6aejqqqc1b47pjr5g4_0": as_task(RAW["bb"], 3)}
    file = write(tmp_path / "set.json", tasks)
    assert set(source("tasks", file).tasks) == set(tasks)
    assert set(source("demonstrations", file).tasks) == {"1_3_5_l6aejqqqc1b47pjr5g4_0"}


def test_max_tasks_is_a_seeded_choice(tmp_path):
    ids = [f"task{i:02}" for i in range(20)]
    file = write(tmp_path / "pairs.json", dict.fromkeys(ids, RAW["aa"]))
    chosen = list(source("pairs", file, max_tasks=5).tasks)
    assert len(chosen) == 5
    assert set(chosen) < set(ids)
    assert chosen != ids[:5]
    write(file, dict.fromkeys(reversed(ids), RAW["aa"]))
    assert list(source("pairs", file, max_tasks=5).tasks) == chosen, "not a matter of the file's order"
    assert list(source("pairs", file, max_tasks=99).tasks) == ids


def test_max_tasks_chooses_among_generators_too():
    (chosen,) = source("counting", max_tasks=1).tasks
    assert [chosen] == list(source("counting", max_tasks=1).tasks)
    assert chosen in COUNTING_TASKS


def test_without_leaves_tasks_out(tmp_path):
    found = source("pairs", pairs_file(tmp_path))
    assert content(found.without({"aa", "zz"})) == expected(["bb"])
    assert content(found) == expected(["aa", "bb"])


def test_known_pairs_are_all_of_a_file_or_some_of_a_generator(tmp_path):
    many = [{"input": [[i // 10, i % 10]], "output": [[1]]} for i in range(100)]
    found = source("pairs", write(tmp_path / "pairs.json", {"aa": RAW["aa"], "many": many}))
    assert keys(found.known_pairs("aa")) == expected(["aa"])["aa"]
    assert keys(found.known_pairs("many")) == keys(legal_pairs(many, "many")[0])
    generated = source("counting")
    for task_id in generated.tasks:
        assert len(generated.known_pairs(task_id)) == 4
        assert keys(generated.known_pairs(task_id)) == keys(generated.known_pairs(task_id))


# ---- bad files -----------------------------------------------------------------------------------------------------


def in_both_shapes(pairs: Any) -> list[tuple[str, Any]]:
    """What each kind reads from a file, with `pairs` in it as a task's demonstrations or as its pairs."""
    task = {"train": pairs, "test": RAW["aa"][:1]}
    return [("tasks", {"bad1": task}), ("demonstrations", {"bad1": task}), ("pairs", {"bad1": pairs})]


WHOLE = json.dumps({"bad1": as_task(RAW["aa"])})
BAD_FILES: list[tuple[str, Any, str]] = [
    *((kind, WHOLE[:-9], "not JSON") for kind in FILE_KINDS),
    *((kind, "", "not JSON") for kind in FILE_KINDS),
    *((kind, "[]", "expected a") for kind in FILE_KINDS),
    *((kind, "3", "expected a") for kind in FILE_KINDS),
    ("tasks", "{}", "expected a JSON object of tasks"),
    ("demonstrations", "{}", "expected a JSON object of tasks"),
    ("pairs", "{}", "holds no tasks"),
    ("tasks", {"bad1": RAW["aa"]}, "lists of pairs.*kind = .pairs."),
    ("pairs", {"bad1": as_task(RAW["aa"])}, "holds tasks.*its kind is .tasks."),
    *(
        (kind, raw, f"bad1.*{said}")
        for pairs, said in (
            ([], "at least one pair"),
            ("pairs", "at least one pair"),
            ([[1]], "pair 0.*expected an object"),
            ([RAW["aa"][0], {"input": [[1]]}], "pair 1.*'output'"),
            ([RAW["aa"][0], {"output": [[1]]}], "pair 1.*'input'"),
            ([{"input": [[1, 2], [3]], "output": [[1]]}], "pair 0, input, row 1"),
            ([RAW["aa"][0], {"input": [[1]], "output": [[10]]}], "pair 1, output, row 0.*0-9"),
            ([{"input": [[1]], "output": [[1] * 31]}], "pair 0, output, row 0.*30"),
            ([{"input": [], "output": [[1]]}], "pair 0, input.*non-empty"),
        )
        for kind, raw in in_both_shapes(pairs)
        if not (kind == "pairs" and pairs[:1] == RAW["aa"][:1])  # the others of a file of pairs are taken
    ),
    *(
        (kind, f'{{"aa": {json.dumps(raw)}, "aa": {json.dumps(raw)}}}', "'aa' appears twice")
        for kind, raw in (("tasks", as_task(RAW["aa"])), ("pairs", RAW["aa"]))
    ),
]


@pytest.mark.parametrize(("kind", "bad", "said"), BAD_FILES)
def test_a_bad_file_is_refused_by_name(kind, bad, said, tmp_path):
    file = write(tmp_path / "set.json", bad)
    with pytest.raises(UserError, match=f"^{file}.*{said}"):
        source(kind, file)


@pytest.mark.parametrize("kind", FILE_KINDS)
@pytest.mark.parametrize(("bad", "said"), [(WHOLE[:-9], "not JSON"), ("", "not JSON"), ([], "(expected|take it out)")])
def test_a_bad_file_in_a_folder_is_refused_by_name(kind, bad, said, tmp_path):
    (pairs_folder if kind == "pairs" else task_folder)(tmp_path)
    write(tmp_path / "bad1.json", bad)
    with pytest.raises(UserError, match=f"^{tmp_path}.*bad1.*{said}"):
        source(kind, tmp_path)


@pytest.mark.parametrize("layout", [pairs_file, pairs_folder, re_arc_folder])
def test_illegal_pairs_are_left_out_and_counted(layout, tmp_path, monkeypatch, caplog):
    """The published RE-ARC has some that are higher than 30. A task of which none is legal is left out."""
    tall, cut = {"input": [[1]] * 31, "output": [[1]]}, {"input": [[1]]}
    more = {"aa": [tall, *RAW["aa"][:2], cut, *RAW["aa"][2:]], "bb": RAW["bb"], "cc": [tall]}
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[__name__], "RAW", more)
        path = layout(tmp_path)
    assert content(source("pairs", path)) == expected(["aa", "bb"])
    assert "3 illegal pairs of 2 tasks are left out, e.g." in caplog.text
    assert "aa, pair 0, input: expected at most 30 rows, got 31" in caplog.text
    caplog.clear()
    assert content(source("pairs", path, max_pairs=2)) == expected(["aa", "bb"], 2)
    assert "2 illegal pairs" in caplog.text


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_what_is_not_there_is_refused_by_name(kind, tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}/none\.json.*(not found|does not exist)"):
        source(kind, tmp_path / "none.json")
    with pytest.raises(UserError, match=f"{tmp_path} holds no"):
        source(kind, tmp_path)


@every_layout
def test_gzipped_files_give_the_same(kind, layout, tmp_path):
    path = layout(tmp_path)
    plain = content(source(kind, path))
    for file in sorted(tmp_path.rglob("*.json")):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert content(source(kind, path if path.is_dir() else path.with_name(f"{path.name}.gz"))) == plain


def test_what_is_no_gzip_file_is_refused(tmp_path):
    whole = gzip.compress(pairs_file(tmp_path).read_bytes())
    file = tmp_path / "pairs.json.gz"
    kinds = {
        b"no gzip": "is not gzipped, whatever its name says: rename it",
        whole[:-20]: "is not whole",
        whole[:30] + b"xxxx" + whole[34:]: "is a damaged gzip file",
    }
    for content, says in kinds.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{file} {says}"):
            source("pairs", file)


def test_a_task_that_is_there_both_ways_is_refused(tmp_path):
    write(pairs_folder(tmp_path) / "aa.json.gz", "")
    with pytest.raises(UserError, match=r"aa\.json and .*aa\.json\.gz are the same task"):
        source("pairs", tmp_path)


def test_a_file_with_another_digest_is_refused(tmp_path):
    file = pairs_file(tmp_path)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert content(source("pairs", file, sha256=digest)) == expected(["aa", "bb"])
    write(file, {**RAW, "bb": RAW["bb"][:3]})
    with pytest.raises(UserError, match=rf"{file} is another file than the config means: its sha256 is [0-9a-f]{{64}}"):
        source("pairs", file, sha256=digest)
    with pytest.raises(UserError, match="is a folder"):
        source("pairs", tmp_path, sha256=digest)
    with pytest.raises(UserError, match="does not exist"):
        source("pairs", tmp_path / "none.json", sha256=digest)
    with pytest.raises(ValueError, match="'re-arc' reads none"):
        SourceConfig(kind="re-arc", sha256=digest)


def test_tasks_in_quarantine_are_left_out(tmp_path):
    file = pairs_file(tmp_path)
    assert content(source("pairs", file, quarantine=["aa"])) == expected(["bb"])
    assert content(source("pairs", file, quarantine=["a*"])) == expected(["bb"])
    assert len(source("re-arc", quarantine=["ff28f65a"]).tasks) == len(source("re-arc").tasks) - 1
    with pytest.raises(UserError, match="has no task cc: take it out of its quarantine"):
        source("pairs", file, quarantine=["cc"])
    with pytest.raises(UserError, match=r"has no task c\*: take it out of its quarantine"):
        source("pairs", file, quarantine=["aa", "c*"])


# ---- generators ----------------------------------------------------------------------------------------------------


def test_every_training_task_has_a_generator(arc):
    found = source("re-arc")
    assert set(found.tasks) == set(re_arc_generators()) == {task.id for task in arc["training"].tasks}
    assert found.endless


@pytest.mark.parametrize("kind", ["re-arc", "counting"])
def test_generated_pairs_depend_on_the_rng_alone(kind):
    found = source(kind, max_tasks=12)
    first = content(found, count=5)
    assert first == content(found, count=5)
    assert {len(pairs) for pairs in first.values()} == {5}
    other = content(found, seed=1, count=5)
    assert all(first[i] != other[i] for i in found.tasks)
    assert all(len(set(pairs)) > 1 for pairs in first.values())


def test_difficulty_sets_the_size():
    def cells(*difficulty: float) -> float:
        found = source("re-arc", max_tasks=60, difficulty=difficulty)
        pairs = [pair for i, maker in found.tasks.items() for pair in maker(named_rng(0, i), 2)]
        return float(np.mean([pair.input.size + pair.output.size for pair in pairs]))

    assert cells(0.4, 0.6) > 2 * cells(0.0, 0.05)


def test_a_generator_that_fails_is_asked_again(rng):
    asked = []

    def fails_at_first(random: Random, low: float, high: float) -> dict[str, Any]:
        asked.append(random.random())
        if len(asked) < 3:
            raise ValueError("a rare draw")
        size = {3: 31, 4: 0}.get(len(asked), 2)  # then grids that are too large or empty, then a good one
        return {"input": [[1] * size] * size, "output": ((2,),)}

    pair = re_arc_pair(fails_at_first, rng, (0.0, 1.0))
    assert (pair.input.shape, pair.output.tolist()) == ((2, 2), [[2]])
    assert len(set(asked)) == len(asked) == 5, "with another seed each time"


def test_a_generator_that_takes_too_long_is_asked_again(rng, caplog):
    asked = []

    def slow_at_first(random: Random, low: float, high: float) -> dict[str, Any]:
        asked.append(random.random())
        while len(asked) < 3:
            try:
                random.random()
            except Exception:  # as a generator may do
                continue
        return {"input": [[1]], "output": [[2]]}

    with caplog.at_level(logging.WARNING):
        assert re_arc_pair(slow_at_first, rng, (0.0, 1.0), 0.05).output.tolist() == [[2]]
    assert len(set(asked)) == 3, "with another seed each time"
    assert [message.split(" for")[0] for message in caplog.messages] == ["slow_at_first took over 0.05 s"] * 2

    def always_slow(random: Random, low: float, high: float) -> dict[str, Any]:
        while True:
            random.random()

    with pytest.raises(UserError, match=r"always_slow made no legal pair in 3 draws .*, 3 of which took too long: put"):
        re_arc_pair(always_slow, rng, (0.0, 1.0), 0.05)


def test_a_pool_has_so_many_pairs_the_same_for_every_seed():
    found = source("re-arc", max_tasks=5, max_pairs=20)
    for maker in found.tasks.values():
        drawn = [keys(maker(named_rng(seed), 4)) for seed in range(30)]
        assert {len(pairs) for pairs in drawn} == {16, 4}, "blocks: the first 16, and the other 4"
        assert 2 <= len({pair for pairs in drawn for pair in pairs}) <= 20
    again = source("re-arc", max_tasks=5, max_pairs=20)
    assert content(again, seed=3) == content(found, seed=3) == content(pickle.loads(pickle.dumps(found)), seed=3)


def test_pairs_of_a_counting_task_share_its_rule():
    """The counted colour, which the bar has, is drawn once a task."""
    found = source("counting")
    assert set(found.tasks) == set(COUNTING_TASKS)
    assert found.endless
    colours = []
    for seed in range(20):
        pairs = found.tasks["count-cells-of-colour"](named_rng(seed), 6)
        (colour,) = {int(c) for pair in pairs for c in pair.output.ravel()}
        colours.append(colour)
    assert len(set(colours)) > 3


# ---- worker processes ----------------------------------------------------------------------------------------------


@every_layout
def test_makers_of_files_can_be_pickled(kind, layout, tmp_path):
    found = source(kind, layout(tmp_path), max_pairs=3)
    assert content(pickle.loads(pickle.dumps(found))) == content(found)


@pytest.mark.parametrize("kind", ["re-arc", "counting"])
def test_makers_of_generators_can_be_pickled(kind):
    found = source(kind, max_tasks=12)
    assert content(pickle.loads(pickle.dumps(found))) == content(found)


def test_one_file_of_a_folder_of_pairs_is_a_source(tmp_path):
    pair = {"input": [[1]], "output": [[2]]}
    (tmp_path / "007bbfb7.json").write_text(json.dumps([pair] * 3))
    source = read_source(SourceConfig(kind="pairs", path=str(tmp_path / "007bbfb7.json")))
    assert source.tasks.keys() == {"007bbfb7"} and len(source.known_pairs("007bbfb7")) == 3
    (tmp_path / "golf.json").write_text(json.dumps({"train": [pair], "test": [pair], "arc-gen": [pair]}))
    with pytest.raises(UserError, match='its kind is "tasks"'):
        read_source(SourceConfig(kind="pairs", path=str(tmp_path / "golf.json")))
