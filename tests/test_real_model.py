"""The shortest path of docs/real-models.md: a real language model is cut, taught, adapted to a real task, and asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import log, weights

ROOT = Path(__file__).parents[1]
MODEL_DIR = ROOT / ".venv" / "smollm2"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not MODEL_DIR.is_dir(), reason="needs a real language model: bin/test --real makes its folder"),
]


def command(module: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"arc_solver.{module}", *map(str, words)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_real_language_model_from_end_to_end(tmp_path):
    settings = ["train.steps=4", "train.batch_tokens=1024", "train.compile=no", "validation.tokens=1", "run.device=cpu"]
    config = ROOT / "configs" / "smollm2-135m.toml"
    said = command("train", config, "--out", tmp_path / "run", f"model.path={MODEL_DIR}", *settings)
    assert "vocabulary cut from 49,152 to 64 ids: 134,515,008 parameters before, 106,240,320 after" in said
    steps = [line for line in log(tmp_path / "run") if "grad_norm" in line]
    assert len(steps) == 4
    assert all(0.1 < step["loss"] < 3 for step in steps), "a pretrained model knows digits and rows from the start"
    assert len(weights(tmp_path / "run" / "model")["model.embed_tokens.weight"]) == 64

    quick = ["adapt.steps=12", "adapt.lr=1e-3", "adapt.batch_size=2", "predict.views=2", "run.show=0", "run.device=cpu"]
    out, model = tmp_path / "solved", f"model.path={tmp_path / 'run' / 'model'}"
    command("solve", "--tasks", "arc-agi-1/training", "--limit", 1, "--out", out, model, *quick)
    (task,) = [record for record in log(out) if record["event"] == "task"]
    assert task["fallback"] is None
    assert task["adaptation"]["last_loss"] < 0.9 * task["adaptation"]["first_loss"]
    assert json.loads((out / "summary.json").read_text())["score"]["tasks"] == 1
