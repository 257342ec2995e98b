"""The one place where a finding becomes words: by its code, from its values."""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.judging.table import CODES
from featstore.runtime.sheets import counted


@dataclass(frozen=True)
class Span:
    """The lowest and highest of several numbers, written as one where both read the same."""

    low: float
    high: float

    def __format__(self, spec: str) -> str:
        low, high = format(self.low, spec), format(self.high, spec)
        return low if low == high else f"{low} to {high}"

    def __str__(self) -> str:
        return format(self)


class _Words(string.Formatter):
    def format_field(self, value: Any, spec: str) -> str:
        if spec.startswith("#"):
            noun = spec[1:]
            return counted(value, noun) if isinstance(value, int) else f"{value} {noun}s"
        return format(value, spec)


_WORDS = _Words()


def sentence(finding: Mapping[str, Any]) -> str:
    """A finding in words, with its remedy and without its place.

    Args:
        finding: As a JSON object. One of an earlier version has its words in ``message``.
    """
    return together([finding])


def together(findings: Sequence[Mapping[str, Any]]) -> str:
    """Several findings that differ in numbers alone in one sentence: each number as it is, or from lowest to highest.

    Args:
        findings: Of one :func:`kind`, at least one.
    """
    first = findings[0]
    template = _template(first)
    if template is None:
        return str(first.get("message") or first.get("code") or "")
    known = {name: _of_all([_known(each)[name] for each in findings]) for name in _fields(template)}
    try:
        said = _WORDS.vformat(template, (), known)
    except (ValueError, TypeError, OverflowError):
        # A file may hold text where a number belongs.
        return CODES[str(first["code"])].means
    remedy = CODES[str(first["code"])].remedy
    return f"{said}; {remedy}" if remedy else said


def kind(finding: Mapping[str, Any]) -> tuple[object, ...]:
    """What findings have in common that :func:`together` can say at once.

    Args:
        finding: As a JSON object.
    """
    template = _template(finding)
    if template is None:
        return finding.get("level"), finding.get("code"), finding.get("message")
    known = _known(finding)
    words = ((name, known[name]) for name in _fields(template) if isinstance(known[name], str))
    return finding.get("level"), finding.get("code"), template, *words


def placed(finding: Mapping[str, Any], *but: str) -> str:
    """The sentence behind the place that it is about.

    Args:
        finding: As a JSON object.
        but: Parts of the place that the reader knows already.
    """
    where = ", ".join(str(value) for name, value in (finding.get("where") or {}).items() if name not in but)
    return f"{where}: {sentence(finding)}" if where else sentence(finding)


def described(finding: Mapping[str, Any], *but: str) -> str:
    """Level, code and sentence: a line on a terminal or below a table.

    Args:
        finding: As a JSON object.
        but: Parts of the place that the reader knows already.
    """
    code = finding.get("code")
    return f"{finding.get('level', 'warning')}: {placed(finding, *but)}{f' ({code})' if code else ''}"


def _known(finding: Mapping[str, Any]) -> dict[str, Any]:
    given = {**(finding.get("limits") or {}), **(finding.get("values") or {})}
    return {name: value for name, value in given.items() if value is not None}


def _template(finding: Mapping[str, Any]) -> str | None:
    """The words for what is known; None where they stand in the file itself, or nobody has any."""
    code = CODES.get(str(finding.get("code")))
    if code is None or finding.get("message"):
        return None
    known = _known(finding)
    return next((says for says in code.says if known.keys() >= set(_fields(says))), None)


def _of_all(values: Sequence[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else Span(min(values), max(values))


@functools.cache
def _fields(template: str) -> tuple[str, ...]:
    return tuple(name for _, name, _, _ in string.Formatter().parse(template) if name)
