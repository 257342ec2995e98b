"""Tables for people: cells are text, and figures read alike everywhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from featstore.runtime.sheets import Sheet, counted, number, with_interval

SHEET = Sheet("a <title>", ("map", "[bold]"), (("a->b", "[red]x[/red]"),), ("note & more",))


def test_the_terminal_shows_cells_as_they_are() -> None:
    stream = io.StringIO()
    Console(file=stream, width=60).print(SHEET)
    for words in ("a <title>", "[bold]", "a->b", "[red]x[/red]", "note & more"):
        assert words in stream.getvalue()


def test_a_notebook_shows_cells_as_they_are() -> None:
    html = SHEET.html()
    for words in ("a &lt;title&gt;", "a-&gt;b", "[red]x[/red]", "note &amp; more"):
        assert words in html
    assert html.count("<td") == 2


@pytest.mark.parametrize(
    ("value", "ci95", "text"),
    [
        (None, None, "–"),
        (0.12345, None, "0.123"),
        (0.5, (0.25, 0.75), "0.500 [0.250, 0.750]"),
        (0.5, (None, 0.75), "0.500 [–, 0.750]"),
    ],
)
def test_figures(value: float | None, ci95: tuple[float | None, float | None] | None, text: str) -> None:
    assert with_interval(value, ci95) == text
    assert number(value) == text.partition(" ")[0]


def test_counts() -> None:
    assert [counted(k, "map") for k in range(3)] == ["0 maps", "1 map", "2 maps"]
