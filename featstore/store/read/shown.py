"""A store in a notebook: one line, a table for pandas, the same table in HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def one_line(path: object, models: Sequence[Mapping[str, Any]], *, complete: bool) -> str:
    """A store's repr.

    Args:
        path: Where it is.
        models: For each ``name``, ``layers``, ``rows`` and ``width``.
        complete: Whether it is sealed.
    """
    parts = [f"{m['name']} {len(m['layers'])} layers of {m['rows']} x {m['width']}" for m in models]
    return f"<Store {path}: {', '.join(parts)}{'' if complete else ', unfinished'}>"


def html_table(caption: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Records as an HTML table, everything escaped.

    Args:
        caption: Above the table.
        records: Rows with equal keys, at least one.
    """
    head = "".join(f"<th>{escape(str(key))}</th>" for key in records[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in record.values()) + "</tr>" for record in records
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
