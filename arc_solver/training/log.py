"""What an offline run leaves and shows while it goes: `log.jsonl`, TensorBoard event files, how far it is.

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

from ..clock import format_duration
from ..files import write_whole
from ..waiting import LINE_S, Reporter, waiting
from .checkpoints import Progress
from .optimize import Step


class TrainingLog:
    """To be entered before the first step. Steps are counted over all stages."""

    def __init__(self, out_dir: Path, progress: Progress, total_steps: int, max_s: float, say: Reporter, main: bool):
        self.out_dir, self.progress, self.say, self.main = out_dir, progress, say, main
        self.total_steps, self.max_s = total_steps, max_s
        self.first_step, self.first_tokens, self.first_s = 0, 0, math.nan  # where the speed is counted from
        self.step_s = 0.0  # see `expect`
        self.stack = ExitStack()

    def __enter__(self) -> "TrainingLog":
        if self.main:
            from torch.utils.tensorboard import SummaryWriter

            _trim(self.out_dir / "log.jsonl", self.progress.total_steps)
            self.file = self.stack.enter_context((self.out_dir / "log.jsonl").open("a", buffering=1))
            folder = self.out_dir / "tensorboard"
            self.board = self.stack.enter_context(SummaryWriter(str(folder), purge_step=self.progress.total_steps + 1))
            step = self.progress.total_steps
            self.wait = self.stack.enter_context(waiting(self.say, f"step {step}", self.total_steps, quiet_s=LINE_S))
            self.wait.done = step
        return self

    def expect(self, left_s: float, step_s: float) -> None:
        """What the rest of the run and each of its steps are thought to take, until steps were measured."""
        self.step_s = step_s
        if self.main:
            self.wait.expect_end_in(left_s)

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
            self.say(f"step {progress.total_steps} ({stage}): {format_metrics(measured)}, {progress.tokens:,} tokens")
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
        """How far it is. Where no row can be seen, steps 1, 2, 10, 100 ... have a line besides those now and then."""
        progress, done = self.progress, self.progress.total_steps
        measured = done - self.first_step
        step_s = (step.elapsed_s - self.first_s) / measured if measured else self.step_s
        left_s = max(0.0, min((self.total_steps - done) * step_s, self.max_s - step.elapsed_s))
        known = "" if math.isnan(progress.validation_loss) else f", validation {progress.validation_loss:.3f}"
        tokens_s = f", {speed:,.0f} tokens/s" if measured else ""
        wait = self.wait
        wait.what, wait.note = f"step {done}", f"loss {progress.loss:.3f}{known}{tokens_s}"
        wait.done, wait.total = done, done + left_s / step_s if step_s else self.total_steps
        wait.expect_end_in(left_s)
        if not self.say.console.is_terminal and (measured < 2 or math.log10(done).is_integer()):
            self.say(f"step {done}: loss {step.loss:.4f}{tokens_s}, ETA {format_duration(left_s)}")


def format_metrics(measured: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items())


def _trim(file: Path, step: int) -> None:
    """Takes out the steps after the checkpoint, which a continued run takes again."""
    if file.exists():
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step and '"finished"' not in line]
        write_whole(file, "".join(f"{line}\n" for line in kept))
