"""LoRA for K tasks at once over one frozen base; PEFT format in and out.

A bank holds K adapters in stacked tensors, A: [K, r, in] and B: [K, out, r] (Hu et al. 2021, arXiv 2106.09685). The
tokens of a batch are laid out adapter by adapter, so one `baddbmm` serves them all; K = 1 is ordinary LoRA. Adapters
are float32 over a base of any type.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import AdaptConfig
from ..errors import UserError
from .attention import to_device
from .fast_decoder import AdapterPadding, LoraLinear
from .model import Model
from .peft_format import CONFIG_FILE, PREFIX, WEIGHTS_FILE, check_adapter, layer_alphas


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter, on the CPU."""

    rank: int
    alpha: float
    weights: Mapping[str, tuple[Tensor, Tensor]]  # name of the linear layer -> A [r, in], B [out, r], float32

    def __reduce__(self) -> tuple[Any, ...]:
        """As arrays: between processes PyTorch sends tensors as handles of shared memory, and those run out."""
        arrays = {name: (a.numpy(), b.numpy()) for name, (a, b) in self.weights.items()}
        return _adapter_of, (self.rank, self.alpha, arrays)


def _adapter_of(rank: int, alpha: float, arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Adapter:
    # Copies, as what was unpickled may be read-only.
    weights = {name: (torch.from_numpy(a.copy()), torch.from_numpy(b.copy())) for name, (a, b) in arrays.items()}
    return Adapter(rank, alpha, weights)


@dataclass(eq=False)
class LoraBank:
    """The adapters that are attached to a model.

    All numbers of an adapter are one row of `weights_KP`, and the layers' matrices are views of it; their gradients
    are views of `gradients_KP`. So a norm, a clip or a step is one operation, however many layers there are.
    """

    rank: int
    alpha: float
    layers: Mapping[str, LoraLinear]  # name of the linear layer -> its wrapper
    weights_KP: Tensor  # float32
    gradients_KP: Tensor | None = None  # None: nobody has asked for any yet
    live: tuple[int, ...] = ()  # the adapters that the next batches are for; (): all

    @property
    def count(self) -> int:
        return len(self.weights_KP)

    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in (layer.A_KRI, layer.B_KOR)]

    def zero_gradients(self) -> Tensor:
        """Where `backward` adds up gradients from now on: [K, P]."""
        if self.gradients_KP is None:
            self.gradients_KP = torch.empty_like(self.weights_KP)
        return self.gradients_KP.zero_()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss."""
        assert self.gradients_KP is not None
        parameters = self.parameters()
        views = _views(self.gradients_KP, parameters)
        torch._foreach_add_(views, torch.autograd.grad(loss, parameters))

    def clip(self, most: float) -> Tensor:
        """Scales gradients so that no adapter's have a norm above this. The norms before, [K]."""
        assert self.gradients_KP is not None
        norms_K = torch.linalg.vector_norm(self.gradients_KP, dim=1)
        self.gradients_KP.mul_((most / (norms_K + 1e-6)).clamp_max(1)[:, None])
        return norms_K

    def flat_parameter(self, k: int) -> nn.Parameter:
        """Adapter k as one flat parameter with gradient, a view of the bank, for an optimizer of its own. [P]"""
        p = nn.Parameter(self.weights_KP[k])
        p.grad = self.zero_gradients()[k]
        return p

    def activate(self, live: Sequence[int]) -> None:
        """Selects the adapters that the next batches go through, one equal block of rows each."""
        wanted = () if list(live) == list(range(self.count)) else tuple(live)
        if wanted != self.live:
            self.live = wanted
            live_L = to_device(torch.tensor(wanted), self.weights_KP.device) if wanted else None
            for layer in self.layers.values():
                layer.live_L = live_L

    def set_rows_per_adapter(self, rows_K: Sequence[int], length: int) -> None:
        """How many rows of the next batches, of so many ids, belong to each adapter, one after another."""
        equal = len(set(rows_K)) == 1
        blocks = None if equal else AdapterPadding.of([rows * length for rows in rows_K], self.weights_KP.device)
        for layer in self.layers.values():
            layer.blocks = blocks

    def cast(self, dtype: torch.dtype) -> None:
        """Adapters in the type in which they are used, for decoding: else every pass casts all of them anew."""
        for p in self.parameters():
            p.data = p.data.to(dtype)

    @torch.no_grad()
    def set(self, k: int, adapter: Adapter) -> None:
        """Makes adapter k a copy of this one."""
        for name, layer in self.layers.items():
            layer.A_KRI[k].copy_(adapter.weights[name][0])
            layer.B_KOR[k].copy_(adapter.weights[name][1])

    def export(self, k: int) -> Adapter:
        """A copy of adapter k."""
        weights = {
            name: (layer.A_KRI[k].detach().cpu().clone(), layer.B_KOR[k].detach().cpu().clone())
            for name, layer in self.layers.items()
        }
        return Adapter(self.rank, self.alpha, weights)


def _views(whole_KP: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of the second dimension in the shapes of these tensors, whose first is K."""
    parts = whole_KP.split([x[0].numel() for x in like], 1)
    return [part.unflatten(1, x.shape[1:]) for part, x in zip(parts, like, strict=True)]


@contextmanager
def attach_adapters(model: Model, adapters: Sequence[Adapter]) -> Iterator[LoraBank]:
    """Context manager: attaches these adapters to the model's linear layers, yields the bank, detaches them at the end.

    Raises:
        UserError: an adapter is for another model, or they differ in rank, alpha or layers.
    """
    first = adapters[0]
    if any((a.rank, a.alpha, set(a.weights)) != (first.rank, first.alpha, set(first.weights)) for a in adapters):
        raise UserError("adapters that are used together must have the same rank, alpha and target layers")
    bases = _bases(model, first)
    like = [x[None] for pair in first.weights.values() for x in pair]
    weights_KP = torch.empty(len(adapters), sum(x.numel() for x in like), device=model.device)
    views = iter(_views(weights_KP, like))
    layers = {
        name: LoraLinear(base, next(views), next(views), first.alpha / first.rank) for name, base in bases.items()
    }
    bank = LoraBank(first.rank, first.alpha, layers, weights_KP)
    for k, adapter in enumerate(adapters):
        bank.set(k, adapter)
    frozen = [p for p in model.lm.parameters() if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(False)
        for name, layer in layers.items():
            _replace(model.lm, name, layer)
        yield bank
    finally:
        for name, layer in layers.items():
            _replace(model.lm, name, layer.base)
        for p in frozen:
            p.requires_grad_(True)


def _bases(model: Model, adapter: Adapter) -> dict[str, nn.Linear]:
    """The layers that an adapter is for."""
    modules, found = dict(model.lm.named_modules()), {}
    for name, (a, b) in adapter.weights.items():
        base = modules.get(name)
        if not isinstance(base, nn.Linear) or (a.shape[1], b.shape[0]) != (base.in_features, base.out_features):
            raise UserError(f"the adapter does not fit this model: {_misfit(model, name, len(b), a.shape[1])}")
        found[name] = base
    return found


def fresh_adapter(model: Model, config: AdaptConfig, rng: np.random.Generator) -> Adapter:
    """An adapter that changes nothing yet: A uniform in +-1/sqrt(in), as `nn.Linear` and PEFT have it, B zero.

    Raises:
        UserError: a target names no linear layer of the model.
    """
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    for name, module in model.lm.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.targets:
            bound = 1 / math.sqrt(module.in_features)
            a = (torch.rand(config.rank, module.in_features, generator=generator) * 2 - 1) * bound
            weights[name] = (a, torch.zeros(module.out_features, config.rank))
        if module is model.lm.get_output_embeddings() and name in weights:
            raise UserError(f"adapt.targets: {name} is the head, which is not adapted to tasks; leave it out")
    found = {name.rpartition(".")[2] for name in weights}
    if missing := set(config.targets) - found:
        raise UserError(
            f"adapt.targets: the model has no linear layer named {', '.join(sorted(missing))}; it has"
            f" {', '.join(sorted(target_names(model))) or 'none; set adapt.enabled=false'}"
        )
    return Adapter(config.rank, config.alpha, weights)


def target_names(model: Model) -> frozenset[str]:
    """The last parts of the names of the linear layers that tasks can be adapted by, PEFT's layers seen through."""
    named = {module: name for name, module in model.lm.named_modules()}
    head = named[model.lm.get_output_embeddings()]
    linears = {name.removesuffix(".base_layer") for module, name in named.items() if isinstance(module, nn.Linear)}
    return frozenset(name.rpartition(".")[2] for name in linears - {head} if ".lora_" not in name)


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The weights under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.weights.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    return tensors


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Writes the two files of a PEFT adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors(adapter), folder / WEIGHTS_FILE)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.weights}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=1) + "\n")


def load_adapter(folder: Path) -> Adapter:
    """Reads a PEFT adapter.

    Raises:
        UserError: there is none, or it is not plain LoRA.
    """
    settings, layers = check_adapter(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    for name in sorted(layers):
        a, b = (tensors.get(f"{PREFIX}{name}.lora_{half}.weight") for half in "AB")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise UserError(f"the adapter in {folder} is damaged, copy or make it again: {name} is not whole")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(f"the adapter in {folder} is damaged, copy or make it again: some weights are not finite")
        weights[name] = (a.float(), b.float())
    if not weights:
        raise UserError(f"the adapter in {folder} is damaged, copy or make it again: it has no weights")
    return _of_one_rank(weights, layer_alphas(folder, settings, {name: len(a) for name, (a, _) in weights.items()}))


def _of_one_rank(weights: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float]) -> Adapter:
    """An adapter with one rank and alpha for all layers: zeros fill up a rank, B takes up what a scale has less."""
    rank = max(len(a) for a, _ in weights.values())
    alpha = max(alphas[name] * (rank / len(a)) for name, (a, _) in weights.items())
    alike: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (a, b) in weights.items():
        missing = rank - len(a)
        share = alphas[name] * (rank / len(a)) / alpha
        alike[name] = (F.pad(a, (0, 0, 0, missing)), F.pad(b * share, (0, missing)))
    return Adapter(rank, alpha, alike)


@torch.no_grad()
def merge(model: Model, adapter: Adapter) -> None:
    """Adds an adapter to the weights, in place.

    Raises:
        UserError: it is for another model.
    """
    for name, (a, b) in adapter.weights.items():
        layer = _linear(model, name)
        if layer is None or layer.weight.shape != (len(b), a.shape[1]):
            raise UserError(_misfit(model, name, len(b), a.shape[1]))
        change = (b @ a).to(layer.weight.device) * (adapter.alpha / adapter.rank)
        layer.weight.copy_((layer.weight.float() + change).to(layer.weight.dtype))


def _misfit(model: Model, name: str, outputs: int, inputs: int) -> str:
    """Why an adapter's layer does not go with the model, and what to do."""
    module = dict(model.lm.named_modules()).get(name)
    if isinstance(module, nn.Linear):
        sizes = f"{module.out_features} x {module.in_features}"
        return f"layer {name} is {outputs} x {inputs} in the adapter and {sizes} in the model: give the model it is for"
    if module is None:
        return f"the model has no layer {name}: give the model that it was trained on as model.path"
    return (
        f"it changes {name}, which is no linear layer but a {type(module).__name__}: merge it with PEFT"
        " (merge_and_unload()), and give the result as model.path"
    )


def _linear(model: Model, name: str) -> nn.Linear | None:
    try:
        layer = model.lm.get_submodule(name)
    except AttributeError:
        return None
    return layer if isinstance(layer, nn.Linear) else None


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
