"""`bin/data` on sets that are there: what it writes and says is what bin/train and the other commands make of them."""

import gzip
import json
from pathlib import Path

import pytest
from toys import grid

from arc_solver.config import SourceConfig, TasksConfig, load_config
from arc_solver.data.command import main
from arc_solver.data.corpus import make_corpus
from arc_solver.data.sources import read_source
from arc_solver.errors import UserError
from arc_solver.files import sha256
from arc_solver.puzzles import Augmentation, Pair, load_tasks
from arc_solver.puzzles.tasks import grid_tokens


def told(capsys, *words: str | Path) -> dict:
    """What a command prints with --json."""
    main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def write(file: Path, content: object) -> Path:
    file.write_text(json.dumps(content))
    return file


def listed(pair: Pair) -> dict:
    return {"input": pair.input.tolist(), "output": pair.output.tolist()}


@pytest.fixture
def pairs() -> list[Pair]:
    """Nine pairs that are all different, however turned and recoloured."""
    return [Pair(grid("012", "340", "1" * 3), grid(*("05"[i >> k & 1] * 3 for k in range(4)), "678")) for i in range(9)]


# ---- partition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_a_partition_is_that_of_bin_train(tmp_path, capsys, seed):
    assert (
        main(["partition", "--of", "arc-agi-1/training", "--tasks", "30", "--seed", str(seed), "--out", str(tmp_path)])
        == 0
    )
    said = capsys.readouterr().out
    settings = next(line for line in said.splitlines() if "validation.of=" in line).partition(": ")[2].split()
    expected = make_corpus(load_config(None, [*settings, 'corpus.sources=[{kind="tasks", path="arc-agi-1/training"}]']))
    validation, training = (
        load_tasks(TasksConfig(spec=str(tmp_path / f"{name}_challenges.json"))) for name in ("validation", "training")
    )
    assert validation.digest == expected.partition.validation.digest
    [[source]] = expected.mixtures
    assert {task.id for task in training.tasks} == source.tasks.keys()
    assert "in neither: 40853293, caa06a1f" in said


def test_what_validation_has_is_not_in_training_either(tmp_path, capsys, pairs):
    """Of a set in which every task is there twice, turned and recoloured."""
    turned = [Augmentation(5, (3, 5, 0, 8, 1, 9, 2, 4, 7, 6)).apply_pair(pair) for pair in pairs]
    tasks = {
        f"{name}{i}": {"train": [listed(pair)], "test": [listed(pair)]}
        for name, of in (("a", pairs), ("b", turned))
        for i, pair in enumerate(of)
    }
    file = write(tmp_path / "set.json", tasks)
    assert main(["partition", "--of", str(file), "--tasks", "4", "--out", str(tmp_path / "parts")]) == 0
    ids = [
        {i[1:] for i in json.loads((tmp_path / "parts" / f"{name}_challenges.json").read_text())}
        for name in ("validation", "training")
    ]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    assert "as they share pairs with validation tasks" in capsys.readouterr().out


def test_a_partition_of_a_part_of_nothing(tmp_path):
    for words in (["--tasks", "0"], ["--tasks", "20"], ["--tasks", "21"]):
        with pytest.raises(UserError):
            main(["partition", "--of", "demo", *words, "--out", str(tmp_path / "new")])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        main(["partition", "--of", "demo", "--tasks", "5", "--out", str(tmp_path / "old")])
    assert not (tmp_path / "new").exists()


# ---- make ----------------------------------------------------------------------------------------------------------


def make(file: Path, *words: str) -> Path:
    assert main(["make", "re-arc", "--difficulty", "0:0.1", "--out", str(file), *words]) == 0
    return file


def test_many_pairs_are_a_source(tmp_path, arc):
    file = make(tmp_path / "pairs.json.gz", "--pairs", "3")
    content = json.loads(gzip.decompress(file.read_bytes()))
    assert content.keys() == {task.id for task in arc["training"].tasks}
    assert max(map(len, content.values())) == 3
    assert all(len({json.dumps(pair) for pair in of_one}) == len(of_one) for of_one in content.values())
    assert len(read_source(SourceConfig(kind="pairs", path=str(file))).tasks) > 390


def test_rules_that_have_fewer_pairs_are_named(tmp_path, capsys):
    content = json.loads(make(tmp_path / "pairs.json", "--pairs", "2", "--difficulty", "0:0").read_text())
    few = [rule for rule, pairs in content.items() if len(pairs) < 2]
    said = capsys.readouterr().out
    assert few and all(f"{rule} {len(content[rule])}" in said for rule in few)


def test_tasks_are_tasks(tmp_path):
    file = make(tmp_path / "tasks.json", "--as", "tasks", "--pairs", "4")
    found = load_tasks(TasksConfig(spec=str(file)))
    assert all(len(task.train) <= 3 and len(task.test) == 1 and task.id in found.solutions for task in found.tasks)
    assert sum(len(task.train) == 3 for task in found.tasks) > 390


def test_the_same_words_make_the_same_bytes(tmp_path):
    first, again, other = (
        sha256(make(tmp_path / f"{i}.json.gz", "--pairs", "1", "--seed", seed, "--processes", processes))
        for i, (seed, processes) in enumerate([("1", "1"), ("1", "3"), ("2", "3")])
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--difficulty", "1:0"], "not within 0:1"),
        (["--difficulty", "0"], "no range such as 0:0.5"),
        (["--pairs", "0"], "at least 1"),
        (["--as", "tasks", "--pairs", "1"], "at least 2"),
        (["--processes", "0"], "at least 1"),
        (["--out", "x.txt"], "ends in .json"),
        (["--out", "there.json"], "exists"),
    ],
    ids=lambda words: words if isinstance(words, str) else words[-1],
)
def test_what_cannot_be_made(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    Path("there.json").touch()
    with pytest.raises(UserError, match=said):
        main(["make", "re-arc", "--out", "new.json", *words])
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


# ---- stats ---------------------------------------------------------------------------------------------------------


def test_statistics_of_a_set_counted_by_hand(tmp_path, capsys):
    small, large = {"input": [[1]], "output": [[1, 2]]}, {"input": [[0] * 10] * 10, "output": [[5] * 30] * 30}
    tasks = {
        "a": {"train": [small, small], "test": [small]},
        "b": {"train": [large], "test": [{"input": [[3]]}, {"input": [[4]]}]},
    }
    found = told(capsys, "stats", write(tmp_path / "tasks.json", tasks))
    assert (found["tasks"], found["pairs"], found["unsolved"]) == (2, 4, 2)
    assert found["spreads"]["demonstrations a task"] == {"least": 1, "median": 1.5, "most": 2}
    assert found["spreads"]["test inputs a task"] == {"least": 1, "median": 1.5, "most": 2}
    # A cell is a token, so is the end of a row, a marker before each grid, and the end of a pair: 3 + 4 + 1, twice, the
    # test input, 3, and its answer, 4; 111 + 931 + 1, 3, and for the answer the longest output shown.
    assert found["spreads"]["tokens a task, with its longest answer"] == {"least": 23, "median": 1000.0, "most": 1977}
    assert found["spreads"]["rows of a grid"] == {"least": 1, "median": 1.0, "most": 30}
    assert found["fits"] == {"512": 1, "1024": 1, "2048": 2, "4096": 2, "8192": 2, "16384": 2}
    cells = {0: 100, 1: 6, 2: 3, 5: 900}
    assert found["colours"] == [round(cells.get(colour, 0) / 1009, 4) for colour in range(10)]
    assert found["same_shape"] == 0


def test_statistics_of_lists_of_pairs(tmp_path, capsys):
    pair = {"input": [[1, 2]], "output": [[2, 1]]}
    found = told(capsys, "stats", write(tmp_path / "lists.json", {"a": [pair] * 3, "b": [pair] * 5}))
    assert (found["tasks"], found["pairs"], found["unsolved"], found["same_shape"]) == (2, 8, 0, 1)
    assert found["spreads"]["pairs a task"] == {"least": 3, "median": 4.0, "most": 5}
    assert found["fits"]["512"] == 512 // 9


@pytest.mark.parametrize("spec", ["demo", "arc-agi-1/training"])
def test_statistics_of_sets_that_are_built_in(spec, capsys):
    found, loaded = told(capsys, "stats", spec), load_tasks(TasksConfig(spec=spec))
    longest = max(task.tokens + max(map(grid_tokens, loaded.solutions[task.id])) for task in loaded.tasks)
    assert found["spreads"]["tokens a task, with its longest answer"]["most"] >= longest
    assert sum(found["colours"]) == pytest.approx(1, abs=1e-3)
    assert main(["stats", spec]) == 0
    assert f"{found['pairs']:,} pairs" in capsys.readouterr().out


# ---- audit ---------------------------------------------------------------------------------------------------------


def test_what_two_sets_share_is_found(tmp_path, capsys, pairs):
    turned = [Augmentation(5, (3, 5, 0, 8, 1, 9, 2, 4, 7, 6)).apply_pair(pair) for pair in pairs]
    first = {
        "same": {"train": [listed(pairs[0])], "test": [listed(pairs[1])]},
        "turned": {"train": [listed(pairs[2]), listed(pairs[3])], "test": [listed(pairs[4])]},
        "own": {"train": [listed(pairs[5])], "test": [listed(pairs[6])]},
    }
    second = {
        "same": [listed(pairs[7])],
        "other": [listed(turned[4]), listed(turned[2]), listed(pairs[8])],
        "none": [{"input": [[1]], "output": [[1]]}],
    }
    words = ["audit", write(tmp_path / "a.json", first), write(tmp_path / "b.json", second)]
    found = told(capsys, *words)
    assert found["shared"] == [
        {"first": "same", "second": "same", "same_id": True, "pairs": 0},
        {"first": "turned", "second": "other", "same_id": False, "pairs": 2},
    ]
    assert main([*map(str, words)]) == 3
    said = capsys.readouterr().out
    assert (
        "2 of the 3 tasks" in said
        and "turned and other: 2 shared pairs" in said
        and "same and same: the same id" in said
    )


def test_what_the_sets_of_arc_agi_1_share_is_known(capsys):
    found = told(capsys, "audit", "arc-agi-1/training", "arc-agi-1/evaluation")
    assert {(each["first"], each["second"]) for each in found["shared"]} == {
        ("40853293", "070dd51e"),
        ("caa06a1f", "50a16a69"),
    }


def test_sets_that_share_nothing(tmp_path, pairs):
    first, second = ({name: [listed(pair)]} for name, pair in zip("ab", pairs, strict=False))
    assert main(["audit", *(str(write(tmp_path / f"{i}.json", each)) for i, each in enumerate((first, second)))]) == 0


# ---- hash ----------------------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_scores_and_the_sha256_that_of_sources(tmp_path, capsys, pairs):
    pair = listed(pairs[0])
    file = write(tmp_path / "tasks.json", {"a": {"train": [pair], "test": [pair]}})
    found = told(capsys, "hash", file)
    assert found["digest"] == load_tasks(TasksConfig(spec=str(file))).digest and found["sha256"] == sha256(file)
    lists = write(tmp_path / "lists.json", {"a": [pair] * 2})
    found = told(capsys, "hash", lists)
    assert found["digest"] is None
    assert read_source(SourceConfig(kind="pairs", path=str(lists), sha256=found["sha256"])).tasks
    assert told(capsys, "hash", "demo")["sha256"] is None


def test_a_digest_does_not_depend_on_how_a_set_is_kept(tmp_path, capsys, pairs):
    pair = listed(pairs[0])
    tasks = {name: {"train": [pair], "test": [pair]} for name in "ab"}
    write(tmp_path / "tasks.json", tasks)
    (tmp_path / "folder").mkdir()
    for name, task in tasks.items():
        write(tmp_path / "folder" / f"{name}.json", task)
    assert len({told(capsys, "hash", tmp_path / each)["digest"] for each in ("tasks.json", "folder")}) == 1
