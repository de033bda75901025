import numpy as np
import pytest
import torch
from conftest import TOY, flip_task
from test_adapters import random_adapter

from arc_solver.encode import END, NEWLINE, NUMBER, VOCABULARY, Cursor, decode_reply, encode_prompt
from arc_solver.engine import TorchEngine
from arc_solver.model import Model


def prompts_of(rng, format, count=10):
    """Prompts of different lengths."""
    tasks = [flip_task(rng, demonstrations=1 + i % 3) for i in range(count)]
    return [encode_prompt(task.train, task.test[0], format) for task in tasks]


@torch.no_grad()
def plainly(model: Model, prompt):
    """Greedy decoding with a whole forward pass for every id, and no cache."""
    cursor, ids, positions, total = (
        Cursor(prompt, model.format),
        prompt.ids_T.tolist(),
        prompt.positions_T.tolist(),
        0.0,
    )
    while not cursor.done:
        logits = model.logits(torch.tensor([ids]), torch.tensor([positions]))[0, -1]
        token = int(logits.masked_fill(~torch.from_numpy(cursor.legal()), -torch.inf).argmax())
        total += torch.log_softmax(logits, -1)[token].item()
        position = cursor.take(token)
        positions.append(position if model.format.positions == "grid" else len(ids))
        ids.append(token)
    return tuple(ids[len(prompt) :]), total


@pytest.fixture
def short(toy):
    """A toy model that ends its rows and grids soon, and not all at the same size."""
    head = torch.nn.Linear(TOY.width, VOCABULARY)
    with torch.no_grad():
        for p in toy.lm.parameters():
            if p.ndim == 2:
                p *= 8  # as drawn, every state is much like the next
        head.weight.normal_(0, 4 * TOY.width**-0.5, generator=torch.Generator().manual_seed(0))
        head.bias.zero_()
        head.bias[[NEWLINE, END]] = 7
        head.bias[NUMBER + 10 :] = -99  # small shape headers
    toy.lm.set_output_embeddings(head)
    return toy


def test_batches_equal_plain_greedy_decoding(short, rng):
    prompts = prompts_of(rng, short.format)
    expected = [plainly(short, prompt) for prompt in prompts]
    for batch_tokens in (1, 100, 10_000):
        replies = TorchEngine(short, batch_tokens).generate(prompts)
        assert [reply.ids for reply in replies] == [ids for ids, _ in expected]
        for reply, (_, total) in zip(replies, expected, strict=True):
            assert reply.log_probability == pytest.approx(total, abs=1e-3)
    assert len({len(reply.ids) for reply in replies}) > 1
    assert all(isinstance(decode_reply(reply.ids, short.format), np.ndarray) for reply in replies)


def test_the_adapter_is_used_and_taken_off(toy_model, rng):
    prompts = prompts_of(rng, toy_model.format, 2)
    engine, adapter = TorchEngine(toy_model, 10_000), random_adapter(toy_model, 3)
    bare, adapted, again = engine.generate(prompts), engine.generate(prompts, adapter), engine.generate(prompts)
    assert [r.log_probability for r in bare] == [r.log_probability for r in again]
    assert [r.ids for r in bare] == [r.ids for r in again]
    assert [r.log_probability for r in adapted] != [r.log_probability for r in bare]
