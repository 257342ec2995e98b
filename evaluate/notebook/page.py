"""A report that was written: where it is and what went into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.runtime.sheets import NONE, Sheet, counted

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class ReportResult:
    """A page that :func:`evaluate.report` wrote, and what went into it.

    Attributes:
        out: The page.
        bytes: Its size.
        directories: Labels of the directories that it shows.
        files: Names of the files that it was made from.
        maps: Maps that it judges.
        beat_controls: How many of them beat their controls.
        warnings: Number of warnings.
        missing: What has not been measured yet.
    """

    out: str
    bytes: int
    directories: Sequence[str]
    files: Sequence[str]
    maps: int
    beat_controls: int
    warnings: int
    missing: Sequence[str]

    @property
    def path(self) -> Path:
        """The page."""
        return Path(self.out)

    def content(self) -> dict[str, Any]:
        """The members as JSON values."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        """The summary for a terminal."""
        return self._sheet().__rich__()

    def __repr__(self) -> str:
        """One line."""
        return f"ReportResult({self.out!r}, {counted(self.maps, 'map')}, {counted(self.warnings, 'warning')})"

    def _repr_html_(self) -> str:
        # As it was given: a notebook follows links that are relative to itself, and none to other places of a disk.
        link = f'<p><a href="{escape(self.out)}">{escape(self.out)}</a></p>'
        return link + self._sheet().html()

    def _sheet(self) -> Sheet:
        facts = (
            ("directories", ", ".join(self.directories)),
            ("maps", str(self.maps)),
            ("maps that beat their controls", str(self.beat_controls)),
            ("warnings", str(self.warnings)),
            ("not measured", "; ".join(self.missing) or NONE),
        )
        return Sheet(f"report in {self.out}", ("what", "value"), facts)
