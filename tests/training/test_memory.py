"""The estimate that is printed before a run, and the peak beside it."""

import gc
import json
import math
import subprocess
import sys
import weakref

import pytest
import torch
from small_runs import small, write_config

from arc_solver.data.sources import read_source
from arc_solver.data.stream import BatchStream, SampleStream
from arc_solver.models.hardware import container_memory, free_memory, whole_memory
from arc_solver.models.model import new_model, packed_loss
from arc_solver.training.memory import estimate_memory, first_tokens
from arc_solver.training.parallel import ParallelContext

WIDE = {"layers": 6, "width": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "mlp_width": 768}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_near_the_peak(checkpointing, tmp_path):
    """In an interpreter of its own: within a third, where a step's activations are most of it."""
    train = {"steps": 1, "batch_tokens": 4096, "optimizer": "adamw", "checkpointing": checkpointing}
    file = write_config(small(model=WIDE, train=train), tmp_path)
    command = [sys.executable, "-P", "-m", "arc_solver.train", str(file), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert about["memory_estimate_bytes"] == pytest.approx(about["memory_peak_bytes"], rel=1 / 3)
    assert "peak memory" in done.stderr


def test_the_memory_of_a_container(tmp_path):
    assert container_memory(tmp_path) == (math.inf, 0), "no control groups: no limit"
    for folder, names, cached in (
        ("v2", ("memory.max", "memory.current"), "inactive_file"),
        ("v1/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ):
        files = {names[0]: "8000\n", names[1]: "3000\n", "memory.stat": f"cache 9\n{cached} 1000\nmapped_file 5\n"}
        (tmp_path / folder).mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / folder / name).write_text(content)
        assert container_memory(tmp_path / folder.partition("/")[0]) == (8000, 2000)
    (tmp_path / "v2" / "memory.max").write_text("max\n")
    assert container_memory(tmp_path / "v2") == (math.inf, 2000)


def test_a_plan_keeps_to_the_container(monkeypatch):
    machine = free_memory(torch.device("cpu"))
    monkeypatch.setattr("arc_solver.models.hardware.container_memory", lambda: (1 << 20, 1 << 18))
    assert machine > 1 << 20
    assert free_memory(torch.device("cpu"), 3) == 1 << 18
    assert whole_memory(torch.device("cpu")) == 1 << 20


def estimated(**settings):
    config = small(model=WIDE, train={"optimizer": "adamw", **settings})
    model = new_model(config.model, config.format, seed=0)
    stream = SampleStream([read_source(config.corpus.sources[0])], config.corpus, config.format, 0, "test")
    batch = BatchStream(stream, 512)[(0, 0)][0]

    def probe(tokens):
        return packed_loss(model, first_tokens(batch, tokens))

    found = estimate_memory(model.lm, config.train, ParallelContext(config), 512, probe)
    return model, found, probe


def test_what_an_estimate_is_made_of():
    model, small_batch, _ = estimated(batch_tokens=1024)
    _, large_batch, _ = estimated(batch_tokens=2048)
    _, recomputed, _ = estimated(batch_tokens=2048, checkpointing=True)
    size = 4 * model.parameters_count
    assert (small_batch.weights, small_batch.gradients, small_batch.optimizer) == (size, size, 2 * size)
    assert large_batch.activations == pytest.approx(2 * small_batch.activations, rel=0.05)
    assert recomputed.activations < large_batch.activations / 3
    assert small_batch.total == sum(vars(small_batch).values())


def test_frozen_weights_have_no_gradients():
    config = small(model=WIDE)
    model = new_model(config.model, config.format, seed=0)
    for p in model.lm.parameters():
        p.requires_grad_(False)
    model.lm.lm_head.weight.requires_grad_(True)
    stream = SampleStream([read_source(config.corpus.sources[0])], config.corpus, config.format, 0, "test")
    batch = BatchStream(stream, 512)[(0, 0)][0]
    found = estimate_memory(
        model.lm, config.train, ParallelContext(config), 512, lambda n: packed_loss(model, first_tokens(batch, n))
    )
    assert found.gradients == 4 * model.lm.lm_head.weight.numel()


def test_estimating_leaves_nothing_behind():
    """No gradient, and no graph: what the probe computed is freed."""
    config = small(model=WIDE)
    model = new_model(config.model, config.format, seed=0)
    computed = []

    def probe(tokens):
        logits = model.logits(torch.zeros(1, tokens, dtype=torch.int64), torch.arange(tokens)[None])
        computed.append(weakref.ref(logits))
        return logits.logsumexp(-1).sum()

    estimate_memory(model.lm, config.train, ParallelContext(config), 512, probe)
    gc.collect()
    assert [ref() for ref in computed] == [None, None]
    assert all(p.grad is None for p in model.lm.parameters())


def test_a_batch_is_cut_to_its_first_tokens():
    config = small()
    stream = SampleStream([read_source(config.corpus.sources[0])], config.corpus, config.format, 0, "test")
    batch = BatchStream(stream, 512)[(0, 0)][0]
    cut = first_tokens(batch, 300)
    assert len(cut.ids_T) == 300 and int(cut.ends_S[-1]) == 300
    assert torch.equal(cut.ids_T, batch.ids_T[:300])
    assert torch.equal(cut.ends_S[:-1], batch.ends_S[batch.ends_S < 300])
