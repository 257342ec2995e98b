"""Who wrote which part of a document, and so which role every token has."""

from __future__ import annotations

from collections.abc import Iterable
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
        text: Names joined by commas, or several of them.

    Raises:
        SpecError: An unknown name, or none.
    """
    if text is None:
        return None
    names = [part.strip() for part in (text.split(",") if isinstance(text, str) else text)]
    unknown = [name for name in names if name not in ROLES]
    if unknown or not names:
        raise SpecError(f"roles {','.join(names)!r}: choose among {', '.join(ROLES)}")
    return tuple(sorted({ROLES.index(name) for name in names}))
