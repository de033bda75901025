"""Ids in; ids and log-probabilities out: greedy decoding in PyTorch, with a KV cache and only legal ids.

A batch is prefilled in one forward pass and then decoded in lockstep. Sequences that end leave the batch. Which ids
are legal, and each id's grid position, come from `encode.Cursor`; a reply that ends is a grid by construction.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .adapters import Adapter, attached
from .config import FormatConfig
from .encode import PAD, Cursor, Prompt, longest_reply
from .model import Model


@dataclass(frozen=True, eq=False)
class Reply:
    """A decoded answer: what follows the prompt, up to and with END."""

    ids: tuple[int, ...]
    log_probability: float  # of all ids together, nats, under the unrestricted softmax


@dataclass(frozen=True, eq=False)
class Scored:
    """A given reply under one prompt."""

    log_probability: float  # of all ids together, nats, under the unrestricted softmax
    agreed: int  # its first ids that greedy decoding takes too


@dataclass(frozen=True, eq=False)
class Found:
    """What the threshold search found for one prompt."""

    replies: tuple[Reply, ...]  # all that are at least as probable as the threshold, the most probable first
    complete: bool  # False: the cap on nodes ended the search, so there may be more


@dataclass
class Cost:
    """What answering took."""

    forward_steps: int = 0  # forward passes of a batch
    tokens: int = 0  # ids that went through the model, prompts included, padding not
    decoded: int = 0  # ids of greedy replies
    drafted: int = 0  # ids of drafts that were checked
    accepted: int = 0  # and those of them that became part of a reply


class Session(Protocol):
    """Prompts that are being answered. What was computed for them is kept for the next question."""

    cost: Cost

    def generate(self, rows: Sequence[int], drafts: Mapping[int, Sequence[int]] | None = None) -> list[Reply]:
        """The greedy replies to these of the prompts, in the order of `rows`, among the ids that are legal.

        Args:
            drafts: guesses of the replies, by row. They change how long it takes, and nothing else.
        """

    def search(self, threshold: float, max_nodes: int) -> list[Found]:
        """For every prompt, the legal replies of probability `threshold` or more; `max_nodes` ids at most are tried."""

    def score(self, replies: Sequence[Sequence[Sequence[int]]]) -> list[list[Scored]]:
        """For every prompt, its own list of replies (with END) scored; what is known already costs nothing."""


class Engine(Protocol):
    """What answers prompts: `TorchEngine`, or `vllm_engine.VLLMEngine`."""

    format: FormatConfig
    context: int  # the most ids that a prompt and its reply may have together

    def open(self, prompts: Sequence[Prompt], adapters: Sequence[Adapter | None]) -> AbstractContextManager[Session]:
        """Takes prompts, each with the adapter that it is answered under, until the context is left."""


class TorchEngine:
    """Decodes on the model's own device. Serves CPUs, small models, and models with grid positions.

    Args:
        batch_tokens: prompts x longest prompt that are decoded together.
    """

    def __init__(self, model: Model, batch_tokens: int):
        self.model, self.batch_tokens = model, batch_tokens

    def generate(self, prompts: Sequence[Prompt], adapter: Adapter | None = None) -> list[Reply]:
        """The greedy reply to each prompt, in their order, under the adapter if one is given."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together: little padding
        replies: dict[int, Reply] = {}
        with ExitStack() as stack:
            if adapter:
                stack.enter_context(attached(self.model, [adapter]))
            stack.enter_context(torch.inference_mode())
            while order:
                count = max(1, self.batch_tokens // len(prompts[order[0]]))
                while count > 1 and len(prompts[order[min(count, len(order)) - 1]]) * count > self.batch_tokens:
                    count -= 1
                batch, order = order[:count], order[count:]
                replies.update(zip(batch, self._decode([prompts[i] for i in batch]), strict=True))
        return [replies[i] for i in range(len(prompts))]

    def _decode(self, prompts: Sequence[Prompt]) -> list[Reply]:
        model, device = self.model, self.model.device
        lengths = [len(prompt) for prompt in prompts]
        count, longest = len(prompts), max(lengths)
        ids_BT = np.full((count, longest), PAD, dtype=np.int64)
        positions_BT = np.zeros((count, longest), dtype=np.int64)
        for b, prompt in enumerate(prompts):
            ids_BT[b, : len(prompt)] = prompt.ids_T
            positions_BT[b, : len(prompt)] = prompt.positions_T
        lengths_B = torch.tensor(lengths, device=device)
        cache = KvCache()
        # Padding is on the right: causal attention of the real ids never sees it, and the mask below hides it later.
        logits_BTV = model.logits(
            torch.from_numpy(ids_BT).to(device), torch.from_numpy(positions_BT).to(device), past_key_values=cache
        )
        logits_BV = logits_BTV[torch.arange(count, device=device), lengths_B - 1]
        mask_BK = torch.arange(longest, device=device) < lengths_B[:, None]

        cursors = [Cursor(prompt, model.format) for prompt in prompts]
        taken: list[list[int]] = [[] for _ in prompts]
        totals = np.zeros(count)
        live = list(range(count))  # rows of the cache -> prompts
        for step in range(longest_reply(model.format)):
            legal_BV = torch.from_numpy(np.stack([cursors[i].legal() for i in live])).to(device)
            next_B = logits_BV.masked_fill(~legal_BV, -torch.inf).argmax(-1)
            chosen_B = torch.log_softmax(logits_BV, -1).gather(1, next_B[:, None])[:, 0]
            next_ids, chosen = next_B.tolist(), chosen_B.tolist()
            positions = []
            for i, token, log_probability in zip(live, next_ids, chosen, strict=True):
                in_grid = cursors[i].take(token)
                positions.append(in_grid if model.format.positions == "grid" else lengths[i] + step)
                taken[i].append(token)
                totals[i] += log_probability
            rows = [row for row, i in enumerate(live) if not cursors[i].done]
            if not rows:
                break
            if len(rows) < len(live):
                keep = torch.tensor(rows, device=device)
                cache.keep(keep)
                next_B, mask_BK = next_B[keep], mask_BK[keep]
                positions, live = [positions[row] for row in rows], [live[row] for row in rows]
            mask_BK = torch.cat((mask_BK, mask_BK.new_ones(len(live), 1)), 1)
            logits_BV = model.logits(
                next_B[:, None],
                torch.tensor(positions, device=device)[:, None],
                past_key_values=cache,
                mask_BTK=mask_BK[:, None],
            )[:, 0]
        return [Reply(tuple(ids), float(total)) for ids, total in zip(taken, totals, strict=True)]


class KvCache:
    """Keys and values of all layers, in buffers that grow by half: a step writes one column and copies nothing.

    Has the one method that attention layers of transformers call on a cache.
    """

    def __init__(self) -> None:
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [B, G, capacity, D]
        self.used: dict[int, int] = {}  # layer -> columns

    def update(self, k_BGTD: Tensor, v_BGTD: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Appends T columns and returns all of them. [B, G, K, D] each."""
        start = self.used.get(layer, 0)
        end = start + k_BGTD.shape[2]
        if layer not in self.buffers or end > self.buffers[layer][0].shape[2]:
            self._grow(layer, k_BGTD, max(end + 32, end * 3 // 2))
        k, v = self.buffers[layer]
        k[:, :, start:end], v[:, :, start:end] = k_BGTD, v_BGTD
        self.used[layer] = end
        return k[:, :, :end], v[:, :, :end]

    def _grow(self, layer: int, like_BGTD: Tensor, capacity: int) -> None:
        batch, groups, _, size = like_BGTD.shape
        old, used = self.buffers.get(layer), self.used.get(layer, 0)
        new = tuple(like_BGTD.new_zeros(batch, groups, capacity, size) for _ in range(2))
        if old:
            for old_buffer, new_buffer in zip(old, new, strict=True):
                new_buffer[:, :, :used] = old_buffer[:, :, :used]
        self.buffers[layer] = (new[0], new[1])

    def keep(self, rows: Tensor) -> None:
        """Only these rows of the batch stay."""
        self.buffers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.buffers.items()}
