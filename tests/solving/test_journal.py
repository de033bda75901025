"""A run's folder: what is kept, what continues, and what is refused."""

import json
import os

import numpy as np
import pytest
import torch
from toys import flip_task, grid, random_adapter

from arc_solver.answers.candidates import Candidate, Predictions
from arc_solver.answers.submission import read_submission
from arc_solver.clock import duration_s
from arc_solver.config import Config, RunConfig, VoteConfig
from arc_solver.errors import MachineError, UserError
from arc_solver.puzzles.task_files import load_tasks
from arc_solver.puzzles.tasks import TaskSet
from arc_solver.solving.adapt import Adaptation
from arc_solver.solving.journal import Journal, TaskResult, open_journal
from arc_solver.solving.run_config import saved_config
from arc_solver.solving.status import counts, last_summary, read_status

VOTES = Config(vote=VoteConfig(rule="votes"))


def some_tasks(rng, count=3) -> TaskSet:
    tasks = tuple(flip_task(rng, f"task{i}", tests=1 + i % 2) for i in range(count))
    solutions = {task.id: tuple(np.ascontiguousarray(g[:, ::-1]) for g in task.test) for task in tasks}
    return TaskSet("toy", tasks, solutions)


def found_for(task, right=True, views=4, of=4) -> Predictions:
    """The right answer, or a wrong one, in `views` of so many views."""
    answers = [np.ascontiguousarray(g[:, ::-1]) if right else grid("7") for g in task.test]
    scores = (-1.0,) * of
    return Predictions(
        (0,) * of, tuple(Candidate(t, g, tuple(range(views)), (), scores) for t, g in enumerate(answers))
    )


def result(task, **more) -> TaskResult:
    return TaskResult(
        task.id, **{"predictions": found_for(task), "adaptation": {}, "seconds": 2, "predicting": 1, **more}
    )


def opened(tmp_path, found, config=VOTES, name="run"):
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "a.safetensors").write_bytes(b"weights")
    return open_journal(tmp_path / name, found, config, [tmp_path / "model"])


def submission(journal):
    return read_submission(journal.run_dir / "submission.json", journal.task_set.tasks)


def test_a_run_is_whole_from_its_first_moment_and_continues(tmp_path, rng):
    found = some_tasks(rng)
    first, second, third = found.tasks
    with opened(tmp_path, found) as journal:
        assert not journal.continued
        assert all(both[0].tolist() == [[0]] for outputs in submission(journal).values() for both in outputs)
        journal.save_result(result(first))
        journal.rewrite_submission()
        assert submission(journal)[first.id][0][0].tolist() == first.test[0][:, ::-1].tolist()
        journal.save_result(result(second, predictions=found_for(second, right=False)))
    with opened(tmp_path, found) as journal:
        assert journal.continued
        assert [journal.done(task.id) for task in found.tasks] == [True, True, False]
        assert counts(found, journal.statuses)["score"]["outputs_solved"] == 1
        journal.save_result(result(third))
    content = counts(found, journal.statuses)
    assert (content["answered"], content["score"]["outputs_solved"], content["score"]["outputs"]) == (3, 2, 4)


def test_later_stages_count_more_and_placeholders_are_tried_again(tmp_path, rng):
    found = some_tasks(rng, 2)
    first, second = found.tasks
    with opened(tmp_path, found) as journal:
        journal.save_result(result(first, predictions=found_for(first, right=False)), "unadapted")
        assert journal.done(first.id, "unadapted")
        assert not journal.done(first.id)
        journal.save_result(result(first), "tasks")
        assert journal.done(first.id)
        assert not journal.done(first.id, "again")
        journal.save_result(result(second, predictions=Predictions((), ()), adaptation=None, fallback="placeholder"))
        assert not journal.done(second.id)
    with opened(tmp_path, found) as journal:
        assert journal.statuses[first.id].solved == [True]
        assert not journal.done(second.id)
        assert counts(found, journal.statuses)["fallen_back"] == {second.id: "placeholder"}
        assert counts(found, journal.statuses)["answered"] == 1


def test_one_attempt_two_and_all_candidates_are_scored_side_by_side(tmp_path, rng):
    """The right answer comes first, second, third, not at all; a fifth task is not come to."""
    found = some_tasks(rng, 5)
    with opened(tmp_path, found) as journal:
        for task, place in zip(found.tasks, (1, 2, 3, None), strict=False):
            answers = []
            for t, right in enumerate(found.solutions[task.id]):
                ranking = [grid("7"), grid("77"), grid("777")]
                if place:
                    ranking.insert(place - 1, right)
                votes = [range(10 * n, 10 * n + 8 - n) for n in range(len(ranking))]
                answers += [
                    Candidate(t, cells, tuple(views), (), (-1.0,) * 40)
                    for cells, views in zip(ranking, votes, strict=True)
                ]
            journal.save_result(result(task, predictions=Predictions((0,) * 40, tuple(answers))))
    with opened(tmp_path, found) as again:
        for statuses in (journal.statuses, again.statuses):
            content = counts(found, statuses)
            columns = [content[key] for key in ("pass@1", "score", "coverage")]
            assert [score["tasks_solved"] for score in columns] == [1, 2, 3]
            assert [score["outputs_solved"] for score in columns] == [1, 3, 4]  # the second task has two
            assert all((score["tasks"], score["outputs"]) == (5, 7) for score in columns)


def test_the_time_of_a_task_is_that_of_all_its_stages(tmp_path, rng):
    found = some_tasks(rng, 4)
    first, second, third, _ = found.tasks
    with opened(tmp_path, found) as journal:
        assert counts(found, journal.statuses)["seconds_per_task"] is None
        for stage, seconds in (("unadapted", 1), ("tasks", 20), ("again", 300)):
            journal.save_result(result(first, seconds=seconds), stage)
        journal.save_result(result(second, seconds=2), "unadapted")
        journal.save_result(result(second, seconds=9, fallback="placeholder"))  # which is tried again
        journal.save_result(result(second, seconds=5))
        journal.save_result(result(third, seconds=7, fallback="placeholder"))  # which is no answer
    with opened(tmp_path, found) as again:
        for statuses in (journal.statuses, again.statuses):
            assert counts(found, statuses)["seconds_per_task"] == {"median": 164, "longest": 321}


def test_adaptations_come_back_as_they_were(tmp_path, rng, toy_model):
    found = some_tasks(rng, 2)
    adapters = [random_adapter(toy_model, seed) for seed in range(2)]
    learnt = [Adaptation(adapter, 3, 40, 1.5, 0.5, 2.0, 0, 0.75, "steps") for adapter in adapters]
    with opened(tmp_path, found) as journal:
        journal.save_adaptations(found.tasks, learnt, 0)
        for task, adaptation in zip(found.tasks, learnt, strict=True):
            assert journal.has_adaptation(task.id, 0)
            assert not journal.has_adaptation(task.id, 1)
            again = journal.adaptation(task.id, 0)
            assert again.to_json() == adaptation.to_json()
            for name, (a, b) in adaptation.adapter.weights.items():
                assert torch.equal(again.adapter.weights[name][0], a)
                assert torch.equal(again.adapter.weights[name][1], b)
        (journal.run_dir / "adapters" / found.tasks[0].id / "adapter_model.safetensors").write_bytes(b"cut")
        assert journal.adaptation(found.tasks[0].id, 0) is None


def test_damaged_results_are_put_aside_and_nothing_else_is_lost(tmp_path, rng):
    found = some_tasks(rng)
    with opened(tmp_path, found) as journal:
        for task in found.tasks:
            journal.save_result(result(task))
    file = journal.run_dir / "tasks" / "task1.json"
    file.write_text(file.read_text()[:50])
    with (journal.run_dir / "log.jsonl").open("a") as log:
        log.write('{"event": "ta')  # cut by a kill
    with opened(tmp_path, found) as journal:
        assert journal.damaged == [file]
        assert [journal.done(task.id) for task in found.tasks] == [True, False, True]
        journal.log(event="after")
    assert json.loads((journal.run_dir / "log.jsonl").read_text().splitlines()[-1]) == {"event": "after"}


def changed(**sections) -> Config:
    return VOTES.model_copy(
        update={key: getattr(VOTES, key).model_copy(update=value) for key, value in sections.items()}
    )


def test_what_would_mix_results_is_refused_by_name(tmp_path, rng):
    found = some_tasks(rng)
    opened(tmp_path, found).__exit__()
    with pytest.raises(UserError, match=r"adapt\.steps=240, and now it is 7"):
        opened(tmp_path, found, changed(adapt={"steps": 7}))
    with pytest.raises(UserError, match=r"run\.seed=0"):
        opened(tmp_path, found, changed(run={"seed": 1}))
    with pytest.raises(UserError, match="another content of the tasks"):
        opened(tmp_path, some_tasks(np.random.default_rng(5)))
    for free in (changed(run={"workers": 3, "time_budget": "40m"}), changed(vote={"rule": "product"})):
        with opened(tmp_path, found, free) as journal:
            assert journal.continued
        assert saved_config(journal.run_dir) == free
    (tmp_path / "model" / "a.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="another content of the checkpoint"):
        open_journal(tmp_path / "run", found, VOTES, [tmp_path / "model"])


def test_what_is_lost_of_a_folder_is_made_again_or_said(tmp_path, rng):
    found = some_tasks(rng)
    with opened(tmp_path, found) as journal:
        journal.save_result(result(found.tasks[0]))
    for name in ("again", "unadapted", "adapters"):
        (journal.run_dir / name).rmdir()
    (journal.run_dir / "summary.json").write_text("[")
    with opened(tmp_path, found) as journal:
        assert journal.done(found.tasks[0].id)
        journal.save_result(result(found.tasks[0]), "again")
    assert last_summary(journal.run_dir) == {}
    for name in ("run.json", "config.json"):
        whole = (journal.run_dir / name).read_text()
        (journal.run_dir / name).write_text(whole[:30])
        with pytest.raises(UserError, match=f"{name} is damaged.*are whole"):
            opened(tmp_path, found)
        (journal.run_dir / name).write_text(whole)
    for section, key, says in (
        ("vote", "rule", "vote.rule: .*got 'none'"),
        ("vote", "law", "unknown setting vote.law"),
    ):
        changed = json.loads(whole) | {section: {key: "none"}}
        (journal.run_dir / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=rf"was made by another version of arc_solver \(.*{says}"):
            opened(tmp_path, found)
    (journal.run_dir / "config.json").write_text(whole)
    with opened(tmp_path, found) as journal:
        assert journal.continued


def test_other_folders_are_left_alone(tmp_path, rng):
    found = some_tasks(rng)
    (tmp_path / "run").mkdir()
    with opened(tmp_path, found), pytest.raises(UserError, match="another process works on"):
        opened(tmp_path, found)  # an empty folder is taken, but not twice
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "submission.json").write_text("precious")
    with pytest.raises(UserError, match="is no run to continue"):
        opened(tmp_path, found, name="other")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="is no run to continue"):
        opened(tmp_path, found, name="file")
    assert (tmp_path / "other" / "submission.json").read_text() == (tmp_path / "file").read_text() == "precious"
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_stops_the_run_in_one_sentence(tmp_path, rng, monkeypatch):
    found = some_tasks(rng)

    def full(*_):
        raise OSError(28, os.strerror(28))

    with opened(tmp_path, found) as journal:
        journal.save_result(result(found.tasks[0]))
        before = (journal.run_dir / "submission.json").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(MachineError, match=r"No space left.*same command again"):
                journal.rewrite_submission()
        assert (journal.run_dir / "submission.json").read_bytes() == before


def test_durations():
    assert [duration_s(text) for text in ("90s", "40m", "11h30m", "1.5h", "1h1m1s")] == [90, 2400, 41400, 5400, 3661]
    for wrong in ("", "90", "1d", "m", "1m1h", "-5s", "1.2.3s"):
        with pytest.raises(ValueError, match="is no duration"):
            duration_s(wrong)
    with pytest.raises(ValueError, match="at least 20 s"):
        RunConfig(time_budget="5s")
    with pytest.raises(ValueError, match="executor"):
        RunConfig(address="auto")


def test_the_status_is_read_while_a_run_goes_on(tmp_path):
    config = changed(tasks={"limit": 3})
    found = load_tasks(config.tasks)
    with opened(tmp_path, found, config) as journal:
        for task in found.tasks[:2]:
            right = tuple(Candidate(t, g, (0,), (), (-1.0,)) for t, g in enumerate(found.solutions[task.id]))
            journal.save_result(result(task, predictions=Predictions((0,), right)))
        name, content = read_status(journal.run_dir)
    assert (name, content["tasks"], content["answered"], content["adapted"]) == ("demo", 3, 2, 2)
    assert content["score"]["outputs_solved"] == content["coverage"]["outputs_solved"] == 2
    assert content["data"] == found.data
    with pytest.raises(UserError, match="is no run"):
        read_status(tmp_path)


def test_the_submission_is_not_rewritten_for_every_task(tmp_path, rng, monkeypatch):
    """Where rewriting it takes long, as with very many tasks, it waits; closing brings it up to date."""
    found = some_tasks(rng, 30)
    real, writes = Journal.rewrite_submission, []

    def slow(self):
        writes.append(1)
        real(self)
        self._writing_s = 1e9  # as if it had taken that long

    with opened(tmp_path, found) as journal:
        monkeypatch.setattr(Journal, "rewrite_submission", slow)
        for task in found.tasks:
            journal.save_result(result(task))
            journal.refresh_submission()
        assert len(writes) <= 1
    answers = submission(journal)
    assert all(answers[i][0][0].tolist() == grids[0].tolist() for i, grids in found.solutions.items())
