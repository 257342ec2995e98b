"""Who wrote which part of a document, and so which role every token has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featstore.errors import SpecError

#: Role by number as stores hold it. ``text`` is ordinary text, and what a template adds around messages; ``generated``
#: is what a model wrote after ordinary text. What a model wrote after messages is the assistant's.
ROLES = ("text", "system", "user", "assistant", "tool", "generated")
TEXT, SYSTEM, USER, ASSISTANT, TOOL, GENERATED = range(len(ROLES))


@dataclass(frozen=True)
class Part:
    """A part of a document's text that somebody wrote.

    Attributes:
        role: Number in :data:`ROLES`.
        start: First byte within the document.
        end: Byte after the last.
    """

    role: int
    start: int
    end: int


def roles_at(
    document: NDArray[np.int32],
    end: NDArray[np.int64],
    message_document: NDArray[np.int32],
    message_role: NDArray[np.uint8],
    message_start: NDArray[np.int64],
    message_end: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """The role of the last byte that each token has read.

    Args:
        document: int32 ``(n,)``, every token's document.
        end: int64 ``(n,)``, where it ends within the document.
        message_document: int32 ``(messages,)``, non-decreasing.
        message_role: uint8 ``(messages,)``.
        message_start: int64 ``(messages,)``, first byte within the document; messages follow each other.
        message_end: int64 ``(messages,)``, byte after the last.

    Returns:
        uint8 ``(n,)``; ``text`` where no message is.
    """
    if not len(message_document):
        return np.zeros(len(end), dtype=np.uint8)
    at = np.searchsorted(
        (message_document.astype(np.int64) << 32) | message_end, (document.astype(np.int64) << 32) | end
    )
    at = np.minimum(at, len(message_document) - 1)
    inside = (message_document[at] == document) & (message_start[at] < end) & (end <= message_end[at])
    return np.where(inside, message_role[at], TEXT).astype(np.uint8)


def parse_roles(text: str | Iterable[str] | None) -> tuple[int, ...] | None:
    """Numbers of the roles that ``--roles`` names, ascending; None for all.

    Args:
        text: Names joined by commas, or several of them; ``all`` or None for all.

    Raises:
        SpecError: An unknown name, or none.
    """
    if text is None or (isinstance(text, str) and text.strip() == "all"):
        return None
    if not isinstance(text, Iterable):
        raise SpecError(f"--roles {text!r}: choose among {', '.join(ROLES)}, or all")
    names = [str(part).strip() for part in (text.split(",") if isinstance(text, str) else text)]
    unknown = [name for name in names if name not in ROLES]
    if unknown or not names:
        raise SpecError(f"--roles {','.join(names)!r}: choose among {', '.join(ROLES)}, or all")
    return tuple(sorted({ROLES.index(name) for name in names}))


def role_names(text: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """The roles that ``--roles`` names, each once and in the order of :data:`ROLES`; None for all.

    Args:
        text: As :func:`parse_roles` takes it.

    Raises:
        SpecError: An unknown name, or none.
    """
    numbers = parse_roles(text)
    return None if numbers is None else tuple(ROLES[number] for number in numbers)


def roles_text(text: str | Iterable[str] | None) -> str | None:
    """The same as one text, ``user,assistant``: however it is typed, the same roles give the same settings.

    Args:
        text: As :func:`parse_roles` takes it.

    Raises:
        SpecError: An unknown name, or none.
    """
    names = role_names(text)
    return None if names is None else ",".join(names)


def of_roles(names: Sequence[str] | None) -> str:
    """Which rows or tokens a figure is of: `` of the roles user, assistant``; empty where it is of all.

    Args:
        names: Of the roles; None for all.
    """
    return f" of the role{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else ""


def count_roles(role: NDArray[np.uint8]) -> dict[str, int]:
    """How many rows there are of every role that occurs, by name in the order of :data:`ROLES`.

    Args:
        role: uint8 ``(n,)``.
    """
    counts = np.bincount(role, minlength=len(ROLES))
    return {name: int(count) for name, count in zip(ROLES, counts, strict=False) if count}
