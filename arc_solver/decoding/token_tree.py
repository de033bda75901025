"""A tree of reply ids to one prompt, with the model's log-probabilities and each node's column in the KV cache.

Greedy decoding, search and scoring walk the same tree, so what one of them found out costs the others nothing. Node 0
is the prompt. A node is *known* once the model has said what may follow it, and *cached* while its keys and values are
in the cache; either may be so without the other.
"""

from collections.abc import Iterable, Sequence
from copy import copy

import numpy as np

from ..config import FormatConfig
from ..puzzles import END, INPUT, OUTPUT, VOCABULARY, Cursor, Prompt
from ..puzzles.encode import GRID_STRIDE


class Grammar:
    """The reply grammar as a state table (legal ids, next state), filled as states are reached.

    Rows of a batch and paths of a tree meet the same states again and again; a number stands for a state here.
    """

    START = 0

    def __init__(self, format: FormatConfig):
        self.format = format
        self.cursors: list[Cursor] = []  # of each state
        self.legal_SV = np.zeros((64, VOCABULARY), dtype=bool)
        self.forced: list[int | None] = []  # of each state: the only legal id, if there is but one
        self._numbers: dict[tuple, int] = {}
        self._steps: dict[tuple[int, int], tuple[int, int]] = {}
        self._number(Cursor(Prompt(np.array([INPUT]), np.array([0])), format))  # grid 0: positions are offsets

    def step(self, state: int, token: int) -> tuple[int, int]:
        """The state after a legal id, and the id's grid position less that of its grid."""
        known = self._steps.get((state, token))
        if known is None:
            assert self.legal_SV[state, token], (self.cursors[state].__dict__, token)
            cursor = copy(self.cursors[state])
            offset = cursor.take(token)
            known = self._steps[state, token] = self._number(cursor), offset
        return known

    def _number(self, cursor: Cursor) -> int:
        in_header = cursor.taken if self.format.shape_header and cursor.taken < 2 else 2
        key = (in_header, cursor.row, cursor.column, cursor.height, cursor.width, cursor.needs_number, cursor.done)
        if key not in self._numbers:
            number = self._numbers[key] = len(self.cursors)
            if number == len(self.legal_SV):
                self.legal_SV = np.concatenate((self.legal_SV, np.zeros_like(self.legal_SV)))
            if not cursor.done:
                self.legal_SV[number] = cursor.legal()
            legal = np.flatnonzero(self.legal_SV[number])
            self.cursors.append(cursor)
            self.forced.append(int(legal[0]) if len(legal) == 1 else None)
        return self._numbers[key]


class TokenTree:
    """All replies to one prompt that have been looked at so far, as a tree of ids.

    Args:
        context_length: positions that the model has; what would lie beyond them is not in the tree.
    """

    def __init__(self, prompt: Prompt, grammar: Grammar, context_length: int):
        self.prompt, self.grammar, self.context_length = prompt, grammar, context_length
        markers = np.count_nonzero((prompt.ids_T == INPUT) | (prompt.ids_T == OUTPUT))
        self.grid_start = GRID_STRIDE * (int(markers) - 1) if grammar.format.positions == "grid" else None
        # Of each node. Parents come before their children.
        self.parents, self.ids, self.states, self.positions = [-1], [-1], [Grammar.START], [len(prompt) - 1]
        self.depths = [0]
        self.columns = [-1]  # of the cache; -1: not cached. That of the prompt is its last one
        self.run_starts = [0]  # the oldest ancestor from which on columns are consecutive
        self.known = [False]
        self.greedy = [-1]  # the most probable legal id after it
        self.log_probabilities_NV = np.zeros((64, VOCABULARY), dtype=np.float32)  # of the id after it
        self._children: dict[tuple[int, int], int] = {}
        self.used = 0  # columns
        self.path: list[int] = [0]  # nodes of greedy decoding so far, the prompt first
        self.cut = False  # whether the path ended at the end of the context

    def child(self, node: int, token: int) -> int | None:
        """The node of a legal id after `node`, made if need be; None: it would lie beyond the context."""
        found = self._children.get((node, token))
        if found is not None:
            return found
        state, offset = self.grammar.step(self.states[node], token)
        depth = self.depths[node] + 1
        position = len(self.prompt) + depth - 1 if self.grid_start is None else self.grid_start + offset
        if position >= self.context_length:
            return None
        found = self._children[node, token] = len(self.ids)
        for column, value in (
            (self.parents, node),
            (self.ids, token),
            (self.states, state),
            (self.positions, position),
            (self.depths, depth),
            (self.columns, -1),
            (self.run_starts, found),
            (self.greedy, -1),
        ):
            column.append(value)
        self.known.append(False)
        return found

    def walk(self, ids: Iterable[int], start: int = 0) -> list[int]:
        """The nodes from `start` on along legal ids, `start` first; it ends early where the context does."""
        nodes = [start]
        for token in ids:
            following = self.child(nodes[-1], token)
            if following is None:
                break
            nodes.append(following)
        return nodes

    def ended(self, node: int) -> bool:
        return self.ids[node] == END

    def ids_to(self, node: int) -> tuple[int, ...]:
        """The reply that ends at a node."""
        ids = []
        while node:
            ids.append(self.ids[node])
            node = self.parents[node]
        return tuple(reversed(ids))

    def log_probability(self, nodes: Sequence[int]) -> float:
        """Of the ids of a walk from the prompt on, whose nodes but the last are known, nats."""
        ids = [self.ids[node] for node in nodes[1:]]
        return float(self.log_probabilities_NV[nodes[:-1], ids].sum(dtype=np.float64))

    def record(self, nodes: Sequence[int], log_probabilities_TV: np.ndarray) -> None:
        """Stores the model's next-id log-probabilities after these nodes; they are known from now on."""
        while len(self.log_probabilities_NV) < len(self.ids):
            self.log_probabilities_NV = np.concatenate(
                (self.log_probabilities_NV, np.zeros_like(self.log_probabilities_NV))
            )
        legal_TV = self.grammar.legal_SV[[self.states[node] for node in nodes]]
        greedy_T = np.where(legal_TV, log_probabilities_TV, -np.inf).argmax(-1)  # of equals, the lowest id
        for t, (node, greedy) in enumerate(zip(nodes, greedy_T.tolist(), strict=True)):
            if not self.known[node]:  # a second time it would differ by rounding
                self.known[node], self.greedy[node] = True, greedy
                self.log_probabilities_NV[node] = log_probabilities_TV[t]

    def advance(self) -> bool:
        """Takes the greedy path as far as it is known. Whether it has come to its end."""
        tip = self.path[-1]
        while self.known[tip] and not self.cut:
            following = self.child(tip, self.greedy[tip])
            self.cut = following is None
            if following is not None:
                self.path.append(tip := following)
        return self.cut or self.ended(tip)

    @property
    def prompt_is_cached(self) -> bool:
        return self.columns[0] >= 0

    def assign_prompt_columns(self) -> None:
        self.columns[0] = len(self.prompt) - 1
        self.used = len(self.prompt)

    def assign_columns(self, nodes: Sequence[int]) -> None:
        """Nodes get the next free columns, in this order; parents come first."""
        for node in nodes:
            parent = self.parents[node]
            self.columns[node] = self.used
            self.run_starts[node] = (
                self.run_starts[parent] if self.columns[parent] == self.used - 1 and parent else node
            )
            self.used += 1

    def free_columns_from(self, column: int) -> None:
        """Columns from `column` on are free again: what is written next overwrites them."""
        if column >= self.used:
            return
        self.used = column
        self.columns = [-1 if place >= column else place for place in self.columns]

    def nodes_to_run(self, nodes: Iterable[int]) -> list[int]:
        """The nodes that a pass must run for `nodes` to become known: they and uncached ancestors, parents first.

        The prompt is not among them.
        """
        found: set[int] = set()
        for node in nodes:
            if self.known[node]:
                continue
            while node and node not in found and (self.columns[node] < 0):
                found.add(node)
                node = self.parents[node]
        return sorted(found)

    def mark_visible(self, node: int, seen_R: np.ndarray) -> None:
        """Sets the mask of one query: the cached columns of a node and its ancestors. [R] bool."""
        while node:
            oldest = self.run_starts[node]
            seen_R[self.columns[oldest] - len(self.prompt) : self.columns[node] + 1 - len(self.prompt)] = True
            node = self.parents[oldest]
