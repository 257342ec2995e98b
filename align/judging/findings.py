"""Findings as JSON values, made where figures are measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from align.judging.table import CODES

#: A finding as a JSON object: ``code``, ``level``, ``where``, ``values``, ``limits``.
Finding = dict[str, Any]


def finding(code: str, where: Mapping[str, str] | None = None, /, **values: float | str | None) -> Finding:
    """A finding with the values that decided it; level and limits are those of the table.

    Args:
        code: One of :data:`align.judging.table.CODES`.
        where: What it is about; all of the result by default.
        values: By name; None and numbers that are not finite are left out.
    """
    known = CODES[code]
    return {
        "code": code,
        "level": known.level,
        "where": dict(where or {}),
        "values": {name: value for name, value in values.items() if _is_known(value)},
        "limits": dict(known.limits),
    }


def _is_known(value: float | str | None) -> bool:
    return isinstance(value, str) or (value is not None and math.isfinite(value))
