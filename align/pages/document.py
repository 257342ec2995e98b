"""A page as one HTML file: its style, its script and its policy; nothing is fetched when it is read."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape

from align.pages.palette import ALIKE, BELOW

#: In the order they run, before what a page adds.
_SCRIPTS = ("elements.js", "marks.js", "charts.js", "heat.js", "tables.js", "folds.js")
#: The style that the chart library adds to every drawing of the class `plot`.
DRAWN = "sha256-+TfQir1nvDucAdvE6XUQBt4ayUjpAWkbw2kCdSfekHM="


class Pages:
    """What the pages of one room are made of.

    Args:
        room: The package whose ``templates`` hold them.
        page: Name of the page's template.
        style: Name of its style, which follows the one of all pages.
        scripts: Names of its scripts, which follow those of all pages.
    """

    def __init__(self, room: str, page: str, style: str, scripts: Sequence[str] = ()) -> None:
        self._environment = jinja2.Environment(
            loader=jinja2.ChoiceLoader([jinja2.PackageLoader(room), jinja2.PackageLoader("align.pages")]),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.do"],
        )
        self._environment.filters["packed"] = packed
        self._page = page
        self._style = self._text("shared.css") + self._text(style)
        colours = json.dumps({"alike": ALIKE, "below": BELOW}, separators=(",", ":"))
        library = files("align.pages").joinpath("vendor", "plot.min.js").read_text(encoding="utf-8")
        own = [self._text(name) for name in (*_SCRIPTS, *scripts)]
        self._script = "\n".join([library, f'"use strict";\nconst COLOURS = {colours};', *own])

    def render(self, **content: Any) -> str:
        """The page.

        Args:
            content: What the template asks for.

        Returns:
            A complete HTML document; the same contents give the same bytes.
        """
        # As strict as a page can be: even text that slipped through escaping would neither run nor load anything.
        policy = (
            f"default-src 'none'; img-src data:; script-src '{_hash(self._script)}'; "
            f"style-src '{_hash(self._style)}' '{DRAWN}'; base-uri 'none'; form-action 'none'"
        )
        return self._environment.get_template(self._page).render(
            policy=policy,
            style=Markup(self._style),  # noqa: S704 (files of this package)
            script=Markup(self._script),  # noqa: S704 (files of this package)
            **content,
        )

    def _text(self, name: str) -> str:
        loader = self._environment.loader
        if loader is None:
            raise jinja2.TemplateNotFound(name)
        return loader.get_source(self._environment, name)[0]


def embedded(data: Any, digits: int = 7) -> Markup:
    """Data as JSON that cannot end its script element or be taken for markup, whatever models are called.

    Args:
        data: JSON values.
        digits: Significant digits that numbers keep.
    """
    text = json.dumps(_rounded(data, digits), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 (no sign of markup is left)


def packed(markup: str) -> Markup:
    """Markup that a page unpacks where it is unfolded: of what most readers never open, a tenth of the bytes.

    Args:
        markup: Escaped already.
    """
    data = base64.b64encode(zlib.compress(str(escape(markup)).encode(), 6)).decode()
    return Markup('<script type="application/zlib">{}</script>').format(data)


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part, digits) for part in value]
    return value


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
