"""How a reply may go on, guessed without the model, for the model to verify (speculative decoding).

Other views' answers are drafts of this one's, and where they are wrong most of their cells are right. Besides, a cell
is often that of the test input, the one above, or the one to the left. Each of these is a rule. Of those that know a
legal id, the one that was right most often lately is followed, and as far as all of the chain is likely to be right.
How often a rule is right to begin with, the demonstrations tell, and for drafts how much they agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..puzzles import END, INPUT, MAX_SIDE, NEWLINE, NUMBER, OUTPUT, Cursor
from .token_tree import Grammar, TokenTree

LIKELY = 0.4  # probability that a whole chain of guesses is right, at least
RECENT = 0.2  # weight of the last id in a rule's record
LONGEST = 15  # guesses in a pass after the first, in which all rows are padded to the longest

Rule = Callable[[Cursor, Sequence[int]], int | None]  # place in the reply, its ids so far -> the id that is next


class CopyCell:
    """A rule: the same cell of another grid, whatever the two sizes, and its ends of rows and of the grid."""

    def __init__(self, ids: Sequence[int]):
        """`ids` is any sequence. What can be made out of its rows of cells is used, and nothing else."""
        self.rows: list[list[int]] = [[]]
        for token in ids:
            if token == NEWLINE:
                self.rows.append([])
            elif token < NEWLINE:
                self.rows[-1].append(token)
        self.rows = [row[:MAX_SIDE] for row in self.rows if row][:MAX_SIDE]

    def __call__(self, cursor: Cursor, _: Sequence[int] = ()) -> int | None:
        if not self.rows:
            return None
        if cursor.config.shape_header and cursor.taken < 2:
            return NUMBER + (len(self.rows[0]) if cursor.taken else len(self.rows))
        if cursor.row >= len(self.rows):
            return END if cursor.row == len(self.rows) else None
        if cursor.needs_number:
            return NUMBER + cursor.row + 1
        row = self.rows[cursor.row]
        if cursor.column < len(row):
            return row[cursor.column]
        return NEWLINE if cursor.column == len(row) else None

    def agrees(self, other: "CopyCell") -> float:
        """Share of cells that are equal; 0 for grids of different shapes."""
        if [len(row) for row in self.rows] != [len(row) for row in other.rows] or not self.rows:
            return 0.0
        pairs = [(a, b) for mine, of in zip(self.rows, other.rows, strict=True) for a, b in zip(mine, of, strict=True)]
        return float(np.mean([a == b for a, b in pairs]))


def copy_above(cursor: Cursor, ids: Sequence[int]) -> int | None:
    """A rule: the cell above."""
    if cursor.width is None or cursor.row == 0 or cursor.column >= cursor.width or cursor.needs_number:
        return None
    return ids[-cursor.width - 1 - cursor.config.row_numbers]


def copy_left(cursor: Cursor, ids: Sequence[int]) -> int | None:
    """A rule: the cell to the left."""
    return ids[-1] if cursor.column else None


@dataclass(eq=False)
class _Trusted:
    rule: Rule
    trust: float  # how often it is right

    def note(self, right: bool) -> None:
        self.trust += RECENT * (right - self.trust)


class Drafter:
    """Guesses how the greedy reply of a tree goes on.

    Args:
        drafts: guesses of the reply, any ids. None: only ids that are the only legal ones are guessed.
    """

    def __init__(self, tree: TokenTree, drafts: Sequence[Sequence[int]] | None):
        self.tree = tree
        self.recorded = 1  # nodes of the path that the record covers; the prompt is the first
        self.rules = [] if drafts is None else [*_of_drafts(drafts), *_of_prompt(tree)]

    def draft(self, most: float, node: int | None = None) -> list[int]:
        """Drafts nodes likely to follow `node` on the greedy path, for the model to verify; END may be the last.

        Args:
            node: what they follow, if not the end of the greedy path.
        """
        self._record()
        tree = self.tree
        node = tree.path[-1] if node is None else node
        nodes: list[int] = []
        ids, likely = list(tree.ids_to(node)), 1.0
        ranked = sorted(self.rules, key=lambda trusted: -trusted.trust)
        while len(nodes) < most and not tree.ended(node):
            token, trust = self._guess(ranked, tree.states[node], ids)
            likely *= trust
            following = tree.child(node, token) if token is not None and likely >= LIKELY else None
            if following is None:
                break
            ids.append(tree.ids[following])
            nodes.append(node := following)
        return nodes

    def _guess(self, ranked: Sequence[_Trusted], state: int, ids: Sequence[int]) -> tuple[int | None, float]:
        """The id that is likely next, and how likely it is."""
        if (forced := self.tree.grammar.forced[state]) is not None:
            return forced, 1.0
        for trusted in ranked:
            if (token := _legal(trusted.rule, self.tree.grammar, state, ids)) is not None:
                return token, trusted.trust
        return None, 0.0

    def _record(self) -> None:
        """Looks how right each rule would have been about what has been decoded since."""
        tree = self.tree
        path = tree.path
        if not self.rules or self.recorded == len(path):
            return
        ids = list(tree.ids_to(path[-1]))
        for depth in range(self.recorded, len(path)):
            state, token, before = tree.states[path[depth - 1]], ids[depth - 1], ids[: depth - 1]
            if tree.grammar.forced[state] is not None:
                continue
            for trusted in self.rules:
                guess = _legal(trusted.rule, tree.grammar, state, before)
                if guess is not None:
                    trusted.note(guess == token)
        self.recorded = len(path)


def _legal(rule: Rule, grammar: Grammar, state: int, ids: Sequence[int]) -> int | None:
    token = rule(grammar.cursors[state], ids)
    return token if token is not None and grammar.legal_SV[state, token] else None


def _of_drafts(drafts: Sequence[Sequence[int]]) -> list[_Trusted]:
    """The distinct ones, each trusted as far as the others agree with it."""
    rules = [CopyCell(draft) for draft in drafts]
    distinct = {str(rule.rows): i for i, rule in reversed(list(enumerate(rules)))}
    trusted = []
    for i in sorted(distinct.values()):
        agreement = [rules[i].agrees(other) for j, other in enumerate(rules) if j != i]
        trusted.append(_Trusted(rules[i], float(np.mean(agreement)) if agreement else 1.0))
    return trusted


def _of_prompt(tree: TokenTree) -> list[_Trusted]:
    """The rules that need no draft, trusted as far as they are right about the outputs of the demonstrations.

    A prompt may be any ids; what is no grid is passed over.
    """
    ids = tree.prompt.ids_T
    grids = [CopyCell(part.tolist()) for part in np.split(ids, np.flatnonzero((ids == INPUT) | (ids == OUTPUT)))[1:-1]]
    *shown, asked = grids or [CopyCell(())]
    outputs = [np.array(grid.rows) for grid in shown[1::2] if len({len(row) for row in grid.rows}) == 1]
    copied = [given.agrees(output) for given, output in zip(shown[::2], shown[1::2], strict=False)]
    return [
        _Trusted(asked, _mean(copied)),
        _Trusted(copy_above, _mean([cell for o in outputs for cell in (o[1:] == o[:-1]).ravel()])),
        _Trusted(copy_left, _mean([cell for o in outputs for cell in (o[:, 1:] == o[:, :-1]).ravel()])),
    ]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
