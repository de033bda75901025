"""Charts: of a training, of predicted chances, and lines for a page. Matplotlib is imported when one is drawn."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # in a chart for a page it becomes the text colour around
DOTS = 110  # an inch, in files of pixels
POINTS = 200  # of a curve that is drawn on a grid of its own
LINES = (("#3f83d6", ""), ("#d27d2d", "o"))  # colours that both light and dark pages show, and marks of the points


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", file: Path) -> None:
    """As the ending says; the same bytes for the same figure. Text becomes outlines, so no font is needed to show it.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "arc_solver"}):
        figure.savefig(file, dpi=DOTS, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)


def smoothed(values: Sequence[float]) -> list[float]:
    """Each with what was before: an exponential average, in which the first weighs no more than the others."""
    smooth, value = [], 0.0
    for i, each in enumerate(values, 1):
        value = 0.98 * value + 0.02 * each
        smooth.append(value / (1 - 0.98**i))
    return smooth


def loss_curve(log_file: Path, picture: Path) -> None:
    """Draws training and validation loss over tokens from a `log.jsonl` of `train`."""
    steps = [json.loads(line) for line in log_file.read_text().splitlines()]
    training = [(s["tokens"] / 1e6, s["loss"]) for s in steps if "loss" in s]
    validation = [(s["tokens"] / 1e6, s["validation_loss"]) for s in steps if "validation_loss" in s]
    smooth = smoothed([loss for _, loss in training])
    figure = new_figure(7, 4)
    axes = figure.subplots()
    axes.plot([x for x, _ in training], smooth, label="training, smoothed", linewidth=1)
    if validation:  # a short run may have had no time for it
        axes.plot(*zip(*validation, strict=True), "o-", label="held-out tasks", markersize=3)
    axes.set(xlabel="million tokens", ylabel="loss, nats a token")
    _logarithmic(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, picture)


def rate_curve(rates: Sequence[float], stages: Sequence[tuple[str, int]], picture: Path) -> None:
    """Draws the learning rate over the steps; `stages` are names and last steps."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    axes.plot(range(1, len(rates) + 1), rates, linewidth=1)
    begin = 0
    for name, end in stages:
        axes.axvline(end, color="grey", linewidth=0.5)
        axes.text((begin + end) / 2, max(rates), name, ha="center", va="bottom", fontsize=8)
        begin = end
    axes.set(xlabel="step", ylabel="learning rate (train.lr)", ylim=(0, None))
    axes.grid(alpha=0.3)
    save_figure(figure, picture)


def reliability_curve(points: Sequence[tuple[float, float, float, float, int]], title: str, picture: Path) -> None:
    """Draws the shares that were solved over predicted chances.

    Args:
        points: predicted chance, share that is solved, its interval's ends, and the number of tasks behind it.
    """
    figure = new_figure(5, 4.6)
    axes = figure.subplots()
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
    save_figure(figure, picture)


def line_chart(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, log: bool = False) -> str:
    """Up to two lines with their labels, as an SVG for a page, whose text colour and fonts it has."""
    import matplotlib

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{x}{y}",  # the same file for the same points, and no id twice on a page
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
    with matplotlib.rc_context(style):
        figure = new_figure(6, 3.2)
        axes = figure.subplots()
        for (label, (xs, ys)), (colour, mark) in zip(lines.items(), LINES, strict=False):
            alone = "o" if len(xs) == 1 else ""  # else it would not be seen
            axes.plot(xs, ys, color=colour, linewidth=1.4, marker=mark or alone, markersize=3, label=label)
        axes.set(xlabel=x, ylabel=y)
        if log:
            _logarithmic(axes)
        else:
            axes.set_ylim(0, None)
        axes.grid(alpha=0.15, color=INK)
        if len(lines) > 1:
            axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _logarithmic(axes: "Axes") -> None:
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def band_chart(curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]], y: str, picture: Path) -> None:
    """Draws of each name the mean of its curves, and between the lowest and the highest of them a band.

    Args:
        curves: of each name its curves, as points over millions of tokens; they may have different points.
    """
    import numpy as np

    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, of in curves.items():
        ends = min(xs[-1] for xs, _ in of)
        grid = np.linspace(max(xs[0] for xs, _ in of), ends, POINTS)
        values_CP = np.array([np.interp(grid, xs, ys) for xs, ys in of])
        (line,) = axes.plot(grid, values_CP.mean(0), linewidth=1.2, label=name)
        axes.fill_between(grid, values_CP.min(0), values_CP.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="million tokens", ylabel=y)
    _logarithmic(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, picture)


def interval_chart(intervals: Mapping[str, tuple[float, float, float]], x: str, picture: Path) -> None:
    """Draws values with their intervals below each other; 0 is where there is no difference.

    Args:
        intervals: of each name the value, and its lower and upper end, which may be NaN.
    """
    figure = new_figure(7, 1.1 + 0.36 * len(intervals))
    axes = figure.subplots()
    for row, (value, low, high) in enumerate(intervals.values()):
        axes.plot((low, high), (row, row), color="#3f83d6", linewidth=2)
        axes.plot(value, row, "o", color="#1f3f66", markersize=5)
    axes.axvline(0, color="grey", linewidth=0.8, linestyle="dashed")
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set(xlabel=x, ylim=(len(intervals) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    save_figure(figure, picture)


def power_law_chart(
    points: Mapping[float, Sequence[float]],
    at: Callable[[float], float],
    far: tuple[float, float, float, float],
    titles: tuple[str, str],
    picture: Path,
) -> None:
    """Draws the values of each x, a law through them, and what it says of a larger x.

    Args:
        far: that x, the value there, and its interval's ends.
        titles: of the axes.
    """
    import numpy as np

    figure = new_figure(7, 4)
    axes = figure.subplots()
    for x, values in points.items():
        axes.plot([x] * len(values), values, "o", color="#3f83d6", markersize=4)
    xs = np.geomspace(min(points), far[0], POINTS)
    axes.plot(xs, [at(x) for x in xs], color="grey", linewidth=1, label="power law")
    below, above = far[1] - far[2], far[3] - far[1]
    axes.errorbar(
        far[0],
        far[1],
        [[max(0.0, below)], [max(0.0, above)]],
        fmt="s",
        color="#d27d2d",
        capsize=3,
        label="ten times more, 95%",
    )
    axes.set(xlabel=titles[0], ylabel=titles[1], xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, picture)
