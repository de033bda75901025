import json
import subprocess
import sys

import numpy as np
import pytest
from toys import TOY

from arc_solver.bench import bench
from arc_solver.bench.baseline_training import read_samples
from arc_solver.bench.schedule import overhead_s
from arc_solver.bench.training import KEPT, MAX_TOKENS, SAMPLES, _packed, flop_utilisation, make_samples
from arc_solver.config import FormatConfig, TrainConfig
from arc_solver.models.model import new_model
from arc_solver.puzzles.encode import PAD


def test_rows_have_one_form(monkeypatch, capsys):
    monkeypatch.setattr(bench, "MEASURED_S", 0.05)
    monkeypatch.setattr(bench, "DRAWS", bench.PAIRS)
    assert bench.main(["stream", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"rows", "machine", "precision", "commit"}
    assert all(set(row) == {"name", "ours", "baseline", "ratio", "unit"} and row["ours"] > 0 for row in content["rows"])
    assert bench.main(["stream"]) == 0
    assert "tokens/s per core" in capsys.readouterr().out


def test_both_sides_of_the_training_bench_see_the_same_samples(tmp_path):
    make_samples(tmp_path / "samples.npz")
    baseline = read_samples(tmp_path / "samples.npz")
    ours = _packed(tmp_path / "samples.npz")
    assert len(baseline["labels"]) == SAMPLES
    assert max(map(len, baseline["labels"])) <= MAX_TOKENS
    assert sum((labels != -100).sum() for labels in baseline["labels"]) == sum(batch.target_tokens for batch in ours)
    kept = np.array(KEPT)[:, 0]
    seen = np.concatenate([kept[batch.ids_T[batch.ids_T != PAD].numpy()] for batch in ours])
    assert sorted(seen) == sorted(np.concatenate(baseline["input_ids"]))


@pytest.mark.parametrize("how", ["kept", "recomputed"])
def test_the_estimate_of_a_step_is_near_its_peak(how):
    """In a process of its own, on a shape whose activations are most of it: within a quarter, and 64 MiB."""
    command = [sys.executable, "-P", "-m", "arc_solver.bench.memory", "a small one", how]
    step = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    kept = 2048 * 12 * 256 * 2 * 10  # more than ten values of the width in every layer, in bf16
    assert (step["measured"] > kept) == (how == "kept")
    assert step["measured"] == pytest.approx(step["estimated"], rel=1 / 4, abs=64 << 20)


def test_the_overhead_of_a_task_is_measured():
    assert overhead_s(tasks=50) > 0


def test_flop_utilisation_is_a_share():
    small = TrainConfig(optimizer="adamw", batch_tokens=4096, compile="no")
    found = flop_utilisation(TOY, small, steps=1, device="cpu")
    assert 0 < found.share < 1
    assert found.tokens_per_s > 0 and found.parameters == new_model(TOY, FormatConfig(), seed=0).parameters_count
