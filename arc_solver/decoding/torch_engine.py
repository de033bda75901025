"""Our own engine, in PyTorch.

Greedy decoding, the search for all probable replies, and scoring ask the same question, "what comes after these ids?",
of the same trees (`token_tree`), whose forward passes share a KV cache (`tree_batch`). Only ids that `encode.Cursor`
calls legal are ever taken, so a reply that ends is a grid by construction.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from ..config import FormatConfig
from ..models import Adapter, LoraBank, Model, attach_adapters
from ..models.kv_cache import bytes_per_token
from ..puzzles import Prompt, longest_reply
from .drafter import LONGEST, Drafter
from .engine import DecodingStats, Drafts, Reply, ReplyScore, SearchResult
from .search import Search, common_prefix_length, greedy_reply, score_reply, without_end
from .token_tree import Grammar, TokenTree
from .tree_batch import MASK_CELLS, Asked, TreeBatch

MOST_PADDING = 0.5, 256  # of a prompt in a cache: as a share of its length, and ids besides
BATCH_TOKENS = {"cpu": 8192, "cuda": 32_768}  # a GPU waits for launches unless a pass is large


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
        self.on_step: Callable[[int], None] = lambda tokens: None

    @property
    def format(self) -> FormatConfig:
        return self.model.format

    @property
    def context_length(self) -> int:
        return self.model.lm.config.max_position_embeddings

    @contextmanager
    def open_session(self, prompts: Sequence[Prompt], adapters: Sequence[Adapter | None]) -> Iterator["TorchSession"]:
        distinct = list({id(adapter): adapter for adapter in adapters if adapter is not None}.values())
        assert not distinct or None not in adapters, "prompts with and without an adapter cannot share a session"
        numbers = {id(adapter): k for k, adapter in enumerate(distinct)}
        with ExitStack() as stack:
            bank = stack.enter_context(attach_adapters(self.model, distinct)) if distinct else None
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
        self.engine, self.cost = engine, DecodingStats()
        grammar = Grammar(engine.format)
        self.trees = [TokenTree(prompt, grammar, engine.context_length) for prompt in prompts]
        self.batches: list[TreeBatch] = []
        self.homes: dict[int, tuple[TreeBatch, int]] = {}  # prompt -> its batch, and its row there
        self.recent: list[TreeBatch] = []  # those with a cache, the one used last at the end
        self.answered: set[int] = set()
        for members in _share_caches(prompts, adapters, engine):
            trees = [self.trees[i] for i in members]
            batch = TreeBatch(
                engine.model, trees, [adapters[i] for i in members], bank, engine.batch_tokens, self._count
            )
            self.batches.append(batch)
            self.homes |= {i: (batch, row) for row, i in enumerate(members)}

    def generate(self, rows: Sequence[int], drafts: Mapping[int, Drafts] | None = None) -> list[Reply]:
        with suppress(_OutOfTime):
            for batch, members in self._by_batch(rows):
                self._decode(batch, {row: Drafter(self.trees[i], (drafts or {}).get(i)) for row, i in members.items()})
        for i in set(rows) - self.answered:
            self.trees[i].advance()
            self.cost.decoded += len(self.trees[i].path) - 1
            self.answered.add(i)
        return [greedy_reply(self.trees[i]) for i in rows]

    def search(self, threshold: float, max_nodes: int) -> list[SearchResult]:
        assert threshold > 0, threshold
        searches = {i: Search(tree, threshold, max_nodes) for i, tree in enumerate(self.trees)}
        with suppress(_OutOfTime):
            for batch, members in self._by_batch(range(len(self.trees))):
                while asked := {row: nodes for row, i in members.items() if (nodes := searches[i].next_nodes())}:
                    batch.evaluate(asked)
        return [search.result() for search in searches.values()]

    def score(self, replies: Sequence[Sequence[Sequence[int]]]) -> list[list[ReplyScore]]:
        wanted = [i for i, of_row in enumerate(replies) if of_row]
        with suppress(_OutOfTime):
            for batch, members in self._by_batch(wanted):
                unknown = {}
                for row, i in members.items():
                    tree = batch.trees[row]
                    walks = [tree.walk(ids[:-1]) for ids in replies[i]]
                    unknown[row] = [walk for walk in walks if not all(tree.known[node] for node in walk)]
                self._evaluate_walks(batch, unknown)
        return [[score_reply(tree, ids) for ids in of_row] for tree, of_row in zip(self.trees, replies, strict=True)]

    def _decode(self, batch: TreeBatch, drafters: Mapping[int, Drafter]) -> None:
        """Greedy decoding of these rows, in which what is guessed is verified."""
        while live := [row for row in drafters if not batch.trees[row].advance()]:
            tips = {row: len(tree.path) for row, tree in batch.rows(live)}
            # With the prompt, rows are long and of different lengths anyway.
            guessed = {
                row: drafters[row].draft(LONGEST if tree.prompt_is_cached else math.inf)
                for row, tree in batch.rows(live)
            }
            batch.evaluate({row: [tree.path[-1], *without_end(tree, guessed[row])] for row, tree in batch.rows(live)})
            for row, tree in batch.rows(live):
                tree.advance()
                right = common_prefix_length(guessed[row], tree.path[tips[row] :])
                last = [tree.path[tips[row] - 1], *without_end(tree, guessed[row][:right])][-1]
                tree.free_columns_from(tree.columns[last] + 1)  # what was guessed wrong
                if drafters[row].rules:
                    self.cost.drafted += len(guessed[row])
                    self.cost.accepted += right

    def _evaluate_walks(self, batch: TreeBatch, unknown: dict[int, list[list[int]]]) -> None:
        """As many whole walks of each row at a time as fit in a batch; their columns are free again afterwards."""
        while unknown := {row: walks for row, walks in unknown.items() if walks}:
            columns = max(batch.trees[row].used + len(walks[-1]) for row, walks in unknown.items())
            room = min(batch.batch_tokens, MASK_CELLS // columns) // len(unknown)
            asked: Asked = {}
            for row, walks in unknown.items():
                asked[row] = walks.pop()
                while walks and len(asked[row]) + len(walks[-1]) <= room:
                    asked[row] = asked[row] + walks.pop()
            ends = {row: max(batch.trees[row].used, len(batch.trees[row].prompt)) for row in asked}
            batch.evaluate(asked)
            for row, end in ends.items():
                batch.trees[row].free_columns_from(end)

    def _by_batch(self, rows: Sequence[int]) -> Iterator[tuple[TreeBatch, dict[int, int]]]:
        """The batches of these prompts, each with room for its cache, and row -> prompt."""
        for batch in self.batches:
            members = {self.homes[i][1]: i for i in sorted(set(rows)) if self.homes[i][0] is batch}
            if not members:
                continue
            self.recent = [other for other in self.recent if other is not batch]
            while self.recent and self._held() + batch.expected_bytes > self.engine.cache_bytes:
                self.recent.pop(0).drop()
            self.recent.append(batch)
            self._look_at_the_clock()
            yield batch, members

    def close(self) -> None:
        """Frees the caches at once: a session and its batches know each other, so they are garbage only much later."""
        for batch in self.batches:
            batch.drop()

    def _held(self) -> int:
        return sum(batch.cache.bytes for batch in self.recent)

    def _count(self, rows: int, tokens: int) -> None:
        self.cost.forward_steps += 1
        self.cost.view_steps += rows
        self.cost.tokens += tokens
        self.cost.cache_bytes = max(self.cost.cache_bytes, self._held())
        self.engine.on_step(tokens)
        self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        if time.monotonic() >= self.engine.deadline:
            raise _OutOfTime


class _OutOfTime(Exception):
    """The engine's deadline has come. Raised between forward passes, when all that is known is consistent."""


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
