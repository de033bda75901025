"""Many runs in one process: memory and open files stay flat.

Twelve of them; or as many as there is time for in ARC_SOLVER_SOAK_MINUTES, if those are more.
"""

import gc
import os
import time
from pathlib import Path

import numpy as np
from toys import TOY, hasty

from arc_solver.config import FormatConfig
from arc_solver.data.leaks import NOTHING
from arc_solver.models.hardware import resident_memory
from arc_solver.models.model import new_model, save_model
from arc_solver.solving.command import main

MINUTES = float(os.environ.get("ARC_SOLVER_SOAK_MINUTES", "0"))
FEWEST = 12  # runs


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_memory_and_open_files_stay_flat(tmp_path, capsys):
    save_model(hasty(new_model(TOY, FormatConfig(), seed=1, trained_on=NOTHING)), tmp_path / "model")
    words = [f"model.path={tmp_path / 'model'}", "run.executor=inprocess", "adapt.steps=3", "predict.views=4"]
    seen: list[tuple[float, int, int]] = []  # seconds, bytes, open files
    began, n = time.monotonic(), 0
    while (spent := time.monotonic() - began) < 60 * MINUTES or n < FEWEST:
        assert main([*words, "--limit", "2", "--out", str(tmp_path / f"run{n}")]) == 0
        capsys.readouterr()
        gc.collect()
        n += 1
        seen.append((spent, resident_memory(), open_files()))
    later = seen[len(seen) // 3 :]  # what libraries load and keep comes first
    minutes, sizes, files = (np.array(column) for column in zip(*later, strict=True))
    growth = np.polyfit(minutes / 60, sizes, 1)[0]  # bytes a minute
    with capsys.disabled():
        print(f"\n{n} runs in {minutes[-1] / 60:.1f} minutes: {sizes[-1] / 2**20:.0f} MiB", end=", ")
        print(f"{files[-1]} open files", end="; ")
        print(f"{growth / 2**20:+.2f} MiB a minute after the first third")
    assert files.max() == files.min()
    assert sizes.max() - sizes.min() < 64 << 20
