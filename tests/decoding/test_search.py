import itertools
import math

import numpy as np
import pytest
import torch
from plain_decoding import answers, flip_prompts, plainly, with_short_replies
from toys import TOY

from arc_solver.config import FormatConfig
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.models.model import Model, new_model
from arc_solver.puzzles.encode import END, NEWLINE, Cursor, encode_reply

FORMAT = FormatConfig()


@torch.no_grad()
def forced(model: Model, prompt, ids):
    """Log-probability of a reply by one plain pass, and how many of its leading ids are the greedy ones."""
    cursor, positions, legal = Cursor(prompt, model.format), prompt.positions_T.tolist(), []
    for t, token in enumerate(ids):
        legal.append(cursor.legal())
        position = cursor.take(token)
        positions.append(position if model.format.positions == "grid" else len(prompt) + t)
    whole = torch.tensor([[*prompt.ids_T.tolist(), *ids]])
    logits_TV = model.logits(whole, torch.tensor([positions]))[0, len(prompt) - 1 : -1]
    total = logits_TV.log_softmax(-1)[range(len(ids)), ids].sum().item()
    greedy = logits_TV.masked_fill(~torch.from_numpy(np.array(legal)), -torch.inf).argmax(-1).tolist()
    agreed = [a == b for a, b in zip(greedy, ids, strict=True)]
    return total, agreed.index(False) if False in agreed else len(ids)


def all_replies(height: int, width: int):
    """Those of 0 and 1, up to this size."""
    for h, w in itertools.product(range(1, height + 1), range(1, width + 1)):
        for cells in itertools.product((0, 1), repeat=h * w):
            yield tuple(encode_reply(np.array(cells, np.uint8).reshape(h, w), FORMAT).tolist())


@pytest.fixture(scope="module")
def two_colours() -> Model:
    """A model whose replies are small grids of 0 and 1: everything else is next to impossible."""
    model = Model(new_model(TOY, FORMAT, seed=1).lm.eval(), FORMAT, None)
    model = with_short_replies(model)
    with torch.no_grad():
        head = model.lm.get_output_embeddings()
        head.weight[[NEWLINE, END]] *= 0.3
        head.weight *= 0.3
        head.bias.fill_(-30)
        head.bias[[0, 1, NEWLINE, END]] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return model


@pytest.fixture(scope="module")
def brute_force(two_colours):
    """Prompts, and for each the log-probabilities of all replies up to 3 by 2, and of the row of 3."""
    prompts = flip_prompts(np.random.default_rng(0), FORMAT, 3)
    every = [*all_replies(3, 2), *all_replies(1, 3)]
    return prompts, [{ids: forced(two_colours, prompt, ids)[0] for ids in every} for prompt in prompts]


@pytest.mark.parametrize("decoded", [False, True])
def test_search_equals_brute_force(two_colours, brute_force, decoded):
    prompts, scores = brute_force
    for threshold in (0.2, 0.03, 0.002):
        with TorchEngine(two_colours, 10_000).open_session(prompts, [None] * 3) as session:
            if decoded:
                session.generate([0, 2])
            found = session.search(threshold, 100_000)
        for prompt, of_prompt, known in zip(prompts, found, scores, strict=True):
            assert of_prompt.complete
            got = {reply.ids: reply.log_probability for reply in of_prompt.replies}
            small = {ids for ids in got if ids in known}
            assert small == {ids for ids, score in known.items() if score >= math.log(threshold)}
            assert all(score >= math.log(threshold) for score in got.values())
            assert list(got.values()) == sorted(got.values(), reverse=True)
            for ids, score in got.items():
                assert score == pytest.approx(forced(two_colours, prompt, ids)[0], abs=1e-3)
    assert sum(len(of_prompt.replies) for of_prompt in found) > 10


def test_the_cap_is_reported_and_kept(two_colours, rng):
    prompts = flip_prompts(rng, FORMAT, 2)
    with TorchEngine(two_colours, 10_000).open_session(prompts, [None] * 2) as session:
        best = session.generate(range(2))
        whole, *_ = session.search(0.001, 100_000)
    with TorchEngine(two_colours, 10_000).open_session(prompts, [None] * 2) as session:
        few = session.search(0.001, 12)
        assert session.cost.tokens <= sum(map(len, prompts)) + 2 * 12 * (1 + 64)  # ids, and what was guessed after them
    assert whole.complete
    assert not any(found.complete for found in few)
    assert len(few[0].replies) < len(whole.replies)
    assert {r.ids for r in few[0].replies} <= {r.ids for r in whole.replies}
    assert whole.replies[0].log_probability >= best[0].log_probability - 1e-6


def test_search_after_decoding_costs_little(two_colours, rng):
    """Above the runner-up there is only the greedy reply, which is known already."""
    prompts = flip_prompts(rng, FORMAT, 3)
    with TorchEngine(two_colours, 10_000).open_session(prompts, [None] * 3) as session:
        best = session.generate(range(3))
        steps = session.cost.forward_steps
        found = session.search(0.999, 1000)
        assert session.cost.forward_steps == steps
    certain = [reply.log_probability >= math.log(0.999) for reply in best]
    assert [len(of_prompt.replies) for of_prompt in found] == [int(c) for c in certain]


@pytest.mark.parametrize("before", ["nothing", "generate", "generate and search"])
def test_scores_equal_a_plain_pass(before, any_format, rng):
    model = with_short_replies(Model(new_model(TOY, any_format, seed=1).lm.eval(), any_format, None))
    prompts = flip_prompts(rng, any_format, 4)
    grids = [rng.integers(0, 10, size=size, dtype=np.uint8) for size in ((1, 1), (3, 2), (3, 2), (4, 5), (2, 7))]
    replies = [[tuple(encode_reply(g, any_format).tolist()) for g in grids[i:]] for i in range(4)]
    replies[0].append(plainly(model, prompts[0])[0])
    replies[1] = []
    for batch_tokens in (60, 10_000):
        with TorchEngine(model, batch_tokens).open_session(prompts, [None] * 4) as session:
            if before != "nothing":
                session.generate(range(4), {2: replies[2][:1]})
            if before == "generate and search":
                session.search(1e-4, 30)
            steps = session.cost.forward_steps
            scores = session.score(replies)
            first = session.cost.forward_steps
            again = session.score(replies)
            assert session.cost.forward_steps == first > steps
        for prompt, of_row, scored, same in zip(prompts, replies, scores, again, strict=True):
            for ids, s, t in zip(of_row, scored, same, strict=True):
                total, agreed = forced(model, prompt, ids)
                assert s.log_probability == pytest.approx(total, abs=1e-3)
                assert (s.agreed, s.log_probability) == (agreed, t.log_probability)


def test_what_decoding_has_seen_is_scored_for_nothing(two_colours, rng):
    """The greedy replies, and drafts whether they were right or not."""
    prompts = flip_prompts(rng, FORMAT, 3)
    greedy, _ = answers(TorchEngine(two_colours, 10_000), prompts)
    draft = tuple(encode_reply(np.ones((4, 4), np.uint8), FORMAT).tolist())
    with TorchEngine(two_colours, 10_000).open_session(prompts, [None] * 3) as session:
        session.generate(range(3), {i: [draft] for i in range(3)})
        steps = session.cost.forward_steps
        scores = session.score([[reply.ids, draft] for reply in greedy])
        assert session.cost.forward_steps == steps
    for prompt, reply, (own, drafted) in zip(prompts, greedy, scores, strict=True):
        assert (own.log_probability, own.agreed) == (pytest.approx(reply.log_probability, abs=1e-3), len(reply.ids))
        total, agreed = forced(two_colours, prompt, draft)
        assert (drafted.log_probability, drafted.agreed) == (pytest.approx(total, abs=1e-3), agreed)


def test_shared_beginnings_are_scored_once(two_colours, rng):
    prompts = flip_prompts(rng, FORMAT, 1)
    grids = [np.zeros((3, 3), np.uint8) for _ in range(2)]
    grids[1][2, 2] = 1
    with TorchEngine(two_colours, 10_000).open_session(prompts, [None]) as session:
        session.score([[tuple(encode_reply(g, FORMAT).tolist()) for g in grids]])
        # The second shares 10 of its 13 ids; the newline after the other cell is its own, and END is never computed.
        assert session.cost.tokens == len(prompts[0]) + 12 + 2
