"""Pictures: grids in the terminal, and the loss curve of a training run."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .encode import END, IGNORE, INPUT, NEWLINE, OUTPUT, TOKENS, Sample
from .tasks import COLOURS, Attempts, Grid, Task, same_grid

# The colours in which ARC tasks are usually drawn: black, blue, red, green, yellow, grey, pink, orange, azure, maroon.
PALETTE = (
    *("#000000", "#1e93ff", "#f93c31", "#4fcc30", "#ffdc00"),
    *("#999999", "#e53aa3", "#ff851b", "#87d8f1", "#921231"),
)

INK = "#010203"  # in a chart it becomes the text colour of the page around


def grid_text(grid: Grid) -> Text:
    """A grid as coloured squares. Where colours are off (a file, NO_COLOR) the digits still tell the cells apart."""
    text = Text()
    for r, row in enumerate(grid.tolist()):
        if r:
            text.append("\n")
        for cell in row:
            text.append(f"{cell} ", style=f"{'#555555' if cell == 0 else PALETTE[cell]} on {PALETTE[cell]}")
    return text


def task_picture(
    task: Task, attempts: Sequence[Attempts], solution: Sequence[Grid] | None, demonstrations: int | None = 1
) -> Group:
    """The first demonstrations, then every test input with its two attempts and, if known, the right output.

    Args:
        attempts: of each test input; empty: there are none.
        demonstrations: how many are shown; None: all.
    """
    shown = []
    for i, pair in enumerate(task.train[:demonstrations], 1):
        name = "a demonstration" if demonstrations == 1 else f"demonstration {i}"
        both = Table.grid(padding=(0, 2))  # side by side, whatever the width
        both.add_row(_labelled(name, pair.input), _labelled("its output", pair.output))
        shown.append(both)
    for t, test_input in enumerate(task.test):
        number = f" {t + 1}" if len(task.test) > 1 else ""
        shown.append(_labelled(f"test input{number}", test_input))
        for name, attempt in zip(("attempt 1", "attempt 2"), attempts[t] if attempts else (), strict=False):
            right = solution is not None and same_grid(attempt, solution[t])
            mark = "" if solution is None else " ✓" if right else " ✗"
            shown.append(_labelled(name + mark, attempt, "green" if right else "red" if mark else ""))
        if solution is not None:
            shown.append(_labelled("right output", solution[t]))
    return Group(Text(f"task {task.id}", style="bold"), Columns(shown, padding=(0, 2)), Text())


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


def _labelled(label: str, grid: Grid, style: str = "") -> Table:
    table = Table.grid()
    table.add_row(Text(label, style=style or "dim"))
    table.add_row(grid_text(grid))
    return table


def save_picture(shown: RenderableType, file: Path, title: str) -> None:
    """What the terminal shows, as an SVG that a browser opens."""
    recorder = Console(record=True, width=130, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    recorder.print(shown)
    recorder.save_svg(str(file), title=title)


def smoothed(values: Sequence[float]) -> list[float]:
    """Each with what was before: an exponential average, which begins at the first."""
    smooth, value = [], values[0]
    for each in values:
        value = 0.98 * value + 0.02 * each
        smooth.append(value)
    return smooth


def loss_curve(log_file: Path, picture: Path) -> None:
    """Draws training and validation loss over tokens from a `log.jsonl` of `train`. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    steps = [json.loads(line) for line in log_file.read_text().splitlines()]
    training = [(s["tokens"] / 1e6, s["loss"]) for s in steps if "loss" in s]
    validation = [(s["tokens"] / 1e6, s["validation_loss"]) for s in steps if "validation_loss" in s]
    smooth = smoothed([loss for _, loss in training])
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([x for x, _ in training], smooth, label="training, smoothed", linewidth=1)
    if validation:  # a short run may have had no time for it
        axes.plot(*zip(*validation, strict=True), "o-", label="held-out tasks", markersize=3)
    axes.set(xlabel="million tokens", ylabel="loss, nats a token", yscale="log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def rate_curve(rates: Sequence[float], stages: Sequence[tuple[str, int]], picture: Path) -> None:
    """Draws the learning rate over the steps; `stages` are names and last steps. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(range(1, len(rates) + 1), rates, linewidth=1)
    begin = 0
    for name, end in stages:
        axes.axvline(end, color="grey", linewidth=0.5)
        axes.text((begin + end) / 2, max(rates), name, ha="center", va="bottom", fontsize=8)
        begin = end
    axes.set(xlabel="step", ylabel="learning rate (train.lr)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def reliability_curve(points: Sequence[tuple[float, float, float, float, int]], title: str, picture: Path) -> None:
    """Draws the shares that were solved over predicted chances. Needs matplotlib.

    Args:
        points: predicted chance, share that is solved, its interval's ends, and the number of tasks behind it.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "arc_solver"  # the same file for the same points
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.6))
    axes.plot((0, 1), (0, 1), color="grey", linewidth=0.8, linestyle="dashed", label="as predicted")
    chances, shares, lows, highs, counts = zip(*points, strict=True)
    below = [share - low for share, low in zip(shares, lows, strict=True)]
    above = [high - share for share, high in zip(shares, highs, strict=True)]
    axes.errorbar(chances, shares, (below, above), fmt="o-", linewidth=1, capsize=3, label="tasks, with 95% intervals")
    for chance, share, count in zip(chances, shares, counts, strict=True):
        axes.annotate(f"{count}", (chance, share), xytext=(7, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="predicted chance", ylabel="share that is solved", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(picture, dpi=110, metadata={"Date": None} if picture.suffix == ".svg" else None)
    pyplot.close(figure)


def line_chart(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], x: str, y: str, log: bool = False) -> str:
    """Lines with their labels, as an SVG for a page, whose text colour and fonts it has. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{x}{y}",  # the same file for the same points, and no id twice on a page
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        for (label, xs, ys), colour, mark in zip(lines, ("#3f83d6", "#d27d2d"), ("", "o"), strict=False):
            axes.plot(xs, ys, color=colour, linewidth=1.4, marker=mark, markersize=3, label=label)
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        if log:
            from matplotlib import ticker

            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axes.set_ylim(0, None)
        axes.grid(alpha=0.15, color=INK)
        if len(lines) > 1:
            axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
