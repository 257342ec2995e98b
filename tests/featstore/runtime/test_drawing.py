"""Points with intervals, and figures that show themselves."""

from __future__ import annotations

import pytest

from featstore.runtime.drawing import Drawing, draw_points, panels


@pytest.mark.parametrize(("count", "shape"), [(0, 0), (1, 1), (3, 3), (4, 4)])
def test_a_panel_for_each_title(count: int, shape: int) -> None:
    titles = [f"a:{k}->$b$" for k in range(count)]
    figure, found = panels(titles)
    assert [axes.get_title() for axes in found] == titles
    assert len(found) == shape
    figure.canvas.draw()


def test_points_have_the_values_and_intervals_given() -> None:
    _, [axes] = panels(["one"])
    draw_points(axes, [("map", 0.5, (0.25, 1.0)), ("none", None, None), ("mean", 0.0, None)], controls=["mean"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["map", "none", "mean"]
    first, second = axes.containers
    assert first.lines[0].get_xydata().tolist() == [[0.5, 0.0]]
    assert first.lines[2][0].get_segments()[0].tolist() == [[0.25, 0.0], [1.0, 0.0]]
    assert second.lines[0].get_xydata().tolist() == [[0.0, 2.0]]
    assert first.lines[0].get_color() != second.lines[0].get_color()
    low, high = axes.get_ylim()
    assert low > high, "from top to bottom"


def test_a_drawing_shows_itself() -> None:
    figure = Drawing(figsize=(1, 1))
    figure.add_subplot()
    assert figure._repr_png_().startswith(b"\x89PNG")
