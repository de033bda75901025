"""Ask a task under many views and undo each answer: views -> prompts -> replies -> candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .adapters import Adapter
from .augment import ColourPolicy, spread_augmentations
from .config import PredictConfig
from .encode import Malformed, Prompt, decode_reply, encode_prompt
from .engine import TorchEngine
from .tasks import Grid, Task, make_grid


@dataclass(frozen=True, eq=False)
class Candidate:
    """An answer to one test input, as one view gave it, with the view's augmentation undone."""

    test: int  # index of the test input
    view: int
    grid: Grid
    log_probability: float  # of the whole reply in its view, nats

    def to_json(self) -> dict[str, Any]:
        return {
            "test": self.test,
            "view": self.view,
            "log_probability": round(self.log_probability, 6),
            "grid": self.grid.tolist(),
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Candidate":
        grid = make_grid(content["grid"], "candidate")
        return Candidate(content["test"], content["view"], grid, content["log_probability"])


def predict(
    task: Task, engine: TorchEngine, adapter: Adapter | None, config: PredictConfig, rng: np.random.Generator
) -> list[Candidate]:
    """One candidate for each view and test input, the task's tests in order. Replies that are no grid are left out."""
    policy = ColourPolicy(config.keep_background, config.output_only)
    views = spread_augmentations(config.views, rng, policy, task.train)
    asked: list[tuple[int, int]] = []
    prompts: list[Prompt] = []
    for v, view in enumerate(views):
        seen = view.apply_task(task)
        for t, test_input in enumerate(seen.test):
            asked.append((t, v))
            prompts.append(_prompt(seen, test_input, engine, config.max_tokens))
    candidates = []
    for (t, v), reply in zip(asked, engine.generate(prompts, adapter), strict=True):
        grid = decode_reply(reply.ids, engine.model.format)
        if not isinstance(grid, Malformed):
            candidates.append(Candidate(t, v, views[v].undo(grid), reply.log_probability))
    return sorted(candidates, key=lambda candidate: (candidate.test, candidate.view))


def _prompt(seen: Task, test_input: Grid, engine: TorchEngine, max_tokens: int) -> Prompt:
    """A prompt longer than `max_tokens` loses demonstrations from the front, but never the last one."""
    pairs: Sequence = seen.train
    prompt = encode_prompt(pairs, test_input, engine.model.format)
    while len(pairs) > 1 and len(prompt) > max_tokens:
        pairs = pairs[1:]
        prompt = encode_prompt(pairs, test_input, engine.model.format)
    return prompt
