"""Chooses and builds the decoding engine of a run: our own on PyTorch, or vLLM."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..config import Config
from ..models import Adapter, Model, checkpoint_dir, free_memory, fresh_adapter, save_model
from ..puzzles import longest_reply
from ..rng import named_rng
from .engine import Engine
from .torch_engine import TorchEngine
from .vllm_engine import VLLMEngine, check_positions, import_vllm, rank_served

# Below this many parameters a step of vLLM is mostly scheduling on the CPU, and lockstep decoding is no slower.
PAYS_FROM = 300_000_000
CACHE_SHARE = 1 / 3  # of the free memory; what is computed needs the rest
CPU_CACHE_BYTES = 4 << 30


def engine_kind(model: Model, config: Config, device: torch.device) -> tuple[str, str]:
    """The engine that a run on a device uses, "torch" or "vllm", and why."""
    if config.engine.kind != "auto":
        return config.engine.kind, "as engine.kind says"
    if config.model.quantize:
        return "torch", "the weights are quantised"
    if model.format.positions == "grid":
        return "torch", "the model has grid positions"
    if device.type != "cuda" or device.index:
        return "torch", f"on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "torch", "the GPU is older than Ampere"
    if model.parameters_count < PAYS_FROM:
        return "torch", "the model is small"
    if not find_spec("vllm"):
        return "torch", "vLLM is not installed"
    return "vllm", f"{model.parameters_count:,} parameters on a GPU"


def check_engine(model: Model, config: Config, device: torch.device) -> None:
    """Refuses at once what `make_engine` would refuse once a run has begun.

    Raises:
        UserError: it is to be vLLM, and that is not installed or cannot serve this model.
    """
    if engine_kind(model, config, device)[0] == "vllm":
        check_positions(model.format)
        if config.adapt.enabled and config.adapt.start == "fresh":
            rank_served(config.adapt.rank)
        import_vllm()


def _cache_bytes(device: torch.device, neighbours: int) -> int:
    """What keys and values may take: a part of the memory that is free once the model is there."""
    free = int(CACHE_SHARE * free_memory(device, neighbours))
    return free if device.type == "cuda" else min(free, CPU_CACHE_BYTES)


def make_engine(model: Model, start: Adapter | None, config: Config, neighbours: int = 1) -> Engine:
    """The engine of a run.

    Args:
        neighbours: workers that share the memory of a CPU.
        model: the checkpoint at `model.path`, with `model.adapter` merged in unless that is `start`.
        start: what the adapters of tasks continue; None: they start with fresh ones.

    Raises:
        UserError: it is to be vLLM, and that is not installed or cannot serve this model.
    """
    if engine_kind(model, config, model.device)[0] == "torch":
        return TorchEngine(model, config.predict.batch_tokens, _cache_bytes(model.device, neighbours))
    like = start or (fresh_adapter(model, config.adapt, named_rng(0)) if config.adapt.enabled else None)
    context = config.predict.max_tokens + longest_reply(model.format)
    called = config.model.path or "the bundled model"
    if start or not config.model.adapter:
        return VLLMEngine(model, checkpoint_dir(config.model.path), config.engine, like, context, called)
    with TemporaryDirectory(prefix="arc_solver-") as folder_name:  # vLLM reads a folder, and merged weights have none
        save_model(model, Path(folder_name))
        merged = f"{called} with {config.model.adapter}"
        return VLLMEngine(model, Path(folder_name), config.engine, like, context, merged)
