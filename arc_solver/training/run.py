"""What the parts of an offline run share, and how one starts: which model, which data, where it stands."""

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..clock import SPARE, RunClock, format_duration
from ..config import Config
from ..data import NOTHING
from ..data.corpus import Corpus
from ..data.stream import Batch, SampleStream
from ..errors import UserError
from ..models import (
    Model,
    attach_lora,
    check_adapter,
    load_model,
    merge_saved_adapter,
    new_model,
    packed_loss,
    save_model,
    unverified_base_warning,
)
from ..models.lora import check_targets, combined_training_data, continue_lora
from ..models.pretrained import fetch_checkpoint, load_any
from ..report import PageWriter
from ..rng import named_rng
from ..waiting import Reporter, Wait, waiting
from .checkpoints import Progress, save_checkpoint
from .parallel import ParallelContext
from .validate import HeldOutMean, Question, accuracy, accuracy_prompts, validation_batches, validation_loss

REFUSING_S = 10.0  # without a word where no row is seen, while a run may yet be refused: that is one sentence


@dataclass(frozen=True, eq=False)
class TrainableModel:
    """The model that is trained; for an adapter also PEFT's model and the folder of its base."""

    model: Model
    lora: Any = None
    base_dir: Path | None = None


@dataclass(frozen=True, eq=False)
class Validation:
    """The fixed sets that a run is validated on."""

    batches: Sequence[Batch]
    tasks: Sequence[str]  # of the batches' samples, in their order
    questions: Sequence[Question]


class Interrupts:
    """The first Ctrl-C or SIGTERM asks the run to end between two steps; another one ends it at once.

    Args:
        alone: of several processes each gets every signal more than once: only the first counts, and the launcher ends
            what takes too long.
    """

    def __init__(self, alone: bool):
        self.alone, self.asked, self.process = alone, False, os.getpid()
        self.before: dict[signal.Signals, Any] = {}

    def watch(self) -> None:
        """To be called once there is something to save; until then they end the run at once."""
        for name in (signal.SIGINT, signal.SIGTERM) if not self.before else ():
            self.before[name] = signal.signal(name, self._note)

    def __enter__(self) -> "Interrupts":
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _note(self, *_: object) -> None:
        if os.getpid() != self.process:  # a loader's, forked with this handler
            os._exit(1)
        if self.asked and self.alone:
            raise KeyboardInterrupt
        if not self.asked:
            os.write(2, b"\ninterrupted: a checkpoint is saved after this step; once more ends the run at once\n")
        self.asked = True


@dataclass(eq=False)
class Run:
    """What the parts of an offline run share.

    `clock` keeps time for the parts of the end: "checkpoint", "validation", "answers" (generated), and "results".
    """

    config: Config
    out_dir: Path
    parallel: ParallelContext
    corpus: Corpus
    start: TrainableModel
    module: nn.Module  # to be called instead of the language model: see `ParallelContext.wrap`
    progress: Progress
    clock: RunClock
    validation: Validation
    say: Reporter
    interrupts: Interrupts
    pages: PageWriter | None  # of the main process, if the run has a page of its own
    average: AveragedModel | None = None  # of the weights, if one is kept

    @property
    def model(self) -> Model:
        return self.start.model

    @property
    def result(self) -> Model:
        """What the run leaves: the model, with the average of its weights if one is kept."""
        return replace(self.model, lm=self.average.module) if self.average else self.model

    def save_checkpoint(self, optimizers: Sequence[torch.optim.Optimizer], name: str = "") -> None:
        """See `checkpoints.save_checkpoint`."""
        with self.clock.measuring("checkpoint"), waiting(self.say, "saving a checkpoint"):
            self.progress.spent_s = self.clock.now_s()
            save_checkpoint(
                self.out_dir,
                self.parallel,
                self.model,
                self.start.lora,
                self.start.base_dir,
                optimizers,
                self.average,
                self.progress,
                name,
            )

    def validate(self, answers: bool, then: tuple[str, ...] | None = None) -> dict[str, float]:
        """What validation measures now, as far as there is time for it and for what follows (`RunClock.has_time_for`).

        It is not compiled: a forward pass alone would be another graph, and take longer to compile than it saves.
        All processes measure the same, so none waits for another.
        """
        measured = {}
        if self.clock.has_time_for("validation", then):
            with (
                self.clock.measuring("validation"),
                waiting(self.say, "validating", len(self.validation.batches)) as wait,
                self.parallel.autocast(),
            ):
                loss = validation_loss(self._losses_of, wait.over(self.validation.batches), self.validation.tasks)
            self.progress.validation_loss = measured["validation_loss"] = loss.value
            self.progress.validation_losses = dict(loss.by_task)
        if answers and self.clock.has_time_for("answers", then):
            asked = f"answering {len(self.validation.questions)} questions"
            with self.clock.measuring("answers"), waiting(self.say, asked) as wait, self.parallel.autocast():
                right = self._accuracy(wait)
            if right is None:
                self.say("generated answers were cut short, and are not counted")
            else:
                self.progress.accuracy = measured["accuracy"] = right.value
                self.progress.accuracies = dict(right.by_task)
        return measured

    def _losses_of(self, batch: Batch) -> Tensor:
        through = self.average.module if self.average else self.module
        return packed_loss(self.result, batch, partial(self.result.logits, through=through), reduction="none")

    def _accuracy(self, wait: Wait) -> HeldOutMean | None:
        """Has the time that there is room for, as replies may be long: None if it is too short. Shards never part."""
        limited = self.clock.limited and not self.parallel.shards
        deadline = time.monotonic() + SPARE * self.clock.end_s["answers"] if limited else math.inf
        alone = self.parallel.processes == 1
        if limited:
            wait.what += f", for {format_duration(deadline - time.monotonic())} at most"

        def is_over() -> bool:
            wait.done += 1
            wait.note = f"step {wait.done:.0f}"
            return time.monotonic() >= deadline or (alone and self.interrupts.asked)

        return accuracy(self.result, self.validation.questions, self.config.predict.batch_tokens, is_over)


def make_validation(config: Config, corpus: Corpus, wait: Wait) -> Validation:
    wait.note = "drawing what is validated on"
    labels, batch_tokens = config.train.labels, max(config.train.batch_tokens, config.corpus.max_tokens)
    return Validation(
        *validation_batches(corpus.partition, config.corpus, config.format, labels, batch_tokens),
        accuracy_prompts(corpus.partition, config.corpus, config.format) if config.validation.accuracy_every else [],
    )


def stage_stream(config: Config, corpus: Corpus, index: int) -> SampleStream:
    """The training samples of a stage."""
    stage = config.stages[index]
    return SampleStream(
        corpus.mixtures[index],
        stage.corpus,
        config.format,
        config.run.seed,
        "train",
        index,
        labels=stage.train.labels,
    )


# ---- the model -----------------------------------------------------------------------------------------------------


def start_model(
    config: Config,
    corpus: Corpus,
    out_dir: Path,
    checkpoint: Path | None,
    parallel: ParallelContext,
    say: Reporter,
    begin: Callable[[], None],
) -> TrainableModel:
    """The model to train. `begin` makes the run's folder; it is called before anything is written there.

    Raises:
        UserError: model or adapter cannot be used.
    """
    if config.model.quantize:
        raise UserError("model.quantize is for bin/solve: training has no quantised base; leave it out")
    if config.model.adapter and config.model.path and not checkpoint:  # before any work is done
        settings, _ = check_adapter(Path(config.model.adapter), by_peft=config.lora.enabled)
        if settings.get("use_dora") and config.lora.enabled and config.lora.save != "merged":
            raise UserError(
                f"the adapter in {config.model.adapter} is DoRA, which bin/solve and vLLM cannot use by itself: set"
                " lora.save=merged"
            )
    if config.model.path and not Path(config.model.path).exists() and not checkpoint:
        # In a terminal the client of the hub draws bars of its own.
        with waiting(say.plain, f"fetching {config.model.path} from the Hugging Face hub", quiet_s=REFUSING_S):
            fetch_checkpoint(config.model.path)
    first = config.run.seed if config.model.seed is None else config.model.seed
    seed = int(named_rng(first, "weights").integers(2**31))
    with waiting(say, "loading the model", quiet_s=REFUSING_S):
        if config.lora.enabled:
            start = _start_lora(config, out_dir, checkpoint, parallel, say, seed, begin)
        else:
            start = TrainableModel(_start_weights(config, checkpoint, say, seed))
    # What the weights have seen before counts too; where that is unknown, it stays unknown.
    seen = start.model.trained_on
    trained_on = corpus.trained_on | seen if seen else None
    return replace(start, model=Model(start.model.lm.to(parallel.device).train(), start.model.format, trained_on))


def _start_weights(config: Config, checkpoint: Path | None, say: Reporter, seed: int) -> Model:
    if checkpoint:
        return load_model(checkpoint / "model")
    if not config.model.path:
        if config.model.adapter:
            raise UserError("model.adapter needs the model that it is for: give model.path")
        return new_model(config.model, config.format, seed, NOTHING)
    folder = fetch_checkpoint(config.model.path)
    model, cut = load_any(folder, config.model.path, config.format)
    if cut:
        say(str(cut))
    return merge_saved_adapter(model, config.model.adapter, folder)


def _start_lora(
    config: Config,
    out_dir: Path,
    checkpoint: Path | None,
    parallel: ParallelContext,
    say: Reporter,
    seed: int,
    begin: Callable[[], None],
) -> TrainableModel:
    if not config.model.path:
        raise UserError("lora.enabled needs a model to adapt: give model.path")
    made = out_dir / "base"
    base_dir = made if made.is_dir() else fetch_checkpoint(config.model.path)
    parallel.barrier()  # all look before one writes
    # A frozen base needs no more than the precision that it is used in; but shards of one group have one type.
    model, cut = load_any(
        base_dir, config.model.path, config.format, torch.float32 if parallel.shards else parallel.dtype
    )
    check_targets(model, config.lora)
    if cut:
        say(str(cut))
        base_dir = made
        begin()
        if parallel.is_main:
            shutil.rmtree(made.with_suffix(".part"), ignore_errors=True)
            save_model(model, made.with_suffix(".part"))
            made.with_suffix(".part").rename(made)
        parallel.barrier()
    adapter = checkpoint / "adapter" if checkpoint else Path(config.model.adapter) if config.model.adapter else None
    if adapter is None:
        return TrainableModel(model, attach_lora(model, config.lora, seed), base_dir)
    lora = continue_lora(model, adapter, base_dir)
    if not checkpoint:
        say(f"the adapter in {adapter} is continued as it is: rank, alpha and targets of [lora] do not count")
        if remark := unverified_base_warning(adapter):
            say(remark)
    return TrainableModel(replace(model, trained_on=combined_training_data(model.trained_on, adapter)), lora, base_dir)
