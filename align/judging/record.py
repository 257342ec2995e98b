"""A finding as results hold it: what was found, where, the values that decided it and the limits they were held to."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from align.judging.sentences import sentence
from align.judging.table import WARNING
from featstore.runtime.records import EMPTY, Number, Record, Table


class Finding(Record):
    """What a careful reader would object to. The codes are explained in docs/reading-results.md.

    Attributes:
        code: Its kind, such as ``few-rows``.
        level: ``invalid`` where a figure is not what it is called, ``warning`` where it says less than it seems to,
            ``note`` for what is no more than worth knowing.
        where: What it is about, by ``pair`` (layer pair), ``way`` (of sending states) and ``control``, ``measure``,
            ``floor`` or ``layers``; nothing for all of the result.
        values: What decided it, by name.
        limits: The thresholds that the values were held to, by name.
        message: Of files of earlier versions: the finding in words.
    """

    code: str = ""
    level: str = WARNING
    where: Table[str] = EMPTY
    values: Table[Number | str | None] = EMPTY
    limits: Table[Number] = EMPTY
    message: str = ""

    @property
    def sentence(self) -> str:
        """The finding in words, without its place."""
        return sentence(self.content())


def _finding(value: Any) -> Any:
    """Early versions wrote the text alone."""
    return {"message": value} if isinstance(value, str) else value


#: Findings in the order in which they were made.
Findings = tuple[Annotated[Finding, BeforeValidator(_finding)], ...]
