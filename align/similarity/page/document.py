"""The page as one HTML file: template, style, script and data put together; nothing is fetched when it is read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.pages.document import Pages, embedded
from align.similarity.findings import judged
from align.similarity.page import words
from align.similarity.page.definitions import MEASURES
from align.similarity.page.views import View, views
from featstore.runtime.console import jsonable
from featstore.runtime.provenance import write_atomic

NAME = "cka.html"
#: In the order they run, after those of all pages.
_SCRIPTS = ("cells.js", "courses.js", "lists.js", "main.js")


def render(result: Mapping[str, Any]) -> str:
    """The page.

    Args:
        result: Contents of ``cka.json``; NaN is read as null.

    Returns:
        A complete HTML document; the same contents give the same bytes.
    """
    plain: dict[str, Any] = jsonable(dict(result))
    # A file of an earlier version was not judged when it was made.
    plain = plain if "judged" in plain else judged(plain)
    shown = views(plain)
    return _pages().render(
        data=embedded(_data(plain, shown)),
        models=plain["models"],
        layers=plain["layers"],
        n=plain.get("n"),
        sample=plain.get("sample"),
        store=plain.get("store"),
        sentences=words.summary(plain, shown),
        warnings=words.warnings(plain["warnings"]),
        glances=words.glances(shown),
        views=shown,
        definitions=_definitions(shown),
        has_rank=bool(plain.get("effective_rank")),
        count=words.count,
    )


def write(result: Mapping[str, Any], out: Path) -> str:
    """Write the page beside ``cka.json``.

    Args:
        result: Contents of ``cka.json``.
        out: Directory; created.

    Returns:
        The name of the file, ``cka.html``.

    Raises:
        NoSpaceError: The disk is full.
    """
    write_atomic(out / NAME, render(result))
    return NAME


def _data(result: dict[str, Any], shown: list[View]) -> dict[str, Any]:
    return {
        "views": shown,
        "rank": result.get("effective_rank"),
        "layers": result["layers"],
        "models": list(dict.fromkeys(result["models"])),
    }


def _definitions(shown: list[View]) -> list[tuple[str, str, str]]:
    names = dict.fromkeys("cka" if view["id"] == "all-rows" else view["id"] for view in shown)
    return [MEASURES[name] for name in names if name in MEASURES]


@functools.cache
def _pages() -> Pages:
    return Pages("align.similarity.page", "page.html.j2", "page.css", _SCRIPTS)
