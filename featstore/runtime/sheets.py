"""A table for people: the same cells for a terminal and for a notebook."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from featstore.runtime.visible import inline

if TYPE_CHECKING:
    from rich.console import RenderableType

#: What a table shows in place of a figure that is undefined or was not measured.
NONE = "–"


@dataclass(frozen=True)
class Sheet:
    """A table for people.

    Attributes:
        title: Above it.
        columns: Names.
        rows: One text for each column.
        notes: Lines below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __rich__(self) -> RenderableType:
        """The table for a terminal. Cells are text and never markup."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for place, name in enumerate(self.columns):
            # What a row is of must be readable; figures may wrap.
            table.add_column(Text(inline(name)), no_wrap=place == 0)
        for row in self.rows:
            table.add_row(*(Text(inline(cell)) for cell in row))
        return Group(Text(inline(self.title), style="bold"), table, *(Text(inline(note)) for note in self.notes))

    def html(self) -> str:
        """The table for a notebook."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        caption = f'<caption style="text-align:left;font-weight:bold">{escape(self.title)}</caption>'
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def number(value: float | None, form: str = ".3f") -> str:
    """A figure in a cell.

    Args:
        value: None where it is undefined.
        form: Format of `format`.
    """
    return NONE if value is None else format(value, form)


def with_interval(value: float | None, ci95: Iterable[float | None] | None, form: str = ".3f") -> str:
    """A figure with its 95 % interval in a cell: ``0.870 [0.851, 0.886]``.

    Args:
        value: None where it is undefined.
        ci95: Low and high end; None without an interval.
        form: Format of `format`.
    """
    ends = "" if ci95 is None else f" [{', '.join(number(end, form) for end in ci95)}]"
    return number(value, form) + ends


def counted(count: int, noun: str) -> str:
    """``1 map``, ``2 maps``.

    Args:
        count: How many.
        noun: In the singular.
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _cell(text: str) -> str:
    return f'<td style="text-align:left">{escape(text)}</td>'
