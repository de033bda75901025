"""A base in 8 or 4 bit, by the real bitsandbytes on the CPU: adapted, asked, looked at, left alone."""

import pytest
import torch
from toys import flip_task

from arc_solver.config import AdaptConfig, PredictConfig, load_config
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.errors import MachineError, UserError
from arc_solver.models import fast_decoder
from arc_solver.models.model import BUNDLED_DIR, load_model
from arc_solver.rng import named_rng
from arc_solver.solving.adapt import adapt
from arc_solver.solving.predict import predict
from arc_solver.solving.preflight import preflight

pytest.importorskip("bitsandbytes", reason="needs the extra quantize")


@pytest.mark.filterwarnings("ignore")  # bitsandbytes says what it casts
@pytest.mark.parametrize(("quantize", "bytes_a_weight"), [("4bit", 0.5), ("8bit", 1)])
def test_a_quantised_base_is_adapted_and_asked(quantize, bytes_a_weight, rng):
    model, whole = (load_model(BUNDLED_DIR, "cpu", torch.bfloat16, how) for how in (quantize, ""))
    layer = model.lm.model.layers[0].mlp.up_proj
    assert layer.weight.nbytes == bytes_a_weight * 256 * 768
    assert not fast_decoder.supports(model.lm), "by hand its weights would be taken for numbers"
    config = load_config(None, [f"model.quantize={quantize}"])
    preflight(model, TorchEngine(model, 0), None, config)
    task, few = flip_task(rng, "flip", demonstrations=2), AdaptConfig(rank=4, steps=40, batch_size=1, recompute="yes")
    before = layer.weight.clone()
    learnt, expected = (adapt([task], m, few, [named_rng(0)])[0] for m in (model, whole))
    assert learnt.ended == "steps" and learnt.last_loss < learnt.first_loss
    assert learnt.first_loss == pytest.approx(expected.first_loss, rel=0.2)
    assert learnt.last_loss < learnt.first_loss - 0.7 * (expected.first_loss - expected.last_loss)
    assert torch.equal(layer.weight, before)
    found = predict(task, TorchEngine(model, 0), learnt.adapter, PredictConfig(views=2), named_rng(0))
    assert found.candidates


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_gradients_flow_after_something_was_decoded(quantize):
    """On a CPU bitsandbytes would pack 4 bits for inference at the first pass without gradients, for good."""
    layer = load_model(BUNDLED_DIR, "cpu", torch.bfloat16, quantize).lm.model.layers[0].mlp.up_proj
    x = torch.randn(3, 256, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (before,) = torch.autograd.grad(layer(x).sum(), x)
    with torch.no_grad():
        layer(x.detach())
    (after,) = torch.autograd.grad(layer(x).sum(), x)
    assert before.any()
    assert torch.equal(before, after)


@pytest.mark.filterwarnings("ignore")
def test_what_fails_with_it_is_said_of_it():
    model = load_model(BUNDLED_DIR, "cpu", torch.bfloat16, "4bit")
    with torch.no_grad():
        model.lm.get_input_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(MachineError, match=r"parameters, quantised by model\.quantize\) does not adapt on cpu"):
        preflight(model, TorchEngine(model, 0), None, load_config(None))


def test_what_does_not_go_with_it_is_refused():
    for words, sentence in (
        (["engine.kind=vllm"], "model.quantize is for engine.kind"),
        (["model.adapter=somewhere"], "cannot be merged into quantised weights"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_config(None, ["model.quantize=4bit", *words])
