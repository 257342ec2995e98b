"""The page as one HTML file: template, style, script and data put together; nothing is fetched when it is read."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from align.similarity.findings import judged
from align.similarity.page import words
from align.similarity.page.definitions import MEASURES
from align.similarity.page.palette import ALIKE, BELOW
from align.similarity.page.views import View, views
from featstore.runtime.console import jsonable
from featstore.runtime.provenance import write_atomic

#: In the order they run; together one script, which the page allows by its hash.
_SCRIPTS = ("base.js", "heat.js", "charts.js", "tables.js", "main.js")
NAME = "cka.html"


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
    environment = _environment()
    script = "\n".join(_text(environment, name) for name in _SCRIPTS)
    # As strict as a page can be: even text that slipped through escaping would neither run nor load anything.
    policy = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(_text(environment, 'page.css'))}'"
    return environment.get_template("page.html.j2").render(
        policy=f"{policy}; base-uri 'none'; form-action 'none'",
        style=Markup(_text(environment, "page.css")),  # noqa: S704 (a file of this package)
        script=Markup(script),  # noqa: S704 (files of this package)
        data=_embedded(_data(plain, shown)),
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
        "colours": {"alike": ALIKE, "below": BELOW},
    }


def _definitions(shown: list[View]) -> list[tuple[str, str, str]]:
    names = dict.fromkeys("cka" if view["id"] == "all-rows" else view["id"] for view in shown)
    return [MEASURES[name] for name in names if name in MEASURES]


def _embedded(data: dict[str, Any]) -> Markup:
    """JSON that cannot end its script element or be taken for markup, whatever the models are called."""
    text = json.dumps(_rounded(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 (no sign of markup is left)


def _rounded(value: Any) -> Any:
    """Seven significant digits, more than the page ever writes; half the size."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("align.similarity.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(environment: jinja2.Environment, name: str) -> str:
    loader = environment.loader
    if loader is None:
        raise jinja2.TemplateNotFound(name)
    return loader.get_source(environment, name)[0]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
