import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TOY

from arc_solver.config import Config, CorpusConfig, OptimConfig, TrainConfig, UserError, load_config
from arc_solver.corpus import SampleStream, TrainingData, pack
from arc_solver.encode import IGNORE
from arc_solver.model import Model, load_model, new_model, save_model
from arc_solver.train import (
    fit,
    latest_checkpoint,
    make_optimizers,
    packed_loss,
    rate_at,
    train,
    validation_batches,
    validation_loss,
)

SMALL = Config(
    model=TOY,
    corpus=CorpusConfig(max_tokens=200),
    train=TrainConfig(
        steps=6,
        batch_tokens=512,
        compile="no",
        precision="fp32",
        loader_workers=0,
        validation_tokens=1000,
        validate_every=3,
        checkpoint_every=1,
        schedule="linear",
    ),
)


def small(**settings) -> Config:
    return SMALL.model_copy(update={"train": SMALL.train.model_copy(update=settings)})


def weights(folder):
    return load_model(folder).lm.state_dict()


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("linear", {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 1: 0}),
        ("cosine", {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 0.4: 0.5 + math.sqrt(0.5) / 2, 1: 0}),
        ("constant", {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 1, 1: 1}),
        ("wsd", {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 1, 0.75: 1, 0.875: 0.5, 1: 0}),
    ],
)
def test_schedules_point_by_point(schedule, points):
    config = OptimConfig(schedule=schedule, warmup=0.2, decay=0.25)
    for progress, rate in points.items():
        assert rate_at(progress, config) == pytest.approx(rate, abs=1e-12)


def test_fit_finds_a_minimum():
    x = torch.nn.Parameter(torch.tensor([5.0]))
    config = OptimConfig(lr=0.5, steps=100)
    optimizers = make_optimizers([("x", x)], config)
    seen = []
    fit([x], optimizers, config, lambda _: (x - 2).square().sum(), after_step=seen.append)
    assert x.item() == pytest.approx(2, abs=0.05)
    assert [s.step for s in seen] == list(range(1, 101))
    assert all(0 < s.rate <= 1 for s in seen)
    assert optimizers[0].param_groups[0]["peak_lr"] == 0.5


def test_fit_ends_in_time_with_the_schedule_done():
    x = torch.nn.Parameter(torch.tensor([5.0]))
    config = OptimConfig(steps=1_000_000, schedule="linear", warmup=0)
    seen = []

    def loss(_):
        time.sleep(0.01)
        return x.square().sum()

    fit([x], make_optimizers([("x", x)], config), config, loss, max_s=0.5, after_step=seen.append)
    assert len(seen) < 60
    assert seen[-1].rate < 0.2


def test_muon_is_for_hidden_matrices():
    model = new_model(TOY, SMALL.format, seed=0)
    muon, adamw = make_optimizers(list(model.lm.named_parameters()), TrainConfig())
    hidden = sum(len(g["params"]) for g in muon.param_groups)
    assert hidden == TOY.layers * 7
    assert hidden + sum(len(g["params"]) for g in adamw.param_groups) == len(list(model.lm.parameters()))
    assert all(g["weight_decay"] == 0 for g in adamw.param_groups if g["params"][0].ndim < 2)


def test_validation_loss_does_not_depend_on_packing():
    model = new_model(TOY, SMALL.format, seed=0)
    stream = SampleStream(SMALL.corpus, SMALL.format, 0, "validation")
    samples = [stream[i] for i in range(12)]
    one = [pack(samples, sum(map(len, samples)) + 50)]
    many = [pack([sample], len(sample) + i) for i, sample in enumerate(reversed(samples))]
    losses = [validation_loss(lambda batch: packed_loss(model, batch), batches) for batches in (one, many)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_validation_is_the_same_for_every_seed():
    first, second = (
        validation_batches(SMALL.model_copy(update={"run": SMALL.run.model_copy(update={"seed": s})})) for s in (0, 1)
    )
    assert [b.ids_T.tolist() for b in first] == [b.ids_T.tolist() for b in second]
    assert sum(int((b.labels_T != IGNORE).sum()) for b in first) > 100


def test_training_twice_gives_identical_weights(tmp_path):
    train(SMALL, tmp_path / "a")
    train(SMALL, tmp_path / "b")
    first = weights(tmp_path / "a" / "model")
    assert same(first, weights(tmp_path / "b" / "model"))
    assert not same(first, new_model(TOY, SMALL.format, seed=0).lm.state_dict())
    names = {file.name for file in (tmp_path / "a" / "model").iterdir()}
    assert {"model.safetensors", "training.json", "training_data.json", "loss.png"} <= names


def test_a_continued_run_ends_like_an_uninterrupted_one(tmp_path):
    """The process is killed (kill -9) as soon as it has a checkpoint, amid the decay, and started again."""
    train(SMALL, tmp_path / "whole")
    command = [sys.executable, "-m", "arc_solver.train", str(write_config(tmp_path)), "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while latest_checkpoint(tmp_path / "cut") is None:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--resume"], check=True, stderr=subprocess.DEVNULL)
    assert same(weights(tmp_path / "whole" / "model"), weights(tmp_path / "cut" / "model"))


def write_config(folder):
    """SMALL as a TOML file."""
    lines = []
    for section in ("model", "corpus", "train"):
        lines.append(f"[{section}]")
        for key, value in getattr(SMALL, section).model_dump(exclude_defaults=True).items():
            lines.append(f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}")
    file = folder / "small.toml"
    file.write_text("\n".join(lines))
    assert load_config(file) == SMALL
    return file


def test_compiled_equals_eager():
    """One graph serves every way of packing."""
    model = new_model(TOY, SMALL.format, seed=0)
    stream = SampleStream(SMALL.corpus, SMALL.format, 0)
    compiled = torch.compile(model.logits, dynamic=False, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in (0, 5, 10):
            batch = pack([stream[i + j] for j in range(2 + i // 5)], 1024)
            losses = [packed_loss(model, batch, logits_of).item() for logits_of in (None, compiled)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_what_a_user_gets_wrong(tmp_path):
    with pytest.raises(UserError, match="no checkpoint to resume"):
        train(SMALL, tmp_path / "none", resume=True)
    train(small(steps=1), tmp_path / "a")
    with pytest.raises(UserError, match="holds a training run"):
        train(SMALL, tmp_path / "a")
    with pytest.raises(UserError, match="not empty"):
        train(SMALL, tmp_path)
    with pytest.raises(UserError, match="give more"):
        train(small(steps=1), tmp_path / "a", resume=True, max_s=0.01)
    with pytest.raises(UserError, match=r"train\.optimizer is 'adamw'"):
        train(small(steps=1, optimizer="adamw"), tmp_path / "a", resume=True)
    with pytest.raises(UserError, match="is a file"):
        train(SMALL, tmp_path / "a" / "log.jsonl")
    with pytest.raises(UserError, match=r"batch_tokens=100"):
        train(small(batch_tokens=100), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_model_that_is_trained_on_keeps_what_it_has_seen(tmp_path):
    """Its base's training data counts in the audit; where the base does not say, neither does the result."""
    train(small(steps=1), tmp_path / "known")
    base = load_model(tmp_path / "known" / "model")
    for seen, expected in ((TrainingData(frozenset({"zz"}), frozenset()), True), (None, False)):
        folder = tmp_path / f"base{expected}"
        save_model(Model(base.lm, base.format, seen), folder)
        config = small(steps=1).model_copy(update={"model": TOY.model_copy(update={"path": str(folder)})})
        train(config, tmp_path / f"run{expected}")
        after = load_model(tmp_path / f"run{expected}" / "model").trained_on
        assert (after is not None and {"zz"} < after.ids) == expected
        assert (after is None) != expected
