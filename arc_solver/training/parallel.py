"""One device or many, and the precision on them: everything about a training step that is not the loss.

Processes come from `torchrun` or `accelerate launch`. Each takes its share of a step's batches. Under "ddp" each has a
whole copy of the model; under "fsdp" a shard of every parameter, its gradient and its moments (FSDP2, Zhao et al. 2023,
arXiv 2304.11277), once the whole model was on each device at the start. The loss is a sum over all target ids of a step
divided by their number, so the gradient does not depend on how many processes share the step.
"""

import ctypes
import math
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..clock import format_duration
from ..config import Config, TrainConfig
from ..data.stream import Batch
from ..errors import UserError, install_command
from ..models import fast_dtype, pick_device
from ..models.attention import packs_in_one_graph


def require_packages(what: str = "training") -> None:
    """Refuses to begin without what training needs. `what`: as the message names it.

    Raises:
        UserError: a package is missing.
    """
    if missing := [name for name in ("accelerate", "peft", "tensorboard") if find_spec(name) is None]:
        raise UserError(f"{what} needs {missing[0]}: run {install_command('arc_solver[train]')}")


class ParallelContext:
    """This process's rank, device and precision in a training run, and the collective operations over all of them.

    Raises:
        UserError: the config does not fit them.
    """

    def __init__(self, config: Config):
        require_packages()
        from accelerate import Accelerator

        device = pick_device(config.run.device)
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        alone = self.accelerator.num_processes == 1
        self.device = device if alone else self.accelerator.device
        self.processes, self.process = self.accelerator.num_processes, self.accelerator.process_index
        trains = [stage.train for stage in config.stages]
        for train in trains:
            if train.batches_per_step % self.processes:
                raise UserError(
                    f"train.batches_per_step={train.batches_per_step} cannot be shared out over {self.processes}"
                    f" processes: give a multiple of {self.processes}"
                )
        self.shards = config.train.parallel == "fsdp" and not alone
        if self.shards and any(train.optimizer == "muon" for train in trains):
            raise UserError('train.parallel="fsdp" needs train.optimizer="adamw": Muon takes whole matrices')
        self.precision = self._precision(config.train.precision)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.scaler = torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.process == 0

    def _precision(self, asked: str) -> str:
        if asked != "auto":
            return asked
        if fast_dtype(self.device) == torch.bfloat16:
            return "bf16"
        return "fp16" if self.device.type == "cuda" else "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.precision != "fp32")

    def wrap(self, lm: Any) -> nn.Module:
        """Wraps the model in DDP or FSDP and returns the module to call. To be called before optimizers are made."""
        if self.processes == 1:
            return lm
        if not self.shards:
            return DistributedDataParallel(lm, None if self.device.type == "cpu" else [self.device.index])
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.processes,))
        for layer in decoder_layers(lm):
            fully_shard(layer, mesh=mesh)
        return fully_shard(lm, mesh=mesh)  # type: ignore[return-value]

    def backward(
        self, loss_of: Callable[[Batch], Tensor], module: nn.Module, mine: Sequence[Batch], targets: int
    ) -> Tensor:
        """Forward and backward of one step. Leaves the gradients of the mean over all target ids; returns that mean.

        Args:
            loss_of: the sum of the losses of a batch's target ids.
            module: from `wrap`.
            mine: this process's batches of the step.
            targets: target ids of the step, in all processes.
        """
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(mine):
            last = i == len(mine) - 1
            with nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync():
                with self.autocast():
                    part = loss_of(batch) / targets
                # Gradients are averaged over the processes; the sum is what is wanted.
                scaled = self.scaler.scale(part) if self.scaler else part
                (scaled * self.processes).backward()
            loss += part.detach()
        return self.accelerator.reduce(loss, "sum") if self.processes > 1 else loss

    def all_reduce_sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of some numbers over the processes."""
        if self.processes == 1:
            return values
        return self.accelerator.reduce(torch.from_numpy(values).to(self.device), "sum").cpu().numpy()

    def broadcast(self, value: float) -> float:
        """The main process's value, returned in every process."""
        return float(self.all_reduce_sum(np.array(value if self.is_main else 0.0)))

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        self.accelerator.end_training()

    # ---- states ----------------------------------------------------------------------------------------------------

    def weights(self, lm: Any) -> dict[str, Any]:
        """All weights, on the main process; the others get none of what is sharded. To be called by all."""
        if not self.shards:
            return lm.state_dict()
        states, whole = _whole_states()
        return states.get_model_state_dict(lm, options=whole)

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler else {}

    def optimizer_states(self, lm: Any, optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
        """Optimizer states by parameter name, on the main process. To be called by all."""
        states, whole = _whole_states()
        return [states.get_optimizer_state_dict(lm, optimizer, options=whole) for optimizer in optimizers]

    def load_optimizer_states(
        self, lm: Any, optimizers: Sequence[Optimizer], states: Sequence[dict[str, Any]], where: str, moments_only: bool
    ) -> None:
        """Gives optimizers the states that `optimizer_states` gave; with `moments_only` they keep their settings.

        Raises:
            UserError: the states are of other parameters or another optimizer.
        """
        if len(states) != len(optimizers):
            raise UserError(f"the optimizer state in {where} is of another train.optimizer: give the same")
        module, whole = _whole_states()
        for optimizer, state in zip(optimizers, states, strict=True):
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            shapes = {name: p.shape for name, p in lm.named_parameters() if id(p) in own}
            found = {
                name: next((value.shape for value in moments.values() if value.ndim), torch.Size())
                for name, moments in state["state"].items()
            }
            if odd := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
                raise UserError(
                    f"the optimizer state in {where} does not fit the parameters that are trained ({odd[0]} is"
                    f' {_shape(found.get(odd[0]))} there and {_shape(shapes.get(odd[0]))} here): use start="weights"'
                )
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            module.set_optimizer_state_dict(lm, optimizer, state, options=whole)
            if moments_only:
                for group, before in zip(optimizer.param_groups, settings, strict=True):
                    group.update(before)


def _whole_states() -> tuple[Any, Any]:
    """PyTorch's module for states that may be sharded, and its options for whole ones.

    Imported late: that takes a third of the time that PyTorch itself takes, and solving tasks has no need of it.
    """
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"


def decoder_layers(lm: Any) -> list[nn.Module]:
    """The layers of a decoder: the longest list of modules in it."""
    return max((list(m) for m in lm.modules() if isinstance(m, nn.ModuleList)), key=len)


def keep_freed_memory(size: int = 256 << 20) -> None:
    """Makes glibc keep freed blocks of up to `size` bytes for later, and give larger ones back to the system.

    Its default does the one now and the other then: it keeps up to three times what a step of training needs, yet asks
    the system for pages, which are cleared first, in most steps of a small model.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, min(size, 32 << 20))  # the most that it takes
        mallopt(m_trim_threshold, size)


# To compile a layer, forward and backward, on two idle cores: the bundled model's 5 layers in bf16 took 22 s of Python
# and 37 s of g++, which runs beside it.
COMPILE_LAYER_S = 8.0
SHORT_S = 600.0
SHARE, SHORT_SHARE = 1 / 3, 1 / 10  # of a run that compiling may take, and of one that is shorter than that


@dataclass(frozen=True)
class CompileDecision:
    """Whether a model's training is compiled, and why."""

    pays: bool
    why: str
    seconds: float  # that it is thought to take; 0 if it is not compiled


def decide_compile(
    lm: Any, config: TrainConfig, parallel: ParallelContext, left_s: float = math.inf
) -> CompileDecision:
    """Decides whether to use torch.compile; "auto" does where it pays within the time left.

    Args:
        lm: what is trained, with its adapter if it has one.
        left_s: that the run may take, or that its steps would, not compiled.
    """
    seconds = COMPILE_LAYER_S * len(decoder_layers(lm))
    against = f"train.compile={config.compile}"
    if config.compile == "auto":
        against = _against_compiling(lm, config, parallel) or _too_long(lm, seconds, left_s)
    if config.compile == "yes" or not against:
        return CompileDecision(True, against or "it pays here", seconds)
    return CompileDecision(False, against, 0.0)


def _against_compiling(lm: Any, config: TrainConfig, parallel: ParallelContext) -> str:
    """What speaks against it on this machine and for this model, however long it trains; "" if nothing does."""
    if parallel.processes > 1:
        return "there are several processes"
    if config.checkpointing:
        return "activations are recomputed"
    if shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there is no g++ here, or no Python.h"
    if not packs_in_one_graph(parallel.device, parallel.dtype):
        return "packed attention is no single graph on this device in this precision"
    if parallel.device.type == "cpu" and parallel.precision == "fp32" and not _trains_all(lm):
        return "it gains nothing for an adapter in fp32 on a CPU"
    return ""


def _too_long(lm: Any, seconds: float, left_s: float) -> str:
    short = left_s < SHORT_S
    if seconds < (SHORT_SHARE if short else SHARE) * left_s and (_trains_all(lm) or not short):
        return ""
    return f"compiling takes about {format_duration(seconds)}, too much of so short a run"


def _trains_all(lm: nn.Module) -> bool:
    return all(p.requires_grad for p in lm.parameters())


def compiled(logits_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function compiled, for batches of one size."""
    return torch.compile(logits_of, dynamic=False)
