"""What an offline run trains on and what it validates on: the mixture, the held-out tasks, and the audit between them.

Held-out tasks are taken out of every source by id. Then the leak audit compares what is left with the tasks to be
scored on, by id and by content; a run with overlap does not start unless the config says so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Config, SourceConfig, TasksConfig, ValidationConfig
from ..errors import UserError, counted, few
from ..puzzles import NotThere, TaskSet, load_tasks, task_hash, write_kaggle_files
from ..rng import named_rng
from ..waiting import Wait
from .leaks import Overlap, TrainingData, find_overlaps, known_keys, training_data
from .sources import Source, read_source

SHOWN = 5  # overlaps that a message names


@dataclass(frozen=True, eq=False)
class Corpus:
    """The data of a run."""

    mixtures: tuple[tuple[Source, ...], ...]  # of each stage
    partition: "Partition"
    trained_on: TrainingData  # of all stages
    overlaps: tuple[Overlap, ...]  # training tasks that the audit found, and that were left out or allowed
    unsolved: int = 0  # tasks to be scored on whose test outputs the audit could not compare with


def make_corpus(config: Config, wait: Wait | None = None) -> Corpus:
    """Reads all sources of all stages, takes out what is held out, and audits the rest.

    Args:
        wait: is kept up to date with what is being done.

    Raises:
        UserError: a source cannot be read, or tasks to be scored on are among the training tasks.
    """
    scored = [_scored_on(spec) for spec in config.audit.scored_on]  # first: generating takes longer
    partition = make_partition(config.validation, config.audit.exclude)
    kept_out = {task.id for task in partition.validation.tasks} | set(config.audit.exclude)
    configs = dict.fromkeys(source for stage in config.stages for source in stage.corpus.sources)
    sources, keys = {}, {}
    wait = wait or Wait("")
    for source in configs:
        wait.note = f"source {source.label}"
        sources[source] = _read(source).without(kept_out)
        wait.note = f"leak audit of source {source.label}"
        keys[source] = known_keys(sources[source])
    wait.note = "leak audit"
    overlaps = find_overlaps(keys, [*scored, partition.validation])
    if overlaps and config.audit.overlap == "refuse":
        raise UserError(_refusal(overlaps, config))
    if config.audit.overlap == "exclude":
        for source in configs:
            # A task goes from all sources, so its RE-ARC generator too; but its demonstrations are no leak.
            own = source.kind == "demonstrations"
            found = {overlap.task_id for overlap in overlaps if not own or overlap.source == source.label}
            sources[source] = sources[source].without(found)
            keys[source] = {i: known for i, known in keys[source].items() if i not in found}
    mixtures = tuple(tuple(sources[source] for source in stage.corpus.sources) for stage in config.stages)
    unsolved = sum(task.id not in found.solutions for found in scored for task in found.tasks)
    return Corpus(mixtures, partition, training_data(keys), tuple(overlaps), unsolved)


def _read(config: SourceConfig) -> Source:
    try:
        return read_source(config)
    except NotThere as error:
        raise UserError(f"source '{config.label}': {error}") from None


def _scored_on(spec: str) -> TaskSet:
    try:
        return load_tasks(TasksConfig(spec=spec))
    except UserError as error:
        raise UserError(f"audit.scored_on: {error} (docs/data.md says how the files in data/ are made)") from None


def _refusal(overlaps: Sequence[Overlap], config: Config) -> str:
    named = few([f"{o.task_id} of {o.source} with {o.scored_id}" for o in overlaps], SHOWN)
    return (
        f"leak audit: {counted(len(overlaps), 'overlap')} of training tasks with those to be scored or validated on"
        f" ({named});"
        ' set audit.overlap="exclude" to leave them out, "allow" to train on them all the same, or audit.scored_on to'
        f" what you score on, now {list(config.audit.scored_on)}"
    )


# ---- held-out tasks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Partition:
    """Tasks that are kept out of training and validated on, and the other tasks of the set they were drawn from."""

    config: ValidationConfig
    validation: TaskSet
    rest: TaskSet


def make_partition(config: ValidationConfig, exclude: Sequence[str] = ()) -> Partition:
    """Draws `config.tasks` random tasks of a set: the same for the same seed, whatever the set's order."""
    try:
        task_set = load_tasks(TasksConfig(spec=config.of))
    except UserError as error:
        raise UserError(f"validation.of: {error}") from None
    by_id = {task.id: task for task in task_set.tasks if task.id not in exclude}
    if config.tasks >= len(by_id):
        most = f"give at most {len(by_id) - 1}" if len(by_id) > 1 else "give another set as validation.of"
        raise UserError(
            f"validation.tasks={config.tasks} leaves none of the {counted(len(by_id), 'task')} of {config.of} to train"
            f" on: {most}"
        )
    if unsolved := [i for i in by_id if i not in task_set.solutions]:
        raise UserError(
            f"validation.of: {config.of} has no solution for {counted(len(unsolved), 'task')}, e.g. {unsolved[0]}, and"
            " only with one can a task be validated on: give a set that has all"
        )
    ids = sorted(by_id)
    chosen = sorted(ids[i] for i in named_rng(config.seed, "held-out tasks").permutation(len(ids))[: config.tasks])
    rest = [i for i in ids if i not in set(chosen)]
    parts = (
        TaskSet(config.of, tuple(by_id[i] for i in part), {i: task_set.solutions[i] for i in part})
        for part in (chosen, rest)
    )
    return Partition(config, *parts)


def write_partition(partition: Partition, folder: Path) -> None:
    """Writes the held-out tasks and the others in Kaggle's format, and a manifest that says how they were drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    config, validation = partition.config, partition.validation
    manifest = {
        "of": config.of,
        "seed": config.seed,
        "validation": {task.id: task_hash(task, validation) for task in validation.tasks},
        "rest": [task.id for task in partition.rest.tasks],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    write_kaggle_files(validation, folder, "validation")
    write_kaggle_files(partition.rest, folder, "training")


def validation_source(partition: Partition) -> Source:
    """What validation samples are drawn from: RE-ARC generators of the held-out tasks, or the tasks' own pairs."""
    config = partition.config
    ids = {task.id for task in partition.validation.tasks}
    if not config.re_arc:
        source = read_source(SourceConfig(kind="tasks", path=config.of))
    else:
        source = read_source(SourceConfig(kind="re-arc", difficulty=config.difficulty))
        if lacking := sorted(ids - source.tasks.keys()):
            raise UserError(
                f"validation.re_arc: RE-ARC has no generator for {lacking[0]} of {config.of}; set it to false to"
                " validate on the tasks' own pairs"
            )
    return source.without(source.tasks.keys() - ids)
