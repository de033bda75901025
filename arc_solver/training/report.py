"""What an offline run says before it begins, and what it leaves at its end: models, figures for a card, pictures."""

import json
import math
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from .. import __version__
from ..charts import loss_curve, rate_curve
from ..clock import format_duration
from ..command import as_called
from ..config import AdaptConfig, Config
from ..data import TrainingData
from ..data.corpus import Corpus
from ..data.stream import COUNTS, pack_in_order
from ..errors import UserError, counted
from ..files import git_commit, sha256, write_json, write_whole
from ..models import Model, cpu_name, packed_loss, peak_memory, save_model
from ..models.adapters import target_names
from ..models.lora import merged_model
from ..models.peft_format import CONFIG_FILE as ADAPTER_CONFIG
from ..waiting import Reporter
from .card import TRAINING_FILE, earlier_runs, model_card
from .checkpoints import latest_checkpoint
from .log import format_metrics
from .memory import MemoryEstimate, estimate_memory, first_tokens, gigabytes
from .optimize import step_rate
from .parallel import ParallelContext
from .run import Run, stage_stream

PRETRAINED_LR = 1e-3  # to adapt a pretrained model with (docs/real-models.md); the default is for the bundled one
PROBE_TOKENS = 2048  # the most that the memory estimate tries
DISK_BYTES_S = 100e6  # of a slow disk: what is written is guessed to take, until it was measured
VALIDATION_SHARE, ANSWERS_SHARE = 0.2, 0.05  # of a run's time: the most for its loss; a guess for generated answers


@dataclass(frozen=True)
class Plan:
    """What is known of a run before its first step."""

    memory: MemoryEstimate
    token_s: float  # of a forward pass that is not compiled, for each token


def show_plan(config: Config, corpus: Corpus, model: Model, parallel: ParallelContext, say: Reporter) -> Plan:
    """Prints what is about to happen."""
    trained = sum(p.numel() for p in model.lm.parameters() if p.requires_grad)
    base = config.model.adapter or config.model.path
    say(
        f"{f'training goes on from {base}' if base else 'new weights, as no model.path is given'}:"
        f" {model.parameters_count:,} parameters, {trained:,} of them trained, on {parallel.device},"
        f" {parallel.precision}; {parallel.processes} process{'es' * (parallel.processes > 1)}"
    )
    if not target_names(model):
        needs = as_called("bin/solve will need adapt.enabled=false")
        say(f"it has no linear layers that tasks could be adapted by: {needs}")
    for index, stage in enumerate(config.stages):
        weights = sum(source.config.weight for source in corpus.mixtures[index])
        mixture = ", ".join(
            f"{source.config.label} {source.config.weight / weights:.0%} ({counted(len(source.tasks), 'task')})"
            for source in corpus.mixtures[index]
        )
        say(f"stage {stage.name}: {counted(stage.train.steps, 'step')}; {mixture}")
        stream = stage_stream(config, corpus, index)
        draws = [stream[i] for i in range(100)]
        lengths = sorted(len(draw.sample) for draw in draws)
        dropped, skipped = sum(d.dropped > 0 for d in draws), sum(d.too_long for d in draws)
        say(
            f"  of 100 samples: median {lengths[50]} tokens, 90% up to {lengths[90]}, longest {lengths[-1]};"
            f" {dropped} lost demonstrations to fit into {stage.corpus.max_tokens}; {skipped} more draws were too long"
        )
    held_out = corpus.partition
    say(f"validation on {counted(len(held_out.validation.tasks), 'held-out task')} of {held_out.config.of}")
    say(_audited(corpus, config, model.trained_on))
    plan = _plan(config, corpus, model, parallel)
    say(str(plan.memory))
    return plan


def _audited(corpus: Corpus, config: Config, trained_on: TrainingData | None) -> str:
    """What the audit of the run's sources found, and what of it nobody can know. `trained_on`: of the model."""
    sets = ", ".join([*config.audit.scored_on, "the validation tasks"])
    ids = {overlap.task_id for overlap in corpus.overlaps}
    if not ids:
        said = [f"leak audit passed: no training task is among {sets}, by id or by content"]
    elif config.audit.overlap == "exclude":
        said = [f"leak audit passed: left out are {counted(len(ids), 'task')}, for being among {sets}"]
    else:
        said = [
            f"leak audit: {counted(len(ids), 'training task')} among {sets}, as the config allows: no score is clean"
        ]
    if seen := len(corpus.trained_on.demonstrated):
        said.append(f"of {counted(seen, 'task')} the demonstrations, not the test pairs, are trained on")
    if corpus.unsolved:
        said.append(f"the test outputs of {corpus.unsolved} of those tasks are not known, so not compared with")
    if trained_on and trained_on.pretrained:
        said.append(f"what {', '.join(sorted(trained_on.pretrained))} saw in pretraining is not known")
    return "; ".join(said)


def _plan(config: Config, corpus: Corpus, model: Model, parallel: ParallelContext) -> Plan:
    """The memory of the stage with the largest batches, and the time of a forward pass."""
    stage = max(config.stages, key=lambda stage: stage.train.batch_tokens)
    stream = stage_stream(config, corpus, config.stages.index(stage))
    samples = [stream[i].sample for i in range(4)]
    batch = pack_in_order(samples, sum(map(len, samples)))[0]
    longest = min(len(batch.ids_T), PROBE_TOKENS, stage.train.batch_tokens)

    def probe(tokens: int) -> Tensor:
        with parallel.autocast():
            return packed_loss(model, first_tokens(batch, tokens))

    estimate = estimate_memory(model.lm, stage.train, parallel, longest, probe)
    if parallel.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(parallel.device)
    began = time.monotonic()  # of a pass that finds all warmed up
    with torch.no_grad():
        probe(longest).item()
    return Plan(estimate, (time.monotonic() - began) / longest)


def estimate_closing_times(run: Run, plan: Plan, import_s: float) -> None:
    """Estimates the time of validation, checkpoint and results, and warns of what will be left out.

    Args:
        import_s: what this machine took to import PyTorch and the rest: matplotlib and the interpreter's end, at which
            all of that is taken down, take about as long together.
    """
    clock, parameters = run.clock, list(run.model.lm.parameters())
    if not clock.limited:
        return
    whole = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    clock.set_estimate("checkpoint", 1 + 3 * trained / DISK_BYTES_S)  # with two moments
    clock.set_estimate("results", 1 + 2 * whole / DISK_BYTES_S + import_s)  # a base is read before an adapter is merged
    clock.set_estimate("validation", plan.token_s * sum(len(batch.ids_T) for batch in run.validation.batches))
    if run.config.validation.accuracy_every:
        clock.set_estimate("answers", ANSWERS_SHARE * clock.max_s)
    if clock.end_s["validation"] > VALIDATION_SHARE * clock.max_s:
        needed = format_duration(clock.end_s["validation"])
        run.say(f"no validation: it would take {needed} of so short a run; fewer validation.tokens do less")
        clock.drop_part("validation")


def save_results(run: Run, estimate: MemoryEstimate, by_itself: bool) -> None:
    """Writes the model and the adapter, with what a model card needs. `by_itself`: see `train`."""
    parallel, start, save = run.parallel, run.start, run.config.lora.save
    weights = parallel.weights(run.result.lm)
    if not parallel.is_main:
        return
    peak = peak_memory(parallel.device)
    saved_as = torch.bfloat16 if parallel.precision == "bf16" else None
    folders = []
    if start.base_dir:
        last = latest_checkpoint(run.out_dir)
        assert last
        if save in ("both", "adapter"):
            folders.append(Path(shutil.copytree(last / "adapter", run.out_dir / "adapter", dirs_exist_ok=True)))
        if save in ("both", "merged"):
            folders.append(run.out_dir / "model")
            save_model(merged_model(last / "adapter", start.base_dir), folders[-1], saved_as)
    else:
        folders.append(run.out_dir / "model")
        save_model(run.result, folders[-1], saved_as, weights)
    about = {**describe(run), "memory_estimate_bytes": estimate.total, "memory_peak_bytes": peak}
    for folder in folders:
        write_json(folder / TRAINING_FILE, about)
        kind = "LoRA adapter" if folder.name == "adapter" else "causal language model"
        if run.progress.total_steps:
            loss_curve(run.out_dir / "log.jsonl", folder / "loss.png")
        write_whole(folder / "README.md", model_card(about, kind))
    _show_results(run, estimate, peak, folders)
    if by_itself and run.progress.total_steps:
        run.say(f"to solve tasks: {_solve_command(run, folders[-1])}")


def _show_results(run: Run, estimate: MemoryEstimate, peak: int, folders: Sequence[Path]) -> None:
    caption = "too long: not even two pairs fitted; left out: found no room in a batch"
    table = Table("source", *(name.replace("_", " ") for name in COUNTS), caption=caption)
    for label, counts in run.progress.counts.items():
        table.add_row(label, *(f"{counts[name]:,}" for name in COUNTS))
    run.say.console.print(table)
    run.say(
        f"peak memory {gigabytes(peak)}, estimated {gigabytes(estimate.total)}; {run.progress.tokens:,} tokens in"
        f" {run.progress.spent_s / 60:.1f} minutes"
    )
    figures = {"validation_loss": run.progress.validation_loss, "accuracy": run.progress.accuracy}
    measured = {name: value for name, value in figures.items() if not math.isnan(value)}
    run.say(f"{format_metrics(measured) or 'not validated'}; {' and '.join(map(str, folders))}")
    done, of = run.progress.total_steps, sum(stage.train.steps for stage in run.config.stages)
    if done < of:
        again = f"{as_called('bin/train')} --out {shlex.quote(str(run.out_dir))} --resume --max-minutes M"
        run.say(f"the clock ended it after {done:,} of {of:,} steps; it goes on with more time: {again}")


def _solve_command(run: Run, result: Path) -> str:
    """`bin/solve` with what was trained: a model, or an adapter for its base."""
    names, adapt, lora = target_names(run.model), run.config.adapt, run.config.lora
    is_adapter = (result / ADAPTER_CONFIG).is_file()
    words = [f"model.path={run.start.base_dir}", f"model.adapter={result}"] if is_adapter else [f"model.path={result}"]
    known = (adapt.targets, lora.targets if lora.enabled else (), tuple(sorted(names)))
    targets = next((some for some in known if some and set(some) <= names), ())
    if not targets:
        words.append("adapt.enabled=false")
    elif targets != AdaptConfig().targets:
        words.append(f"adapt.targets={json.dumps(targets, separators=(',', ':'))}")
    if targets and run.model.trained_on and run.model.trained_on.pretrained:
        words.append(f"adapt.lr={PRETRAINED_LR:g}")
    return f"{as_called('bin/solve')} {shlex.join(words)}"


def describe(run: Run) -> dict[str, Any]:
    """The figures of a training run so far, for a model card."""
    progress, device = run.progress, run.parallel.device
    base = run.config.model.adapter or run.config.model.path
    return {
        "began_with": base,
        "parameters": run.model.parameters_count,
        "tokens": progress.tokens,
        "steps": progress.total_steps,
        "minutes": round(progress.spent_s / 60, 1),
        "validation_loss": _rounded(progress.validation_loss),
        "validation_losses": {task: _rounded(loss) for task, loss in progress.validation_losses.items()},
        "accuracy": _rounded(progress.accuracy),
        "accuracies": {task: _rounded(share) for task, share in progress.accuracies.items()},
        "sources": {label: {**_about_source(run, label), **counts} for label, counts in progress.counts.items()},
        "leak_audit": _audited(run.corpus, run.config, run.model.trained_on),
        "left_out": _left_out(run.corpus, run.config),
        "held_out": [task.id for task in run.corpus.partition.validation.tasks],
        "seed": run.config.run.seed,
        "commit": git_commit(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "processes": run.parallel.processes,
        "torch": torch.__version__,
        "arc_solver": __version__,
        "config": run.config.model_dump(mode="json", exclude_defaults=True),
        "earlier": earlier_runs(base),
    }


def _left_out(corpus: Corpus, config: Config) -> dict[str, dict[str, str]]:
    """Of each source the tasks that the audit found and left out, each with the scored or held-out task that it is."""
    found: dict[str, dict[str, str]] = {}
    for overlap in corpus.overlaps if config.audit.overlap == "exclude" else ():
        found.setdefault(overlap.source, {})[overlap.task_id] = overlap.scored_id
    return found


def _about_source(run: Run, label: str) -> dict[str, Any]:
    """What a source is: how many tasks of it are trained on, its licence, and the digest of its file."""
    source = next(source for mixture in run.corpus.mixtures for source in mixture if source.config.label == label)
    file, digest = Path(source.config.path), source.config.sha256 or None  # which was checked when it was read
    if not digest and source.config.path and file.is_file():
        digest = sha256(file)
    return {"tasks": len(source.tasks), "licence": source.config.licence or None, "sha256": digest}


def _rounded(measured: float) -> float | None:
    return None if math.isnan(measured) else round(measured, 4)


def plot_rates(config: Config, picture: Path) -> None:
    """Draws the learning rate of every step of every stage, without training.

    Raises:
        UserError: the file is no picture that can be written.
    """
    if picture.suffix not in (".png", ".svg", ".pdf") or not picture.parent.is_dir():
        raise UserError(f"--plot-lr {picture}: give a .png, .svg or .pdf file in a folder that exists")
    rates = [
        stage.train.lr * step_rate(k / stage.train.steps, stage.train)
        for stage in config.stages
        for k in range(stage.train.steps)
    ]
    ends = np.cumsum([stage.train.steps for stage in config.stages]).tolist()
    rate_curve(rates, [(stage.name, end) for stage, end in zip(config.stages, ends, strict=True)], picture)
