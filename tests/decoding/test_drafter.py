import numpy as np
import pytest
from toys import FORMATS

from arc_solver.config import FormatConfig
from arc_solver.decoding.drafter import CopyCell, Drafter, copy_above, copy_left
from arc_solver.decoding.token_tree import Grammar, TokenTree
from arc_solver.puzzles.encode import END, NEWLINE, VOCABULARY, encode_prompt, encode_reply
from arc_solver.puzzles.tasks import Pair, make_grid

GRID = make_grid([[1, 2, 2], [1, 3, 3]], "grid")


def tree_of(pairs, test_input, format=FormatConfig()):  # noqa: B008
    return TokenTree(encode_prompt(pairs, test_input, format), Grammar(format), 32_768)


def decode(tree, ids):
    """Makes these ids the greedy path."""
    for node, token in zip(tree.walk(ids), ids, strict=False):
        logits_V = np.full((1, VOCABULARY), -9.0, dtype=np.float32)
        logits_V[0, token] = 0
        tree.record([node], logits_V)
    tree.advance()


def guessed(drafter, most=np.inf):
    return [drafter.tree.ids[node] for node in drafter.draft(most)]


def noise(rng, shape=(4, 5)):
    return make_grid(rng.integers(0, 10, size=shape).tolist(), "noise")


def different(rng):
    """Demonstrations of which no rule is right often."""
    return [Pair(noise(rng), noise(rng, (3, 4))) for _ in range(3)]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rules_are_right_where_they_apply(format, rng):
    """Every id of a reply, guessed from those before it: the same grid always, the others where they hold."""
    grid = noise(rng, (5, 4))
    tree = tree_of(different(rng), GRID, format)
    ids = encode_reply(grid, format).tolist()
    same = CopyCell(ids)
    cells = [[], []]
    for node, (t, token) in zip(tree.walk(ids), enumerate(ids), strict=False):
        cursor = tree.grammar.cursors[tree.states[node]]
        assert same(cursor) == token
        if token < NEWLINE:
            cells[0].append(copy_above(cursor, ids[:t]))
            cells[1].append(copy_left(cursor, ids[:t]))
    assert cells[0] == [None] * 4 + grid[:-1].ravel().tolist()
    assert [c for i, c in enumerate(cells[1]) if i % 4] == grid[:, :-1].ravel().tolist()


def test_a_draft_is_followed_to_the_end_and_on_after_what_it_had_wrong(rng):
    tree, ids = tree_of(different(rng), GRID), encode_reply(noise(rng, (6, 6)), FormatConfig()).tolist()
    assert guessed(Drafter(tree, [ids])) == ids
    assert guessed(Drafter(tree, [ids, ids, ids]), 7) == ids[:7]
    drafter = Drafter(tree, [ids])
    wrong = (ids[1] + 1) % 10
    decode(tree, [ids[0], wrong])
    rest = guessed(drafter)
    assert 0 < len(rest) < len(ids) - 2  # it is trusted less now
    assert rest == ids[2 : 2 + len(rest)]


def test_drafts_are_trusted_as_far_as_they_agree(rng):
    tree = tree_of(different(rng), GRID)
    grids = [noise(rng, (8, 8)) for _ in range(3)]
    replies = [encode_reply(grid, FormatConfig()).tolist() for grid in grids]
    assert guessed(Drafter(tree, replies)) == []
    almost = np.array(grids[0])
    almost[7, 7] = (almost[7, 7] + 1) % 10
    near = encode_reply(make_grid(almost.tolist(), "near"), FormatConfig()).tolist()
    chain = guessed(Drafter(tree, [replies[1], replies[0], near, replies[0]]))
    assert len(chain) > 0
    assert chain == replies[0][: len(chain)]


@pytest.mark.parametrize("rule", ["input", "above", "left"])
def test_what_the_demonstrations_do_is_guessed_without_drafts(rule, rng):
    def output(grid):
        rows = {"input": grid, "above": np.tile(grid[:1], (4, 1)), "left": np.tile(grid[:, :1], (1, 5))}[rule]
        return make_grid(rows.tolist(), rule)

    pairs = [Pair(grid, output(grid)) for grid in (noise(rng) for _ in range(3))]
    asked = noise(rng)
    ids = encode_reply(output(asked), FormatConfig()).tolist()
    tree = tree_of(pairs, asked)
    known = {"input": 0, "above": 6, "left": 1}[rule]
    drafter = Drafter(tree, [])
    decode(tree, ids[:known])
    chain = guessed(drafter)
    most = {"input": len(ids), "above": len(ids) - known - 1, "left": 5}[rule]  # below, it is wrong sooner or later
    assert chain[: most if rule != "left" else 4] == ids[known : known + (most if rule != "left" else 4)]


def test_the_rule_that_was_right_lately_is_followed(rng):
    """Neither the demonstrations nor the drafts say so: the record of this reply does."""
    tree = tree_of(different(rng), GRID)
    ids = encode_reply(make_grid([[7, 7, 7, 7]] * 6, "one colour"), FormatConfig()).tolist()
    drafter = Drafter(tree, [encode_reply(noise(rng, (6, 4)), FormatConfig()).tolist() for _ in range(2)])
    assert guessed(drafter) == []
    decode(tree, ids[:14])
    chain = guessed(drafter)
    assert len(chain) >= 5
    assert chain == ids[14 : 14 + len(chain)]


def test_without_drafts_only_what_must_come_is_guessed(rng):
    tree = tree_of([Pair(GRID, GRID)] * 2, GRID)
    ids = encode_reply(GRID, FormatConfig()).tolist()
    drafter = Drafter(tree, None)
    assert guessed(drafter) == []
    decode(tree, ids[:7])  # all of the second row
    assert guessed(drafter) == [NEWLINE]


def test_whatever_the_draft_only_legal_ids_are_guessed(rng):
    for draft in ([END, END], [NEWLINE] * 5, [63] * 9, rng.integers(0, VOCABULARY, size=200).tolist(), []):
        tree = tree_of(different(rng), GRID)
        nodes = Drafter(tree, [draft]).draft(np.inf)
        assert len(tree.walk([tree.ids[node] for node in nodes])) == len(nodes) + 1
