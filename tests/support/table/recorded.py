"""``docs/models.json``: what was measured, a line a test; it is read and written here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.support.table.measuring import Row

RESULTS = ROOT / "docs" / "models.json"


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what comes out, without what a build adds to them."""
    return {name: version(name).partition("+")[0] for name in ("torch", "transformers")}


def text(rows: Mapping[str, Row]) -> str:
    """The file's text, the same for the same rows.

    Args:
        rows: By type, and ``type@variant``.
    """
    types = ",\n".join(f"{json.dumps(name)}: {_row(rows[name])}" for name in sorted(rows))
    return f'{{"versions": {json.dumps(versions(), sort_keys=True)},\n"types": {{\n{types}\n}}}}\n'


def _row(row: Row) -> str:
    return "{\n " + ",\n ".join(f"{json.dumps(name)}: {json.dumps(row[name])}" for name in row) + "}"


def read(path: Path = RESULTS) -> tuple[dict[str, str], dict[str, Row]]:
    """Versions and rows.

    Args:
        path: Of the file.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content["versions"], content["types"]


def plain(row: Row) -> Row:
    """A row as the file gives it back."""
    found: Row = json.loads(json.dumps(row))
    return found


def not_looked_at(installed: Iterable[str], rows: Mapping[str, Row]) -> list[str]:
    """Types of the installed transformers that the file does not have.

    Args:
        installed: Their names.
        rows: Of the file.
    """
    return sorted(set(installed) - set(rows))
