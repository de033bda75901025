"""The layers run by hand give what transformers gives, forward and backward."""

from typing import Any

import pytest
import torch
from toys import TOY, random_adapter

from arc_solver.config import AdaptConfig, FormatConfig
from arc_solver.data.stream import Batch
from arc_solver.models import fast_decoder
from arc_solver.models.adapters import attach_adapters
from arc_solver.models.attention import Packing
from arc_solver.models.kv_cache import KvCache
from arc_solver.models.lora import attach_lora
from arc_solver.models.model import Model, load_model, new_model, packed_loss, save_model
from arc_solver.puzzles.encode import VOCABULARY

HEADS: dict[str, dict[str, Any]] = {
    "Qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},  # biases
    "Qwen3": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8},  # norms of queries and keys
    "Llama": {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "Mistral": {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": None},
}


@pytest.fixture(params=HEADS)
def model(request, tmp_path) -> Model:
    """A stock model as it is loaded; biases and norms are not at values that hide mistakes."""
    import transformers

    settings = getattr(transformers, f"{request.param}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, **HEADS[request.param]
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        lm = getattr(transformers, f"{request.param}ForCausalLM")(settings)
        for p in lm.parameters():
            p += 0.1 * torch.randn_like(p)
    save_model(Model(lm, FormatConfig(), None), tmp_path)
    return load_model(tmp_path)


@pytest.fixture
def by_transformers(monkeypatch):
    """Switches the layers by hand off."""
    return lambda: monkeypatch.setattr(fast_decoder, "supports", lambda lm: False)


def some_batch(length: int = 40) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(0, 14, (length,), generator=generator)
    positions_T = torch.randint(0, 3000, (length,), generator=generator)
    return Batch(ids_T, ids_T.clone(), positions_T, torch.tensor([7, 20, length]))


def test_logits(model, by_transformers):
    batch = some_batch()
    ids_BT, positions_BT = batch.ids_T.view(2, 20), batch.positions_T.view(2, 20)
    mask_BTK = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    mask_BTK |= torch.eye(20, dtype=torch.bool)
    ways = [{}, {"mask_BTK": mask_BTK}]
    packed = {"packing": Packing.of(batch.ends_S, model.device)}
    with torch.no_grad():
        assert fast_decoder.supports(model.lm)
        ours = [model.logits(ids_BT, positions_BT, **way) for way in ways]
        ours.append(model.logits(batch.ids_T[None], batch.positions_T[None], **packed))
        few = model.logits(ids_BT, positions_BT, rows=torch.tensor([3, 39]))
        by_transformers()
        theirs = [model.logits(ids_BT, positions_BT, **way) for way in ways]
        theirs.append(model.logits(batch.ids_T[None], batch.positions_T[None], **packed))
        few_of_theirs = model.logits(ids_BT, positions_BT, rows=torch.tensor([3, 39]))
    for a, b in zip([*ours, few], [*theirs, few_of_theirs], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    assert few.shape == (2, VOCABULARY)


@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "by transformers"])
def test_a_cache_continues_a_sequence(model, by_transformers, by_hand):
    if not by_hand:
        by_transformers()
    batch = some_batch(20)
    ids_BT, positions_BT = batch.ids_T[None], batch.positions_T[None]
    cache = KvCache(1)
    with torch.no_grad():
        whole = model.logits(ids_BT, positions_BT)
        first = model.logits(ids_BT[:, :12], positions_BT[:, :12], cache=cache.for_prefill([0]))
        mask_BTK = torch.ones(1, 8, 20, dtype=torch.bool).tril(12)
        step = cache.for_decoding(torch.arange(12, 20)[None], 20)
        second = model.logits(ids_BT[:, 12:], positions_BT[:, 12:], cache=step, mask_BTK=mask_BTK)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [AdaptConfig().targets, ("v_proj", "up_proj"), ("o_proj", "q_proj", "down_proj")])
def test_gradients_of_adapters(model, by_transformers, targets):
    config = AdaptConfig(rank=3, alpha=6, targets=targets)
    adapters = [random_adapter(model, seed, config) for seed in range(2)]

    def loss_and_gradients():
        with attach_adapters(model, adapters) as bank:
            loss = packed_loss(model, some_batch())
            loss.backward()
            return loss, [p.grad for p in bank.parameters()]

    with attach_adapters(model, adapters):
        assert fast_decoder.supports(model.lm)
    ours, our_gradients = loss_and_gradients()
    by_transformers()
    theirs, their_gradients = loss_and_gradients()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


def test_what_it_does_not_know_goes_through_transformers(model):
    assert not fast_decoder.supports(model.lm), "the weights themselves would get no gradients"
    with torch.no_grad():
        assert fast_decoder.supports(model.lm)
        with torch.autocast("cpu", torch.bfloat16):
            assert not fast_decoder.supports(model.lm)
        model.lm.config.hidden_act = "gelu"
        assert not fast_decoder.supports(model.lm)


def test_layers_of_peft_are_not_overlooked():
    from arc_solver.config import LoraConfig

    model = new_model(TOY, FormatConfig(), seed=0)
    attach_lora(model, LoraConfig(enabled=True, rank=2), seed=0)
    with torch.no_grad():
        assert not fast_decoder.supports(model.lm)
