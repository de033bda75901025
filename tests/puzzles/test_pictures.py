import io
import json

import numpy as np
from rich.console import Console
from toys import flip_task

from arc_solver.puzzles.pictures import grid_text, loss_curve, save_picture, task_picture
from arc_solver.puzzles.tasks import freeze


def test_pictures_show_every_cell(rng):
    cells = freeze(np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert grid_text(cells).plain == "0 1 2 \n3 4 5 "
    task = flip_task(rng, tests=2)
    attempts = [(cells, task.test[0]), (cells, cells)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(task_picture(task, attempts, [task.test[0], task.test[1]]))
    text = console.export_text()
    assert text.count("✓") == 1
    assert text.count("✗") == 3


def test_pictures_are_saved(tmp_path, rng):
    task = flip_task(rng)
    save_picture(task_picture(task, [(task.test[0], task.test[0])], None), tmp_path / "x.svg", "title")
    assert (tmp_path / "x.svg").read_text().startswith("<svg")
    steps = [{"step": i, "tokens": i * 10**6, "loss": 3 / i, "validation_loss": 4 / i} for i in range(1, 5)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, steps)))
    loss_curve(tmp_path / "log.jsonl", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
