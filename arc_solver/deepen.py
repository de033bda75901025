"""More layers for a trained model, without a change of what it computes.

Copies of its layers are put between them, whose last matrices, out of attention and out of the MLP, are zero: at first
they add nothing, and training finds work for them ("block expansion", Wu et al. 2024, arXiv 2401.02415). So a small
model's training is not lost when there is time for a deeper one.
"""

import copy
import re
from dataclasses import replace
from typing import Any

import torch

from .config import UserError
from .decoder import ARCHITECTURES
from .model import Model

LAST = re.compile(r"(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)")


def deepened(model: Model, more: int) -> Model:
    """The model with `more` layers, spread evenly, and the same logits.

    Raises:
        UserError: its architecture is not Llama's or one of its kin.
    """
    lm = model.lm
    if type(lm).__name__ not in ARCHITECTURES:
        raise UserError(f"model.deepen is for Llama and its kin, and this model is {lm.config.model_type}: set it to 0")
    plan = plan_layers(lm.config.num_hidden_layers, more)
    grown = type(lm)(_config(lm.config, [source for source, _ in plan])).to(model.dtype)
    state = {name: weight for name, weight in lm.state_dict().items() if not name.startswith("model.layers.")}
    for index, (source, is_new) in enumerate(plan):
        for name, weight in lm.model.layers[source].state_dict().items():
            zero = is_new and LAST.fullmatch(name)
            state[f"model.layers.{index}.{name}"] = torch.zeros_like(weight) if zero else weight
    grown.load_state_dict(state)
    return replace(model, lm=grown.to(model.device).train(lm.training))


def plan_layers(layers: int, more: int) -> list[tuple[int, bool]]:
    """For each layer of the deeper model, which one it is a copy of, and whether it is a new one."""
    copies = [(k + 1) * layers // more - 1 if more <= layers else k * layers // more for k in range(more)]
    return [place for source in range(layers) for place in ((source, False), *[(source, True)] * copies.count(source))]


def _config(config: Any, sources: list[int]) -> Any:
    deeper = copy.deepcopy(config)
    deeper.num_hidden_layers = len(sources)
    if getattr(config, "layer_types", None):
        deeper.layer_types = [config.layer_types[source] for source in sources]
    return deeper
