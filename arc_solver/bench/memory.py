"""`bin/bench memory`: what a step of adaptation takes beside what it was thought to take, on shapes of real models.

One sample, one adapter of rank 32 on all linear layers, random weights; activations kept, and recomputed. Each in a
process of its own, as the peak of a process never falls.
"""

import json
import subprocess
import sys
from dataclasses import dataclass

import torch

from ..config import AdaptConfig, FormatConfig, ModelConfig
from ..models import (
    Model,
    Packing,
    attach_adapters,
    fast_dtype,
    fresh_adapter,
    new_model,
    peak_memory,
    pick_device,
    resident_memory,
    to_device,
)
from ..rng import named_rng
from ..training.memory import activation_bytes_per_token
from ..training.parallel import keep_freed_memory
from .training import QWEN_05B

SMOLLM2_135M = ModelConfig(layers=30, width=576, heads=9, kv_heads=3, head_dim=64, mlp_width=1536)
QWEN3_4B = ModelConfig(layers=36, width=2560, heads=32, kv_heads=8, head_dim=128, mlp_width=9728)
SMALL = ModelConfig(layers=12, width=256, heads=4, kv_heads=2)
SHAPES = {"a small one": SMALL, "SmolLM2-135M": SMOLLM2_135M, "Qwen2.5-0.5B": QWEN_05B, "Qwen3-4B": QWEN3_4B}
TOKENS = {"a small one": 2048, "SmolLM2-135M": 2048, "Qwen2.5-0.5B": 2048, "Qwen3-4B": 8192}
ON_A_CPU = ("SmolLM2-135M", "Qwen2.5-0.5B")  # the largest needs 16 GiB before its weights are cast


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of one adaptation step, without weights and adapter: measured and estimated bytes."""

    measured: int
    estimated: int


def measure_step_memory(name: str, recompute: bool) -> StepMemory:
    """Measures one adaptation step's memory for a named model shape; needs a fresh process."""
    device = pick_device("auto")
    if device.type == "cpu":
        torch.set_num_threads(2)
        keep_freed_memory(1 << 20)
    drawn = new_model(SHAPES[name], FormatConfig(), seed=0)
    model = Model(drawn.lm.to(fast_dtype(device)).to(device).eval(), drawn.format, None)
    with attach_adapters(model, [fresh_adapter(model, AdaptConfig(), named_rng(0))]) as bank:
        kept = activation_bytes_per_token(model)[recompute]
        bank.zero_gradients()
        before = _now(device)
        tokens = TOKENS[name]
        ids_T = torch.arange(tokens) % 10
        packing = Packing.of(torch.tensor([tokens]), device)
        logits = model.logits(
            to_device(ids_T[None], device),
            to_device(torch.arange(tokens)[None], device),
            packing=packing,
            recompute=recompute,
        )
        bank.backward(logits.logsumexp(-1).sum())
        return StepMemory(peak_memory(device) - before, int(kept * tokens))


def _now(device: torch.device) -> int:
    if device.type == "cpu":
        return resident_memory()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def measure_all() -> dict[str, StepMemory]:
    """Name of what was measured -> what came of it."""
    names = [*ON_A_CPU, "Qwen3-4B"] if torch.cuda.is_available() else ON_A_CPU
    found = {}
    for name in names:
        for how in ("kept", "recomputed"):
            command = [sys.executable, "-P", "-m", "arc_solver.bench.memory", name, how]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[f"{name}, {TOKENS[name]} tokens, {how}"] = StepMemory(**json.loads(done.stdout))
    return found


if __name__ == "__main__":
    print(json.dumps(vars(measure_step_memory(sys.argv[1], sys.argv[2] == "recomputed"))))
