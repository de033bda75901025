"""The offline training loop: schedules, optimizers, `take_step`, `fit`.

`fit` knows optimizers, schedules and time (`Pace`); it does not know tasks. It serves the offline run in `train.py`.
Test-time training in `adapt.py` follows the same schedules.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config import OptimConfig
from ..errors import MachineError
from ..models import fast_dtype
from .muon import Float32Muon

RECENT = 50  # steps, the longest of which says what another may take


@dataclass(frozen=True)
class Step:
    """What one step of `fit` did."""

    step: int  # counted from 1
    loss: float
    grad_norm: float  # before clipping
    rate: float  # share of the peak learning rate
    began_s: float  # by the clock of the run
    elapsed_s: float  # by the same clock, at its end
    until_s: float  # when it had to have ended


MOST_OVERFLOWS = 20  # in a row: so many halvings bring any scale of the loss under 1, so it is not the scale


def rate_at(progress: float, config: OptimConfig) -> float:
    """Share of the peak learning rate at `progress`, the share of the run that is behind, 0 to 1.

    "cyclic" is a row of `cycles` equal triangles, each up from 0 and down to 0 again; each peak is `cycle_decay`
    times the one before (Smith 2017, arXiv 1506.01186, "triangular2" where that is 0.5). It needs no warm-up.

    All others warm up in a line. Then "linear" falls to 0 in a line, "cosine" in half a cosine, "constant" stays, and
    "wsd" (warm-up, stable, decay) stays and then falls to 0 in a line over the last `decay` of the run.
    """
    if config.schedule == "cyclic":
        cycle = min(int(progress * config.cycles), config.cycles - 1)
        within = progress * config.cycles - cycle
        return config.cycle_decay**cycle * (1.0 - abs(2.0 * within - 1.0))
    if progress < config.warmup:
        return progress / config.warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        return min(1.0, (1.0 - progress) / config.decay) if config.decay else 1.0
    behind = (progress - config.warmup) / (1.0 - config.warmup) if config.warmup < 1 else 1.0
    return 1.0 - behind if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * behind))


def step_rate(progress: float, config: OptimConfig) -> float:
    """The rate of the step that begins at `progress`: that of its middle, so neither the first nor the last is 0."""
    return rate_at(min(1.0, progress + 0.5 / config.steps), config)


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
    optimizers: list[Optimizer] = []
    if hidden:
        muon = torch.optim.Muon if fast_dtype(hidden[0].device) == torch.bfloat16 else Float32Muon
        optimizers.append(muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay))
    if rest:
        kept = [g for g in groups if g["params"]]
        optimizers.append(torch.optim.AdamW(kept, lr=config.lr, betas=config.betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]  # "lr" follows the schedule; a checkpoint holds both
    return optimizers


def averaged(module: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of a module's weights, to be updated after each step; None if `decay` is 0."""
    if not decay:
        return None
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


class Pace:
    """Drives the learning-rate schedule by time, and says whether another step still fits before the limit.

    The first step compiles and warms up, for minutes maybe. So the schedule is counted from its end, and sees all
    rates however long that took. With u seconds counted and v left it stands at u / (u + v). A continued run goes on
    with the seconds that it had counted; its own first step, which compiles again, does not count either.

    Args:
        now_s: seconds that the run has taken, the same in all processes; None: since this call.
        ends_s: when the last step must have ended, by what is known now.
        counted_s: seconds that a continued run had counted.
        first_s: what the first step is thought to take.
        step_s: what each of the others is thought to take, until they were measured.
    """

    def __init__(
        self,
        now_s: Callable[[], float] | None = None,
        ends_s: Callable[[], float] = lambda: math.inf,
        counted_s: float = 0.0,
        first_s: float = 0.0,
        step_s: float = 0.0,
    ):
        start = time.monotonic()
        self.now_s = now_s or (lambda: time.monotonic() - start)
        self.ends_s, self.first_s, self.step_s = ends_s, first_s, step_s
        self.counted_from_s = self.now_s() - counted_s  # once the first step is done; see `end`
        self.counted_s = counted_s  # when the step began
        self.behind = 0.0  # share of the time, in the middle of the step
        self.began_s = self.ended_s = self.until_s = math.nan
        self.recent_s: deque[float] = deque(maxlen=RECENT)  # steps, without the first
        self.warm = False

    def begin(self) -> bool:
        """Begins a step, if it can end in time."""
        self.began_s, self.until_s = self.now_s(), self.ends_s()
        steps_s = self.recent_s or [self.step_s if self.warm else self.first_s]
        longest_s, usual_s = max(steps_s), sum(steps_s) / len(steps_s)
        if self.began_s >= self.until_s or self.began_s + longest_s > self.until_s:
            return False
        if self.warm:
            self.counted_s = self.began_s - self.counted_from_s
        middle_s = usual_s / 2 if self.warm else 0.0
        left_s = self.until_s - (longest_s - usual_s) - self.began_s  # the last step is likely to be a usual one
        # What is kept for the end may turn out to be less than was thought; the schedule never goes back.
        self.behind = max(self.behind, min(1.0, (self.counted_s + middle_s) / (self.counted_s + left_s)))
        return True

    def end(self) -> None:
        self.ended_s = self.now_s()
        if self.warm:
            self.recent_s.append(self.ended_s - self.began_s)
        else:
            self.warm, self.counted_from_s = True, self.ended_s - self.counted_s


def fit(
    parameters: Sequence[nn.Parameter],
    optimizers: Sequence[Optimizer],
    config: OptimConfig,
    backward_at: Callable[[int], Tensor],
    *,
    first_step: int = 0,
    pace: Pace | None = None,
    scaler: torch.amp.GradScaler | None = None,
    after_step: Callable[[Step], None] = lambda step: None,
) -> None:
    """Takes gradient steps until `config.steps` are done, or there is no time for another.

    The schedule follows whichever is further, steps or time, so a run that is cut by time still ends its decay.

    Args:
        optimizers: from `make_optimizers`.
        backward_at: runs step k (from 0) forward and backward, leaves the gradients, and returns the loss.
        first_step: where a continued run stands.
        pace: the time that there is; None: as much as it takes.
        scaler: what scaled the loss, in fp16; a step whose gradients overflowed changes nothing.

    Raises:
        MachineError: gradients are not finite, and it is not the scale of the loss.
    """
    pace = pace or Pace()
    half_step = 0.5 / config.steps  # that `step_rate` looks ahead; in time, `Pace` does
    overflowed = 0  # steps in a row
    for k in range(first_step, config.steps):
        if not pace.begin():
            break
        loss = backward_at(k)
        progress = max(k / config.steps, pace.behind - half_step)
        norm, rate = take_step(parameters, optimizers, config, progress, scaler)
        overflowed = 0 if math.isfinite(norm) else overflowed + 1
        if overflowed > (MOST_OVERFLOWS if scaler else 0):
            raise MachineError(
                f"the gradients of step {k + 1} are not finite (loss {loss.item():g}): training diverged; lower"
                " train.lr (train.muon_lr with Muon), or use another train.precision"
            )
        pace.end()
        after_step(Step(k + 1, loss.item(), norm, rate, pace.began_s, pace.ended_s, pace.until_s))


def take_step(
    parameters: Sequence[nn.Parameter],
    optimizers: Sequence[Optimizer],
    config: OptimConfig,
    progress: float,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[float, float]:
    """One step from the gradients that are there, which it uses up. Gradients that are not finite change nothing.

    Returns the norm of the gradients before clipping, and the share of the peak learning rate that `progress` gave.
    """
    rate = step_rate(progress, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        if scaler:
            scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, config.clip).item()
    for optimizer in optimizers:
        if math.isfinite(norm):  # all or none: one optimizer's overflow is in the norm that clips them all
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if scaler:
        scaler.update()
    return norm, rate
