"""What would fail for every task fails before the first one, with the cause."""

from contextlib import nullcontext

import pytest
import torch
from toys import TOY

from arc_solver.config import Config, FormatConfig, load_config
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.errors import MachineError
from arc_solver.models import fast_decoder
from arc_solver.models.kv_cache import _Step
from arc_solver.models.model import Model, new_model
from arc_solver.solving import executors
from arc_solver.solving.preflight import preflight
from arc_solver.solving.worker import make_worker


@pytest.fixture
def model() -> Model:
    """Not quite as it is drawn, when every id is as likely as any other."""
    drawn = new_model(TOY, FormatConfig(), seed=1).lm.eval()
    with torch.no_grad():
        for p in drawn.parameters():
            p *= 3
    return Model(drawn, FormatConfig(), None)


def look(model: Model, config: Config | None = None) -> None:
    preflight(model, TorchEngine(model, 0), None, config or Config())


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_works_passes(model, dtype, by_hand, enabled, monkeypatch):
    if not by_hand:
        monkeypatch.setattr(fast_decoder, "supports", lambda lm: False)
    model.lm.to(dtype)
    before = {name: p.clone() for name, p in model.lm.state_dict().items()}
    look(model, load_config(None, [f"adapt.enabled={str(enabled).lower()}"]))
    assert all(torch.equal(p, before[name]) for name, p in model.lm.state_dict().items())


def test_a_cache_that_the_model_cannot_use_is_named(model, monkeypatch):
    monkeypatch.setattr(_Step, "update", lambda self, k, v: (k, v))
    with pytest.raises(MachineError, match=r"qwen3, .* does not decode on cpu: TypeError: .*; no task was begun"):
        look(model)


def test_a_cache_that_gives_other_numbers_is_noticed(model, monkeypatch):
    real = _Step.update

    def wrong(self, k, v, layer, *args, **kwargs):
        k, v = real(self, k, v, layer, *args, **kwargs)
        return k, 30 * v

    monkeypatch.setattr(_Step, "update", wrong)
    with pytest.raises(MachineError, match=r"by the engine, and .* by a plain pass"):
        look(model)


def test_weights_that_are_not_finite_are_noticed(model):
    with torch.no_grad():
        model.lm.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(MachineError, match="does not adapt on cpu: the loss or its gradients are not finite"):
        look(model)


def test_no_worker_begins_without_it(monkeypatch):
    monkeypatch.setattr(_Step, "update", lambda self, k, v: (k, v))
    with pytest.raises(MachineError, match="before the first task"):
        make_worker(load_config(None, ["run.device=cpu"]))


@pytest.mark.parametrize("works", [True, False])
def test_nothing_watches_a_process_after_the_first_look(works, monkeypatch):
    """One in which no worker could be made goes on: what watched the look would end it ten minutes later."""
    timers = []
    monkeypatch.setattr(executors.faulthandler, "dump_traceback_later", lambda *_, **__: timers.append("set"))
    monkeypatch.setattr(executors.faulthandler, "cancel_dump_traceback_later", lambda: timers.append("cancelled"))
    if not works:
        monkeypatch.setattr(_Step, "update", lambda self, k, v: (k, v))
    with nullcontext() if works else pytest.raises(MachineError):
        make_worker(load_config(None, ["run.device=cpu"]))
    assert timers == ["set", "cancelled"]
