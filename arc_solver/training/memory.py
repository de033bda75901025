"""How much memory a step of training will take, measured before the first one.

What is kept for the backward pass depends on the architecture, on what is trained, on precision and on checkpointing.
So it is measured and not derived: two short batches are run forward, and the bytes kept are extrapolated to a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..data.stream import Batch
from ..models import Model, Packing, fast_decoder, resident_memory
from .parallel import ParallelContext


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # of one packed batch, with the copies of the weights that autocast makes
    rest: int  # on a CPU: the program itself, its libraries and its data

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in vars(self).items() if size)
        return f"memory estimate: {gigabytes(self.total)} at the peak ({parts})"


def gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def estimate_memory(
    lm: Any, config: TrainConfig, parallel: ParallelContext, longest: int, probe: Callable[[int], Tensor]
) -> MemoryEstimate:
    """Estimates the peak of a step.

    To be called when the weights are in memory, whole, and before checkpointing hides what is kept.

    Args:
        longest: tokens that can be probed.
        probe: the loss of a batch of so many tokens, with its graph.
    """
    shards = parallel.processes if parallel.shards else 1
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in lm.parameters()]
    weights, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    few, many = longest // 2, longest
    kept_few, kept_many = _kept_bytes(lm, probe, few), _kept_bytes(lm, probe, many)
    resident = resident_memory() - weights if parallel.device.type == "cpu" else 0  # after the weights were used once
    per_token = (kept_many - kept_few) / (many - few)
    fixed = kept_few - per_token * few
    if config.checkpointing:  # one layer's activations at a time, and each layer's input
        text, size = lm.config.get_text_config(), parallel.dtype.itemsize
        per_token = per_token / text.num_hidden_layers + text.num_hidden_layers * text.hidden_size * size
    moments = 2 if config.optimizer == "adamw" else 1
    return MemoryEstimate(
        weights // shards,
        trained // shards,
        moments * trained // shards,
        int(fixed + per_token * config.batch_tokens),
        max(0, resident),
    )


def _kept_bytes(lm: nn.Module, probe: Callable[[int], Tensor], tokens: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, other than the weights themselves."""
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it: never freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = probe(tokens)
    seen, open_ = set(), [loss.grad_fn]
    while open_:
        if (node := open_.pop()) is not None and node not in seen:
            seen.add(node)
            open_ += [before for before, _ in node.next_functions]
            for tensor in fast_decoder.saved_tensors(node):
                note(tensor)
    return sum(kept.values())


def activation_bytes_per_token(model: Model, few: int = 64, many: int = 128) -> tuple[float, float]:
    """Activation bytes for each token of an adaptation step: if kept for the backward pass, and if recomputed."""

    def probe(tokens: int) -> Tensor:
        ids_BT = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
        packing = Packing.of(torch.tensor([tokens]), model.device)
        return model.logits(ids_BT, torch.arange(tokens, device=model.device)[None], packing=packing).sum()

    kept_few, kept_many = (_kept_bytes(model.lm, probe, tokens) for tokens in (few, many))
    text, size = model.lm.config.get_text_config(), next(model.lm.parameters()).element_size()
    whole, layers = (kept_many - kept_few) / (many - few), text.num_hidden_layers
    # Recomputed: the input of each layer; of one layer what it keeps, and as much again of gradients.
    return whole, layers * text.hidden_size * size + 2 * whole / layers


def first_tokens(batch: Batch, tokens: int) -> Batch:
    """A batch cut to its first tokens."""
    ends = batch.ends_S[batch.ends_S < tokens]
    return Batch(
        batch.ids_T[:tokens],
        batch.labels_T[:tokens],
        batch.positions_T[:tokens],
        torch.cat((ends, torch.tensor([tokens]))),
    )
