"""The leak audit on made-up tasks: two scored ones, and training data that has something of them or not."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from toys import grid

from arc_solver.config import SourceConfig
from arc_solver.data.leaks import NOTHING, LeakAudit, TrainingData, find_overlaps, known_keys, leak_audit, pair_key
from arc_solver.data.leaks import training_data as training_data_of
from arc_solver.data.sources import Source
from arc_solver.puzzles.augment import GEOMETRIES, Augmentation
from arc_solver.puzzles.tasks import Grid, Pair, Task, TaskSet, freeze

MAKING = np.random.default_rng(0)


def random_cells() -> Grid:
    return freeze(MAKING.integers(0, 10, size=(4, 5), dtype=np.uint8))


A1, A2, A_TEST, B1, B2, B_TEST_1, B_TEST_2, OTHER, ANOTHER = (Pair(random_cells(), random_cells()) for _ in range(9))
SCORED = TaskSet(
    "scored",
    (Task("aa", (A1, A2), (A_TEST.input,)), Task("bb", (B1, B2), (B_TEST_1.input, B_TEST_2.input))),
    {"aa": (A_TEST.output,), "bb": (B_TEST_1.output, B_TEST_2.output)},
)
UNSOLVED = TaskSet("unsolved", SCORED.tasks, {})


def changed(pair: Pair) -> Pair:
    """Turned, mirrored and recoloured."""
    return Augmentation(6, (3, 5, 0, 8, 1, 9, 2, 4, 7, 6)).apply_pair(pair)


def source(kind: str, tasks: Mapping[str, Sequence[Pair]], path: str = "x") -> Source:
    config = SourceConfig.model_validate({"kind": kind, "path": path})
    return Source(config, {i: lambda rng, count, pairs=pairs: pairs for i, pairs in tasks.items()}, False)


def keys_of(*sources: Source) -> dict[SourceConfig, dict[str, set[str]]]:
    return {found.config: known_keys(found) for found in sources}


# Kind, its tasks; the scored tasks found by id, by content, demonstrated; and what overlaps: (training, scored task).
CASES = [
    ("tasks", {"zz": [OTHER, ANOTHER]}, (), (), (), []),
    ("tasks", {"aa": [OTHER]}, ("aa",), (), (), [("aa", "aa")]),
    ("tasks", {"zz": [OTHER, changed(A2)]}, (), ("aa",), (), [("zz", "aa")]),
    ("pairs", {"zz": [changed(B_TEST_2)]}, (), ("bb",), (), [("zz", "bb")]),
    ("tasks", {"aa": [A1, A2, A_TEST]}, ("aa",), ("aa",), (), [("aa", "aa")]),
    ("tasks", {"bb": [A1]}, ("bb",), ("aa",), (), [("bb", "bb")]),
    ("tasks", {"yy": [A1], "zz": [A1, OTHER]}, (), ("aa",), (), [("yy", "aa"), ("zz", "aa")]),
    ("demonstrations", {"aa": [A1, A2], "bb": [B1, B2]}, (), (), ("aa", "bb"), []),
    ("demonstrations", {"zz": [changed(A1), OTHER]}, (), (), (), []),
    ("demonstrations", {"zz": [OTHER, changed(A_TEST)]}, (), ("aa",), (), [("zz", "aa")]),
    ("demonstrations", {"aa": [A1, changed(B_TEST_1)]}, (), ("bb",), ("aa",), [("aa", "bb")]),
]


@pytest.mark.parametrize(("kind", "tasks", "by_id", "by_content", "demonstrated", "overlaps"), CASES)
def test_both_audits_find_the_same(kind, tasks, by_id, by_content, demonstrated, overlaps):
    keys = keys_of(source(kind, tasks))
    audit = leak_audit(training_data_of(keys), SCORED)
    assert audit == LeakAudit(2, by_id, by_content, demonstrated)
    assert audit.passed == (not by_id and not by_content)
    found = find_overlaps(keys, [SCORED])
    assert [(overlap.task_id, overlap.scored_id) for overlap in found] == overlaps
    assert {overlap.source for overlap in found} <= {f"{kind} x"}


@pytest.mark.parametrize(("kind", "tasks"), [case[:2] for case in CASES])
def test_of_an_unsolved_set_the_demonstrations_are_compared(kind, tasks):
    """What is not known cannot be found: the pairs of a test input."""
    of_tests = {pair_key(pair) for pair in (A_TEST, B_TEST_1, B_TEST_2)}
    only_demonstrations = {i: [pair for pair in pairs if pair_key(pair) not in of_tests] for i, pairs in tasks.items()}
    keys, fewer = keys_of(source(kind, tasks)), keys_of(source(kind, only_demonstrations))
    assert leak_audit(training_data_of(keys), UNSOLVED) == leak_audit(training_data_of(fewer), SCORED)
    assert find_overlaps(keys, [UNSOLVED]) == find_overlaps(fewer, [SCORED])


def test_every_source_is_compared_with_every_scored_set():
    first, second = source("tasks", {"yy": [A1], "zz": [B1]}), source("pairs", {"yy": [A1], "xx": [OTHER]}, "y")
    sets = [TaskSet(task.id, (task,), {}) for task in SCORED.tasks]
    found = [(o.source, o.task_id, o.scored_id) for o in find_overlaps(keys_of(first, second), sets)]
    assert found == [("tasks x", "yy", "aa"), ("tasks x", "zz", "bb"), ("pairs y", "yy", "aa")]
    assert find_overlaps(keys_of(first, second), []) == []


def test_demonstrations_beside_the_tasks_themselves():
    """Of two sources with the same tasks, the one that is only demonstrations excuses nothing."""
    keys = keys_of(source("demonstrations", {"aa": [A1, A2]}), source("tasks", {"aa": [A1, A2, A_TEST]}))
    assert leak_audit(training_data_of(keys), SCORED) == LeakAudit(2, ("aa",), ("aa",), ("aa",))
    assert [(o.source, o.task_id) for o in find_overlaps(keys, [SCORED])] == [("tasks x", "aa")]


def test_a_demonstration_that_is_the_test_pair_recoloured_is_given_with_the_question():
    """Seven ARC-AGI-1 evaluation tasks have one. Trained on as a pair of a whole task, it is a leak all the same."""
    task = Task("cc", (A1, changed(A_TEST)), (A_TEST.input,))
    scored = TaskSet("scored", (task,), {"cc": (A_TEST.output,)})
    demonstrations = keys_of(source("demonstrations", {"cc": task.train}))
    assert leak_audit(training_data_of(demonstrations), scored) == LeakAudit(1, (), (), ("cc",))
    assert find_overlaps(demonstrations, [scored]) == []
    whole = keys_of(source("tasks", {"zz": [changed(A_TEST)]}))
    assert leak_audit(training_data_of(whole), scored).by_content == ("cc",)
    assert [overlap.task_id for overlap in find_overlaps(whole, [scored])] == ["zz"]


def test_pairs_of_a_single_colour_say_nothing():
    plain = Pair(grid("11", "11"), grid("1"))
    scored = TaskSet("scored", (Task("aa", (plain, A1), (A2.input,)),), {"aa": (A2.output,)})
    keys = keys_of(source("tasks", {"zz": [plain, OTHER]}))
    assert leak_audit(training_data_of(keys), scored).passed
    assert find_overlaps(keys, [scored]) == []


# ---- what is kept of the training data -----------------------------------------------------------------------------

SOME = training_data_of(keys_of(source("tasks", {"yy": [A1]}), source("demonstrations", {"zz": [B1, B2]})))
MORE = TrainingData(frozenset("x"), frozenset(), frozenset(), frozenset("k"), frozenset({"org/model"}))


def test_training_data_keeps_demonstrations_apart():
    keys = [frozenset({pair_key(pair) for pair in pairs}) for pairs in ([A1], [B1, B2])]
    assert TrainingData(frozenset({"yy"}), keys[0], frozenset({"zz"}), keys[1]) == SOME
    assert training_data_of({}) == NOTHING


@pytest.mark.parametrize("data", [NOTHING, SOME, MORE, SOME | MORE])
def test_training_data_goes_through_json(data):
    written = json.dumps(data.to_json())
    assert TrainingData.from_json(json.loads(written)) == data
    assert written == json.dumps(TrainingData.from_json(json.loads(written)).to_json())


def test_training_data_of_an_older_checkpoint():
    assert TrainingData.from_json({"ids": ["aa"], "pair_keys": ["k"]}) == TrainingData(
        frozenset({"aa"}), frozenset("k")
    )


def test_training_data_adds_up():
    assert SOME | MORE == MORE | SOME
    assert SOME | SOME == SOME == SOME | NOTHING
    for name in vars(SOME):
        assert getattr(SOME | MORE, name) == getattr(SOME, name) | getattr(MORE, name)


# ---- in words ------------------------------------------------------------------------------------------------------


def test_the_audit_names_models_whose_pretraining_is_unknown():
    two = MORE | TrainingData(frozenset(), frozenset(), pretrained=frozenset({"another/model"}))
    assert leak_audit(two, SCORED) == LeakAudit(2, (), (), (), ("another/model", "org/model"))
    assert leak_audit(two, SCORED).passed, "unknown is not found"


PASSED = "leak audit passed: none of the tasks (2) is in the training data, by id or by content"


@pytest.mark.parametrize(
    ("audit", "said"),
    [
        (LeakAudit(2, (), (), ()), PASSED),
        (
            LeakAudit(2, (), (), ("aa",)),
            f"{PASSED}; the demonstrations, not the test pairs, of 1 of them are",
        ),
        (
            LeakAudit(2, (), (), (), ("a/b", "c/d")),
            f"{PASSED}; what a/b, c/d saw in pretraining is not known",
        ),
        (
            LeakAudit(2, (), (), ("aa", "bb"), ("a/b",)),
            f"{PASSED}; the demonstrations, not the test pairs, of 2 of them are; what a/b saw in pretraining is not"
            " known",
        ),
        (
            LeakAudit(2, ("aa",), (), ()),
            "leak audit: 1 of 2 tasks found in the training data by id, 0 by a pair: not a score on unseen tasks",
        ),
        (
            LeakAudit(2, ("aa",), ("aa", "bb"), ("bb",), ("a/b",)),
            "leak audit: 1 of 2 tasks found in the training data by id, 2 by a pair: not a score on unseen tasks",
        ),
    ],
)
def test_what_the_audit_says(audit, said):
    assert str(audit) == said


# ---- pair keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", range(GEOMETRIES))
@pytest.mark.parametrize("pair", [Pair(grid("0120", "3400"), grid("012")), Pair(grid("5"), grid("67")), A1])
def test_pair_key_sees_through_geometries_and_colours(geometry, pair, rng):
    for _ in range(10):
        colours = tuple(int(c) for c in rng.permutation(10))
        assert pair_key(Augmentation(geometry, colours).apply_pair(pair)) == pair_key(pair)


def test_pair_key_tells_other_pairs_apart():
    others = [
        Pair(grid("0120", "3400"), grid("012")),
        Pair(grid("0120", "3400"), grid("010")),  # a cell
        Pair(grid("0120", "3400"), grid("014")),  # the same grids, other colours in common
        Pair(grid("012"), grid("0120", "3400")),  # input and output the other way round
        Pair(grid("01203400"), grid("012")),  # the same cells, another shape
        Pair(grid("0120", "3400", "0000"), grid("012")),
        Pair(grid("0120", "0043"), grid("012")),  # a row mirrored
        Pair(grid("0120", "3300"), grid("012")),  # two colours made one
        *(Pair(plain, grid("12")) for plain in (grid("0000"), grid("00", "00"))),  # the input's shape alone
        *(Pair(grid("12"), plain) for plain in (grid("3333"), grid("33", "33"))),  # the output's
    ]
    assert len({pair_key(pair) for pair in others}) == len(others)


def test_pair_key_of_a_single_colour_is_none():
    assert pair_key(Pair(grid("11"), grid("1"))) is None
    assert pair_key(Pair(grid("11"), grid("2"))) is not None


def test_training_data_is_that_of_all_sources():
    first, second = source("tasks", {"aa": [A1]}), source("tasks", {"zz": [OTHER]}, "y")
    both = training_data_of(keys_of(first, second))
    assert both == training_data_of(keys_of(first)) | training_data_of(keys_of(second))
    assert leak_audit(both, SCORED).by_content == ("aa",)
