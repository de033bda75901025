"""What an offline run leaves and shows while it goes: `log.jsonl`, TensorBoard event files, a progress bar.

Only the main process's log writes; the others' do nothing.
"""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from .checkpoints import Progress
from .files import write_whole
from .optimize import Step


class TrainingLog:
    """To be entered before the first step. Steps are counted over all stages."""

    def __init__(self, out_dir: Path, progress: Progress, total_steps: int, max_s: float, console: Console, main: bool):
        self.out_dir, self.progress, self.console, self.main = out_dir, progress, console, main
        self.total_steps, self.max_s = total_steps, max_s
        self.first_tokens, self.first_s = progress.tokens, math.nan  # where the speed is counted from
        self.stack = ExitStack()

    def __enter__(self) -> "TrainingLog":
        if self.main:
            from torch.utils.tensorboard import SummaryWriter

            _trim(self.out_dir / "log.jsonl", self.progress.total_steps)
            self.file = self.stack.enter_context((self.out_dir / "log.jsonl").open("a", buffering=1))
            folder = self.out_dir / "tensorboard"
            self.board = self.stack.enter_context(SummaryWriter(str(folder), purge_step=self.progress.total_steps + 1))
            self.bar = self.stack.enter_context(_progress_bar(self.console))
            self.line = self.bar.add_task(
                "train", total=self.total_steps, completed=self.progress.total_steps, text="starting"
            )
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stack.__exit__(*error)  # type: ignore[arg-type]

    def step(self, stage: str, step: Step, measured: Mapping[str, float]) -> None:
        """Notes a step, and what validation measured after it."""
        progress = self.progress
        if math.isfinite(step.loss):
            progress.loss = 0.95 * progress.loss + 0.05 * step.loss if math.isfinite(progress.loss) else step.loss
        if not self.main:
            return
        elapsed_s = progress.stage_began_s + step.elapsed_s
        if math.isnan(self.first_s):  # the first step compiles: it counts for nothing
            self.first_tokens, self.first_s = progress.tokens, elapsed_s
        seconds = elapsed_s - self.first_s
        speed = (progress.tokens - self.first_tokens) / seconds if seconds else 0.0
        at = {"step": progress.total_steps, "stage": stage, "elapsed_s": elapsed_s, "tokens": progress.tokens}
        self._write({**asdict(step), **at, **measured})
        scalars = {"loss/train": step.loss, "grad_norm": step.grad_norm, "rate": step.rate, "tokens_per_second": speed}
        for name, value in (scalars | {f"validation/{name}": value for name, value in measured.items()}).items():
            self.board.add_scalar(name, value, progress.total_steps)
        if measured:
            self.console.print(f"step {progress.total_steps} ({stage}): {shown(measured)}, {progress.tokens:,} tokens")
        self._show(elapsed_s, speed)

    def finish(self, measured: Mapping[str, float]) -> None:
        """Notes the last validation."""
        if self.main:
            at = {"step": self.progress.total_steps, "tokens": self.progress.tokens}
            self._write({**at, **measured, "finished": True})

    def _write(self, record: Mapping[str, Any]) -> None:
        legal = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(legal) + "\n")

    def _show(self, elapsed_s: float, speed: float) -> None:
        progress = self.progress
        known = "" if math.isnan(progress.validation_loss) else f"  validation {progress.validation_loss:.3f}"
        in_time = progress.total_steps * max(1.0, self.max_s / elapsed_s)
        self.bar.update(
            self.line,
            completed=progress.total_steps,
            total=min(self.total_steps, in_time),
            text=f"loss {progress.loss:.3f}{known}  {speed:,.0f} tokens/s",
        )


def shown(measured: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items())


def _trim(file: Path, step: int) -> None:
    """Takes out the steps after the checkpoint, which a continued run takes again."""
    if file.exists():
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step and '"finished"' not in line]
        write_whole(file, "".join(f"{line}\n" for line in kept))


def _progress_bar(console: Console) -> ProgressBar:
    return ProgressBar(
        TextColumn("step {task.completed}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )
