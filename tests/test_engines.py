"""What every engine must do, asked through the protocol alone and compared with decoding that does nothing clever."""

import math
import os
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_grid
from test_adapters import random_adapter

from arc_solver.config import AdaptConfig, EngineConfig, FormatConfig, named_rng
from arc_solver.decoding.torch_engine import Engine, TorchEngine
from arc_solver.decoding.vllm_engine import VLLMEngine
from arc_solver.models.adapters import Adapter, attached, fresh_adapter
from arc_solver.models.model import Model, save_model
from arc_solver.puzzles.encode import END, INPUT, NEWLINE, PAD, VOCABULARY, Cursor, Prompt, encode_prompt, encode_reply
from arc_solver.puzzles.tasks import Pair

FORMAT = FormatConfig(positions="token")
CONTEXT = 512
ADAPT = AdaptConfig(rank=3, alpha=6)
HEADS: dict[str, dict[str, Any]] = {  # of 32 each, the least that vLLM can do on a CPU
    "Qwen2": {"num_attention_heads": 3, "num_key_value_heads": 1},  # vLLM reads no head_dim here: width / heads
    "Qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "Llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}


KEPT: list[VLLMEngine] = []


def opinionated_model(architecture: str) -> Model:
    """A stock model that is sure of little and mostly says what is a short grid, or almost: illegal ids are often best.

    Biases, norms and the base of the rotation are not at values that hide mistakes.
    """
    import transformers

    settings = getattr(transformers, f"{architecture}Config")(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        **HEADS[architecture],
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        lm = getattr(transformers, f"{architecture}ForCausalLM")(settings)
        for p in lm.parameters():
            p += 0.1 * torch.randn_like(p)
        embeddings_VH, head_VH = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
        embeddings_VH *= 2
        head_VH *= 1.5
        # Channel 0 is the same everywhere, so the head's column 0 is a bias, which stock models lack.
        embeddings_VH[:, 0] = lm.model.norm.weight[0] = 1
        for layer in lm.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        head_VH[:, 0] = -10
        head_VH[:4, 0], head_VH[[NEWLINE, END], 0], head_VH[INPUT, 0] = 0, 2.6, -1
    return Model(lm.eval(), FORMAT, None)


@dataclass(frozen=True, eq=False)
class Served:
    """An engine with the model that it should answer as."""

    model: Model
    engine: Engine


def make_torch(model: Model, folder: Path) -> Engine:
    return TorchEngine(model, 300)  # so few that prompts go in several batches


def make_vllm(model: Model, folder: Path) -> Engine:
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # or a function of the sampler is compiled, even on the CPU
    config = EngineConfig(kv_cache_gib=1 / 16, max_loras=2, max_sequences=8, step_tokens=128)
    save_model(model, folder)
    return kept(VLLMEngine(model, folder, config, fresh_adapter(model, ADAPT, named_rng(0))))


def kept(engine: VLLMEngine) -> VLLMEngine:
    """The engine, kept to the end: vLLM frees none without harm to the others."""
    KEPT.append(engine)
    return engine


MAKERS = {"torch": make_torch, "vllm": make_vllm}
ENGINES = [
    "torch",
    pytest.param("vllm", marks=pytest.mark.vllm),
]
MODELS: dict[tuple[str, str], Served] = {}


def serve(kind: str, architecture: str, folder: Path) -> Served:
    """Engines are kept: making one costs as much as several tests."""
    if (kind, architecture) not in MODELS:
        model = opinionated_model(architecture)
        MODELS[kind, architecture] = Served(model, MAKERS[kind](model, folder))
    return MODELS[kind, architecture]


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=HEADS)
def any_model(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Served:
    return serve(kind, request.param, tmp_path)


@pytest.fixture
def llama(kind: str, tmp_path: Path) -> Served:
    return serve(kind, "Llama", tmp_path)


def prompts_of(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of different lengths, of which all but the first two share the beginning."""
    rng = np.random.default_rng(seed)
    pairs = [Pair(random_grid(rng, 6), random_grid(rng, 6)) for _ in range(4)]
    inputs = [random_grid(rng, 5) for _ in range(count)]
    return [encode_prompt(pairs[:2] if i < 2 else pairs, given, FORMAT) for i, given in enumerate(inputs)]


def some_adapters(model: Model, count: int) -> list[Adapter]:
    """Adapters that change the answers, but not so much that nothing likely is left; the third is like the first."""
    found = []
    for seed, strength in ((0, 0.3), (6, 0.2), (0, 0.1))[:count]:
        drawn = random_adapter(model, seed, ADAPT)
        weights = {name: (down, up * strength) for name, (down, up) in drawn.weights.items()}
        found.append(Adapter(drawn.rank, drawn.alpha, weights))
    return found


class Plain:
    """The reference: a whole forward pass of one sequence for every id, no cache, no batch."""

    def __init__(self, model: Model, prompt: Prompt, adapter: Adapter | None = None):
        self.model, self.prompt, self.adapter = model, prompt, adapter

    @torch.no_grad()
    def logprobs(self, reply: Sequence[int]) -> np.ndarray:
        """Of what may come at each place of a reply and after it. [T + 1, V]"""
        ids_T = torch.tensor([*self.prompt.ids_T.tolist(), *reply])
        logits_BTV = self.model.logits(ids_T[None], torch.arange(len(ids_T))[None])
        return logits_BTV[0, len(self.prompt) - 1 :].log_softmax(-1).numpy()

    def with_adapter(self) -> Any:
        from contextlib import nullcontext

        return attached(self.model, [self.adapter]) if self.adapter else nullcontext()

    def greedy(self, most: int = 10**6) -> tuple[int, ...]:
        cursor, ids = Cursor(self.prompt, FORMAT), []
        with self.with_adapter():
            while not cursor.done and len(ids) < most:
                ids.append(int(np.where(cursor.legal(), self.logprobs(ids)[-1], -np.inf).argmax()))
                cursor.take(ids[-1])
        return tuple(ids)

    def log_probability(self, reply: Sequence[int]) -> float:
        with self.with_adapter():
            return float(self.logprobs(reply)[range(len(reply)), list(reply)].sum())

    def probable(self, threshold: float) -> dict[tuple[int, ...], float]:
        """All legal replies of that probability or more, by trying everything."""
        found: dict[tuple[int, ...], float] = {}

        def extend(ids: tuple[int, ...], log_probability: float, cursor: Cursor) -> None:
            row_V = self.logprobs(ids)[-1]
            for token in np.flatnonzero(cursor.legal()).tolist():
                total = log_probability + float(row_V[token])
                if total >= math.log(threshold):
                    step = copy(cursor)
                    step.take(token)
                    if step.done:
                        found[*ids, token] = total
                    else:
                        extend((*ids, token), total, step)

        with self.with_adapter():
            extend((), 0.0, Cursor(self.prompt, FORMAT))
        return found


def same_start(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_greedy_replies_are_those_of_plain_decoding(any_model):
    """Under several adapters in one session, and bare once they are gone."""
    model, engine = any_model.model, any_model.engine
    prompts, adapters = prompts_of(6), some_adapters(model, 3)
    under = [adapters[i] for i in (0, 1, 2, 0, 1, 0)]
    plain = [Plain(model, prompt, adapter) for prompt, adapter in zip(prompts, under, strict=True)]
    with engine.open(prompts, under) as session:
        replies = session.generate([5, 0, 1, 2, 3, 4])
    for reply, reference in zip(replies, (plain[i] for i in (5, 0, 1, 2, 3, 4)), strict=True):
        assert reply.ids == reference.greedy()
        assert reply.log_probability == pytest.approx(reference.log_probability(reply.ids), abs=1e-3)
    with engine.open(prompts, [None] * 6) as session:
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
    with engine.open(prompts, under) as session:
        fresh = session.score(replies)
    with engine.open(prompts, under) as session:
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
        with engine.open(prompts, under) as session:
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
    with llama.engine.open(prompts, [None, None]) as session:
        whole = session.search(1e-3, max_nodes=2000)
    with llama.engine.open(prompts, [None, None]) as session:
        part = session.search(1e-3, max_nodes=4)
    for some, every in zip(part, whole, strict=True):
        assert (some.complete, every.complete) == (False, True)
        assert {reply.ids for reply in some.replies} < {reply.ids for reply in every.replies}


def test_drafts_change_no_answer(llama):
    prompts, under = prompts_of(6), some_adapters(llama.model, 2) * 3
    with llama.engine.open(prompts, under) as session:
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
    with llama.engine.open(prompts, under) as session:
        drafted = session.generate(range(6), drafts)
        assert len(replies[0]) <= session.cost.accepted <= session.cost.drafted
    assert [reply.ids for reply in drafted] == replies
    for ours, theirs in zip(drafted, plain, strict=True):
        assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-3)


def test_costs_are_counted_and_what_is_known_costs_nothing(llama):
    prompts = prompts_of(3)
    with llama.engine.open(prompts, [None] * 3) as session:
        assert session.cost.forward_steps == session.cost.tokens == session.cost.decoded == 0
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
    assert [reply.ids for reply in again] == [reply.ids for reply in reversed(replies)]
    for (score,), reply in zip(scores[:2], replies, strict=True):
        assert score.log_probability == pytest.approx(reply.log_probability, abs=1e-3)
        assert score.agreed == len(reply.ids)


def test_a_reply_is_cut_where_the_context_ends(llama, rng):
    room = 2
    ids_T = np.resize(prompts_of(3)[2].ids_T, llama.engine.context - room)
    prompt = Prompt(ids_T, np.arange(len(ids_T), dtype=np.int32))
    expected = Plain(llama.model, prompt).greedy(most=room)
    assert END not in expected
    with llama.engine.open([prompt], [None]) as session:
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
    with coarse.engine.open(prompts, under) as session:
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
