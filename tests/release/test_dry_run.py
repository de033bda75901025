"""The whole rehearsal: the real notebook, the real wheels, the bundled model, offline."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arc_solver.errors import MachineError
from arc_solver.release.bundle import CHECKOUT
from arc_solver.release.sandbox import namespaces
from arc_solver.release.submit import RELEASES

QUICK = ["adapt.steps=20", "predict.views=4", "kaggle.smoke_tasks=2", "run.workers=1"]


def test_from_a_config_to_a_scored_submission():
    """Six tasks, 12 h in 1.5 minutes. What `bin/submit configs/kaggle-cpu.toml dry-run` does with 240."""
    try:
        namespaces()
    except MachineError as error:
        pytest.skip(str(error))
    words = [sys.executable, "-P", "-m", "arc_solver.submit", str(CHECKOUT / "configs" / "kaggle-cpu.toml"), "dry-run"]
    words += [*QUICK, "--rehearse", "6", "--clock", "0.002", "--json"]
    here = Path(sys.prefix) / "dry-run"  # keeps what stands for the image, which is made anew when its lock has changed
    here.mkdir(exist_ok=True)
    for release in (here / RELEASES).glob("[!.]*"):
        shutil.rmtree(release)
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(words, cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rehearsed = json.loads(done.stdout)["rehearsal"]
    commit, rerun = rehearsed["commit"], rehearsed["rerun"]
    assert commit["tasks"] == rerun["tasks"] == 6
    assert (commit["answered"], rerun["answered"]) == (2, 6)
    assert commit["score"]["tasks"] == rerun["score"]["tasks"] == 6
    assert commit["score"]["outputs_solved"] <= 2  # the others have placeholders
    assert rerun["seconds"] < 12 * 3600 * 0.002
    assert "leak audit passed" in rerun["audit"]
    assert "not a score on unseen tasks" in commit["audit"]
    log = (here / json.loads(done.stdout)["release"] / "rehearsal" / "rerun" / "log.txt").read_text()
    assert "GPUs: []" in log
    assert "6 of 6 tasks answered" in log
    assert "exit code 0" in log
