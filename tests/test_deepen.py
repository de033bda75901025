"""A deeper model computes the same, until it is trained."""

import json

import pytest
import torch
from conftest import TOY
from small_runs import small, weights

from arc_solver.config import FormatConfig, UserError, load_config
from arc_solver.deepen import deepened, plan_layers
from arc_solver.model import load_model, new_model
from arc_solver.train import train


@pytest.mark.parametrize("more", [1, 2, 3, 5])
def test_the_logits_are_the_same(more, tmp_path):
    model = new_model(TOY, FormatConfig(), seed=1)
    grown = deepened(model, more)
    assert grown.lm.config.num_hidden_layers == len(grown.lm.model.layers) == TOY.layers + more
    ids, positions = torch.randint(0, 60, (2, 9)), torch.arange(9).expand(2, 9)
    assert torch.equal(grown.logits(ids, positions), model.logits(ids, positions))


def test_the_new_layers_lie_among_the_old_ones():
    assert plan_layers(5, 3) == [
        *((0, False), (0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)),
    ]
    assert [is_new for _, is_new in plan_layers(2, 4)] == [False, True, True, False, True, True]


def test_every_layer_of_a_deeper_model_is_trained(tmp_path):
    train(small(), tmp_path / "a")
    path = str(tmp_path / "a" / "model")
    train(small(model={"path": path, "deepen": 2}), tmp_path / "b")
    before, after = weights(tmp_path / "a" / "model"), weights(tmp_path / "b" / "model")
    assert load_model(tmp_path / "b" / "model").lm.config.num_hidden_layers == TOY.layers + 2
    new = [name for name in after if name not in before and name.endswith("down_proj.weight")]
    assert len(new) == 2 and all(after[name].abs().max() > 0 for name in after)
    (earlier,) = json.loads((tmp_path / "b" / "model" / "training.json").read_text())["earlier"]
    assert earlier["steps"] == 6


def test_what_cannot_be_deepened(tmp_path):
    with pytest.raises(UserError, match=r"give its folder as model\.path"):
        load_config(None, ["model.deepen=2"])
    with pytest.raises(UserError, match=r"leave it out with lora\.enabled"):
        load_config(None, ["model.deepen=2", f"model.path={tmp_path}", "lora.enabled=true", "train.optimizer=adamw"])
