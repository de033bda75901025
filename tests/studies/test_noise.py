"""The study of noise that ships, for as many minutes as there are: what it says of reproducibility is a law."""

import os
import re
from pathlib import Path

import pytest
from forked import Forked

MINUTES = float(os.environ.get("ARC_SOLVER_SOAK_MINUTES", "0"))


@pytest.mark.skipif(not MINUTES, reason="takes long: bin/test --nightly runs it")
def test_runs_with_one_seed_leave_the_same_weights(tmp_path):
    words = ["audit.scored_on=[]", "train.steps=60", "validation.tokens=32768"]
    places = ["--out", str(tmp_path / "out"), "--page", str(tmp_path / "page"), "--hours", str(MINUTES / 60)]
    process = Forked("arc_solver.study", ["configs/studies/noise.toml", *places, *words])
    said = process.communicate(timeout=300 + 120 * MINUTES)
    assert process.returncode == 0, said
    answer = Path(tmp_path / "page" / "noise.md").read_text().splitlines()[2]
    same = re.search(r"Of (\d+) pairs? of runs with the same seed, (\d+) left the same weights", answer)
    assert same and int(same[1]) == int(same[2]) >= 1
