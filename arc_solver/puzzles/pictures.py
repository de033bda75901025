"""Tasks and answers as pictures: coloured grids in the terminal, or in a file that a README shows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..charts import DOTS, new_figure, save_figure
from ..errors import UserError, counted
from .encode import END, IGNORE, INPUT, NEWLINE, OUTPUT, TOKENS, Sample
from .tasks import COLOURS, Attempts, Grid, Task, same_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.path import Path as Outline

# The colours in which ARC tasks are usually drawn: black, blue, red, green, yellow, grey, pink, orange, azure, maroon.
PALETTE = (
    *("#000000", "#1e93ff", "#f93c31", "#4fcc30", "#ffdc00"),
    *("#999999", "#e53aa3", "#ff851b", "#87d8f1", "#921231"),
)
DARK = {0, 2, 9}  # colours on which a number is white
RIGHT, WRONG = "#1a7f37", "#cf222e"

# Of a file, in inches.
MOST_IN_A_ROW = 6  # grids: a demonstration, a test input, both attempts and the right output
BOX, MOST_CELL = 1.5, 0.3  # the longest sides of a grid and of a cell
GAP, LABEL, TITLE = 0.42, 0.24, 0.36  # between two grids, above each, and above a task
TALLEST = 150.0  # 16,500 pixels: taller ones many programs do not open
MISSING = "□"  # stands for a sign that the font lacks


@dataclass(frozen=True, eq=False)
class Labelled:
    """A grid and what stands above it. `is_right`: None where nobody knows, or where it is no answer."""

    label: str
    grid: Grid
    is_right: bool | None = None


@dataclass(frozen=True, eq=False)
class Drawing:
    """What is to be drawn of one task.

    Attributes:
        attempts: of each test input; empty: there are none.
        demonstrations: how many are shown; None: all.
    """

    title: str
    task: Task
    attempts: Sequence[Attempts] = ()
    solution: Sequence[Grid] | None = None
    demonstrations: int | None = None

    def shown_demonstrations(self) -> list[list[Labelled]]:
        """Input and output of each."""
        shown = self.task.train[: self.demonstrations]
        name = "a demonstration" if self.demonstrations == 1 else "demonstration {}"
        return [
            [Labelled(name.format(i), pair.input), Labelled("its output", pair.output)]
            for i, pair in enumerate(shown, 1)
        ]

    def shown_tests(self) -> list[list[Labelled]]:
        """Each test input with its attempts and, if known, the right output."""
        tests = []
        for t, test_input in enumerate(self.task.test):
            number = f" {t + 1}" if len(self.task.test) > 1 else ""
            shown = [Labelled(f"test input{number}", test_input)]
            answers = self.attempts[t] if self.attempts else ()
            for name, attempt in zip(("attempt 1", "attempt 2"), answers, strict=False):
                right = None if self.solution is None else same_grid(attempt, self.solution[t])
                shown.append(Labelled(name + {None: "", True: " ✓", False: " ✗"}[right], attempt, right))
            if self.solution is not None:
                shown.append(Labelled("right output", self.solution[t]))
            tests.append(shown)
        return tests


# ---- in the terminal -----------------------------------------------------------------------------------------------


def grid_text(grid: Grid, numbers: bool = False) -> Text:
    """A grid as coloured squares. Where colours are off (a file, NO_COLOR) the digits still tell the cells apart.

    Of black cells the digit can be seen, dimly: the terminal is often black itself, and would hide where a grid ends.
    """
    text = Text()
    for r, row in enumerate(grid.tolist()):
        if r:
            text.append("\n")
        for cell in row:
            ink = _contrast(cell) if numbers else "#444444" if cell == 0 else PALETTE[cell]
            text.append(f"{cell} ", style=f"{ink} on {PALETTE[cell]}")
    return text


def needs_numbers(console: Console) -> bool:
    """Whether a console has so few colours that some of ours look the same there."""
    return console.color_system not in ("256", "truecolor")


def width_of(drawing: Drawing) -> int:
    """Columns that a picture needs, if no grid may be torn; see `task_picture`."""
    wide = Console(width=10_000)
    return max(Text(drawing.title).cell_len, *(wide.measure(each).maximum for each in _units(drawing, numbers=False)))


def task_picture(drawing: Drawing, numbers: bool = False) -> Group:
    """Demonstrations side by side, whatever the width; then tests and answers, as many in a row as there is room."""
    return Group(Text(drawing.title, style="bold"), Columns(_units(drawing, numbers), padding=(0, 2)), Text())


def _units(drawing: Drawing, numbers: bool) -> list[Table]:
    """What a line's end does not tear apart."""
    shown = []
    for pair in drawing.shown_demonstrations():
        both = Table.grid(padding=(0, 2))
        both.add_row(*(_labelled(each, numbers) for each in pair))
        shown.append(both)
    return [*shown, *(_labelled(each, numbers) for test in drawing.shown_tests() for each in test)]


def _labelled(shown: Labelled, numbers: bool) -> Table:
    table = Table.grid()
    table.add_row(Text(shown.label, style={None: "dim", True: "green", False: "red"}[shown.is_right]))
    table.add_row(grid_text(shown.grid, numbers))
    return table


def sample_text(sample: Sample) -> Text:
    """A sequence as a model reads it, a line for each row and each marker; in front of each, whether it is learnt."""
    text = Text()
    starts_line = True
    for token, label in zip(sample.ids_T.tolist(), sample.labels_T.tolist(), strict=True):
        is_learnt = label != IGNORE
        if starts_line:
            text.append("learnt  " if is_learnt else "        ", style="bold")
        name = "⏎" if token == NEWLINE else TOKENS[token]
        is_cell = token < COLOURS
        text.append(name, style=f"white on {PALETTE[token]}" if is_cell and token else "" if is_learnt else "dim")
        starts_line = token in (NEWLINE, INPUT, OUTPUT, END)
        text.append("\n" if starts_line else " ")
    return text


# ---- in a file -----------------------------------------------------------------------------------------------------


def save_pictures(drawings: Sequence[Drawing], file: Path, numbers: bool = False) -> None:
    """Tasks below each other, each in rows of up to six grids with one size of cells. PNG or SVG, by the file's ending.

    Signs of a title that the font lacks are drawn as boxes.

    Raises:
        UserError: it would be too tall for most programs.
        OSError: it cannot be written.
    """
    rows_of = [_rows(drawing) for drawing in drawings]
    cells = [_cell_side(rows) for rows in rows_of]
    height = sum(TITLE + sum(_row_height(row, cell) for row in rows) for rows, cell in zip(rows_of, cells, strict=True))
    if height > TALLEST:
        raise UserError(
            f"{counted(len(drawings), 'drawing')} would make a picture of {height * DOTS:,.0f} pixels from top to"
            f" bottom, and at most {TALLEST * DOTS:,.0f} can be shown: choose fewer tasks or views"
        )
    widest = max(len(row) for rows in rows_of for row in rows)
    figure = new_figure(GAP + widest * (BOX + GAP), height + GAP / 2)
    figure.set_layout_engine("none")
    top = height + GAP / 2  # what is left, from below
    for drawing, rows, cell in zip(drawings, rows_of, cells, strict=True):
        _write(figure, drawing.title, GAP, top - 0.26, size=10, weight="bold")
        top -= TITLE
        for row in rows:
            for column, shown in enumerate(row):
                left = GAP + column * (BOX + GAP)
                colour = {None: "#57606a", True: RIGHT, False: WRONG}[shown.is_right]
                _write(figure, shown.label, left, top - LABEL + 0.07, size=8, color=colour)
                _draw(figure, shown.grid, left, top - LABEL, cell, numbers)
                if shown.label == "its output":
                    _write(figure, "→", left - GAP / 2, top - LABEL - 0.2, size=11, color="#57606a", ha="center")
            top -= _row_height(row, cell)
    save_figure(figure, file)


def _rows(drawing: Drawing) -> list[list[Labelled]]:
    """Of the grids of a task: what belongs together is never torn apart."""
    rows: list[list[Labelled]] = [[]]
    for unit in [*drawing.shown_demonstrations(), *drawing.shown_tests()]:
        if len(rows[-1]) + len(unit) > MOST_IN_A_ROW:
            rows.append([])
        rows[-1] += unit
    return rows


def _cell_side(rows: Iterable[Iterable[Labelled]]) -> float:
    return min(MOST_CELL, BOX / max(max(shown.grid.shape) for row in rows for shown in row))


def _row_height(row: Iterable[Labelled], cell: float) -> float:
    return LABEL + max(shown.grid.shape[0] for shown in row) * cell + 0.16


def _draw(figure: "Figure", grid: Grid, left: float, top: float, cell: float, numbers: bool) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    (rows, columns), (width, height) = grid.shape, figure.get_size_inches()
    box = (left / width, (top - rows * cell) / height, columns * cell / width, rows * cell / height)
    axes = figure.add_axes(box, xlim=(0, columns), ylim=(rows, 0))
    axes.set_axis_off()
    outlines: dict[int, list[Outline]] = {}  # of each colour: equal cells of a row are one rectangle, for a small file
    for r, row in enumerate(grid.tolist()):
        for colour, run in groupby(range(columns), key=row.__getitem__):
            first, *rest = run
            outlines.setdefault(colour, []).append(_rectangle(first, r, first + len(rest) + 1, r + 1))
    for colour, rectangles in outlines.items():
        axes.add_patch(PathPatch(Outline.make_compound_path(*rectangles), facecolor=PALETTE[colour], linewidth=0))
    lines = [Outline([(c, 0), (c, rows)]) for c in range(columns + 1)]
    lines += [Outline([(0, r), (columns, r)]) for r in range(rows + 1)]
    between = PathPatch(Outline.make_compound_path(*lines), fill=False, edgecolor="#555555", linewidth=0.5)
    between.set_clip_on(False)
    axes.add_patch(between)
    for (r, c), value in np.ndenumerate(grid) if numbers else ():
        style: Any = {"fontsize": 72 * cell * 0.55, "ha": "center", "va": "center_baseline"}  # in points
        axes.text(c + 0.5, r + 0.5, f"{value}", color=_contrast(int(value)), **style)


def _rectangle(left: int, top: int, right: int, bottom: int) -> "Outline":
    from matplotlib.path import Path as Outline

    return Outline([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], closed=True)


def _write(figure: "Figure", text: str, left: float, bottom: float, **style: Any) -> None:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    width, height = figure.get_size_inches()
    known = get_font(findfont(FontProperties(weight=style.get("weight")))).get_charmap()
    drawable = "".join(sign if ord(sign) in known else MISSING for sign in text)
    figure.text(left / width, bottom / height, drawable, **style)


def _contrast(cell: int) -> str:
    return "#ffffff" if cell in DARK else "#000000"
