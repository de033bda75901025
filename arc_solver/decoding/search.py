"""What a token tree tells: the greedy reply, the score of a given reply, and all replies above a probability."""

import heapq
import math
from collections.abc import Iterable, Sequence
from itertools import takewhile

import numpy as np

from ..puzzles import END
from .drafter import Drafter
from .engine import Reply, ReplyScore, SearchResult
from .token_tree import TokenTree


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def greedy_reply(tree: TokenTree) -> Reply:
    """The greedy path, as far as it is known."""
    return Reply(tuple(tree.ids[node] for node in tree.path[1:]), tree.log_probability(tree.path))


def score_reply(tree: TokenTree, ids: Sequence[int]) -> ReplyScore:
    """A reply's score from the tree alone: -inf beyond the context, NaN where not evaluated."""
    nodes = tree.walk(ids)
    agreed = common_prefix_length([tree.greedy[node] for node in nodes], ids)
    if len(nodes) <= len(ids):
        return ReplyScore(-math.inf, agreed)
    return ReplyScore(tree.log_probability(nodes) if all(tree.known[node] for node in nodes[:-1]) else math.nan, agreed)


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

    def next_nodes(self) -> list[int]:
        """The nodes to evaluate before the next call; empty when the search has ended."""
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
            self.tree.free_columns_from(self.kept)
        self.asked = [
            (-cost, [node, *without_end(self.tree, self.drafter.draft(self.window, node))]) for cost, node in heads
        ]
        return [node for _, chain in self.asked for node in chain]

    def result(self) -> SearchResult:
        replies = sorted(self.replies, key=lambda reply: (-reply.log_probability, reply.ids))
        return SearchResult(tuple(replies), complete=not self.open)

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


def without_end(tree: TokenTree, nodes: Iterable[int]) -> list[int]:
    """Those that go through the model: all but END, after which nothing comes."""
    return [node for node in nodes if not tree.ended(node)]


def _next_window(window: float, guessed: int, useful: int) -> float:
    """How many ids to guess next, when of so many in the last window so many were of use."""
    if useful < guessed:
        return max(1, min(window, 2 * useful))
    return 2 * window if guessed >= window else window
