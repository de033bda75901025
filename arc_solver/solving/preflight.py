"""A smoke test before the first task: one tiny task is adapted to, decoded and scored on the real device.

What does not work there would fail for every task, after its adaptation. Here it ends the run at its start.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from ..config import Config
from ..decoding.engine import Engine
from ..errors import MachineError, UserError, first_line
from ..models import Adapter, Model, attach_adapters, free_memory
from ..puzzles import IGNORE, Pair, Prompt, Sample, Task, encode_prompt, encode_sample, freeze
from ..rng import named_rng
from .adapt import adapt

# How far the engine's log-probability of a reply may be from that of a plain pass: rounding of 16 bit is well within.
MOST_APART, MOST_APART_SHARE = 0.5, 0.05
NODES = 4  # ids that are continued from the cache
T = TypeVar("T")


def preflight(model: Model, engine: Engine, start: Adapter | None, config: Config) -> None:
    """Adapts to a tiny task, decodes and scores it, and compares the score with a plain forward pass.

    Raises:
        MachineError: one of them does not work with this model on this device; the sentence says which, and why.
    """
    task = _short_task()
    adapter = start
    if config.adapt.enabled:
        few = config.adapt.model_copy(update={"steps": 1, "batch_size": 1, "stop": "never"})
        rngs, memory = [named_rng(0, "preflight")], free_memory(model.device)
        starts = [start] if start else None
        found = _tried("adapt", model, lambda: adapt([task], model, few, rngs, starts, memory=memory)[0])
        if found.ended != "steps":
            raise MachineError(_sentence("adapt", model, "the loss or its gradients are not finite"))
        adapter = found.adapter
    sample = encode_sample([*task.train, Pair(task.test[0], task.train[0].output)], model.format, "last")
    prompt = encode_prompt(task.train, task.test[0], model.format)
    plain = _tried("run", model, lambda: _log_probability(model, adapter, sample))
    asked = _tried("decode", model, lambda: _asked(engine, adapter, prompt, sample.ids_T[len(prompt) :].tolist()))
    if not abs(asked - plain) <= MOST_APART + MOST_APART_SHARE * abs(plain):
        why = f"a reply has log-probability {asked:.2f} by the engine, and {plain:.2f} by a plain pass"
        raise MachineError(_sentence("decode", model, why))


def _short_task() -> Task:
    """Grids of 2 by 3 that are to be mirrored."""
    cells = [np.array(rows, dtype=np.uint8) for rows in ([[1, 2, 0], [0, 3, 0]], [[0, 4, 4], [5, 0, 0]])]
    pairs = tuple(Pair(freeze(grid), freeze(np.ascontiguousarray(grid[:, ::-1]))) for grid in cells)
    return Task("preflight", pairs, (pairs[0].input,))


def _tried(what: str, model: Model, run: Callable[[], T]) -> T:
    try:
        return run()
    except (UserError, MachineError):
        raise
    except Exception as error:  # of any kind: from the code of an architecture, a library or a driver
        raise MachineError(_sentence(what, model, f"{type(error).__name__}: {first_line(error)}")) from error


def _sentence(what: str, model: Model, why: str) -> str:
    quantised = ", quantised by model.quantize" if getattr(model.lm, "is_quantized", False) else ""
    kind = f"this model ({model.lm.config.model_type}, {model.parameters_count:,} parameters{quantised})"
    return f"before the first task: {kind} does not {what} on {model.device}: {why}; no task was begun"


def _asked(engine: Engine, adapter: Adapter | None, prompt: Prompt, reply: list[int]) -> float:
    """The engine's log-probability of a reply, once it has continued the prompt from its cache."""
    with engine.open_session([prompt], [adapter]) as session:
        session.search(threshold=1e-6, max_nodes=NODES)
        return session.score([[reply]])[0][0].log_probability


@torch.inference_mode()
def _log_probability(model: Model, adapter: Adapter | None, sample: Sample) -> float:
    """Of what the sample learns, by one causal pass without a cache."""
    ids_T, positions_T, labels_T = (
        torch.from_numpy(x.astype(np.int64)).to(model.device)
        for x in (sample.ids_T, sample.positions_T, sample.labels_T)
    )
    with attach_adapters(model, [adapter]) if adapter else nullcontext():
        logits_TV = model.logits(ids_T[None], positions_T[None])[0]
    return -F.cross_entropy(logits_TV[:-1], labels_T[1:], ignore_index=IGNORE, reduction="sum").item()
