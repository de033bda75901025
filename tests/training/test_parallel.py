"""Several processes, precision and accumulation: the same training as one process in float32."""

import subprocess
import time

import pytest
import torch
from checkpoints import make_checkpoint
from small_runs import finish, launched, log, small, start_ranks, weights, write_config

from arc_solver.data.sources import read_source
from arc_solver.data.stream import BatchStream, SampleStream
from arc_solver.errors import UserError
from arc_solver.models.model import new_model, packed_loss
from arc_solver.training.checkpoints import latest_checkpoint
from arc_solver.training.parallel import ParallelContext, decoder_layers
from arc_solver.training.train import train

SETTINGS = {"train": {"optimizer": "adamw", "batches_per_step": 2}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that the others are compared with: one process, two batches a step one after another."""
    folder = tmp_path_factory.mktemp("alone")
    train(small(**SETTINGS), folder / "run")
    return folder / "run"


def assert_like(run_dir, alone):
    """Losses within 1e-5 of each other, weights within 1e-5, and the same samples counted."""
    for mine, expected in zip(log(run_dir), log(alone), strict=True):
        assert mine["tokens"] == expected["tokens"]
        for key in ("loss", "grad_norm", "validation_loss"):
            assert mine.get(key, 0) == pytest.approx(expected.get(key, 0), abs=1e-5), mine
    after, expected = weights(run_dir / "model"), weights(alone / "model")
    assert all(torch.allclose(after[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_processes_that_train_like_one(alone, launcher, tmp_path):
    file = write_config(small(**SETTINGS), tmp_path)
    done = subprocess.run(launched(launcher, file, tmp_path / "run"), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_like(tmp_path / "run", alone)


def test_shards_train_like_one_process(alone, tmp_path):
    config = small(train={**SETTINGS["train"], "parallel": "fsdp"})
    finish(*start_ranks(2, write_config(config, tmp_path), tmp_path / "run"))
    assert_like(tmp_path / "run", alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_adapter_is_trained_by_two_processes_like_by_one(parallel, tmp_path):
    """The second run is killed and continued on its way."""
    pretrained = make_checkpoint(tmp_path / "qwen", "qwen2")
    config = small(
        model={"path": str(pretrained)},
        format={"positions": "token"},
        lora={"enabled": True, "rank": 4, "alpha": 8.0},
        train={**SETTINGS["train"], "lr": 1e-2, "parallel": parallel},
    )
    train(config, tmp_path / "alone")
    file = write_config(config, tmp_path)
    ranks = start_ranks(2, file, tmp_path / "run")
    while latest_checkpoint(tmp_path / "run") is None:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.wait()
    finish(*start_ranks(2, file, tmp_path / "run", "--resume"))
    for mine, expected in zip(log(tmp_path / "run"), log(tmp_path / "alone"), strict=True):
        assert mine.get("loss", 0) == pytest.approx(expected.get("loss", 0), abs=1e-4), mine
    after, expected = weights(tmp_path / "run" / "model"), weights(tmp_path / "alone" / "model")
    assert all(torch.allclose(after[name], expected[name], atol=1e-3) for name in expected)
    assert not torch.equal(expected["model.layers.0.mlp.up_proj.weight"], base_weight(tmp_path / "alone"))


def base_weight(out_dir):
    return weights(out_dir / "base")["model.layers.0.mlp.up_proj.weight"]


def test_processes_must_fit_the_batches_of_a_step(tmp_path):
    file = write_config(small(), tmp_path)
    said = finish(*start_ranks(2, file, tmp_path / "run"), expect=2)
    assert said.count("error: train.batches_per_step=1 cannot be shared out over 2 processes") == 1
    assert not (tmp_path / "run").exists()


def test_shards_and_muon_do_not_go_together(tmp_path):
    file = write_config(small(train={"parallel": "fsdp", "batches_per_step": 2}), tmp_path)
    said = finish(*start_ranks(2, file, tmp_path / "run"), expect=2)
    assert said.count('error: train.parallel="fsdp" needs train.optimizer="adamw"') == 1


def first_batches(config, count):
    source = read_source(config.corpus.sources[0])
    stream = SampleStream([source], config.corpus, config.format, 0, "test")
    return BatchStream(stream, config.train.batch_tokens)[(0, 0)][:count]


def gradients(config, batches):
    """Loss and gradients of one step over the batches."""
    devices = ParallelContext(config)
    model = new_model(config.model, config.format, seed=0)
    learnt = sum(batch.target_tokens for batch in batches)
    loss = devices.backward(lambda b: packed_loss(model, b, reduction="sum"), model.lm, batches, learnt)
    scale = devices.scaler.get_scale() if devices.scaler else 1.0
    return loss.item(), torch.cat([p.grad.flatten() / scale for p in model.lm.parameters()])


def test_accumulated_gradients_are_those_of_the_mean_over_all_learnt_ids():
    """Batches with more target ids count for more."""
    config = small()
    batches = first_batches(config, 3)
    assert len({batch.target_tokens for batch in batches}) > 1
    loss, gradient = gradients(config, batches)
    model = new_model(config.model, config.format, seed=0)
    parts = [packed_loss(model, batch) * batch.target_tokens for batch in batches]
    expected = sum(parts) / sum(batch.target_tokens for batch in batches)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(gradient, torch.cat([p.grad.flatten() for p in model.lm.parameters()]), atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_nearly_the_gradients_of_full(precision):
    batches = first_batches(small(), 2)
    loss, expected = gradients(small(), batches)
    low_loss, gradient = gradients(small(train={"precision": precision}), batches)
    assert low_loss == pytest.approx(loss, rel=0.01)
    assert torch.nn.functional.cosine_similarity(gradient, expected, dim=0) > 0.99
    assert not torch.equal(gradient, expected)


def test_only_fp16_scales_the_loss():
    scaled = {p: ParallelContext(small(train={"precision": p})).scaler is not None for p in ("fp32", "bf16", "fp16")}
    assert scaled == {"fp32": False, "bf16": False, "fp16": True}


def test_optimizer_states_of_other_parameters_are_refused():
    config = small(train={"optimizer": "adamw"})
    devices = ParallelContext(config)
    lms = [new_model(config.model.model_copy(update={"width": width}), config.format, 0).lm for width in (32, 64)]
    optimizers = [torch.optim.AdamW(lm.parameters()) for lm in lms]
    for lm, optimizer in zip(lms, optimizers, strict=True):
        sum(p.sum() for p in lm.parameters()).backward()
        optimizer.step()
    states = devices.optimizer_states(lms[0], optimizers[:1])
    devices.load_optimizer_states(lms[0], optimizers[:1], states, "here", moments_only=False)
    with pytest.raises(UserError, match=r"in here does not fit .* 64 x 32 there and 64 x 64 here"):
        devices.load_optimizer_states(lms[1], optimizers[1:], states, "here", moments_only=False)
    with pytest.raises(UserError, match=r"another train\.optimizer"):
        devices.load_optimizer_states(lms[0], optimizers[:1], states * 2, "here", moments_only=False)


def test_decoder_layers_are_found():
    config = small()
    assert len(decoder_layers(new_model(config.model, config.format, 0).lm)) == config.model.layers
