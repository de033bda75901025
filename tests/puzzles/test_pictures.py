"""Tasks as pictures: every cell in its colour, in the terminal and in files."""

import io
import re
from collections import Counter

import numpy as np
import pytest
from rich.color import Color
from rich.console import COLOR_SYSTEMS, Console
from toys import flip_task

from arc_solver.errors import UserError
from arc_solver.puzzles.pictures import (
    PALETTE,
    Drawing,
    _rows,
    grid_text,
    needs_numbers,
    save_pictures,
    task_picture,
    width_of,
)
from arc_solver.puzzles.tasks import Pair, Task, freeze

CELLS = freeze(np.arange(6, dtype=np.uint8).reshape(2, 3))
PATCH = re.compile(r'<path d="([^"]*)" clip-path="[^"]*"(?: style="fill: (#\w{6})")?/>')  # black is the default


def filled(svg: str) -> Counter:
    """Areas by colour."""
    areas: Counter = Counter()
    for outline, colour in PATCH.findall(svg):
        for rectangle in re.findall(r"M[^M]*", outline):
            points = np.array(re.findall(r"-?[\d.]+", rectangle), float).reshape(-1, 2)
            width, height = np.ptp(points, axis=0)
            areas[colour or PALETTE[0]] += width * height
    return areas


def test_pictures_show_every_cell(rng):
    assert grid_text(CELLS).plain == "0 1 2 \n3 4 5 "
    task = flip_task(rng, tests=2)
    attempts = [(CELLS, task.test[0]), (CELLS, CELLS)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(task_picture(Drawing("task", task, attempts, [task.test[0], task.test[1]])))
    text = console.export_text()
    assert text.count("✓") == 1
    assert text.count("✗") == 3


def test_the_number_of_a_cell_is_seen_on_demand():
    for numbers in (False, True):
        styles = [str(span.style).split(" on ") for span in grid_text(CELLS, numbers).spans]
        assert [paper for _, paper in styles] == list(PALETTE[:6])
        hidden = [ink == paper for ink, paper in styles]
        assert hidden == [False] * 6 if numbers else hidden == [False] + [True] * 5


@pytest.mark.parametrize("numbers", [False, True])
def test_a_file_has_all_cells_in_their_colours_and_needs_no_font(tmp_path, numbers):
    """Of a task whose grids have one size, so that all cells have one size too."""
    grids = [freeze(np.random.default_rng(seed).integers(0, 10, (4, 5)).astype(np.uint8)) for seed in range(5)]
    drawing = Drawing("task", Task("t", (Pair(grids[0], grids[1]),), (grids[2],)), [(grids[3], grids[4])], [grids[4]])
    save_pictures([drawing], tmp_path / "x.svg", numbers)
    svg = (tmp_path / "x.svg").read_text()
    areas = filled(svg)
    counts = Counter(PALETTE[cell] for grid in [*grids, grids[4]] for cell in grid.ravel().tolist())
    cell = sum(areas[colour] for colour in counts) / sum(counts.values())
    for colour, count in counts.items():
        assert areas[colour] / cell == pytest.approx(count, abs=0.01), colour
    assert "<text" not in svg and "font-family" not in svg and "http" not in svg.partition("</metadata>")[2]


def test_a_file_is_what_its_ending_says_and_the_same_for_the_same_tasks(tmp_path, rng):
    drawing = Drawing("task", flip_task(rng))
    for name in ("a.svg", "b.svg", "a.png"):
        save_pictures([drawing, drawing], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_rows_keep_together_what_belongs_together(rng):
    """Demonstrations and tests; a task with a single demonstration, one test and its answers is one row."""
    task = flip_task(rng, tests=2)
    attempts = [(CELLS, CELLS)] * 2
    one = _rows(Drawing("task", task, attempts, task.test, demonstrations=1))
    assert [len(row) for row in one] == [6, 4]
    for row in _rows(Drawing("task", task, attempts, task.test)):
        assert row[0].label.startswith(("demonstration", "test input")) and len(row) <= 6


@pytest.mark.parametrize(("system", "needed"), [("standard", True), ("256", False), ("truecolor", False)])
def test_numbers_are_needed_where_colours_of_ours_look_the_same(system, needed):
    console = Console(color_system=system, force_terminal=True, file=io.StringIO())
    assert needs_numbers(console) == needed
    shown = {Color.parse(colour).downgrade(COLOR_SYSTEMS[system]).get_ansi_codes() for colour in PALETTE}
    assert (len(shown) < 10) == needed


def test_at_its_width_no_grid_is_torn(rng):
    cells = freeze(rng.integers(0, 10, (3, 30)).astype(np.uint8))
    drawing = Drawing("task", Task("t", (Pair(cells, cells),), (cells,)), [(cells, cells)], [cells])
    row = " ".join(map(str, cells[0].tolist()))
    assert width_of(drawing) >= 2 * 2 * 30
    for width, torn in ((80, True), (width_of(drawing), False)):
        console = Console(width=width, file=io.StringIO())
        with console.capture() as capture:
            console.print(task_picture(drawing))
        assert (capture.get().count(row) < 6) == torn


def test_a_picture_that_would_be_too_tall_is_refused(tmp_path, rng):
    drawing = Drawing("task", flip_task(rng))
    with pytest.raises(UserError, match=r"400 drawings would make a picture of [\d,]+ pixels .* choose fewer tasks"):
        save_pictures([drawing] * 400, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_sign_that_the_font_lacks_is_a_box(tmp_path, rng):
    """Without a warning, which would be an error here."""
    for name, title in (("a", "task 例え é"), ("b", "task □□ é")):
        save_pictures([Drawing(title, flip_task(np.random.default_rng(0)))], tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_an_ending_in_capitals_is_as_good(tmp_path, rng):
    drawing = Drawing("task", flip_task(rng))
    for name in ("a.svg", "B.SVG", "C.PNG"):
        save_pictures([drawing], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "B.SVG").read_bytes()
    assert (tmp_path / "C.PNG").read_bytes().startswith(b"\x89PNG")
