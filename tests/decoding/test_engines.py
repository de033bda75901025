"""What every engine must do, asked through the protocol alone and compared with decoding that does nothing clever."""

import math
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_decoding import (
    FORMAT,
    HEADS,
    MAKERS,
    Plain,
    Served,
    opinionated_model,
    prompts_of,
    same_start,
    serve,
    some_adapters,
)
from toys import random_grid

from arc_solver.models.adapters import Adapter
from arc_solver.models.model import Model
from arc_solver.puzzles.encode import END, Prompt, encode_reply

ENGINES = [
    "torch",
    pytest.param("vllm", marks=pytest.mark.vllm),
]


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=HEADS)
def any_model(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Served:
    return serve(kind, request.param, tmp_path)


@pytest.fixture
def llama(kind: str, tmp_path: Path) -> Served:
    return serve(kind, "Llama", tmp_path)


def test_greedy_replies_are_those_of_plain_decoding(any_model):
    """Under several adapters in one session, and bare once they are gone."""
    model, engine = any_model.model, any_model.engine
    prompts, adapters = prompts_of(6), some_adapters(model, 3)
    under = [adapters[i] for i in (0, 1, 2, 0, 1, 0)]
    plain = [Plain(model, prompt, adapter) for prompt, adapter in zip(prompts, under, strict=True)]
    with engine.open_session(prompts, under) as session:
        replies = session.generate([5, 0, 1, 2, 3, 4])
    for reply, reference in zip(replies, (plain[i] for i in (5, 0, 1, 2, 3, 4)), strict=True):
        assert reply.ids == reference.greedy()
        assert reply.log_probability == pytest.approx(reference.log_probability(reply.ids), abs=1e-3)
    with engine.open_session(prompts, [None] * 6) as session:
        bare = session.generate(range(6))
    for reply, prompt in zip(bare, prompts, strict=True):
        reference = Plain(model, prompt)
        assert reply.ids == reference.greedy()
        assert reply.log_probability == pytest.approx(reference.log_probability(reply.ids), abs=1e-3)
    assert bare[1].log_probability != pytest.approx(replies[2].log_probability, abs=0.1)
    assert len({reply.ids for reply in (*bare, *replies)}) > 3


def test_scores_are_those_of_plain_decoding(any_model, rng):
    model, engine = any_model.model, any_model.engine
    prompts, under = prompts_of(3), some_adapters(model, 3)
    plain = [Plain(model, prompt, adapter) for prompt, adapter in zip(prompts, under, strict=True)]
    greedy = [reference.greedy() for reference in plain]
    replies = [
        [reply, *(tuple(encode_reply(random_grid(rng, 7), FORMAT).tolist()) for _ in range(3))] for reply in greedy
    ]
    with engine.open_session(prompts, under) as session:
        fresh = session.score(replies)
    with engine.open_session(prompts, under) as session:
        session.generate([0, 2])
        after = session.score(replies)
    for scores in (fresh, after):
        for row, reference in enumerate(plain):
            for reply, score in zip(replies[row], scores[row], strict=True):
                assert score.log_probability == pytest.approx(reference.log_probability(reply), abs=1e-3)
                assert score.agreed == same_start(reply, greedy[row])
    assert {score.agreed for mine in fresh for score in mine} > {0}


def test_the_search_finds_what_trying_everything_finds(any_model):
    model, engine = any_model.model, any_model.engine
    prompts, under, threshold = prompts_of(4), some_adapters(model, 2) * 2, 1e-3
    expected = [Plain(model, p, adapter).probable(threshold) for p, adapter in zip(prompts, under, strict=True)]
    assert max(map(len, expected)) > 2
    for known in ((), (0, 3)):
        with engine.open_session(prompts, under) as session:
            session.generate(known)
            found = session.search(threshold, max_nodes=2000)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.complete
            assert {reply.ids for reply in mine.replies} == set(theirs)
            for reply in mine.replies:
                assert reply.log_probability == pytest.approx(theirs[reply.ids], abs=1e-3)
            probabilities = [reply.log_probability for reply in mine.replies]
            assert probabilities == sorted(probabilities, reverse=True)


def test_a_search_that_the_cap_ends_says_so(llama):
    prompts = prompts_of(2)
    with llama.engine.open_session(prompts, [None, None]) as session:
        whole = session.search(1e-3, max_nodes=2000)
    with llama.engine.open_session(prompts, [None, None]) as session:
        part = session.search(1e-3, max_nodes=4)
    for some, every in zip(part, whole, strict=True):
        assert (some.complete, every.complete) == (False, True)
        assert {reply.ids for reply in some.replies} < {reply.ids for reply in every.replies}


def test_drafts_change_no_answer(llama):
    prompts, under = prompts_of(6), some_adapters(llama.model, 2) * 3
    with llama.engine.open_session(prompts, under) as session:
        plain = session.generate(range(6))
        assert session.cost.drafted == session.cost.accepted == 0
    replies = [reply.ids for reply in plain]
    drafts = {
        0: [replies[0]],
        1: [replies[1][: len(replies[1]) // 2], replies[1]],
        2: [(*replies[2][:-1], *encode_reply(np.zeros((2, 3), dtype=np.uint8), FORMAT).tolist())],
        3: [(END, 5)],  # illegal
        4: [replies[0], replies[0], replies[3]],
        5: [],
    }
    with llama.engine.open_session(prompts, under) as session:
        drafted = session.generate(range(6), drafts)
        assert len(replies[0]) <= session.cost.accepted <= session.cost.drafted
    assert [reply.ids for reply in drafted] == replies
    for ours, theirs in zip(drafted, plain, strict=True):
        assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-3)


def test_costs_are_counted_and_what_is_known_costs_nothing(llama):
    prompts, told = prompts_of(3), []
    with llama.engine.open_session(prompts, [None] * 3) as session:
        assert session.cost.forward_steps == session.cost.tokens == session.cost.decoded == 0
        llama.engine.on_step = told.append
        replies = session.generate([0, 1])
        cost = copy(session.cost)
        assert cost.forward_steps >= max(len(reply.ids) for reply in replies)
        assert cost.decoded == sum(len(reply.ids) for reply in replies)
        assert cost.tokens >= len(prompts[0]) + len(prompts[1])
        again = session.generate([1, 0])
        scores = session.score([[replies[0].ids], [replies[1].ids], []])
        assert session.cost == cost
        session.generate([2])
        assert session.cost.forward_steps > cost.forward_steps
        assert session.cost.tokens > cost.tokens
        assert sum(told) == session.cost.tokens, "what is told at every step is not what went through"
    assert [reply.ids for reply in again] == [reply.ids for reply in reversed(replies)]
    for (score,), reply in zip(scores[:2], replies, strict=True):
        assert score.log_probability == pytest.approx(reply.log_probability, abs=1e-3)
        assert score.agreed == len(reply.ids)


def test_a_reply_is_cut_where_the_context_ends(llama, rng):
    room = 2
    ids_T = np.resize(prompts_of(3)[2].ids_T, llama.engine.context_length - room)
    prompt = Prompt(ids_T, np.arange(len(ids_T), dtype=np.int32))
    expected = Plain(llama.model, prompt).greedy(most=room)
    assert END not in expected
    with llama.engine.open_session([prompt], [None]) as session:
        (reply,) = session.generate([0])
        (found,) = session.search(1e-3, max_nodes=500)
        ((scored,),) = session.score([[encode_reply(random_grid(rng), FORMAT).tolist()]])
    assert reply.ids == expected
    assert reply.log_probability == pytest.approx(Plain(llama.model, prompt).log_probability(expected), abs=1e-3)
    assert not found.replies
    assert scored.log_probability == -math.inf


@pytest.fixture
def coarse(kind: str, tmp_path: Path) -> Iterator[Served]:
    model = opinionated_model("Qwen3")
    with torch.no_grad():
        for layer in model.lm.model.layers:  # else rounding in the first grows too much in the second
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
    model.lm.to(torch.bfloat16)
    yield Served(model, MAKERS[kind](model, tmp_path))


def rounded(adapter: Adapter) -> Adapter:
    """Not all engines have adapters in float32."""
    weights = {name: (a.bfloat16().float(), b.bfloat16().float()) for name, (a, b) in adapter.weights.items()}
    return Adapter(adapter.rank, adapter.alpha, weights)


def test_bfloat16_is_near(coarse):
    """The log-probabilities of a reply's ids are those of full precision with the same weights, within 0.02 each."""
    prompts, under = prompts_of(3), [rounded(adapter) for adapter in some_adapters(coarse.model, 3)]
    replies = [encode_reply(pair, FORMAT).tolist() for pair in (np.zeros((2, 2), np.uint8), np.ones((3, 1), np.uint8))]
    with coarse.engine.open_session(prompts, under) as session:
        greedy = session.generate(range(3))
        scores = session.score([replies] * 3)
    exact = Model(coarse.model.lm.to(torch.float32), FORMAT, None)
    for row, (prompt, adapter) in enumerate(zip(prompts, under, strict=True)):
        plain = Plain(exact, prompt, adapter)
        assert greedy[row].log_probability == pytest.approx(
            plain.log_probability(greedy[row].ids), abs=0.02 * len(greedy[row].ids)
        )
        for reply, score in zip(replies, scores[row], strict=True):
            assert score.log_probability == pytest.approx(plain.log_probability(reply), abs=0.02 * len(reply))
