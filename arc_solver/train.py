"""The one training loop, `fit`, and the offline run built on it.

`fit` knows optimizers, schedules and the clock; it does not know tasks. It serves `bin/train` here and test-time
training in `adapt.py`.
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer

from . import __version__
from .config import (
    Config,
    OptimConfig,
    Parser,
    TrainConfig,
    UserError,
    load_config,
    named_rng,
    require_new_dir,
    run_main,
)
from .corpus import Batch, BatchStream, SampleStream, TrainingData, batches, pack, training_data
from .encode import IGNORE, Sample
from .model import Model, fast_dtype, load_model, new_model, pick_device, save_model
from .report import loss_curve


@dataclass(frozen=True)
class Step:
    """What one step of `fit` did."""

    step: int  # counted from 1
    loss: float
    grad_norm: float  # before clipping
    rate: float  # share of the peak learning rate
    elapsed_s: float


def rate_at(progress: float, config: OptimConfig) -> float:
    """Share of the peak learning rate at `progress`, the share of the run that is behind, 0 to 1.

    Warm-up is linear. Then "linear" falls to 0 in a line, "cosine" in half a cosine, "constant" stays, and "wsd"
    (warm-up, stable, decay) stays and then falls to 0 in a line over the last `decay` of the run.
    """
    if progress < config.warmup:
        return progress / config.warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        return min(1.0, (1.0 - progress) / config.decay) if config.decay else 1.0
    behind = (progress - config.warmup) / (1.0 - config.warmup) if config.warmup < 1 else 1.0
    return 1.0 - behind if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * behind))


def make_optimizers(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[Optimizer]:
    """AdamW, or Muon for the matrices of the hidden layers with AdamW for the rest (Jordan 2024, "Muon").

    Weight decay is for matrices only.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    hidden = [p for name, p in trained if p.ndim == 2 and "embed" not in name and "head" not in name]
    if config.optimizer == "adamw":
        hidden = []
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in trained if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
    ]
    if hidden:
        optimizers.insert(0, torch.optim.Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # "lr" follows the schedule; a checkpoint holds both
    return optimizers


def fit(
    parameters: Sequence[nn.Parameter],
    optimizers: Sequence[Optimizer],
    config: OptimConfig,
    loss_at: Callable[[int], Tensor],
    *,
    first_step: int = 0,
    spent_s: float = 0.0,
    max_s: float = math.inf,
    after_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Takes gradient steps until `config.steps` are done or `max_s` seconds are over.

    The schedule follows whichever is further, steps or time, so a run that is cut by time still ends its decay.

    Args:
        optimizers: from `make_optimizers`.
        loss_at: the loss of step k (from 0), a scalar with a graph.
        first_step, spent_s: where a continued run stands.
    """
    start = time.monotonic() - spent_s
    for k in range(first_step, config.steps):
        progress = max(k / config.steps, (time.monotonic() - start) / max_s)
        if progress >= 1:
            break
        # A step's rate is that of its middle: the first is not 0, and neither is the last.
        rate = rate_at(min(1.0, progress + 0.5 / config.steps), config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
        loss = loss_at(k)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        after_step(Step(k + 1, loss.item(), norm.item(), rate, time.monotonic() - start))


def packed_loss(model: Model, batch: Batch, logits_of: Callable[..., Tensor] | None = None) -> Tensor:
    """Mean cross entropy of the learnt ids of a packed batch, in nats.

    `logits_of` is `model.logits`, or that compiled.
    """
    ids_BT, positions_BT, ends_S = (
        x.to(model.device) for x in (batch.ids_T[None], batch.positions_T[None], batch.ends_S)
    )
    torch._dynamo.maybe_mark_dynamic(ends_S, 0)  # the number of sequences differs from batch to batch
    logits_TV = (logits_of or model.logits)(ids_BT, positions_BT, ends_S=ends_S)[0]
    # Nothing is learnt at a sequence's first id, so the shift by one crosses no border.
    return F.cross_entropy(logits_TV[:-1], batch.labels_T[1:].to(model.device), ignore_index=IGNORE)


@torch.no_grad()
def validation_loss(loss_of: Callable[[Batch], Tensor], fixed: Sequence[Batch]) -> float:
    """Mean cross entropy over all learnt ids of the batches, in nats: the same however they are packed."""
    learnt = [int((batch.labels_T != IGNORE).sum()) for batch in fixed]
    return sum(loss_of(batch).item() * count for batch, count in zip(fixed, learnt, strict=True)) / sum(learnt)


def validation_batches(config: Config) -> list[Batch]:
    """A fixed set: the same samples for every seed, of tasks that training never sees."""
    stream = SampleStream(config.corpus, config.format, seed=0, split="validation", labels=config.train.labels)
    packed: list[Batch] = []
    chosen: list[Sample] = []
    room, total, index = config.train.batch_tokens, 0, 0
    while total < config.train.validation_tokens:
        sample = stream[index]
        if len(sample) > room:
            packed.append(pack(chosen, config.train.batch_tokens))
            chosen, room = [], config.train.batch_tokens
        chosen.append(sample)
        room, total, index = room - len(sample), total + len(sample), index + 1
    return [*packed, pack(chosen, config.train.batch_tokens)]


# ---- the offline run ---------------------------------------------------------------------------------------------


@dataclass
class TrainProgress:
    """Where a training run stands."""

    step: int = 0
    tokens: int = 0  # useful tokens, padding not counted
    spent_s: float = 0.0
    loss: float = math.nan  # training loss, averaged over about 20 steps
    validation_loss: float = math.nan


def train(config: Config, out_dir: Path, max_s: float = math.inf, resume: bool = False) -> Model:
    """Trains on the corpus and leaves in `out_dir`: `config.json`, `log.jsonl`, `checkpoints/`, and at last `model/`.

    Raises:
        UserError: `out_dir` holds a run and `resume` is false, or the other way round.
    """
    started = time.monotonic()
    checkpoint = latest_checkpoint(out_dir) if resume else None
    if resume and checkpoint is None:
        raise UserError(f"{out_dir} holds no checkpoint to resume from: leave --resume out")
    if not resume and (out_dir / "log.jsonl").exists():
        raise UserError(f"{out_dir} holds a training run: give another --out, or --resume to continue it")
    if not resume:
        require_new_dir(out_dir)
    if checkpoint:
        _check_same_config(config, out_dir / "config.json")
    device = pick_device(config.run.device)
    model, progress = _start(config, checkpoint, device)
    if progress.spent_s >= max_s:
        spent = f"{progress.spent_s / 60:.1f}"
        raise UserError(f"--max-minutes counts from the start of the run, which has spent {spent}: give more")
    named = list(model.lm.named_parameters())
    optimizers = make_optimizers(named, config.train)
    if checkpoint:
        states = torch.load(checkpoint / "optimizers.pt", weights_only=True)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    bf16 = {"auto": fast_dtype(device) == torch.bfloat16, "bf16": True, "fp32": False}[config.train.precision]
    compiles = _compiles(config.train, device)
    logits_of = torch.compile(model.logits, dynamic=False) if compiles else model.logits

    def loss_of(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return packed_loss(model, batch, logits_of)

    stream = SampleStream(config.corpus, config.format, config.run.seed, labels=config.train.labels)
    source = batches(BatchStream(stream, config.train.batch_tokens), progress.step, config.train.loader_workers)
    fixed = validation_batches(config)

    def loss_at(_: int) -> Tensor:
        batch = next(source)
        progress.tokens += batch.useful_tokens
        return loss_of(batch)

    out_dir.mkdir(parents=True, exist_ok=True)
    _write_json(out_dir / "config.json", config.model_dump(mode="json"))
    _trim_log(out_dir / "log.jsonl", progress.step)
    console = Console(stderr=True)
    console.print(
        f"{model.parameters_count:,} parameters on {device}, {'bf16' if bf16 else 'fp32'}"
        f"{', compiled' if compiles else ''}; {len(stream.ids)} RE-ARC generators and"
        f" {len(stream.arc)} ARC tasks; validation on {config.corpus.holdout_tasks} held-out tasks"
    )
    with (out_dir / "log.jsonl").open("a", buffering=1) as log, _progress_bar(console) as bar:
        first = "compiling, which takes a minute" if compiles else "starting"
        line = bar.add_task("train", total=config.train.steps, completed=progress.step, text=first)
        tokens_before, spent_before_s = progress.tokens, progress.spent_s + time.monotonic() - started

        def after_step(step: Step) -> None:
            progress.step, progress.spent_s = step.step, step.elapsed_s
            progress.loss = step.loss if math.isnan(progress.loss) else 0.95 * progress.loss + 0.05 * step.loss
            record: dict[str, Any] = {**asdict(step), "tokens": progress.tokens}
            if step.step % config.train.validate_every == 0:
                record["validation_loss"] = progress.validation_loss = validation_loss(loss_of, fixed)
                console.print(
                    f"step {step.step}: validation loss {progress.validation_loss:.4f}, {progress.tokens:,} tokens"
                )
            log.write(json.dumps(record) + "\n")
            if step.step % config.train.checkpoint_every == 0:
                save_checkpoint(out_dir, model, optimizers, progress)
            speed = (progress.tokens - tokens_before) / (step.elapsed_s - spent_before_s)
            known = "" if math.isnan(progress.validation_loss) else f"  validation {progress.validation_loss:.3f}"
            text = f"loss {progress.loss:.3f}{known}  {speed:,.0f} tokens/s"
            in_time = step.step * max(1.0, max_s / step.elapsed_s)
            bar.update(line, completed=step.step, total=min(config.train.steps, in_time), text=text)

        fit(
            [p for _, p in named],
            optimizers,
            config.train,
            loss_at,
            first_step=progress.step,
            spent_s=spent_before_s,
            max_s=max_s,
            after_step=after_step,
        )
        progress.validation_loss = validation_loss(loss_of, fixed)
        log.write(json.dumps({**asdict(progress), "finished": True}) + "\n")
    save_checkpoint(out_dir, model, optimizers, progress)
    model_dir = out_dir / "model"
    save_model(model, model_dir, torch.bfloat16 if bf16 else None)
    _write_json(model_dir / "training.json", describe(config, model, progress, device))
    loss_curve(out_dir / "log.jsonl", model_dir / "loss.png")
    console.print(f"validation loss {progress.validation_loss:.4f}, {progress.tokens:,} tokens; model in {model_dir}")
    return model


def save_checkpoint(out_dir: Path, model: Model, optimizers: Sequence[Optimizer], progress: TrainProgress) -> None:
    """Writes all that a continued run needs. Killed at any moment, the newest complete checkpoint is still there."""
    folder = out_dir / "checkpoints" / f"step-{progress.step:07d}"
    if folder.exists():  # the last step was just saved
        return
    temporary = folder.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_model(model, temporary / "model")
    torch.save([optimizer.state_dict() for optimizer in optimizers], temporary / "optimizers.pt")
    _write_json(temporary / "progress.json", asdict(progress))
    os.sync()
    temporary.rename(folder)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)


def latest_checkpoint(out_dir: Path) -> Path | None:
    """The newest complete checkpoint of a training run."""
    return max((out_dir / "checkpoints").glob("step-*[0-9]"), default=None)


def describe(config: Config, model: Model, progress: TrainProgress, device: torch.device) -> dict[str, Any]:
    """The figures of a training run for a model card."""
    return {
        "parameters": model.parameters_count,
        "tokens": progress.tokens,
        "steps": progress.step,
        "minutes": round(progress.spent_s / 60, 1),
        "validation_loss": round(progress.validation_loss, 4),
        "seed": config.run.seed,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "arc_solver": __version__,
        "config": config.model_dump(mode="json", exclude_defaults=True),
    }


def _start(config: Config, checkpoint: Path | None, device: torch.device) -> tuple[Model, TrainProgress]:
    """The model to train, and where it stands: a checkpoint, the weights that the config names, or new ones."""
    new_data = training_data(config.corpus)
    trained_on: TrainingData | None = new_data
    progress = TrainProgress()
    if checkpoint or config.model.path:
        model = load_model(checkpoint / "model" if checkpoint else config.model.path, device)
        if model.format != config.format:
            raise UserError(f"the checkpoint has another [format] than the config: {model.format!r}")
        if checkpoint:
            progress = TrainProgress(**json.loads((checkpoint / "progress.json").read_text()))
        # What the weights have seen before counts too; where that is unknown, it stays unknown.
        trained_on = new_data | model.trained_on if model.trained_on else None
    else:
        seed = int(named_rng(config.run.seed, "weights").integers(2**31))
        model = new_model(config.model, config.format, seed)
    return Model(model.lm.to(device).train(), model.format, trained_on), progress


def _check_same_config(config: Config, file: Path) -> None:
    """A run goes on with the settings it was started with; only [run] may differ."""
    before, now = json.loads(file.read_text()), config.model_dump(mode="json")
    for section in ("format", "model", "corpus", "train"):
        for key, value in now[section].items():
            if before[section].get(key) != value:
                raise UserError(
                    f"--resume: {section}.{key} is {value!r} and the run was started with {before[section].get(key)!r};"
                    " give the same settings, or start a new run with model.path"
                )


def _trim_log(file: Path, step: int) -> None:
    """Takes out the steps after the checkpoint, which a continued run takes again."""
    if file.exists():
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step and '"finished"' not in line]
        file.write_text("".join(f"{line}\n" for line in kept))


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )


def _compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether to compile. "auto" wants the C++ compiler and, for its CPU kernels, the Python headers."""
    if config.compile != "auto":
        return config.compile == "yes"
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return shutil.which("g++") is not None and headers


def cpu_name() -> str:
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("Model name"))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/train", description="Train a model offline on ARC tasks and RE-ARC.")
    parser.add_argument("config", help="TOML file, e.g. configs/bundled.toml")
    parser.add_argument("--out", required=True, type=Path, help="folder for the log, the checkpoint and the model")
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, help="end training by then; the schedule is shaped to it"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    parser.add_argument("--seed", type=int, help="run.seed")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(arguments)
    if args.max_minutes <= 0:
        raise UserError(f"--max-minutes must be above 0, got {args.max_minutes:g}")
    seed = [] if args.seed is None else [f"run.seed={args.seed}"]
    train(load_config(args.config, [*args.overrides, *seed]), args.out, args.max_minutes * 60, args.resume)
    return 0


if __name__ == "__main__":
    run_main(main)
