"""Ids in; ids and log-probabilities out: the protocol of engines, and the one in PyTorch.

Greedy decoding, the search for all probable replies, and scoring ask the same question, "what comes after these ids?",
of the same trees (`token_tree`), whose forward passes share a KV cache (`block`). Only ids that `encode.Cursor` calls
legal are ever taken, so a reply that ends is a grid by construction.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import numpy as np

from ..config import FormatConfig
from ..models.adapters import Adapter, LoraBank, attached
from ..models.kv_cache import bytes_per_token
from ..models.model import Model
from ..puzzles.encode import END, GRID_STRIDE, Prompt, longest_reply
from .block import MASK_CELLS, Asked, Block
from .drafter import LONGEST, Drafter
from .token_tree import Grammar, TokenTree

MOST_PADDING = 0.5, 256  # of a prompt in a cache: as a share of its length, and ids besides
BATCH_TOKENS = {"cpu": 8192, "cuda": 32_768}  # a GPU waits for launches unless a pass is large


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
    view_steps: int = 0  # the same, summed over the prompts that took part
    tokens: int = 0  # ids that went through the model, prompts included, padding not
    decoded: int = 0  # ids of greedy replies
    drafted: int = 0  # ids of drafts that were checked
    accepted: int = 0  # and those of them that became part of a reply
    cache_bytes: int = 0  # of keys and values, at most at a time


Drafts = Sequence[Sequence[int]]


class Session(Protocol):
    """Prompts that are being answered. What was computed for them is kept for the next question."""

    cost: Cost

    def generate(self, rows: Sequence[int], drafts: Mapping[int, Drafts] | None = None) -> list[Reply]:
        """The greedy replies to these of the prompts, in the order of `rows`, among the ids that are legal.

        Args:
            drafts: by row, guesses of the reply, or none; with a row here, what else is likely is guessed too. It
                changes how long it takes, and nothing else.
        """

    def search(self, threshold: float, max_nodes: int) -> list[Found]:
        """For every prompt, the legal replies of probability `threshold` or more; `max_nodes` ids at most are tried."""

    def score(self, replies: Sequence[Sequence[Sequence[int]]]) -> list[list[Scored]]:
        """For every prompt, its own list of replies (with END) scored; what is known already costs nothing."""


class Engine(Protocol):
    """What answers prompts: `TorchEngine`, or `vllm_engine.VLLMEngine`."""

    deadline: float  # of `time.monotonic()`; what is not answered by then comes back unfinished
    on_step: Callable[[], None]  # called after every forward pass

    @property
    def format(self) -> FormatConfig: ...

    @property
    def context(self) -> int:
        """The positions that the model has; see `needed_context`."""

    def open(self, prompts: Sequence[Prompt], adapters: Sequence[Adapter | None]) -> AbstractContextManager[Session]:
        """Takes prompts, each with the adapter that it is answered under, until the context is left."""


def needed_context(prompt: Prompt, format: FormatConfig) -> int:
    """The context in which any legal reply to a prompt fits, in positions."""
    if format.positions == "token":
        return len(prompt) + longest_reply(format)
    return (int(prompt.positions_T[-1]) // GRID_STRIDE + 1) * GRID_STRIDE


class TorchEngine:
    """Answers on the model's own device. Serves CPUs, small models, and models with grid positions.

    Answers do not depend on the two limits, up to ties that are closer than rounding.

    Args:
        batch_tokens: rows x longest row that go through the model together, padding included; 0: what suits the device.
        cache_bytes: what keys and values may take. Prompts for which it is too little are answered one part after
            another, and computed again when they are asked again; one part may take more if its replies branch much.
    """

    def __init__(self, model: Model, batch_tokens: int, cache_bytes: int = 4 << 30):
        self.model, self.cache_bytes = model, cache_bytes
        self.batch_tokens = batch_tokens or BATCH_TOKENS[model.device.type]
        self.deadline = math.inf
        self.on_step: Callable[[], None] = lambda: None

    @property
    def format(self) -> FormatConfig:
        return self.model.format

    @property
    def context(self) -> int:
        return self.model.lm.config.max_position_embeddings

    @contextmanager
    def open(self, prompts: Sequence[Prompt], adapters: Sequence[Adapter | None]) -> Iterator["TorchSession"]:
        distinct = list({id(adapter): adapter for adapter in adapters if adapter is not None}.values())
        assert not distinct or None not in adapters, "prompts with and without an adapter cannot share a session"
        numbers = {id(adapter): k for k, adapter in enumerate(distinct)}
        with ExitStack() as stack:
            bank = stack.enter_context(attached(self.model, distinct)) if distinct else None
            if bank:
                bank.cast(self.model.dtype)
            session = TorchSession(self, prompts, [numbers.get(id(adapter), 0) for adapter in adapters], bank)
            try:
                yield session
            finally:
                session.close()


class TorchSession:
    """Prompts that are being answered by a `TorchEngine`.

    Where the engine's deadline came first, replies have no END, searches are not complete and scores are NaN.

    The greedy choice is the most probable id among the legal ones, the lowest of equal ones. A draft is verified by
    several ids a pass, which round otherwise than one by one: ties closer than that may be broken otherwise.
    """

    def __init__(self, engine: TorchEngine, prompts: Sequence[Prompt], adapters: Sequence[int], bank: LoraBank | None):
        self.engine, self.cost = engine, Cost()
        grammar = Grammar(engine.format)
        self.trees = [TokenTree(prompt, grammar, engine.context) for prompt in prompts]
        self.blocks: list[Block] = []
        self.homes: dict[int, tuple[Block, int]] = {}  # prompt -> its block, and its row there
        self.recent: list[Block] = []  # those with a cache, the one used last at the end
        self.answered: set[int] = set()
        for members in _share_caches(prompts, adapters, engine):
            trees = [self.trees[i] for i in members]
            block = Block(engine.model, trees, [adapters[i] for i in members], bank, engine.batch_tokens, self._count)
            self.blocks.append(block)
            self.homes |= {i: (block, row) for row, i in enumerate(members)}

    def generate(self, rows: Sequence[int], drafts: Mapping[int, Drafts] | None = None) -> list[Reply]:
        with suppress(_OutOfTime):
            for block, members in self._by_block(rows):
                self._decode(block, {row: Drafter(self.trees[i], (drafts or {}).get(i)) for row, i in members.items()})
        for i in set(rows) - self.answered:
            self.trees[i].advance()
            self.cost.decoded += len(self.trees[i].path) - 1
            self.answered.add(i)
        return [greedy_reply(self.trees[i]) for i in rows]

    def search(self, threshold: float, max_nodes: int) -> list[Found]:
        assert threshold > 0, threshold
        searches = {i: Search(tree, threshold, max_nodes) for i, tree in enumerate(self.trees)}
        with suppress(_OutOfTime):
            for block, members in self._by_block(range(len(self.trees))):
                while asked := {row: nodes for row, i in members.items() if (nodes := searches[i].ask())}:
                    block.learn(asked)
        return [search.found() for search in searches.values()]

    def score(self, replies: Sequence[Sequence[Sequence[int]]]) -> list[list[Scored]]:
        wanted = [i for i, of_row in enumerate(replies) if of_row]
        with suppress(_OutOfTime):
            for block, members in self._by_block(wanted):
                unknown = {}
                for row, i in members.items():
                    tree = block.trees[row]
                    walks = [tree.walk(ids[:-1]) for ids in replies[i]]
                    unknown[row] = [walk for walk in walks if not all(tree.known[node] for node in walk)]
                self._learn_walks(block, unknown)
        return [[scored(tree, ids) for ids in of_row] for tree, of_row in zip(self.trees, replies, strict=True)]

    def _decode(self, block: Block, drafters: Mapping[int, Drafter]) -> None:
        """Greedy decoding of these rows, in which what is guessed is verified."""
        while live := [row for row in drafters if not block.trees[row].advance()]:
            tips = {row: len(tree.path) for row, tree in block.rows(live)}
            # With the prompt, rows are long and of different lengths anyway.
            guessed = {row: drafters[row].chain(LONGEST if tree.placed else math.inf) for row, tree in block.rows(live)}
            block.learn({row: [tree.path[-1], *_fed(tree, guessed[row])] for row, tree in block.rows(live)})
            for row, tree in block.rows(live):
                tree.advance()
                right = agreement(guessed[row], tree.path[tips[row] :])
                last = [tree.path[tips[row] - 1], *_fed(tree, guessed[row][:right])][-1]
                tree.free_from(tree.columns[last] + 1)  # what was guessed wrong
                if drafters[row].rules:
                    self.cost.drafted += len(guessed[row])
                    self.cost.accepted += right

    def _learn_walks(self, block: Block, unknown: dict[int, list[list[int]]]) -> None:
        """As many whole walks of each row at a time as fit in a batch; their columns are free again afterwards."""
        while unknown := {row: walks for row, walks in unknown.items() if walks}:
            columns = max(block.trees[row].used + len(walks[-1]) for row, walks in unknown.items())
            room = min(block.batch_tokens, MASK_CELLS // columns) // len(unknown)
            asked: Asked = {}
            for row, walks in unknown.items():
                asked[row] = walks.pop()
                while walks and len(asked[row]) + len(walks[-1]) <= room:
                    asked[row] = asked[row] + walks.pop()
            ends = {row: max(block.trees[row].used, len(block.trees[row].prompt)) for row in asked}
            block.learn(asked)
            for row, end in ends.items():
                block.trees[row].free_from(end)

    def _by_block(self, rows: Sequence[int]) -> Iterator[tuple[Block, dict[int, int]]]:
        """The blocks of these prompts, each with room for its cache, and row -> prompt."""
        for block in self.blocks:
            members = {self.homes[i][1]: i for i in sorted(set(rows)) if self.homes[i][0] is block}
            if not members:
                continue
            self.recent = [other for other in self.recent if other is not block]
            while self.recent and self._held() + block.expected_bytes > self.engine.cache_bytes:
                self.recent.pop(0).drop()
            self.recent.append(block)
            self._look_at_the_clock()
            yield block, members

    def close(self) -> None:
        """Frees the caches at once: a session and its blocks know each other, so they are garbage only much later."""
        for block in self.blocks:
            block.drop()

    def _held(self) -> int:
        return sum(block.cache.bytes for block in self.recent)

    def _count(self, rows: int, tokens: int) -> None:
        self.cost.forward_steps += 1
        self.cost.view_steps += rows
        self.cost.tokens += tokens
        self.cost.cache_bytes = max(self.cost.cache_bytes, self._held())
        self.engine.on_step()
        self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        if time.monotonic() >= self.engine.deadline:
            raise _OutOfTime


class _OutOfTime(Exception):
    """The engine's deadline has come. Raised between forward passes, when all that is known is consistent."""


class Search:
    """The search for all replies to one prompt that are probable enough, most probable ids first.

    What follows an id off the greedy path is mostly what follows its neighbour on it. So the cells of the greedy reply
    are guessed, and a pass learns about whole chains of ids.
    """

    WIDTH = 8  # ids that a pass asks about, each with a chain of guesses after it
    COLUMNS = 4096  # of the cache after the prompt; beyond them all are freed, and computed again if need be

    def __init__(self, tree: TokenTree, threshold: float, max_nodes: int):
        self.tree, self.least, self.left = tree, math.log(threshold), max_nodes
        self.open: list[tuple[float, int]] = [(0.0, 0)]  # a heap of (minus log-probability, node)
        self.replies: list[Reply] = []
        self.drafter = Drafter(tree, [tree.ids_to(tree.path[-1])])
        self.window: float = 8
        self.asked: list[tuple[float, list[int]]] = []  # log-probability of each chain's first node, and the chain
        self.kept = max(tree.used, len(tree.prompt))  # columns

    def ask(self) -> list[int]:
        """Nodes that have to be known before the next call; none: the search has ended."""
        for asked in self.asked:
            self.window = min(64, _next_window(self.window, len(asked[1]) - 1, self._hits(asked)))
        heads: list[tuple[float, int]] = []
        while self.open and len(heads) < min(self.WIDTH, self.left):
            cost, node = heapq.heappop(self.open)
            if self.tree.known[node]:
                self._expand(-cost, node)
            else:
                heads.append((cost, node))
        for head in heads:  # expanded at the next call
            heapq.heappush(self.open, head)
        if not heads or self.tree.used - len(self.tree.prompt) > self.COLUMNS:
            self.tree.free_from(self.kept)
        self.asked = [(-cost, [node, *_fed(self.tree, self.drafter.chain(self.window, node))]) for cost, node in heads]
        return [node for _, chain in self.asked for node in chain]

    def found(self) -> Found:
        replies = sorted(self.replies, key=lambda reply: (-reply.log_probability, reply.ids))
        return Found(tuple(replies), complete=not self.open)

    def _expand(self, total: float, node: int) -> None:
        """Opens what may come after a known node. `total` is the node's log-probability."""
        self.left -= 1
        totals_V = total + self.tree.log_probabilities_NV[node].astype(np.float64)
        legal_V = self.tree.grammar.legal_SV[self.tree.states[node]]
        for token in np.flatnonzero(legal_V & (totals_V >= self.least)).tolist():
            following = self.tree.child(node, token)
            if following is None:
                continue
            if token == END:
                self.replies.append(Reply(self.tree.ids_to(following), float(totals_V[token])))
            else:
                heapq.heappush(self.open, (-float(totals_V[token]), following))

    def _hits(self, asked: tuple[float, list[int]]) -> int:
        """How many ids of a chain, after its first, are probable enough to be of use."""
        total, chain = asked
        ids = [self.tree.ids[node] for node in chain[1:]]
        totals = total + self.tree.log_probabilities_NV[chain[:-1], ids].cumsum(dtype=np.float64)
        return int((totals >= self.least).sum())


def _next_window(window: float, guessed: int, useful: int) -> float:
    """How many ids to guess next, when of so many in the last window so many were of use."""
    if useful < guessed:
        return max(1, min(window, 2 * useful))
    return 2 * window if guessed >= window else window


def _fed(tree: TokenTree, nodes: Iterable[int]) -> list[int]:
    """Those that go through the model: all but END, after which nothing comes."""
    return [node for node in nodes if not tree.ended(node)]


def agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading elements are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def greedy_reply(tree: TokenTree) -> Reply:
    """The greedy path, as far as it is known."""
    return Reply(tuple(tree.ids[node] for node in tree.path[1:]), tree.log_probability(tree.path))


def scored(tree: TokenTree, ids: Sequence[int]) -> Scored:
    """A reply beyond the context has probability 0; one that nobody has looked at, NaN."""
    nodes = tree.walk(ids)
    agreed = agreement([tree.greedy[node] for node in nodes], ids)
    if len(nodes) <= len(ids):
        return Scored(-math.inf, agreed)
    return Scored(tree.log_probability(nodes) if all(tree.known[node] for node in nodes[:-1]) else math.nan, agreed)


def _share_caches(prompts: Sequence[Prompt], adapters: Sequence[int], engine: TorchEngine) -> list[list[int]]:
    """Which prompts share a cache: those of an adapter together, of nearly equal length, and as many as fit."""
    room = engine.cache_bytes // bytes_per_token(engine.model)  # ids
    longest_of = {k: max(len(p) for p, of in zip(prompts, adapters, strict=True) if of == k) for k in set(adapters)}
    parts: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: (-longest_of[adapters[i]], adapters[i], -len(prompts[i]))):
        lengths = [len(prompts[j]) for j in (*parts[-1], i)] if parts else []
        fits = len(lengths) * (max(lengths, default=0) + longest_reply(engine.format)) <= room
        share, besides = MOST_PADDING
        if lengths and fits and max(lengths) <= (1 + share) * min(lengths) + besides:
            parts[-1].append(i)
        else:
            parts.append([i])
    return [sorted(part, key=lambda i: (adapters[i], i)) for part in parts]
