"""What a run trains on and what it validates on. Most tests use ARC-AGI-1 itself, some small sets written here."""

import json
from pathlib import Path

import numpy as np
import pytest

from arc_solver.config import Config, ValidationConfig, load_config
from arc_solver.data.corpus import Corpus, Partition, make_corpus, make_partition, validation_source
from arc_solver.data.leaks import leak_audit
from arc_solver.errors import UserError
from arc_solver.puzzles.tasks import Task, grid_key

COPIES = {("40853293", "070dd51e"), ("caa06a1f", "50a16a69")}  # training tasks that are evaluation tasks


def config(*words: str) -> Config:
    return load_config(None, words)


def ids_of(corpus: Corpus) -> list[set[str]]:
    """The training tasks of each source of each stage."""
    return [set(source.tasks) for mixture in corpus.mixtures for source in mixture]


def held_out(partition: Partition) -> set[str]:
    return {task.id for task in partition.validation.tasks}


def rest_of(corpus: Corpus) -> set[str]:
    return {task.id for task in corpus.partition.rest.tasks}


@pytest.fixture
def small_set(tmp_path) -> Path:
    """Thirty tasks of random grids: three demonstrations and a test pair."""
    rng = np.random.default_rng(0)

    def pair() -> dict[str, list[list[int]]]:
        return {side: rng.integers(0, 10, size=(3, 4)).tolist() for side in ("input", "output")}

    tasks = {f"task{i:02}": {"train": [pair() for _ in range(3)], "test": [pair()]} for i in range(30)}
    file = tmp_path / "set.json"
    file.write_text(json.dumps(tasks))
    (tmp_path / "pairs.json").write_text(json.dumps({i: task["train"] for i, task in tasks.items()}))
    return file


@pytest.fixture(scope="module")
def default_corpus() -> Corpus:
    return make_corpus(Config())


# ---- held-out tasks ------------------------------------------------------------------------------------------------


def test_by_default_20_training_tasks_are_held_out(default_corpus, arc):
    training = {task.id for task in arc["training"].tasks}
    chosen = held_out(default_corpus.partition)
    assert len(chosen) == 20
    assert chosen < training
    excluded = set(Config().audit.exclude)
    assert {task.id for task in default_corpus.partition.rest.tasks} == training - chosen - excluded
    assert ids_of(default_corpus) == [training - chosen - excluded] * 2


def test_a_partition_is_seeded(small_set):
    first, again, other = (make_partition(ValidationConfig(of=str(small_set), tasks=10, seed=s)) for s in (0, 0, 1))
    assert held_out(first) == held_out(again) != held_out(other)
    assert first.rest.digest == again.rest.digest


def test_a_partition_does_not_depend_on_the_order(small_set, tmp_path):
    turned = tmp_path / "turned.json"
    turned.write_text(json.dumps(dict(reversed(json.loads(small_set.read_text()).items()))))
    sets = [make_partition(ValidationConfig(of=str(file), tasks=10, seed=3)) for file in (small_set, turned)]

    def order(task: Task) -> tuple:
        return task.id, [grid_key(pair.input) for pair in task.train]

    assert [order(t) for t in sets[0].validation.tasks] == [order(t) for t in sets[1].validation.tasks]
    assert sets[0].rest.digest == sets[1].rest.digest


@pytest.mark.parametrize("seed", range(5))
def test_a_partition_is_disjoint_and_complete(small_set, seed):
    exclude = ("task03", "task17", "elsewhere")
    partition = make_partition(ValidationConfig(of=str(small_set), tasks=7, seed=seed), exclude)
    chosen = held_out(partition)
    assert len(chosen) == 7 == len(partition.validation.solutions)
    rest = [task.id for task in partition.rest.tasks]
    assert not chosen & set(rest)
    assert len(rest) == len(set(rest))
    assert chosen | set(rest) == {f"task{i:02}" for i in range(30)} - set(exclude)


def test_every_task_may_be_held_out(small_set):
    drawn = [held_out(make_partition(ValidationConfig(of=str(small_set), tasks=10, seed=s))) for s in range(20)]
    assert set.union(*drawn) == {f"task{i:02}" for i in range(30)}


def test_partitions_that_cannot_be(small_set, tmp_path):
    with pytest.raises(UserError, match=r"validation\.tasks=30 leaves none of the 30 tasks.*give at most 29"):
        make_partition(ValidationConfig(of=str(small_set), tasks=30))
    with pytest.raises(UserError, match="leaves none of the 29 tasks"):
        make_partition(ValidationConfig(of=str(small_set), tasks=29), ("task00",))
    tasks = json.loads(small_set.read_text())
    single = tmp_path / "single.json"
    single.write_text(json.dumps({"task05": tasks["task05"]}))
    with pytest.raises(UserError, match=r"none of the 1 task .* give another set as validation\.of"):
        make_partition(ValidationConfig(of=str(single), tasks=1))
    del tasks["task05"]["test"][0]["output"]
    unsolved = tmp_path / "unsolved.json"
    unsolved.write_text(json.dumps(tasks))
    with pytest.raises(UserError, match=f"{unsolved} has no solution for 1 task, e.g. task05"):
        make_partition(ValidationConfig(of=str(unsolved), tasks=5))
    assert len(held_out(make_partition(ValidationConfig(of=str(unsolved), tasks=5), ("task05",)))) == 5


def test_validation_samples_come_from_the_held_out_tasks_alone(default_corpus, small_set):
    generated = validation_source(default_corpus.partition)
    assert set(generated.tasks) == held_out(default_corpus.partition)
    assert generated.endless
    own = make_partition(ValidationConfig(of=str(small_set), tasks=5, re_arc=False))
    source = validation_source(own)
    assert set(source.tasks) == held_out(own)
    assert {len(source.known_pairs(i)) for i in source.tasks} == {4}, "test pairs too"
    with pytest.raises(UserError, match=r"validation\.re_arc: RE-ARC has no generator for task.. .*set it to false"):
        validation_source(make_partition(ValidationConfig(of=str(small_set), tasks=5)))


def test_held_out_tasks_are_in_no_source_of_any_stage(small_set, tmp_path):
    file = tmp_path / "stages.toml"
    file.write_text(
        f"""
        validation = {{ of = "{small_set}", tasks = 8, re_arc = false }}
        audit = {{ scored_on = [], exclude = ["task01"] }}
        [[stages]]
        name = "one"
        corpus.sources = [{{ kind = "tasks", path = "{small_set}" }}, {{ kind = "counting" }}]
        [[stages]]
        name = "two"
        corpus.sources = [
            {{ kind = "demonstrations", path = "{small_set}" }}, {{ kind = "pairs", path = "{tmp_path}/pairs.json" }}
        ]
        """
    )
    corpus = make_corpus(load_config(file))
    kinds = [[source.config.kind for source in mixture] for mixture in corpus.mixtures]
    assert kinds == [["tasks", "counting"], ["demonstrations", "pairs"]]
    rest = {f"task{i:02}" for i in range(30)} - held_out(corpus.partition) - {"task01"}
    assert len(rest) in (21, 22)
    tasks, counting, demonstrations, pairs = ids_of(corpus)
    assert tasks == demonstrations == pairs == rest == rest_of(corpus)
    assert corpus.trained_on.ids == rest | counting
    assert corpus.trained_on.demonstrated == rest
    assert leak_audit(corpus.trained_on, corpus.partition.validation).passed


# ---- the audit -----------------------------------------------------------------------------------------------------


def test_the_default_config_passes_the_audit(default_corpus, arc):
    assert default_corpus.overlaps == ()
    assert leak_audit(default_corpus.trained_on, arc["evaluation"]).passed
    assert leak_audit(default_corpus.trained_on, default_corpus.partition.validation).passed
    trained = leak_audit(default_corpus.trained_on, arc["training"])
    assert set(trained.by_id) == set(trained.by_content) == rest_of(default_corpus)


def test_training_on_the_evaluation_set_is_refused():
    words = 'corpus.sources=[{kind="tasks", path="arc-agi-1/evaluation", max_tasks=9}]'
    with pytest.raises(UserError) as caught:
        make_corpus(config(words))
    said = str(caught.value)
    chosen = make_corpus(config(words, 'audit.overlap="allow"', "audit.scored_on=[]")).mixtures[0][0].tasks
    assert said.startswith("leak audit: 9 overlaps of training tasks with")
    assert sum(f"{i} of tasks arc-agi-1/evaluation with {i}" in said for i in chosen) == 5
    assert "and 4 more" in said
    for setting in ('audit.overlap="exclude"', '"allow"', "audit.scored_on", "['arc-agi-1/evaluation']"):
        assert setting in said
    assert "\n" not in said


def test_overlapping_tasks_are_left_out_or_allowed(arc):
    """Of 60 evaluation and 60 training tasks, those evaluation tasks that are scored."""
    words = [
        'audit.scored_on=["demo"]',
        'corpus.sources=[{kind="tasks", path="arc-agi-1/evaluation", max_tasks=60},'
        ' {kind="tasks", path="arc-agi-1/training", max_tasks=60}]',
    ]
    demo = {task.id for task in sorted(arc["evaluation"].tasks, key=lambda task: (task.tokens, task.id))[:20]}
    allowed, excluded = (make_corpus(config(*words, f"audit.overlap={how}")) for how in ("allow", "exclude"))
    evaluation, training = ids_of(allowed)
    leaked = evaluation & demo
    assert len(evaluation) == 60
    assert leaked
    assert ids_of(excluded) == [evaluation - demo, training]
    for corpus in (allowed, excluded):
        assert {(o.task_id, o.scored_id) for o in corpus.overlaps} == {(i, i) for i in leaked}
    assert allowed.trained_on.ids == evaluation | training
    assert excluded.trained_on.ids == (evaluation | training) - demo
    assert set(leak_audit(allowed.trained_on, arc["evaluation"]).by_id) == evaluation
    assert set(leak_audit(excluded.trained_on, arc["evaluation"]).by_id) == evaluation - demo


def test_a_partition_of_the_evaluation_set():
    """100 of its tasks are validated on, and none of these is trained on: no two evaluation tasks share a pair."""
    corpus = make_corpus(
        config(
            "validation.of=arc-agi-1/evaluation",
            "validation.tasks=100",
            "validation.seed=7",
            "validation.re_arc=false",
            'corpus.sources=[{kind="tasks", path="arc-agi-1/evaluation"}]',
            "audit.scored_on=[]",
        )
    )
    chosen = held_out(corpus.partition)
    (trained,) = ids_of(corpus)
    assert (len(chosen), len(trained)) == (100, 300)
    assert not chosen & trained
    assert corpus.overlaps == ()
    assert leak_audit(corpus.trained_on, corpus.partition.validation).passed


def test_copies_under_another_id_are_found():
    """Without the exclusions, two evaluation tasks turn out to be training tasks under another id."""
    words = ["audit.exclude=[]", 'corpus.sources=[{kind="tasks", path="arc-agi-1/training"}]']
    corpus = make_corpus(config(*words, "audit.overlap=exclude"))
    assert {(o.task_id, o.scored_id) for o in corpus.overlaps} == COPIES
    assert ids_of(corpus) == [rest_of(corpus) - {i for i, _ in COPIES}]
    assert {i for i, _ in COPIES} == set(Config().audit.exclude)


def test_validation_tasks_count_as_scored_ones(small_set, tmp_path):
    """A copy of a held-out task, upside down and under another id."""
    tasks = json.loads(small_set.read_text())
    partition = make_partition(ValidationConfig(of=str(small_set), tasks=5, re_arc=False))
    first = partition.validation.tasks[0].id
    copy = {part: [{side: p[side][::-1] for side in p} for p in tasks[first][part]] for part in ("train", "test")}
    (tmp_path / "copied.json").write_text(json.dumps({"copy": copy, "task00": tasks["task00"]}))
    words = [
        *(f"validation.of={small_set}", "validation.tasks=5", "validation.re_arc=false", "audit.scored_on=[]"),
        f'corpus.sources=[{{kind="tasks", path="{tmp_path}/copied.json"}}]',
    ]
    with pytest.raises(
        UserError, match=rf"1 overlap of training tasks .*\(copy of tasks .*copied\.json with {first}\)"
    ):
        make_corpus(config(*words))
    assert ids_of(make_corpus(config(*words, "audit.overlap=exclude"))) == [{"task00"} - held_out(partition)]


def test_leaving_tasks_out_keeps_their_demonstrations(small_set, tmp_path):
    """Of a set that has the scored tasks among others, beside the scored tasks' demonstrations, which are no leak."""
    tasks = json.loads(small_set.read_text())
    scored = tmp_path / "scored.json"
    scored.write_text(json.dumps({i: tasks[i] for i in ("task00", "task01")}))
    corpus = make_corpus(
        config(
            *(f"validation.of={small_set}", "validation.tasks=2", "validation.re_arc=false"),
            f'corpus.sources=[{{kind="tasks", path="{small_set}"}}, {{kind="demonstrations", path="{scored}"}}]',
            *(f'audit.scored_on=["{scored}"]', "audit.overlap=exclude"),
        )
    )
    whole, demonstrations = ids_of(corpus)
    assert not whole & {"task00", "task01"}
    assert demonstrations == {"task00", "task01"} - held_out(corpus.partition)


def test_a_task_is_left_out_of_every_source_that_has_it(small_set, tmp_path):
    """Of two sources with the same task, only one has the pair that gives it away, as with RE-ARC's generators."""
    tasks = json.loads(small_set.read_text())
    scored, other = tmp_path / "scored.json", tmp_path / "pairs_of_task03.json"
    scored.write_text(json.dumps({"renamed": tasks["task03"]}))
    other.write_text(json.dumps(dict.fromkeys(("task03", "task05"), tasks["task04"]["test"])))
    words = [
        *(f"validation.of={small_set}", "validation.tasks=2", "validation.re_arc=false"),
        f'corpus.sources=[{{kind="tasks", path="{small_set}"}}, {{kind="pairs", path="{other}"}}]',
        *(f'audit.scored_on=["{scored}"]', "audit.overlap=exclude"),
    ]
    corpus = make_corpus(config(*words))
    assert [(o.task_id, o.scored_id) for o in corpus.overlaps] == [("task03", "renamed")]
    assert "task03" not in set.union(*ids_of(corpus)) | corpus.trained_on.ids


def test_the_demonstrations_of_the_evaluation_set_may_be_trained_on():
    """They are given with the question."""
    corpus = make_corpus(config('corpus.sources=[{kind="demonstrations", path="arc-agi-1/evaluation"}]'))
    assert corpus.overlaps == ()
    assert len(corpus.trained_on.demonstrated) == 400
    assert corpus.trained_on.ids == frozenset()


@pytest.mark.parametrize("kind", ["tasks", "demonstrations"])
def test_a_source_that_is_not_there_is_named(kind):
    with pytest.raises(UserError, match=r"^source 'mine': tasks 'nowhere' not found"):
        make_corpus(load_config(None, [f"corpus.sources=[{{kind='{kind}', path='nowhere', name='mine'}}]"]))
