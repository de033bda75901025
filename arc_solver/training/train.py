"""The offline run: stages of training on the corpus, from a new model or any pretrained one.

    bin/train CONFIG.toml --out DIR
    torchrun --nproc-per-node 8 -m arc_solver.train CONFIG.toml --out DIR

The loop itself is `optimize.fit`. Here is what surrounds it: which model, which data, validation, checkpoints, logs.
"""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from ..clock import RunClock, format_duration
from ..command import require_new_dir
from ..config import Config, StageConfig, TrainConfig, load_config
from ..data.corpus import Corpus, make_corpus, write_partition
from ..data.stream import COUNTS, Batch, BatchStream, SampleStream, batches
from ..errors import MachineError, UserError, counted
from ..files import write_json
from ..models import packed_loss
from ..models.model import recompute_activations
from ..report import is_training
from ..report.writer import pages_of_training
from ..waiting import Reporter, waiting
from .card import TRAINING_FILE
from .checkpoints import (
    BEFORE_DECAY,
    Progress,
    cannot_write,
    checkpoint_beside,
    latest_checkpoint,
    load_progress,
    load_states,
)
from .log import TrainingLog
from .optimize import Pace, Step, averaged, fit, make_optimizers
from .parallel import CompileDecision, ParallelContext, compiled, decide_compile
from .report import Plan, describe, estimate_closing_times, save_results, show_plan
from .run import REFUSING_S, Interrupts, Run, make_validation, stage_stream, start_model

BEGINNING = "beginning"  # a file of a run whose folder is being made
MOST_SHOWN = 100  # characters of two values in a message


def train(
    config: Config,
    out_dir: Path,
    max_s: float = math.inf,
    resume: bool = False,
    began: float | None = None,
    by_itself: bool = True,
) -> None:
    """Trains on the corpus and leaves in `out_dir`: `config.json`, `log.jsonl`, `checkpoints/`, and at last `model/`.

    With LoRA it leaves `adapter/` too, and `base/`, the checkpoint it is for, where that had to be cut first.

    Args:
        max_s: seconds from `began`, and what a continued run had spent, until all of that is there.
        began: by `time.monotonic()`; None: now.
        by_itself: whether the model is for the user to go on with, who is told how; else it is a part of another run.

    Raises:
        UserError: what the config names cannot be used, or `out_dir` holds a run and `resume` is false, or the other
            way round; or there was no time for a single step.
        MachineError: something cannot be written.
    """
    entered = time.monotonic()
    began = entered if began is None else began
    checkpoint = _where_to_begin(config, out_dir, resume)
    progress = load_progress(checkpoint) if checkpoint else Progress()
    if progress.spent_s >= max_s:
        spent = f"{progress.spent_s / 60:.1f}"
        raise UserError(f"--max-minutes counts from the start of the run, which has spent {spent} of them: give more")
    fresh = not out_dir.exists()
    parallel = ParallelContext(config)
    say = Reporter(Console(stderr=True, quiet=not parallel.is_main))
    try:
        clock = RunClock(began - progress.spent_s, max_s, parallel.broadcast)
        with waiting(say, "reading the training data", quiet_s=REFUSING_S) as wait:
            corpus = make_corpus(config, wait)
            validation = make_validation(config, corpus, wait)
            for index, stage in enumerate(config.stages):  # refuses what cannot be drawn before any work is done
                BatchStream(stage_stream(config, corpus, index), stage.train.batch_tokens)
        begin = partial(_begin, config, corpus, out_dir, parallel)
        try:
            start = start_model(config, corpus, out_dir, checkpoint, parallel, say, begin)
        except UserError:
            if fresh and parallel.is_main:  # the same --out can be given again
                shutil.rmtree(out_dir, ignore_errors=True)
            raise
        if checkpoint:
            say(f"continued from {checkpoint}, after {counted(progress.total_steps, 'step')}")
        with waiting(say, "trying the model, for the estimates"):
            plan = show_plan(config, corpus, start.model, parallel, say)
        if config.train.checkpointing:
            recompute_activations(start.model.lm)
        module = parallel.wrap(start.model.lm)
        begin()
        interrupts = Interrupts(alone=parallel.processes == 1)
        pages = pages_of_training(out_dir, say) if parallel.is_main and by_itself else None
        run = Run(
            config,
            out_dir,
            parallel,
            corpus,
            start,
            module,
            progress,
            clock,
            validation,
            say,
            interrupts,
            pages,
            averaged(start.model.lm, config.train.ema),
        )
        estimate_closing_times(run, plan, entered - began)
        try:
            _train_stages(run, plan, checkpoint)
        except KeyboardInterrupt:
            if pages and progress.total_steps:
                pages.finish()
            raise
        with waiting(say, "saving the results"):
            save_results(run, plan.memory, by_itself)
        if pages and progress.total_steps:
            pages.finish(clock.began + max_s)
        if not progress.total_steps:
            raise UserError(
                f"--max-minutes {max_s / 60:g} left no time for a single step; {out_dir} has what the run began with:"
                " give more, with --resume"
            )
    except (OSError, SafetensorError) as error:
        raise MachineError(cannot_write(out_dir, error)) from error
    finally:
        parallel.end()


def _begin(config: Config, corpus: Corpus, out_dir: Path, parallel: ParallelContext) -> None:
    """Makes the run's folder. From here on it can be resumed; killed in here, it is begun anew."""
    if not parallel.is_main:
        return
    if not (out_dir / "config.json").exists():
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out_dir} cannot be made ({error.strerror}): give another folder") from None
        (out_dir / BEGINNING).touch()
        write_partition(corpus.partition, out_dir / "partition")
        write_json(out_dir / "config.json", config.model_dump(mode="json"))
    (out_dir / BEGINNING).unlink(missing_ok=True)


def _where_to_begin(config: Config, out_dir: Path, resume: bool) -> Path | None:
    """The checkpoint that a run continues from, if it does."""
    checkpoint = latest_checkpoint(out_dir) if resume else None
    if resume and not is_training(out_dir):
        what = f"{out_dir} holds no training run to resume" if out_dir.exists() else f"there is no folder {out_dir}"
        raise UserError(f"{what}: give the --out that the run was started with, or leave --resume out to start one")
    if not resume and is_training(out_dir):
        raise UserError(f"{out_dir} holds a training run: give another --out, or --resume to continue it")
    if not resume and not (out_dir / BEGINNING).exists():
        require_new_dir(out_dir)
    if resume:  # one that was ended before its first checkpoint begins anew
        _check_same_config(config, out_dir / "config.json")
    return checkpoint


def _check_same_config(config: Config, file: Path) -> None:
    """A run goes on with the settings it was started with; only the device may be another."""
    # Read as a config: a setting that is younger than the run has had its default.
    before, now = load_config(file).model_dump(mode="json"), config.model_dump(mode="json")
    _require_same("run.seed", before["run"]["seed"], now["run"]["seed"])
    for section in ("format", "model", "lora", "validation", "audit"):
        _require_same_section(section, before, now)
    _require_same("the number of stages", len(before["stages"]), len(now["stages"]))
    for old, new in zip(before["stages"], now["stages"], strict=True):
        _require_same("start of a stage", old["start"], new["start"])
        for section in ("train", "corpus"):
            _require_same_section(section, old, new)


def _require_same_section(section: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now[section].items():
        _require_same(f"{section}.{key}", before[section].get(key), value)


def _require_same(name: str, before: Any, now: Any) -> None:
    if before != now:
        values = f" ({before!r} then, {now!r} now)" if len(repr(before)) + len(repr(now)) < MOST_SHOWN else ""
        raise UserError(
            f"--resume: {name} is not what the run was started with{values}: give the config.json in its folder as the"
            " config, or start a new run, with another --out"
        )


# ---- the stages ----------------------------------------------------------------------------------------------------


def _train_stages(run: Run, plan: Plan, checkpoint: Path | None) -> None:
    """All stages that are not done yet, each from the weights that the one before left."""
    progress, stages, clock = run.progress, run.config.stages, run.clock
    work = [s.train.steps * s.train.batches_per_step * s.train.batch_tokens for s in stages]
    steps = sum(stage.train.steps for stage in stages)
    log = TrainingLog(run.out_dir, progress, steps, clock.max_s, run.say, run.parallel.is_main)
    with log, run.interrupts:
        for index in range(progress.stage, len(stages)):
            stage = stages[index]
            if index > progress.stage:
                progress.stage, progress.step, progress.rate, progress.stage_began_s = index, 0, 0.0, clock.now_s()
                checkpoint = latest_checkpoint(run.out_dir)
            optimizers = make_optimizers(run.model.lm.named_parameters(), stage.train)
            if progress.step:
                assert checkpoint
                load_states(checkpoint, run.parallel, run.model, optimizers, run.average)
            elif stage.start == "weights+optimizer":
                source = checkpoint or checkpoint_beside(run.config.model.adapter or run.config.model.path)
                load_states(source, run.parallel, run.model, optimizers, moments_only=True)
            # Of the time that is left, a stage gets its share of the work that is left.
            share = work[index] / sum(work[index:])
            step_s = _step_s(run, stage.train, plan)
            left_s = min(clock.max_s - clock.now_s(), step_s * (stage.train.steps - progress.step))
            choice = decide_compile(run.model.lm, stage.train, run.parallel, left_s)
            pace = _pace(run, share, step_s, choice.seconds)
            run.say(_announcement(choice, pace))
            expected_s = pace.first_s + step_s * (steps - progress.total_steps)
            log.expect(min(expected_s, clock.max_s - clock.now_s()), step_s)
            _train_stage(run, stage, choice, optimizers, pace, log)
            if not progress.step:
                run.say(f"stage {stage.name}: there was no time for a step of it")
            if stage.train.keep_before_decay and not (run.out_dir / BEFORE_DECAY).exists():
                run.say(f"stage {stage.name}: too short for a checkpoint before the decay")
            run.save_checkpoint(optimizers)
            if run.interrupts.asked:
                raise KeyboardInterrupt
        _end(run, log)


def _step_s(run: Run, train: TrainConfig, plan: Plan) -> float:
    """The seconds that a step which is not compiled is thought to take."""
    # Forward and backward cost three forward passes, four where activations are recomputed.
    passes = (4 if train.checkpointing else 3) * train.batches_per_step / run.parallel.processes
    return run.parallel.broadcast(passes * train.batch_tokens * plan.token_s)


def _pace(run: Run, share: float, step_s: float, compile_s: float) -> Pace:
    """The time of the stage that the run stands in, which has that share of what is left when it begins."""
    progress, clock = run.progress, run.clock
    began_s = progress.stage_began_s
    return Pace(
        clock.now_s,
        lambda: began_s + (clock.steps_until_s() - began_s) * share if clock.limited else math.inf,
        counted_s=progress.spent_s - progress.counted_from_s if progress.step else 0.0,
        first_s=step_s + compile_s,
        step_s=step_s,
    )


def _train_stage(
    run: Run,
    stage: StageConfig,
    choice: CompileDecision,
    optimizers: Sequence[torch.optim.Optimizer],
    pace: Pace,
    log: TrainingLog,
) -> None:
    parallel, progress, interrupts, train = run.parallel, run.progress, run.interrupts, stage.train
    stream = stage_stream(run.config, run.corpus, progress.stage)
    packed = BatchStream(stream, train.batch_tokens, train.batches_per_step)
    source = batches(packed, progress.step, train.loader_workers, parallel.process, parallel.processes)
    loss_of = _loss_of(run, choice)
    asked = False  # in any process, to end
    first, first_step = ExitStack(), progress.step  # what is waited for until the first step is done

    def backward_at(_: int) -> Tensor:
        nonlocal asked
        if not pace.warm:
            with waiting(run.say, "drawing the first batches"):
                mine = next(source)
            first.enter_context(waiting(run.say, _first_step(choice)))
        else:
            mine = next(source)
        counts_SC = np.sum([batch.counts_SC for batch in mine], axis=0)
        useful = (
            sum(batch.useful_tokens for batch in mine),
            sum(batch.target_tokens for batch in mine),
            interrupts.asked,
        )
        tokens, targets, ending, *counts = parallel.all_reduce_sum(np.concatenate((useful, counts_SC.ravel()))).tolist()
        asked = ending > 0
        progress.tokens += tokens
        _count(progress, stream, np.reshape(counts, counts_SC.shape))
        return parallel.backward(loss_of, run.module, mine, targets)

    def after_step(step: Step) -> None:
        if step.step == first_step + 1 and choice.pays:
            run.say(f"compiled: the first step took {format_duration(step.elapsed_s - step.began_s)}")
        first.close()
        interrupts.watch()
        if run.average:
            run.average.update_parameters(run.model.lm)
        progress.step, progress.total_steps = step.step, progress.total_steps + 1
        progress.counted_from_s = pace.counted_from_s
        ending = asked or (interrupts.asked and parallel.processes == 1)
        log.step(stage.name, step, {} if ending else _validated(run))
        if run.pages:
            run.pages.refresh()
        ending = ending or (interrupts.asked and parallel.processes == 1)  # while it was validated
        decays, progress.rate = progress.rate == 1.0 > step.rate, step.rate
        if train.keep_before_decay and decays:
            _keep_before_decay(run, optimizers)
        if ending or _checkpoint_is_due(run, train):
            run.save_checkpoint(optimizers)
        if ending:
            raise KeyboardInterrupt

    with first:
        fit(
            [p for p in run.model.lm.parameters() if p.requires_grad],
            optimizers,
            train,
            backward_at,
            first_step=first_step,
            pace=pace,
            scaler=parallel.scaler,
            after_step=after_step,
        )


def _keep_before_decay(run: Run, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Saves what another run can go on from, in place of what an earlier stage or a shorter schedule kept."""
    folder = run.out_dir / BEFORE_DECAY
    file = folder / ("adapter" if run.start.lora else "model") / TRAINING_FILE
    if run.parallel.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    run.parallel.barrier()
    run.save_checkpoint(optimizers, BEFORE_DECAY)
    if run.parallel.is_main:
        write_json(file, describe(run))


def _announcement(choice: CompileDecision, pace: Pace) -> str:
    """What comes before the first step is heard of."""
    if choice.pays:
        seconds = format_duration(choice.seconds)
        return f"compiling, takes about {seconds} the first time; train.compile=no skips it ({choice.why})"
    return f"not compiled: {choice.why}; a step takes about {format_duration(pace.step_s)}"


def _first_step(choice: CompileDecision) -> str:
    """What is waited for until anything is known of steps."""
    return f"the first step, which compiles for about {format_duration(choice.seconds)}" if choice.pays else "a step"


def _validated(run: Run) -> dict[str, float]:
    """What validation measures after a step, if it is due."""
    validation, steps = run.config.validation, run.progress.total_steps
    answers = bool(validation.accuracy_every) and steps % validation.accuracy_every == 0
    return run.validate(answers) if answers or steps % validation.every == 0 else {}


def _checkpoint_is_due(run: Run, train: TrainConfig) -> bool:
    """Every so many steps; and a run with a time limit saves one early, to learn what that takes."""
    due = run.progress.total_steps % train.checkpoint_every == 0
    learns = run.clock.limited and not run.clock.is_measured("checkpoint")
    return (due or learns) and run.clock.has_time_for("checkpoint")


def _end(run: Run, log: TrainingLog) -> None:
    """The last validation, as far as there is time for it."""
    asked = bool(run.config.validation.accuracy_every)
    measured = run.validate(asked, then=("results",))
    log.finish(measured)
    for figure in [name for name in ("validation_loss", *["accuracy"] * asked) if name not in measured]:
        run.say(f"there was no time to measure the {figure.replace('_', ' ')} at the end")


def _count(progress: Progress, stream: SampleStream, counts_SC: np.ndarray) -> None:
    """Adds what became of each source's samples in a step."""
    for source, row in zip(stream.sources, counts_SC.tolist(), strict=True):
        known = progress.counts.setdefault(source.config.label, dict.fromkeys(COUNTS, 0))
        progress.counts[source.config.label] = {n: known[n] + more for n, more in zip(COUNTS, row, strict=True)}


def _loss_of(run: Run, choice: CompileDecision) -> Callable[[Batch], Tensor]:
    """The summed loss of a batch, compiled where that pays."""
    eager = partial(run.model.logits, through=run.module)
    logits_of = compiled(eager) if choice.pays else eager
    return lambda batch: packed_loss(run.model, batch, logits_of, reduction="sum")
