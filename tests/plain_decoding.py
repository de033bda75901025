"""Engines under test, and beside them decoding that does nothing clever: a whole forward pass for every id."""

import math
import os
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toys import TOY, flip_task, random_adapter, random_grid

from arc_solver.config import AdaptConfig, EngineConfig, FormatConfig
from arc_solver.decoding.engine import Engine
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.decoding.vllm_engine import VLLMEngine
from arc_solver.models.adapters import Adapter, attach_adapters, fresh_adapter
from arc_solver.models.model import Model, save_model
from arc_solver.puzzles.encode import (
    END,
    INPUT,
    NEWLINE,
    NUMBER,
    PAD,
    VOCABULARY,
    Cursor,
    Prompt,
    encode_prompt,
)
from arc_solver.puzzles.tasks import Pair
from arc_solver.rng import named_rng

FORMAT = FormatConfig(positions="token")
CONTEXT = 512
ADAPT = AdaptConfig(rank=3, alpha=6)
HEADS: dict[str, dict[str, Any]] = {  # of 32 each, the least that vLLM can do on a CPU
    "Qwen2": {"num_attention_heads": 3, "num_key_value_heads": 1},  # vLLM reads no head_dim here: width / heads
    "Qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "Llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
KEPT: list[VLLMEngine] = []


def opinionated_model(architecture: str) -> Model:
    """A stock model that is sure of little and mostly says what is a short grid, or almost: illegal ids are often best.

    Biases, norms and the base of the rotation are not at values that hide mistakes.
    """
    import transformers

    settings = getattr(transformers, f"{architecture}Config")(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        **HEADS[architecture],
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        lm = getattr(transformers, f"{architecture}ForCausalLM")(settings)
        for p in lm.parameters():
            p += 0.1 * torch.randn_like(p)
        embeddings_VH, head_VH = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
        embeddings_VH *= 2
        head_VH *= 1.5
        # Channel 0 is the same everywhere, so the head's column 0 is a bias, which stock models lack.
        embeddings_VH[:, 0] = lm.model.norm.weight[0] = 1
        for layer in lm.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        head_VH[:, 0] = -10
        head_VH[:4, 0], head_VH[[NEWLINE, END], 0], head_VH[INPUT, 0] = 0, 2.6, -1
    return Model(lm.eval(), FORMAT, None)


@dataclass(frozen=True, eq=False)
class Served:
    """An engine with the model that it should answer as."""

    model: Model
    engine: Engine


def make_torch(model: Model, folder: Path) -> Engine:
    return TorchEngine(model, 300)  # so few that prompts go in several batches


def make_vllm(model: Model, folder: Path) -> Engine:
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # or a function of the sampler is compiled, even on the CPU
    config = EngineConfig(kv_cache_gib=1 / 16, max_loras=2, max_sequences=8, step_tokens=128)
    save_model(model, folder)
    return kept(VLLMEngine(model, folder, config, fresh_adapter(model, ADAPT, named_rng(0))))


def kept(engine: VLLMEngine) -> VLLMEngine:
    """The engine, kept to the end: vLLM frees none without harm to the others."""
    KEPT.append(engine)
    return engine


MAKERS = {"torch": make_torch, "vllm": make_vllm}
MODELS: dict[tuple[str, str], Served] = {}


def serve(kind: str, architecture: str, folder: Path) -> Served:
    """Engines are kept: making one costs as much as several tests."""
    if (kind, architecture) not in MODELS:
        model = opinionated_model(architecture)
        MODELS[kind, architecture] = Served(model, MAKERS[kind](model, folder))
    return MODELS[kind, architecture]


def prompts_of(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of different lengths, of which all but the first two share the beginning."""
    rng = np.random.default_rng(seed)
    pairs = [Pair(random_grid(rng, 6), random_grid(rng, 6)) for _ in range(4)]
    inputs = [random_grid(rng, 5) for _ in range(count)]
    return [encode_prompt(pairs[:2] if i < 2 else pairs, given, FORMAT) for i, given in enumerate(inputs)]


def some_adapters(model: Model, count: int) -> list[Adapter]:
    """Adapters that change the answers, but not so much that nothing likely is left; the third is like the first."""
    found = []
    for seed, strength in ((0, 0.3), (6, 0.2), (0, 0.1))[:count]:
        drawn = random_adapter(model, seed, ADAPT)
        weights = {name: (down, up * strength) for name, (down, up) in drawn.weights.items()}
        found.append(Adapter(drawn.rank, drawn.alpha, weights))
    return found


class Plain:
    """The reference: a whole forward pass of one sequence for every id, no cache, no batch."""

    def __init__(self, model: Model, prompt: Prompt, adapter: Adapter | None = None):
        self.model, self.prompt, self.adapter = model, prompt, adapter

    @torch.no_grad()
    def logprobs(self, reply: Sequence[int]) -> np.ndarray:
        """Of what may come at each place of a reply and after it. [T + 1, V]"""
        ids_T = torch.tensor([*self.prompt.ids_T.tolist(), *reply])
        logits_BTV = self.model.logits(ids_T[None], torch.arange(len(ids_T))[None])
        return logits_BTV[0, len(self.prompt) - 1 :].log_softmax(-1).numpy()

    def with_adapter(self) -> Any:
        from contextlib import nullcontext

        return attach_adapters(self.model, [self.adapter]) if self.adapter else nullcontext()

    def greedy(self, most: int = 10**6) -> tuple[int, ...]:
        cursor, ids = Cursor(self.prompt, FORMAT), []
        with self.with_adapter():
            while not cursor.done and len(ids) < most:
                ids.append(int(np.where(cursor.legal(), self.logprobs(ids)[-1], -np.inf).argmax()))
                cursor.take(ids[-1])
        return tuple(ids)

    def log_probability(self, reply: Sequence[int]) -> float:
        with self.with_adapter():
            return float(self.logprobs(reply)[range(len(reply)), list(reply)].sum())

    def probable(self, threshold: float) -> dict[tuple[int, ...], float]:
        """All legal replies of that probability or more, by trying everything."""
        found: dict[tuple[int, ...], float] = {}

        def extend(ids: tuple[int, ...], log_probability: float, cursor: Cursor) -> None:
            row_V = self.logprobs(ids)[-1]
            for token in np.flatnonzero(cursor.legal()).tolist():
                total = log_probability + float(row_V[token])
                if total >= math.log(threshold):
                    step = copy(cursor)
                    step.take(token)
                    if step.done:
                        found[*ids, token] = total
                    else:
                        extend((*ids, token), total, step)

        with self.with_adapter():
            extend((), 0.0, Cursor(self.prompt, FORMAT))
        return found


def same_start(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def flip_prompts(rng, format, count=10):
    """Prompts of different lengths."""
    tasks = [flip_task(rng, demonstrations=1 + i % 3) for i in range(count)]
    return [encode_prompt(task.train, task.test[0], format) for task in tasks]


@torch.no_grad()
def plainly(model: Model, prompt):
    """Greedy decoding with a whole forward pass for every id, and no cache."""
    cursor, ids, positions, total = (
        Cursor(prompt, model.format),
        prompt.ids_T.tolist(),
        prompt.positions_T.tolist(),
        0.0,
    )
    while not cursor.done:
        logits = model.logits(torch.tensor([ids]), torch.tensor([positions]))[0, -1]
        token = int(logits.masked_fill(~torch.from_numpy(cursor.legal()), -torch.inf).argmax())
        total += torch.log_softmax(logits, -1)[token].item()
        position = cursor.take(token)
        positions.append(position if model.format.positions == "grid" else len(ids))
        ids.append(token)
    return tuple(ids[len(prompt) :]), total


def with_short_replies(model: Model) -> Model:
    """The model changed so that it ends its rows and grids soon, and not all at the same size."""
    width = model.lm.config.hidden_size
    head = torch.nn.Linear(width, VOCABULARY)
    with torch.no_grad():
        for p in model.lm.parameters():
            if p.ndim == 2:
                p *= 8 * (TOY.width / width) ** 0.5  # as drawn, every state is much like the next
        head.weight.normal_(0, 4 * width**-0.5, generator=torch.Generator().manual_seed(0))
        head.bias.zero_()
        head.bias[[NEWLINE, END]] = 10
        head.bias[NUMBER + 10 :] = -99  # small shape headers
    model.lm.set_output_embeddings(head)
    return model


def answers(engine, prompts, drafts=None, adapters=None, rows=None):
    """The replies, and what they cost. `drafts`: one, by row."""
    drafts = {i: [draft] for i, draft in (drafts or {}).items()}
    with engine.open_session(prompts, adapters or [None] * len(prompts)) as session:
        return session.generate(range(len(prompts)) if rows is None else rows, drafts), session.cost
