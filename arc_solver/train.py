"""The offline run: stages of training on the corpus, from a new model or any pretrained one.

    bin/train CONFIG.toml --out DIR
    torchrun --nproc-per-node 8 -m arc_solver.train CONFIG.toml --out DIR

The loop itself is `optimize.fit`. Here is what surrounds it: which model, which data, validation, checkpoints, logs.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from .checkpoints import (
    Progress,
    cannot_write,
    checkpoint_beside,
    latest_checkpoint,
    load_progress,
    load_states,
)
from .config import (
    Config,
    MachineError,
    Parser,
    StageConfig,
    TrainConfig,
    UserError,
    load_config,
    require_new_dir,
    run_main,
)
from .corpus import Corpus, make_corpus
from .devices import Devices, compiled
from .files import write_json
from .model import packed_loss, recompute_activations
from .optimize import Step, fit, make_optimizers
from .run import Run, make_validation, stage_stream, start_model
from .stream import COUNTS, Batch, BatchStream, SampleStream, batches
from .training_log import TrainingLog
from .training_report import plot_rates, save_results, show_plan
from .validate import write_partition


def train(config: Config, out_dir: Path, max_s: float = math.inf, resume: bool = False) -> None:
    """Trains on the corpus and leaves in `out_dir`: `config.json`, `log.jsonl`, `checkpoints/`, and at last `model/`.

    With LoRA it leaves `adapter/` too, and `base/`, the checkpoint it is for, where that had to be cut first.

    Raises:
        UserError: what the config names cannot be used, or `out_dir` holds a run and `resume` is false, or the other
            way round.
        MachineError: something cannot be written.
    """
    began = time.monotonic()
    checkpoint = _where_to_begin(config, out_dir, resume)
    progress = load_progress(checkpoint) if checkpoint else Progress()
    if progress.spent_s >= max_s:
        spent = f"{progress.spent_s / 60:.1f}"
        raise UserError(f"--max-minutes counts from the start of the run, which has spent {spent}: give more")
    fresh = not out_dir.exists()
    devices = Devices(config)
    console = Console(stderr=True, quiet=not devices.main, soft_wrap=True, highlight=False)
    try:
        corpus = make_corpus(config)
        validation = make_validation(config, corpus)
        for index, stage in enumerate(config.stages):  # refuses what cannot be drawn before any work is done
            BatchStream(stage_stream(config, corpus, index), stage.train.batch_tokens)
        begin = partial(_begin, config, corpus, out_dir, devices)
        try:
            start = start_model(config, corpus, out_dir, checkpoint, devices, console, begin)
        except UserError:
            if fresh and devices.main:  # the same --out can be given again
                shutil.rmtree(out_dir, ignore_errors=True)
            raise
        estimate = show_plan(config, corpus, start.model, devices, console)
        if config.train.checkpointing:
            recompute_activations(start.model.lm)
        module = devices.share(start.model.lm)
        begin()
        began -= progress.spent_s
        run = Run(config, out_dir, devices, corpus, start, module, progress, began, max_s, validation)
        _train_stages(run, checkpoint, console)
        save_results(run, estimate, console)
    except (OSError, SafetensorError) as error:
        raise MachineError(cannot_write(out_dir, error)) from error
    finally:
        devices.end()


def _begin(config: Config, corpus: Corpus, out_dir: Path, devices: Devices) -> None:
    """Makes the run's folder. From here on it can be resumed."""
    if not devices.main or (out_dir / "config.json").exists():
        return
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out_dir} cannot be made ({error.strerror}): give another folder") from None
    write_partition(corpus.partition, out_dir / "partition")
    write_json(out_dir / "config.json", config.model_dump(mode="json"))


def _where_to_begin(config: Config, out_dir: Path, resume: bool) -> Path | None:
    """The checkpoint that a run continues from, if it does."""
    checkpoint = latest_checkpoint(out_dir) if resume else None
    if resume and not _is_run(out_dir):
        raise UserError(f"{out_dir} holds no training run to resume: leave --resume out")
    if not resume and _is_run(out_dir):
        raise UserError(f"{out_dir} holds a training run: give another --out, or --resume to continue it")
    if not resume:
        require_new_dir(out_dir)
    if resume:  # one that was ended before its first checkpoint begins anew
        _check_same_config(config, out_dir / "config.json")
    return checkpoint


def _is_run(folder: Path) -> bool:
    """Whether a training run began there; a run directory of bin/solve has a config.json too."""
    return (folder / "config.json").is_file() and (folder / "partition").is_dir()


def _check_same_config(config: Config, file: Path) -> None:
    """A run goes on with the settings it was started with; only the device may be another."""
    before, now = json.loads(file.read_text()), config.model_dump(mode="json")
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
        raise UserError(
            f"--resume: {name} is {now!r} and the run was started with {before!r}; give the same settings (they are in"
            " its config.json), or start a new run with model.path"
        )


# ---- the stages ----------------------------------------------------------------------------------------------------


def _train_stages(run: Run, checkpoint: Path | None, console: Console) -> None:
    """All stages that are not done yet, each from the weights that the one before left."""
    progress, stages = run.progress, run.config.stages
    work = [s.train.steps * s.train.batches_per_step * s.train.batch_tokens for s in stages]
    steps = sum(stage.train.steps for stage in stages)
    with TrainingLog(run.out_dir, progress, steps, run.max_s, console, run.devices.main) as log:
        for index in range(progress.stage, len(stages)):
            stage = stages[index]
            if index > progress.stage:
                progress.stage, progress.step, progress.stage_began_s = index, 0, run.clock()
                checkpoint = latest_checkpoint(run.out_dir)
            optimizers = make_optimizers(run.model.lm.named_parameters(), stage.train)
            if progress.step:
                assert checkpoint
                load_states(checkpoint, run.devices, run.model, optimizers)
            elif stage.start == "weights+optimizer":
                source = checkpoint or checkpoint_beside(run.config.model.adapter or run.config.model.path)
                load_states(source, run.devices, run.model, optimizers, moments_only=True)
            loss_of = _loss_of(run, stage.train)
            # Of the time that is left, a stage gets its share of the work that is left.
            left_s = (run.max_s - progress.stage_began_s) * work[index] / sum(work[index:])
            _train_stage(run, stage, loss_of, optimizers, left_s, log)
            run.save_checkpoint(optimizers)
        log.finish(run.validate(loss_of, bool(run.config.validation.accuracy_every)))


def _train_stage(
    run: Run,
    stage: StageConfig,
    loss_of: Callable[[Batch], Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    max_s: float,
    log: TrainingLog,
) -> None:
    devices, progress, train, validation = run.devices, run.progress, stage.train, run.config.validation
    stream = stage_stream(run.config, run.corpus, progress.stage)
    packed = BatchStream(stream, train.batch_tokens, train.batches_per_step)
    source = batches(packed, progress.step, train.loader_workers, devices.process, devices.processes)

    def backward_at(_: int) -> Tensor:
        mine = next(source)
        counts_SC = np.sum([batch.counts_SC for batch in mine], axis=0)
        useful = (sum(batch.useful_tokens for batch in mine), sum(batch.learnt for batch in mine))
        tokens, learnt, *counts = devices.total(np.concatenate((useful, counts_SC.ravel()))).tolist()
        progress.tokens += tokens
        _count(progress, stream, np.reshape(counts, counts_SC.shape))
        return devices.backward(loss_of, run.module, mine, learnt)

    def after_step(step: Step) -> None:
        progress.step, progress.total_steps = step.step, progress.total_steps + 1
        total = progress.total_steps
        answers = bool(validation.accuracy_every) and total % validation.accuracy_every == 0
        due = answers or total % validation.every == 0
        log.step(stage.name, step, run.validate(loss_of, answers) if due else {})
        if total % train.checkpoint_every == 0:
            run.save_checkpoint(optimizers)

    fit(
        [p for p in run.model.lm.parameters() if p.requires_grad],
        optimizers,
        train,
        backward_at,
        first_step=progress.step,
        clock=lambda: run.clock() - progress.stage_began_s,
        max_s=max_s,
        scaler=devices.scaler,
        after_step=after_step,
    )


def _count(progress: Progress, stream: SampleStream, counts_SC: np.ndarray) -> None:
    """Adds what became of each source's samples in a step."""
    for source, row in zip(stream.sources, counts_SC.tolist(), strict=True):
        known = progress.counts.setdefault(source.config.label, dict.fromkeys(COUNTS, 0))
        progress.counts[source.config.label] = {n: known[n] + more for n, more in zip(COUNTS, row, strict=True)}


def _loss_of(run: Run, train: TrainConfig) -> Callable[[Batch], Tensor]:
    """The summed loss of a batch, compiled where that pays."""
    logits_of = compiled(partial(run.model.logits, through=run.module), train, run.devices)
    return lambda batch: packed_loss(run.model, batch, logits_of, reduction="sum")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/train", description="Train a model offline on ARC tasks, RE-ARC and other sources.")
    parser.add_argument("config", help="TOML file, e.g. configs/bundled.toml")
    parser.add_argument("--out", type=Path, help="folder for the log, the checkpoint and the model")
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, help="end training by then; the schedule is shaped to it"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    parser.add_argument("--plot-lr", type=Path, metavar="FILE", help="draw the learning rates, and train nothing")
    parser.add_argument("--seed", type=int, help="run.seed")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(arguments)
    if not args.max_minutes > 0:
        raise UserError(f"--max-minutes must be above 0, got {args.max_minutes:g}")
    seed = [] if args.seed is None else [f"run.seed={args.seed}"]
    config = load_config(args.config, [*args.overrides, *seed])
    if args.plot_lr:
        plot_rates(config, args.plot_lr)
        return 0
    if not args.out:
        raise UserError("--out is missing: give a folder for the log, the checkpoints and the model")
    try:
        train(config, args.out, args.max_minutes * 60, args.resume)
    except KeyboardInterrupt:
        print(f"interrupted; --resume continues from the last checkpoint in {args.out}, if any", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_main(main)
