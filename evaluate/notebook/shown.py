"""What results share: a file, tables for a terminal and a notebook, and the order of their conditions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import PrivateAttr

from featstore.runtime import records
from featstore.runtime.arguments import as_path
from featstore.runtime.sheets import NONE, Sheet, number

if TYPE_CHECKING:
    from rich.console import RenderableType


class ShownResult(records.Record):
    """A record that prints as tables."""

    _path: Path | None = PrivateAttr(default=None)

    @classmethod
    def read(cls, where: str | os.PathLike[str]) -> Self:
        """Read the result that an earlier call has written.

        Args:
            where: Its directory, or the file.

        Raises:
            AdapterError: There is none; the message names the command that writes it.
            CorruptDataError: It is damaged.
        """
        place = as_path("where", where)
        return records.read(cls, place).at(place / cls.file if place.is_dir() else place)

    def at(self, path: Path) -> Self:
        """Remember the file that holds this result.

        Args:
            path: The file.
        """
        self._path = path
        return self

    @property
    def path(self) -> Path | None:
        """The file it was written to or read from; None where it was neither."""
        return self._path

    def sheets(self) -> list[Sheet]:
        """Its tables for people."""
        raise NotImplementedError

    def __rich__(self) -> RenderableType:
        """The tables for a terminal."""
        from rich.console import Group

        return Group(*(sheet.__rich__() for sheet in self.sheets()))

    def _repr_html_(self) -> str:
        return "".join(sheet.html() for sheet in self.sheets())

    def __repr__(self) -> str:
        """One line: the kind of result, what it is of, and its file."""
        place = f", {str(self.path)!r}" if self.path else ""
        return f"{type(self).__name__}({self._summary()}{place})"

    __str__ = __repr__

    def _summary(self) -> str:
        raise NotImplementedError


def ordered(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Names in the order in which people read them: a file has them in the order of their letters.

    Args:
        names: To be ordered.
        order: Those that are known; others come after them.
    """
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def interval(ci95: Iterable[float | None] | None, form: str) -> str:
    """A 95 % interval in a cell of its own.

    Args:
        ci95: Low and high end; None without an interval.
        form: Format of `format`.
    """
    return NONE if ci95 is None else f"[{', '.join(number(end, form) for end in ci95)}]"


def height_of(lines: Iterable[int]) -> float:
    """Inches that a panel needs.

    Args:
        lines: Of each panel; the largest decides.
    """
    return 1 + 0.24 * max([5, *lines])
