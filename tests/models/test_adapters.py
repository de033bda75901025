import numpy as np
import pytest
import torch
from toys import TOY, random_adapter

from arc_solver.config import AdaptConfig, FormatConfig
from arc_solver.errors import UserError
from arc_solver.models.adapters import attach_adapters, fresh_adapter, load_adapter, save_adapter
from arc_solver.models.model import new_model, save_model
from arc_solver.rng import named_rng

CONFIG = AdaptConfig(rank=3, alpha=6)


def ask(model, ids_BT):
    positions = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    with torch.no_grad():
        return model.logits(ids_BT, positions)


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 14, size=(3, 20)))


def test_a_fresh_adapter_changes_nothing(toy_model, ids_BT):
    bare = ask(toy_model, ids_BT)
    with attach_adapters(toy_model, [fresh_adapter(toy_model, CONFIG, named_rng(0))]):
        assert torch.equal(ask(toy_model, ids_BT), bare)
    assert torch.equal(ask(toy_model, ids_BT), bare)


def test_each_row_goes_through_its_own_adapter(toy_model, ids_BT):
    adapters = [random_adapter(toy_model, seed) for seed in range(3)]
    with attach_adapters(toy_model, adapters):
        together = ask(toy_model, ids_BT)
    for k, adapter in enumerate(adapters):
        with attach_adapters(toy_model, [adapter]):
            alone = ask(toy_model, ids_BT[k : k + 1])[0]
        torch.testing.assert_close(together[k], alone, atol=1e-5, rtol=1e-4)
    assert (together[0] - ask(toy_model, ids_BT)[0]).abs().max() > 0.1


def test_gradients_stay_with_their_adapter(toy_model, ids_BT):
    with attach_adapters(toy_model, [random_adapter(toy_model, seed) for seed in range(3)]) as bank:
        toy_model.logits(ids_BT, torch.arange(20).expand_as(ids_BT))[1].square().sum().backward()
        for p in bank.parameters():
            assert p.grad is not None
            assert not p.grad[[0, 2]].any()
            assert p.grad[1].any()
        assert all(p.grad is None for name, p in toy_model.lm.named_parameters() if "_K" not in name)
    assert all(p.requires_grad for p in toy_model.lm.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 asks for it
def test_peft_reads_it_and_gives_the_same_logits(tmp_path, ids_BT):
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

    model = new_model(TOY, FormatConfig(), seed=1)
    adapter = random_adapter(model, 5)
    save_model(model, tmp_path / "model")
    save_adapter(adapter, tmp_path / "adapter")
    stock = Qwen3ForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa")
    peft = PeftModel.from_pretrained(stock, tmp_path / "adapter")
    causal = torch.ones(20, 20, dtype=torch.bool).tril().expand(3, 1, 20, 20)
    positions = torch.arange(20).expand(3, 20)
    expected = peft(input_ids=ids_BT, position_ids=positions, attention_mask=causal).logits
    with attach_adapters(model, [load_adapter(tmp_path / "adapter")]):
        torch.testing.assert_close(ask(model, ids_BT), expected, atol=1e-4, rtol=1e-4)


def test_saving_is_a_round_trip(tmp_path, toy_model):
    adapter = random_adapter(toy_model, 2)
    save_adapter(adapter, tmp_path)
    again = load_adapter(tmp_path)
    assert (again.rank, again.alpha, set(again.weights)) == (adapter.rank, adapter.alpha, set(adapter.weights))
    for name, (a, b) in adapter.weights.items():
        assert torch.equal(again.weights[name][0], a)
        assert torch.equal(again.weights[name][1], b)


def test_what_does_not_fit_is_refused(tmp_path, toy_model):
    with pytest.raises(UserError, match="no linear layer named nothing"):
        fresh_adapter(toy_model, AdaptConfig(targets=("q_proj", "nothing")), named_rng(0))
    wider = new_model(TOY.model_copy(update={"width": 48}), FormatConfig(), seed=0)
    with (
        pytest.raises(UserError, match="does not fit this model"),
        attach_adapters(toy_model, [random_adapter(wider, 0)]),
    ):
        pass
    both = [random_adapter(toy_model, 0), random_adapter(toy_model, 0, AdaptConfig(rank=2))]
    with pytest.raises(UserError, match="same rank"), attach_adapters(toy_model, both):
        pass
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        load_adapter(tmp_path)


def test_tasks_with_different_numbers_of_rows_share_a_batch(toy_model, ids_BT):
    adapters = [random_adapter(toy_model, seed) for seed in range(3)]
    with attach_adapters(toy_model, adapters) as bank:
        expected = ask(toy_model, ids_BT)
        bank.set_rows_per_adapter((2, 0, 1), ids_BT.shape[1])
        mixed = ask(toy_model, torch.stack([ids_BT[0], ids_BT[0], ids_BT[2]]))
        bank.set_rows_per_adapter((1, 1, 1), ids_BT.shape[1])
        assert torch.equal(ask(toy_model, ids_BT), expected)
    torch.testing.assert_close(mixed, expected[[0, 0, 2]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("damage", ["rank", "pattern", "nan"])
def test_an_adapter_that_contradicts_itself_is_refused(tmp_path, toy_model, damage):
    import json

    adapter = random_adapter(toy_model, 1)
    if damage == "nan":
        next(iter(adapter.weights.values()))[1][0, 0] = torch.nan
    save_adapter(adapter, tmp_path)
    file = tmp_path / "adapter_config.json"
    changes = {"rank": {"r": 2}, "pattern": {"rank_pattern": {"q_proj": 1}}, "nan": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes[damage]))
    sentence = {"rank": "says rank 2$", "pattern": r"q_proj are of rank 3, .* says rank 1$", "nan": "not finite"}
    with pytest.raises(UserError, match=sentence[damage]):
        load_adapter(tmp_path)
