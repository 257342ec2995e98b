"""The main figures of every map as one compact table, which the page's own script lays out a screenful at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from align.pages.document import embedded
from evaluate.reporting.reading.inputs import Node, Pair, Run
from evaluate.reporting.reading.names import type_name

#: Digits behind the point: what the page shows, and one more to sort by.
_DIGITS = 4
#: Title, and whether its values are numbers.
_COLUMNS = (
    ("run", False),
    ("layers", False),
    ("type", False),
    ("direction", False),
    ("layer", False),
    ("shown to do", False),
    ("val R²", True),
    ("R²", True),
    ("from", True),
    ("to", True),
    ("partial R²", True),
    ("top-1", True),
    ("beyond token, nats", True),
    ("recovered", True),
)


def every_map(judged: Sequence[tuple[Run, Pair, str]]) -> Markup:
    """All maps in the order of their verdicts, as the JSON of a data block of the page.

    Words that many rows share stand once, and rows have their numbers. What is not known is null.

    Args:
        judged: Of every map its run, its layer pair, and what it was shown to do in a few words.
    """
    words: dict[str, int] = {}
    rows = [
        [
            value if number else words.setdefault(str(value), len(words))
            for value, (_, number) in zip(_row(*each), _COLUMNS, strict=True)
        ]
        for each in judged
    ]
    return embedded({"columns": [list(column) for column in _COLUMNS], "words": list(words), "rows": rows})


def _row(run: Run, pair: Pair, shown: str) -> Iterator[Any]:
    metrics = run.file("metrics.json").get("pairs", pair.key)
    stitched = run.file("stitch.json").get("pairs", pair.key)
    test = metrics.get("test")
    yield from (run.label, pair, type_name(run), pair.direction, pair.source_layer, shown)
    for node in (
        metrics.get("val", "r2"),
        test.get("r2"),
        test.get("r2_ci95").get(0),
        test.get("r2_ci95").get(1),
        test.get("partial_r2"),
        test.get("retrieval_top1"),
        stitched.get("beyond_token", "nats"),
        stitched.get("recovered", "value"),
    ):
        yield _rounded(node)


def _rounded(node: Node) -> float | None:
    return None if node.number is None else round(node.number, _DIGITS)
