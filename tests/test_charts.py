"""Charts: pictures of their kind, with all points, the same bytes for the same points."""

import json
import re

import pytest

from arc_solver.charts import line_chart, loss_curve, reliability_curve, smoothed


def test_smoothing_begins_at_the_first_value_and_follows():
    assert smoothed([1.0, 2.0])[0] == pytest.approx(1.0) and smoothed([1.0, 2.0])[1] == pytest.approx(1.505, abs=0.01)
    assert smoothed([0.0] + [1.0] * 400)[-1] > 0.99


def test_a_loss_curve_is_drawn_from_a_log(tmp_path):
    steps = [{"step": i, "tokens": i * 10**6, "loss": 3 / i, "validation_loss": 4 / i} for i in range(1, 5)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, steps)))
    loss_curve(tmp_path / "log.jsonl", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_points_make_the_same_file_without_a_font(tmp_path):
    points = [(0.2, 0.25, 0.1, 0.5, 8), (0.8, 0.7, 0.5, 0.9, 9)]
    for name in "ab":
        reliability_curve(points, "chances", tmp_path / f"{name}.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert "<text" not in drawn and "font-family" not in drawn


def test_a_chart_of_a_page_has_its_colours_and_text():
    svg = line_chart({"one": ([1, 2, 3], [1, 2, 3]), "two": ([1, 2], [3, 2])}, "steps", "loss")
    assert svg.startswith("<svg") and "currentColor" in svg
    assert {"one", "two", "steps", "loss"} <= set(re.findall(r"<text[^>]*>([^<]+)</text>", svg))
