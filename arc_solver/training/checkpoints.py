"""Checkpoints of an offline run: complete, written whole or not at all, the last good one never in danger.

checkpoints/step-0001000/model/ or adapter/    the weights, or the adapter that is trained instead
                         optimizers.pt         their states by parameter name, the loss scale of fp16, the average
                         progress.json         where the run stands
before-decay/                                  the same, if asked for, after the first step of the decay
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ..errors import MachineError, UserError, first_line
from ..files import sync_folder, write_json
from ..models import Model, save_model
from ..models.lora import save_lora
from .parallel import ParallelContext

BEFORE_DECAY = "before-decay"


@dataclass
class Progress:
    """Where a training run stands."""

    stage: int = 0
    step: int = 0  # in this stage
    total_steps: int = 0  # in all stages
    tokens: int = 0  # useful tokens, padding not counted
    spent_s: float = 0.0
    stage_began_s: float = 0.0
    counted_from_s: float = 0.0  # the stage's schedule counts seconds from there on; see `optimize.Pace`
    rate: float = 0.0  # share of the peak learning rate in the stage's last step
    loss: float = math.nan  # training loss, averaged over about 20 steps
    validation_loss: float = math.nan
    validation_losses: dict[str, float] = field(default_factory=dict)  # of each held-out task
    accuracy: float = math.nan
    accuracies: dict[str, float] = field(default_factory=dict)  # of each held-out task that was asked
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # what became of each source's samples


def save_checkpoint(
    out_dir: Path,
    parallel: ParallelContext,
    model: Model,
    lora: Any,
    base_dir: Path | None,
    optimizers: Sequence[Optimizer],
    average: AveragedModel | None,
    progress: Progress,
    name: str = "",
) -> None:
    """Writes all that a continued run needs. Killed at any moment, the newest complete checkpoint is still there.

    To be called by all processes.

    Args:
        lora: PEFT's model, if an adapter is trained, on the checkpoint in `base_dir`.
        average: of the weights, if one is kept.
        name: of the folder, for one that is kept beside the run's newest; "": that.

    Raises:
        MachineError: it cannot be written.
    """
    folder = out_dir / (name or f"checkpoints/step-{progress.total_steps:07d}")
    weights = parallel.weights(model.lm)
    states = {
        "optimizers": parallel.optimizer_states(model.lm, optimizers),
        "scaler": parallel.scaler_state(),
        "average": average.state_dict() if average else None,
    }
    if parallel.is_main and not folder.exists():  # the last step may just have been saved
        temporary = folder.with_suffix(".part")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            if lora:
                assert base_dir
                save_lora(lora, temporary / "adapter", base_dir, model.trained_on, weights if parallel.shards else None)
            else:
                save_model(model, temporary / "model", state=weights)
            with (temporary / "optimizers.pt").open("wb") as file:
                torch.save(states, file)
            write_json(temporary / "progress.json", asdict(progress))
            sync_folder(temporary)
            temporary.rename(folder)
        except Exception as error:  # of many kinds, one for each library that writes
            shutil.rmtree(temporary, ignore_errors=True)
            raise MachineError(cannot_write(out_dir, error)) from error
        for other in folder.parent.iterdir() if not name else ():
            if other != folder:
                shutil.rmtree(other)
    parallel.barrier()


def cannot_write(out_dir: Path, error: Exception) -> str:
    last = latest_checkpoint(out_dir)
    kept = f"the last good checkpoint is {last}: make room and continue with --resume" if last else "there is none yet"
    return f"a checkpoint in {out_dir} could not be written ({first_line(error)}); {kept}"


def latest_checkpoint(out_dir: Path) -> Path | None:
    """The newest complete checkpoint of a training run."""
    return max((out_dir / "checkpoints").glob("step-*[0-9]"), default=None)


def load_progress(checkpoint: Path) -> Progress:
    return Progress(**json.loads((checkpoint / "progress.json").read_text()))


def load_states(
    checkpoint: Path,
    parallel: ParallelContext,
    model: Model,
    optimizers: Sequence[Optimizer],
    average: AveragedModel | None = None,
    moments_only: bool = False,
) -> None:
    """Gives optimizers (and the loss scale, and the average of the weights) the states of a checkpoint.

    Args:
        moments_only: learning rates and other settings stay as they are, for a new stage.

    Raises:
        UserError: there are none, or they are of other parameters or another optimizer.
    """
    file = checkpoint / "optimizers.pt"
    try:
        states = torch.load(file, map_location="cpu", weights_only=True)
        optimizer_states = states["optimizers"]
    except Exception as error:  # a missing, cut or foreign file
        kind = "adapter" if (checkpoint / "adapter").is_dir() else "model"
        setting = "model.adapter" if kind == "adapter" else "model.path"
        what = "is missing" if not file.exists() else f"is not whole ({first_line(error)})"
        raise UserError(
            f"the optimizer state {file} {what}: copy it again, or begin a new run from the weights beside it, with"
            f" {setting}={checkpoint / kind}"
        ) from None
    parallel.load_optimizer_states(model.lm, optimizers, optimizer_states, str(file), moments_only)
    if parallel.scaler and states["scaler"] and not moments_only:
        parallel.scaler.load_state_dict(states["scaler"])
    if average and not moments_only:
        average.load_state_dict(states["average"])


def checkpoint_beside(path: str) -> Path:
    """The checkpoint of the run that a model or an adapter lies in.

    Raises:
        UserError: it lies in no run.
    """
    beside = Path(path).parent
    for folder in (beside, latest_checkpoint(beside)) if path else ():
        if folder and (folder / "optimizers.pt").is_file():
            return folder
    raise UserError(
        f'start="weights+optimizer" needs the optimizer state of an earlier run, and {path or "the new model"} lies in'
        ' none; use start="weights"'
    )
