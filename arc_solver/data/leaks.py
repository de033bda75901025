"""The leak audit: is a task that a model is scored on among the tasks that it was trained on, by id or by content?

It runs twice. Before training it compares the sources with the sets that are to be scored (`find_overlaps`), and
with every score it compares what the checkpoint says it was trained on with the scored tasks (`leak_audit`).

Demonstrations of an unlabelled set may be trained on. They are no leak: test outputs are not among them. The audit
then looks at the scored tasks' test pairs only, and says of how many tasks the demonstrations were seen.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import SourceConfig
from ..errors import UserError, counted
from ..puzzles import Augmentation, Pair, Task, TaskSet
from ..puzzles.augment import GEOMETRIES
from ..puzzles.tasks import GridKey
from .sources import Source, solved_pairs


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on, as far as an audit needs it. Saved in every checkpoint."""

    ids: frozenset[str]  # training tasks, and the tasks behind the RE-ARC generators
    pair_keys: frozenset[str]  # `pair_key` of their pairs, and of some generated ones
    demonstrated: frozenset[str] = frozenset()  # tasks of which only the demonstrations were trained on
    demonstration_keys: frozenset[str] = frozenset()
    pretrained: frozenset[str] = frozenset()  # models whose pretraining data nobody can audit

    def __or__(self, other: "TrainingData") -> "TrainingData":
        return TrainingData(
            self.ids | other.ids,
            self.pair_keys | other.pair_keys,
            self.demonstrated | other.demonstrated,
            self.demonstration_keys | other.demonstration_keys,
            self.pretrained | other.pretrained,
        )

    def to_json(self) -> dict[str, list[str]]:
        return {name: sorted(values) for name, values in vars(self).items()}

    @staticmethod
    def from_json(content: Mapping[str, Sequence[str]]) -> "TrainingData":
        return TrainingData(**{name: frozenset(values) for name, values in content.items()})


NOTHING = TrainingData(frozenset(), frozenset())


def demonstrations_of(task: Task) -> TrainingData:
    """What an adapter of a task has seen: its demonstrations."""
    return TrainingData(frozenset(), frozenset(), frozenset({task.id}), frozenset(pair_keys(task.train)))


DATA_FILE = "training_data.json"  # in every checkpoint that says what it was trained on


def read_training_data(checkpoint: Path) -> TrainingData | None:
    """What a checkpoint or an adapter was trained on; None: it does not say.

    Raises:
        UserError: the file is damaged.
    """
    file = checkpoint / DATA_FILE
    if not file.is_file():
        return None
    try:
        return TrainingData.from_json(json.loads(file.read_text()))
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged: copy it again, or remove it and go without a leak audit") from None


Keys = Mapping[str, set[str]]  # task id -> `pair_key` of the pairs that say what the task is


def known_keys(source: Source) -> dict[str, set[str]]:
    return {task_id: pair_keys(source.known_pairs(task_id)) for task_id in source.tasks}


def training_data(keys: Mapping[SourceConfig, Keys]) -> TrainingData:
    """What an audit needs to know of some sources."""
    ids: dict[bool, set[str]] = {False: set(), True: set()}
    pair_keys: dict[bool, set[str]] = {False: set(), True: set()}
    for source, by_id in keys.items():
        demonstrations = source.kind == "demonstrations"
        ids[demonstrations] |= by_id.keys()
        pair_keys[demonstrations] |= set().union(*by_id.values())
    return TrainingData(*(frozenset(found[which]) for which in (False, True) for found in (ids, pair_keys)))


@dataclass(frozen=True)
class LeakAudit:
    """Overlap between what a model was trained on and the tasks that it is scored on."""

    tasks: int  # scored tasks
    by_id: tuple[str, ...]  # those whose id is among the training tasks
    by_content: tuple[str, ...]  # those that share a pair with the training data, however turned or recoloured
    demonstrated: tuple[str, ...]  # those whose demonstrations, not their test pairs, were trained on
    pretrained: tuple[str, ...] = ()  # models that the training began with, whose own data is not known

    @property
    def passed(self) -> bool:
        return not (self.by_id or self.by_content)

    def __str__(self) -> str:
        if not self.passed:
            return (
                f"leak audit: {len(self.by_id)} of {counted(self.tasks, 'task')} found in the training data by id,"
                f" {len(self.by_content)} by a pair: not a score on unseen tasks"
            )
        found = f"leak audit passed: none of the tasks ({self.tasks}) is in the training data, by id or by content"
        if self.demonstrated:
            found += f"; the demonstrations, not the test pairs, of {len(self.demonstrated)} of them are"
        if self.pretrained:
            found += f"; what {', '.join(self.pretrained)} saw in pretraining is not known"
        return found


def leak_audit(trained_on: TrainingData, scored: TaskSet) -> LeakAudit:
    """Compares by id and by content: all pairs of the scored tasks, with the outputs that are known."""
    by_content = []
    for task in scored.tasks:
        test_pairs = solved_pairs(task, scored)
        unseen = _unseen_keys(task, test_pairs)
        if pair_keys((*task.train, *test_pairs)) & trained_on.pair_keys or unseen & trained_on.demonstration_keys:
            by_content.append(task.id)
    ids = [task.id for task in scored.tasks]
    return LeakAudit(
        len(ids),
        tuple(i for i in ids if i in trained_on.ids),
        tuple(by_content),
        tuple(i for i in ids if i in trained_on.demonstrated),
        tuple(sorted(trained_on.pretrained)),
    )


@dataclass(frozen=True)
class Overlap:
    """A training task that is, or shares a pair with, a task to be scored."""

    source: str
    task_id: str
    scored_id: str


def find_overlaps(keys: Mapping[SourceConfig, Keys], scored: Iterable[TaskSet]) -> list[Overlap]:
    """Every training task that overlaps with one of the scored sets, once for each source that has it."""
    ids: dict[str, str] = {}
    any_pair: dict[str, str] = {}
    test_pair: dict[str, str] = {}
    for task, test_pairs in _with_test_pairs(scored):
        ids[task.id] = task.id
        test_pair |= dict.fromkeys(_unseen_keys(task, test_pairs), task.id)
        any_pair |= dict.fromkeys(pair_keys((*task.train, *test_pairs)), task.id)
    found = []
    for source, tasks in keys.items():
        by_id, by_key = ({}, test_pair) if source.kind == "demonstrations" else (ids, any_pair)
        for task_id, own in tasks.items():
            hits = [by_key[key] for key in sorted(own) if key in by_key]
            if task_id in by_id or hits:
                found.append(Overlap(source.label, task_id, by_id.get(task_id) or hits[0]))
    return found


@dataclass(frozen=True)
class Shared:
    """A task of one set that is, or shares pairs with, a task of another."""

    first: str
    second: str
    same_id: bool
    pairs: int  # that both have, up to geometry and colours


def shared_tasks(first: Keys, second: Keys) -> list[Shared]:
    """Every two tasks of two sets that have the same id or share pairs, by id of the first."""
    having: dict[str, list[str]] = {}
    for task_id, keys in second.items():
        for key in keys:
            having.setdefault(key, []).append(task_id)
    found = []
    for task_id, keys in first.items():
        common = Counter(other for key in keys for other in having.get(key, ()))
        others = sorted(common.keys() | ({task_id} & second.keys()))
        found += [Shared(task_id, other, other == task_id, common[other]) for other in others]
    return sorted(found, key=lambda shared: (shared.first, shared.second))


def _with_test_pairs(scored: Iterable[TaskSet]) -> Iterator[tuple[Task, tuple[Pair, ...]]]:
    for found in scored:
        for task in found.tasks:
            yield task, solved_pairs(task, found)


def _unseen_keys(task: Task, test_pairs: Sequence[Pair]) -> set[str]:
    """Keys of the test pairs that are not, recoloured, among the task's own demonstrations. Some tasks ask that."""
    return pair_keys(test_pairs) - pair_keys(task.train)


def pair_keys(pairs: Iterable[Pair]) -> set[str]:
    """`pair_key` of all pairs that have one."""
    return {key for pair in pairs if (key := pair_key(pair))}


def pair_key(pair: Pair) -> str | None:
    """A hash that is the same for a pair under all 8 geometries and every renaming of its colours.

    None for a pair of a single colour: it says nothing, and any two tasks may share it.
    """
    if len(set(pair.input.tobytes() + pair.output.tobytes())) == 1:
        return None
    keys: list[GridKey] = []
    for geometry in range(GEOMETRIES):
        turned = Augmentation(geometry).apply_pair(pair)
        first, second = turned.input.tobytes(), turned.output.tobytes()
        colours = bytes(dict.fromkeys(first + second))  # in the order in which they appear
        renamed = bytes.maketrans(colours, bytes(range(len(colours))))
        keys.append(
            bytes(turned.input.shape)
            + first.translate(renamed)
            + bytes(turned.output.shape)
            + second.translate(renamed)
        )
    return hashlib.sha256(min(keys)).hexdigest()[:16]
