"""The findings of a part of a file, as it was judged when it was made, or when it was read."""

from __future__ import annotations

from typing import Any

from evaluate.reporting.reading.inputs import Node
from featstore.runtime.records import Record


def findings_of(block: Node) -> list[dict[str, Any]]:
    """What a file says against a result, as JSON objects.

    Args:
        block: The part of a file that has ``warnings``.
    """
    return [each.value.content() for each in block.get("warnings") if isinstance(each.value, Record)]


def codes_of(block: Node) -> set[str]:
    """The codes of the findings of a part of a file.

    Args:
        block: As of :func:`findings_of`.
    """
    return {str(found.get("code")) for found in findings_of(block)}
