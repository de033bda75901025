import logging

import numpy as np
import pytest
import torch
from checkpoints import KINDS, make_lm
from plain_decoding import answers, flip_prompts, plainly, with_short_replies
from toys import FORMATS, TOY, flip_task, random_adapter

from arc_solver.config import AdaptConfig, FormatConfig
from arc_solver.decoding.engine import DecodingStats, needed_context_length
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.models.kv_cache import bytes_per_token
from arc_solver.models.model import ATTENTION, Model, new_model, prepare_transformers
from arc_solver.puzzles.encode import (
    END,
    NEWLINE,
    NUMBER,
    VOCABULARY,
    Cursor,
    decode_reply,
    encode_prompt,
    longest_reply,
)
from arc_solver.solving.adapt import adapt


@pytest.fixture(scope="module", params=FORMATS, ids=lambda f: f"{f.positions}-{f.shape_header:d}{f.row_numbers:d}")
def case(request):
    """A model, prompts, and what plain decoding gives for them."""
    model = with_short_replies(Model(new_model(TOY, request.param, seed=1).lm.eval(), request.param, None))
    prompts = flip_prompts(np.random.default_rng(3), request.param, 6)
    return model, prompts, [plainly(model, prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def one_case():
    """The same, in the default format."""
    model = with_short_replies(Model(new_model(TOY, FormatConfig(), seed=1).lm.eval(), FormatConfig(), None))
    prompts = flip_prompts(np.random.default_rng(3), FormatConfig(), 7)
    return model, prompts, [plainly(model, prompt) for prompt in prompts]


def assert_same(replies, expected):
    """`expected`: ids and log-probability of each."""
    assert [reply.ids for reply in replies] == [ids for ids, _ in expected]
    for reply, (_, total) in zip(replies, expected, strict=True):
        assert reply.log_probability == pytest.approx(total, abs=1e-3)


def wrong_drafts(ids, rng):
    """Drafts that are wrong, each in another way."""
    cells = [list(row) for row in np.split(ids, np.flatnonzero(np.equal(ids, NEWLINE)) + 1)]
    middle = [*ids[: len(ids) // 2], (ids[len(ids) // 2] + 1) % 10, *ids[len(ids) // 2 + 1 :]]
    wider = [int(i) for row in cells for i in ([*row[:-1], 3, NEWLINE] if row[-1] == NEWLINE else row)]
    narrower = [int(i) for row in cells for i in ([*row[1:]] if len(row) > 2 else row)]
    return {
        "wrong in the middle": middle,
        "wider": wider,
        "narrower": narrower,
        "taller": [*ids[:-1], *ids],
        "lower": [int(i) for row in cells[1:] for i in row],
        "rubbish": rng.integers(0, VOCABULARY, size=40).tolist(),
        "one colour": [7] * 100,
        "cut": list(ids[: len(ids) // 2]),
        "empty": [],
    }


def test_batches_equal_plain_greedy_decoding(case):
    short, prompts, expected = case
    for batch_tokens in (1, 100, 10_000):
        replies, _ = answers(TorchEngine(short, batch_tokens), prompts)
        assert_same(replies, expected)
    assert len({len(reply.ids) for reply in replies}) > 1
    assert all(isinstance(decode_reply(reply.ids, short.format), np.ndarray) for reply in replies)


def test_right_drafts_are_verified_in_one_pass(case):
    short, prompts, expected = case
    drafts = {i: ids for i, (ids, _) in enumerate(expected)}
    replies, cost = answers(TorchEngine(short, 10_000), prompts, drafts)
    assert_same(replies, expected)
    length = sum(map(len, drafts.values()))
    assert (cost.forward_steps, cost.decoded, cost.drafted, cost.accepted) == (1, length, length, length)
    assert cost.tokens == sum(map(len, prompts)) + length - len(prompts)  # nothing comes after END


def test_wrong_drafts_change_no_reply(case, rng):
    short, prompts, expected = case
    prompts, expected = prompts[:5], expected[:5]
    of_each = [wrong_drafts(ids, rng) for ids, _ in expected]
    for kind in of_each[0]:
        drafts = {i: of_each[i][kind] for i in range(len(prompts) - 1)}  # one has none
        for batch_tokens in (150, 10_000):
            replies, cost = answers(TorchEngine(short, batch_tokens), prompts, drafts)
            assert_same(replies, expected)
            assert cost.accepted <= cost.drafted


def test_noisy_drafts_save_steps(one_case, rng):
    """One wrong cell costs a few passes and not all that are left."""
    short, prompts, expected = one_case
    drafts = {i: wrong_drafts(ids, rng)["wrong in the middle"] for i, (ids, _) in enumerate(expected)}
    _, plain_cost = answers(TorchEngine(short, 10_000), prompts)
    _, cost = answers(TorchEngine(short, 10_000), prompts, drafts)
    assert cost.forward_steps < plain_cost.forward_steps / 2


def random_lm(kind) -> Model:
    """An architecture of the hub, over our ids; norms and biases random."""

    class OurIds:
        def __len__(self):
            return VOCABULARY

        def convert_tokens_to_ids(self, token):
            return END

    prepare_transformers()
    lm = make_lm(kind, OurIds(), tied=False, seed=0)
    lm.set_attn_implementation(ATTENTION)
    return with_short_replies(Model(lm.eval(), FormatConfig(positions="token"), None))


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_decodes_as_it_does_plainly(kind, rng):
    model = random_lm(kind)
    prompts = flip_prompts(rng, model.format, 4)
    expected = [plainly(model, prompt) for prompt in prompts]
    drafts = {i: wrong_drafts(ids, rng)["wrong in the middle"] for i, (ids, _) in enumerate(expected)}
    assert_same(answers(TorchEngine(model, 10_000), prompts)[0], expected)
    replies, cost = answers(TorchEngine(model, 10_000), prompts, drafts)
    assert_same(replies, expected)
    held = max(len(prompt) + len(ids) for prompt, (ids, _) in zip(prompts, expected, strict=True))
    assert cost.cache_bytes >= held * bytes_per_token(model)
    assert cost.cache_bytes % bytes_per_token(model) == 0


def test_an_adapted_model_decodes_as_it_does_plainly(toy_model, rng):
    from arc_solver.models.adapters import attach_adapters

    task = flip_task(rng)
    adapter = adapt([task], toy_model, AdaptConfig(steps=30, rank=4, lr=2e-2), [rng])[0].adapter
    prompts = [encode_prompt(task.train[i:], task.test[0], toy_model.format) for i in range(3)]
    with attach_adapters(toy_model, [adapter]):
        expected = [plainly(toy_model, prompt) for prompt in prompts]
    drafts = {0: expected[0][0], 1: expected[0][0]}
    replies, _ = answers(TorchEngine(toy_model, 10_000), prompts, drafts, [adapter] * 3)
    assert_same(replies, expected)


def test_the_adapter_is_used_and_taken_off(toy_model, rng):
    prompts = flip_prompts(rng, toy_model.format, 2)
    engine, adapter = TorchEngine(toy_model, 10_000), random_adapter(toy_model, 3)
    bare, adapted, again = (answers(engine, prompts, adapters=a)[0] for a in (None, [adapter] * 2, None))
    assert [r.log_probability for r in bare] == [r.log_probability for r in again]
    assert [r.ids for r in bare] == [r.ids for r in again]
    assert [r.log_probability for r in adapted] != [r.log_probability for r in bare]


def test_adapters_share_a_session_and_keep_apart(one_case):
    """Rows that end at different times, prompts in any order, drafts for some."""
    short, prompts, expected = one_case
    prompts, expected = prompts[:7], expected[:7]
    adapters = [random_adapter(short, seed) for seed in range(3)]
    mine = [adapters[i] for i in (2, 0, 1, 0, 2, 2, 0)]
    engine = TorchEngine(short, 10_000)
    alone = [answers(engine, [prompt], adapters=[a])[0][0] for prompt, a in zip(prompts, mine, strict=True)]
    expected = [(reply.ids, reply.log_probability) for reply in alone]
    for batch_tokens in (150, 10_000):
        replies, _ = answers(TorchEngine(short, batch_tokens), prompts, {1: alone[0].ids, 4: alone[4].ids}, mine)
        assert_same(replies, expected)
    with pytest.raises(AssertionError, match="cannot share"), engine.open_session(prompts[:2], [adapters[0], None]):
        pass


def test_rows_are_asked_in_any_order_and_again(one_case):
    short, prompts, expected = one_case
    prompts, expected = prompts[:6], expected[:6]
    with TorchEngine(short, 10_000).open_session(prompts, [None] * 6) as session:
        for rows in ([4], [5, 0, 4], [3, 2, 1, 0], [2, 2]):
            assert_same(session.generate(rows), [expected[i] for i in rows])
        cost = DecodingStats(**vars(session.cost))
        session.generate(range(6), {0: [[1, 2, 3]]})
        assert session.cost == cost  # nothing is asked twice


def test_the_cache_limit_changes_no_answer(one_case):
    short, prompts, expected = one_case
    prompts, expected = prompts[:6], expected[:6]
    replies = [[ids for ids, _ in expected[:3]]] * 6
    found = []
    for cache_bytes in (1, 3 * 1100 * bytes_per_token(short), 1 << 30):
        with TorchEngine(short, 10_000, cache_bytes).open_session(prompts, [None] * 6) as session:
            assert_same(session.generate(range(3)), expected[:3])
            assert_same(session.generate(range(6), {5: [expected[0][0], expected[1][0]]}), expected)
            scores = session.score(replies)
            found.append([s.log_probability for of_row in scores for s in of_row])
            if cache_bytes == 1:
                assert len(session.batches) == 6
                assert sum(batch.cache.bytes > 0 for batch in session.batches) == 1
    assert found[0] == pytest.approx(found[2], abs=1e-3)
    assert found[1] == pytest.approx(found[2], abs=1e-3)


def test_costs_of_a_case_worked_by_hand(rng):
    """A model that prefers END to a newline to the colour 3, whatever it has seen."""
    model = random_lm("qwen2")
    with torch.no_grad():
        head = model.lm.get_output_embeddings()
        head.weight.zero_()
        head.bias.zero_()
        head.bias[3], head.bias[NEWLINE], head.bias[END] = 1, 2, 3  # as soon as it may: one cell, newline, end
    prompts = flip_prompts(rng, model.format, 2)
    replies, cost = answers(TorchEngine(model, 10_000), prompts)
    assert [reply.ids for reply in replies] == [(3, NEWLINE, END)] * 2
    together = sum(map(len, prompts))
    seen = (cost.forward_steps, cost.tokens, cost.decoded, cost.drafted, cost.accepted)
    assert seen == (3, together + 4, 6, 0, 0)  # the prompts, the cells, the newlines
    logits = torch.zeros(VOCABULARY)
    logits[[3, NEWLINE, END]] = torch.tensor([1.0, 2.0, 3.0])
    total = torch.log_softmax(logits, 0)[[3, NEWLINE, END]].sum().item()
    assert replies[0].log_probability == pytest.approx(total, abs=1e-5)
    _, cost = answers(TorchEngine(model, 10_000), prompts, {0: [3, 3, NEWLINE, END]})
    # All of the draft in one pass, and its first id was right. The newline that is wanted instead is no draft's.
    # Then the draft goes on: a row of one cell, so a newline; the second row of the draft is none, so the end.
    assert (cost.drafted, cost.accepted) == (5, 2)


class Small:
    """A model whose memory runs out above so many ids in a pass."""

    def __init__(self, model: Model, most: int):
        self.model, self.most, self.failures = model, most, 0
        self.lm, self.format, self.device = model.lm, model.format, model.device

    def logits(self, ids_BT, positions_BT, **attention):
        if ids_BT.numel() > self.most:
            self.failures += 1
            raise torch.OutOfMemoryError("no memory")
        return self.model.logits(ids_BT, positions_BT, **attention)


def test_less_is_computed_at_a_time_when_memory_runs_out(one_case, caplog):
    short, prompts, expected = one_case
    longest = max(map(len, prompts)) + max(len(ids) for ids, _ in expected)
    small = Small(short, longest + 10)
    drafts = {i: ids for i, (ids, _) in enumerate(expected)}
    with caplog.at_level(logging.WARNING):
        replies, _ = answers(TorchEngine(small, 10_000), prompts, drafts)
    assert_same(replies, expected)
    assert small.failures > 0
    assert "out of memory" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        answers(TorchEngine(Small(short, 10), 10_000), prompts)


@pytest.mark.parametrize("positions", ["token", "grid"])
def test_replies_end_where_the_context_does(positions, rng):
    model = random_lm("qwen3")
    model = Model(model.lm, FormatConfig(positions=positions), None)
    with torch.no_grad():
        model.lm.get_output_embeddings().bias[[NEWLINE, END]] = 6
    (prompt,) = flip_prompts(rng, model.format, 1)
    (whole, _) = plainly(model, prompt)
    assert whole.index(NEWLINE) > 2
    assert len(whole) > 6
    context = len(prompt) + 5 if positions == "token" else int(prompt.positions_T[-1]) + 3
    model.lm.config.max_position_embeddings = context
    engine = TorchEngine(model, 10_000)
    assert engine.context_length == context < needed_context_length(prompt, model.format)
    (reply,), _ = answers(engine, [prompt], {0: whole})
    assert reply.ids == whole[: len(reply.ids)]
    assert END not in reply.ids
    assert len(reply.ids) == 5 if positions == "token" else len(reply.ids) < len(whole)
    with engine.open_session([prompt], [None]) as session:
        assert session.score([[whole]])[0][0].log_probability == -np.inf
        found = session.search(1e-9, 50)[0].replies
    assert all(len(reply.ids) <= 5 and positions == "token" for reply in found)  # END has the last position of a grid


def test_the_needed_context_is_that_of_the_largest_reply(any_format, rng):
    (prompt,) = flip_prompts(rng, any_format, 1)
    cursor, last = Cursor(prompt, any_format), 0
    for step in range(longest_reply(any_format)):
        legal = np.flatnonzero(cursor.legal())
        token = int(max(legal)) if NUMBER + 30 in legal else int(min(legal))  # the largest header, then cells
        position = cursor.take(token)
        last = max(last, position if any_format.positions == "grid" else len(prompt) + step)
    assert cursor.done
    assert last + 1 == needed_context_length(prompt, any_format)
