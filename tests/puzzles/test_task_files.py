"""Tasks as people have them: the layouts of public data sets, archives, other wrappings, and what is something else."""

import gzip
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from toys import flip_task

from arc_solver.answers.submission import blank_submission, read_submission, write_submission
from arc_solver.config import TasksConfig, load_config
from arc_solver.errors import UserError
from arc_solver.puzzles.task_files import load_tasks, safe_id
from arc_solver.puzzles.tasks import TaskSet, challenge, grid_key

TASK = challenge(flip_task(np.random.default_rng(0), "some"))
OUTPUT = [[1, 2], [3, 4]]
SOLVED = {"train": TASK["train"], "test": [{**TASK["test"][0], "output": OUTPUT}]}


def load(path, **settings) -> TaskSet:
    return load_tasks(TasksConfig(spec=str(path), **settings))


def tree(folder: Path, *names: str, content=SOLVED) -> Path:
    """Files of one task each, in folders that are made."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


def ids(found: TaskSet) -> list[str]:
    return [task.id for task in found.tasks]


def refused(path, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **settings)
    said = str(caught.value)
    assert "\n" not in said
    return said


# ---- layouts of data sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "spec", "expected"),
    [
        (["corpus/Above/Above1.json", "corpus/Below/Below1.json"], "corpus", ["Above1", "Below1"]),  # ConceptARC
        (["dataset/1d_fill/1d_fill_0.json", "dataset/1d_flip/1d_flip_0.json"], "dataset", ["1d_fill_0", "1d_flip_0"]),
        (["data/MiniARC/a b.json", "data/MiniARC/c.json"], ".", ["a_b", "c"]),  # Mini-ARC's repository
        (["re_arc/tasks/aa.json", "re_arc/metadata.json"], ".", ["aa"]),
        (["set/aa.json", "set/deeper/bb.json"], "set", ["aa"]),
        (["aa.json", "dataset-metadata.json", "package.json"], ".", ["aa"]),
        (["d/aa.json", "d/._aa.json", "d/.DS_Store", ".git/x.json", "__MACOSX/d/aa.json"], ".", ["aa"]),
    ],
)
def test_folders_of_folders(files, spec, expected, tmp_path):
    found = load(tree(tmp_path, *files) / spec)
    assert ids(found) == expected
    assert found.solutions.keys() == set(expected)
    assert found.name == str(tmp_path / spec)


@pytest.mark.parametrize(
    ("files", "choices"),
    [
        (["data/training/aa.json", "data/evaluation/bb.json"], ["data/evaluation", "data/training"]),  # ARC-AGI-1, -2
        (["train/aa.json", "val/bb.json"], ["train", "val"]),
        (["corpus/A/A1.json", "corpus/B/B1.json", "Minimal/C.json"], ["Minimal", "corpus"]),  # ConceptARC's repository
        (["public_eval/aa.json", "semi/bb.json"], ["public_eval", "semi"]),
    ],
)
def test_where_it_is_not_clear_which_are_meant_the_folders_are_named(files, choices, tmp_path):
    said = refused(tree(tmp_path, *files))
    first, *others = [str(tmp_path / choice) for choice in choices]
    assert f"such as --tasks {first} (and there are {', '.join(others)})" in said
    for choice in choices:
        assert load(tmp_path / choice).tasks


def test_kaggles_folder_of_combined_files(tmp_path):
    tree(tmp_path, "x_test_challenges.json", "x_training_challenges.json", content={"aa": TASK})
    tree(tmp_path, "x_training_solutions.json", "sample_submission.json", content={"aa": [OUTPUT]})
    said = refused(tmp_path)
    assert f"--tasks {tmp_path}/x_test_challenges.json (and there are x_training_challenges.json)" in said
    assert load(tmp_path / "x_training_challenges.json").solutions
    (tmp_path / "x_test_challenges.json").unlink()
    assert load(tmp_path).solutions, "one challenges file is clear enough"


@pytest.mark.parametrize(
    ("name", "task_id"),
    [
        ("1,_3,_5,_...__l6aejq", "1__3__5__...__l6aejq"),
        ("Person_all except blocks in pink's view_l6aek", "Person_all_except_blocks_in_pink_s_view_l6aek"),
        ("Flip_color!_l6ab8j", "Flip_color__l6ab8j"),
        ("..", "_"),
        (".hidden", "_hidden"),
        ("../up", "__up"),
        ("", "_"),
        ("\ud800", "_"),
        ("größe", "größe"),
        ("a" * 400, None),
    ],
)
def test_any_name_becomes_an_id(name, task_id, tmp_path, caplog):
    """Of a combined file, and in a submission for it. A warning says so."""
    (tmp_path / "set.json").write_text(json.dumps({name: TASK}))
    found = load(tmp_path / "set.json")
    (made,) = ids(found)
    warned = f"set.json: 1 of 1 task get other ids than their names, as file names have them, e.g. {made} for "
    assert (warned in caplog.text) == (made != name)
    assert made == (task_id or made) == safe_id(made)
    assert len(f"{made}.json.part".encode()) < 255
    (tmp_path / made).with_suffix(".json").touch()
    write_submission(blank_submission(found), tmp_path / "submission.json")
    content = json.loads((tmp_path / "submission.json").read_text())
    (tmp_path / "theirs.json").write_text(json.dumps({name: content[made]}))
    assert read_submission(tmp_path / "theirs.json", found.tasks).keys() == {made}
    assert ids(load(tmp_path / "set.json", ids=(name,))) == [made]


def test_names_that_become_other_ids_are_counted_in_one_line(tmp_path, caplog):
    names = ("a b c", "d", "e/f")
    (tmp_path / "set.json").write_text(json.dumps(dict.fromkeys(names, TASK)))
    assert ids(load(tmp_path / "set.json")) == ["a_b_c", "d", "e_f"]
    (record,) = caplog.records
    assert "2 of 3 tasks get other ids" in record.getMessage() and 'a_b_c for "a b c", in' in record.getMessage()


def test_names_that_become_the_same_id_are_refused(tmp_path):
    assert "two tasks have the id a_b" in refused(tree(tmp_path, "a b.json", "a,b.json"))
    (tmp_path / "set.json").write_text(json.dumps({"a b": TASK, "a_b": TASK}))
    assert "two tasks have the id a_b" in refused(tmp_path / "set.json")


def test_solutions_of_more_tasks_and_outputs_that_are_not_known(tmp_path):
    tree(tmp_path, "x_challenges.json", content={"aa": TASK})
    tree(tmp_path, "x_solutions.json", content={"bb": [OUTPUT], "aa": [OUTPUT]})
    assert [grid.tolist() for grid in load(tmp_path / "x_challenges.json").solutions["aa"]] == [OUTPUT]
    unknown = {"train": TASK["train"], "test": [{**TASK["test"][0], "output": None}]}
    assert load(tree(tmp_path / "null", "aa.json", content=unknown)).solutions == {}
    hole = {"train": [{**TASK["train"][0], "output": None}], "test": TASK["test"]}
    assert "train pair 0: 'output' is missing" in refused(tree(tmp_path / "hole", "aa.json", content=hole))


# ---- wrappings -----------------------------------------------------------------------------------------------------


def zipped(folder: Path, *more: tuple[str, str]) -> Path:
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.json")):
            archive.write(path, path.relative_to(folder.parent))
        for name, text in more:
            archive.writestr(name, text)
    return file


def tarred(folder: Path, ending: str) -> Path:
    file = folder.with_name(folder.name + ending)
    with tarfile.open(file, "w:" + {".tgz": "gz", ".tar": ""}.get(ending, ending.rpartition(".")[2])) as archive:
        archive.add(folder, folder.name)
    return file


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_archives_are_read_as_the_folders_they_hold(ending, tmp_path):
    folder = tree(tmp_path / "corpus", "A/A1.json", "B/B1.json", "B/._B1.json")
    file = zipped(folder) if ending == ".zip" else tarred(folder, ending)
    found = load(file)
    assert found.digest == load(folder).digest
    assert ids(found) == ["A1", "B1"]
    tree(tmp_path / "kaggle", "x_challenges.json", content={"aa": TASK})
    tree(tmp_path / "kaggle", "x_solutions.json", content={"aa": [OUTPUT]})
    kaggle = tmp_path / "kaggle"
    found = load(zipped(kaggle) if ending == ".zip" else tarred(kaggle, ending))
    assert ids(found) == ["aa"]
    assert [grid.tolist() for grid in found.solutions["aa"]] == [OUTPUT]
    unclear = tree(tmp_path / "unclear", "training/aa.json", "evaluation/bb.json")
    assert "not clear which are meant" in refused(zipped(unclear) if ending == ".zip" else tarred(unclear, ending))


def test_an_archive_writes_nothing_and_believes_nothing(tmp_path, monkeypatch):
    folder = tree(tmp_path / "set", "aa.json")
    before = sorted(tmp_path.rglob("*"))
    file = zipped(folder, ("../../up.json", "{}"), ("__MACOSX/set/._aa.json", "no JSON"), ("set/.hidden.json", "{"))
    assert ids(load(file)) == ["aa"]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, file])
    monkeypatch.setattr("arc_solver.puzzles.file_tree.MOST_BYTES", 100)
    assert "set/aa.json would have" in refused(file)
    monkeypatch.setattr("arc_solver.puzzles.file_tree.MOST_MEMBERS", 2)
    assert "more than the 2 that are read" in refused(file)


def test_damaged_archives_are_refused(tmp_path):
    folder = tree(tmp_path / "set", "aa.json", "bb.json")
    for file in (zipped(folder), tarred(folder, ".tar.gz")):
        whole = file.read_bytes()
        for damaged, says in {
            whole[:-40]: "damaged|not whole",
            whole[:60] + b"xxxxxxxxxxxx" + whole[72:]: "damaged",
            b"": "is no archive, whatever its name says",
            b"no archive": "is no archive, whatever its name says",
            b"<!DOCTYPE html>": "is a web page",
        }.items():
            file.write_bytes(damaged)
            said = refused(file)
            assert str(file) in said
            assert re.search(says, said), said
            assert "get it again" in said or "raw" in said


def test_an_archive_with_a_password_is_not_called_damaged(tmp_path):
    file = zipped(tree(tmp_path / "set", "aa.json"))
    content = bytearray(file.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of the file, and in the directory
        content[content.index(header) + flags] |= 1
    file.write_bytes(content)
    said = refused(file)
    assert "cannot be unpacked here" in said and "password" in said and "damaged" not in said


def test_an_archive_where_one_file_is_asked_for(tmp_path):
    file = tree(tmp_path / "set", "x_challenges.json", content={"aa": SOLVED}) / "x_challenges.json"
    said = refused(file, solutions=str(zipped(file.parent)))
    assert "is a zip archive, not JSON: unpack it" in said and "--tasks" not in said


def test_a_bad_line_is_named_by_its_number(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text(f'{json.dumps(SOLVED)}\n\n{{"train": }}\n')
    assert f"{file}: line 3 is not JSON: Expecting value at character 11" in refused(file)


def test_another_tools_file_among_tasks_is_to_be_taken_out(tmp_path):
    for name in ("a.json", "z.json"):  # before them and after them
        folder = tree(tmp_path / name, "mm.json", "nn.json")
        tree(folder, name, content={"compilerOptions": {}})
        assert f"{name} lies among task files: take it out, as it holds no task, but" in refused(folder)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: gzip.compress(b"\xef\xbb\xbf" + text.encode()),
    ],
    ids=["utf-8 with a mark", "utf-16", "gzipped"],
)
def test_byte_order_marks(wrap, tmp_path):
    """In every file that is read: tasks, solutions, a submission."""
    ending = ".json.gz" if wrap("")[:2] == b"\x1f\x8b" else ".json"
    challenges, solutions, submission = (
        tmp_path / f"{name}{ending}" for name in ("x_challenges", "x_solutions", "mine")
    )
    challenges.write_bytes(wrap(json.dumps({"aa": TASK})))
    solutions.write_bytes(wrap(json.dumps({"aa": [OUTPUT]})))
    found = load(challenges)
    assert ids(found) == [*found.solutions] == ["aa"]
    write_submission(blank_submission(found), tmp_path / "plain.json")
    submission.write_bytes(wrap((tmp_path / "plain.json").read_text()))
    assert read_submission(submission, found.tasks).keys() == {"aa"}


def test_a_config_may_begin_with_a_mark(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf[adapt]\nsteps = 7\n")
    assert load_config(tmp_path / "c.toml").adapt.steps == 7


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{"id": "aa", **SOLVED}, {"id": "bb", **SOLVED}], ["aa", "bb"]),
        ([{"task_id": "aa", **SOLVED}], ["aa"]),
        ([{"aa": SOLVED}, {"bb": SOLVED}], ["aa", "bb"]),
        ([SOLVED, SOLVED], ["set-0", "set-1"]),
    ],
)
def test_one_task_a_line_and_lists_of_tasks(lines, expected, tmp_path):
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    (tmp_path / "set.jsonl").write_text(text)
    (tmp_path / "set.json").write_text(json.dumps(lines))
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("set.jsonl", "set.json", "set.jsonl.gz"):
        found = load(tmp_path / name)
        assert ids(found) == [*found.solutions] == expected
    (tmp_path / "named.json").write_text(text)
    if len(lines) > 1:
        assert "rename it to end in .jsonl" in refused(tmp_path / "named.json")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree(tmp_path, "set/aa.json")
    assert ids(load("~/set")) == ["aa"]
    config = load_config(None, ["model.path=~/m", "model.adapter=~/a", 'audit.scored_on=["~/set"]'])
    assert (config.model.path, config.model.adapter) == (f"{tmp_path}/m", f"{tmp_path}/a")
    assert config.audit.scored_on == (f"{tmp_path}/set",)
    with pytest.raises(UserError, match="no home folder for '~nobody-of-that-name/x'"):
        load_config(None, ["tasks.spec=~nobody-of-that-name/x"])


# ---- something else ------------------------------------------------------------------------------------------------

PAIRS = [{"input": [[1]], "output": [[2]]}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "a web page.*raw"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"GGUF\x03", "GGUF"),
        (b"", "it is empty"),
        ({"aa": PAIRS}, 'lists of pairs.*kind = "pairs"'),
        (PAIRS, 'lists of pairs.*kind = "pairs"'),
        ({"aa": [{"attempt_1": [[1]], "attempt_2": [[1]]}]}, "a submission.*bin/score"),
        ({"aa": [OUTPUT]}, "solutions, not tasks.*--solutions"),
        ({"peft_type": "LORA", "r": 8}, "an adapter.*model.adapter"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "settings of a model.*model.path"),
        ({"title": "x", "id": "me/x", "licenses": [{"name": "CC0-1.0"}]}, "Kaggle's description of a dataset"),
    ],
)
def test_what_is_something_else_is_called_by_its_name(content, says, tmp_path):
    file = tmp_path / "some.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    said = refused(file)
    assert str(file) in said
    assert re.search(says, said), said
    if content:
        tree(tmp_path, "aa.json")
        assert re.search(says, refused(tmp_path)), "among tasks too"


def test_many_tasks_among_files_of_one(tmp_path):
    tree(tmp_path, "aa.json", "bb.json")
    tree(tmp_path, "all.json", content={"aa": SOLVED})
    assert "all.json holds many tasks, and lies among files of one task each" in refused(tmp_path)


def test_tasks_of_larger_grids_than_arcs_are_left_out_of_a_set_and_counted(tmp_path, caplog):
    """1D-ARC has some. Alone one is refused, and so is a competition's file: its submission must answer all tasks."""
    wide = {"train": SOLVED["train"], "test": [{**SOLVED["test"][0], "output": [[1] * 31]}]}
    tree(tree(tmp_path / "dataset", "a/a1.json", "b/b1.json"), "b/b2.json", content=wide)
    assert ids(load(tmp_path / "dataset")) == ["a1", "b1"]
    assert "1 of 3 tasks are left out, as they have larger grids than ARC's, e.g." in caplog.text
    assert "b2.json: task b2, test pair 0, output, row 0: expected at most 30 cells" in caplog.text
    assert "at most 30 cells" in refused(tmp_path / "dataset" / "b" / "b2.json")
    assert "all of its 2 tasks have too large grids" in refused(
        tree(tmp_path / "all", "c.json", "d.json", content=wide)
    )
    (tmp_path / "x_challenges.json").write_text(json.dumps({"aa": SOLVED, "bb": wide}))
    assert "at most 30 cells" in refused(tmp_path / "x_challenges.json")


def test_paths_go_on_into_archives(tmp_path):
    """So that what a refusal names can be given."""
    unclear = zipped(tree(tmp_path / "set", "data/training/aa.json", "data/evaluation/bb.json"))
    said = refused(unclear)
    named = re.search(r"such as --tasks (\S+)", said)
    assert named
    assert ids(load(named[1])) == ["bb"]
    assert ids(load(f"{unclear}/set/data/training/aa.json")) == ["aa"]
    assert f"not found ({unclear} has no set/data/nothing)" in refused(f"{unclear}/set/data/nothing")


def test_what_lies_beside_folders_of_tasks(tmp_path):
    """Mini-ARC has traces of people who solved the tasks."""
    tree(tmp_path / "data", "MiniARC/aa.json", "MiniARC/bb.json")
    tree(tmp_path / "data", "MiniARC_traces/trace_1.json", content={"id": 1, "action_sequence": "..."})
    assert ids(load(tmp_path)) == ["aa", "bb"]


def test_the_same_grids_whatever_the_wrapping(tmp_path):
    folder = tree(tmp_path / "set", "aa.json")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("aa.json", json.dumps(SOLVED))
    (tmp_path / "aa.json").write_bytes(buffer.getvalue())  # a zip by another name
    (ours,), (theirs,) = load(folder).tasks, load(tmp_path / "aa.json").tasks
    assert [grid_key(pair.input) for pair in ours.train] == [grid_key(pair.input) for pair in theirs.train]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.csv", b"id,input\n1,2\n", "a CSV file"),
        ("x.yaml", b"a: 1\n", "YAML"),
        ("x.json", b"404: Not Found", "no such file"),
        ("x.json", b"<?xml version='1.0'?><Error/>", "a server's answer"),
        ("x.json", b"Rar!\x1a\x07", "a RAR archive"),
        ("x.json", b"7z\xbc\xaf\x27\x1c", "7-Zip"),
        ("x.json", b"\x80\x04\x95\x00", "pickle"),
        ("x.json", b"\x89HDF\r\n", "HDF5"),
        ("x.json", b'{"code": 403, "message": "no permission"}', "a server's answer, not tasks"),
        ("x.json", b'{"cells": [], "nbformat": 4}', "a notebook"),
    ],
)
def test_more_files_that_are_no_tasks_are_called_by_their_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert said in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("https://github.com/fchollet/ARC-AGI", "download it first"),
        ("66e6c45b", "--ids 66e6c45b"),
        ("ARC-AGI-1/Evaluation", "did you mean arc-agi-1/evaluation"),
        ("concept-arc", "bin/data list"),
    ],
)
def test_names_under_which_no_tasks_are(tmp_path, monkeypatch, spec, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(spec)


def test_pairs_without_names_are_a_task(tmp_path):
    """As in BARC's data sets: the last pair is the test pair."""
    lines = [{"examples": [[[[i]], [[i + 1]]] for i in range(k, k + 3)], "source": "def f(): ..."} for k in (0, 4)]
    (tmp_path / "barc.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = load(tmp_path / "barc.jsonl")
    assert [task.id for task in found.tasks] == ["barc-0", "barc-1"]
    assert [len(task.train) for task in found.tasks] == [2, 2]
    assert found.tasks[1].test[0].tolist() == [[6]] and found.solutions["barc-1"][0].tolist() == [[7]]


def test_endings_in_capitals(tmp_path):
    folder = tree(tmp_path / "set", "aa.JSON", "bb.Json", content=SOLVED)
    assert {task.id for task in load(folder).tasks} == {"aa", "bb"}
