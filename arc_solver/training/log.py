"""What an offline run leaves and shows while it goes: `log.jsonl`, TensorBoard event files, a progress bar.

Only the main process's log writes; the others' do nothing.
"""

import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from ..clock import format_duration
from ..files import write_whole
from .checkpoints import Progress
from .optimize import Step

TELL_S = 60.0  # between lines where no bar can be seen
QUIET_S = 5.0  # without a word are enough
REFUSING_S = 20.0  # while a run may yet be refused: that is one sentence, and nothing before it


class TrainingLog:
    """To be entered before the first step. Steps are counted over all stages."""

    def __init__(self, out_dir: Path, progress: Progress, total_steps: int, max_s: float, console: Console, main: bool):
        self.out_dir, self.progress, self.console, self.main = out_dir, progress, console, main
        self.total_steps, self.max_s = total_steps, max_s
        self.first_step, self.first_tokens, self.first_s = 0, 0, math.nan  # where the speed is counted from
        self.told_s = -math.inf  # when the last plain line was
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
        if math.isnan(self.first_s):  # the first step compiles: it counts for nothing
            self.first_step, self.first_tokens, self.first_s = progress.total_steps, progress.tokens, step.elapsed_s
        seconds = step.elapsed_s - self.first_s
        speed = (progress.tokens - self.first_tokens) / seconds if seconds else 0.0
        at = {"step": progress.total_steps, "stage": stage, "tokens": progress.tokens}
        self._write({**asdict(step), **at, **measured})
        scalars = {"loss/train": step.loss, "grad_norm": step.grad_norm, "rate": step.rate, "tokens_per_second": speed}
        for name, value in (scalars | {f"validation/{name}": value for name, value in measured.items()}).items():
            self.board.add_scalar(name, value, progress.total_steps)
        if measured:
            self.console.print(
                f"step {progress.total_steps} ({stage}): {format_metrics(measured)}, {progress.tokens:,} tokens"
            )
        self._show(step, speed)

    def finish(self, measured: Mapping[str, float]) -> None:
        """Notes the last validation."""
        if self.main:
            at = {"step": self.progress.total_steps, "tokens": self.progress.tokens}
            self._write({**at, **measured, "finished": True})

    def _write(self, record: Mapping[str, Any]) -> None:
        legal = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(legal) + "\n")

    def _show(self, step: Step, speed: float) -> None:
        """The bar; where it cannot be seen, a line at steps 1, 10, 100 ... and every minute."""
        progress, done = self.progress, self.progress.total_steps
        step_s = (step.elapsed_s - self.first_s) / max(1, done - self.first_step)
        left_s = max(0.0, min((self.total_steps - done) * step_s, self.max_s - step.elapsed_s))
        known = "" if math.isnan(progress.validation_loss) else f"  validation {progress.validation_loss:.3f}"
        self.bar.update(
            self.line,
            completed=done,
            total=done + left_s / step_s if step_s else self.total_steps,
            text=f"loss {progress.loss:.3f}{known}  {speed:,.0f} tokens/s",
        )
        due = done == self.first_step or math.log10(done).is_integer() or step.elapsed_s - self.told_s >= TELL_S
        if due and not self.console.is_terminal:
            self.told_s = step.elapsed_s
            speed_and_end = f", {speed:,.0f} tokens/s, ETA {format_duration(left_s)}" if step_s else ""
            self.console.print(f"step {done}: loss {step.loss:.4f}{speed_and_end}")


@contextmanager
def announce_if_slow(console: Console, what: str, quiet_s: float = QUIET_S) -> Iterator[None]:
    """Context manager: prints what is being done if it takes longer than `quiet_s`."""
    timer = threading.Timer(quiet_s, console.print, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def format_metrics(measured: Mapping[str, float]) -> str:
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
