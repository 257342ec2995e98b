"""Documents to windows, and where a text may be cut.

A *window* is the unit a model reads: a stretch of document bytes cut at whitespace, so that two tokenizers see exactly
the same text.
"""

from __future__ import annotations

from featstore.errors import SpecError

_WHITESPACE = frozenset(b" \t\n\r\v\f")


def windows(raw: bytes, size: int) -> list[tuple[int, int]]:
    """Cut a document's bytes into windows of at most ``size`` bytes.

    A cut falls before whitespace, which opens the next window; where a stretch has none, before a whole character.

    Args:
        raw: UTF-8 bytes of the document.
        size: Window length in bytes, at least 4 (the longest character).

    Returns:
        ``(start, end)`` byte ranges that tile the document.

    Raises:
        SpecError: The size is under 4.
    """
    if size < 4:
        raise SpecError(f"window of {size} bytes: at least 4 are needed to hold any character")
    ranges = []
    start = 0
    while len(raw) - start > size:
        end = last_cut(raw, start, start + size)
        ranges.append((start, end))
        start = end
    if start < len(raw):
        ranges.append((start, len(raw)))
    return ranges


def last_cut(raw: bytes, start: int, limit: int) -> int:
    """The last place in (start, limit] before whitespace, else before a whole character.

    Args:
        raw: UTF-8 bytes of a document.
        start: First byte of the stretch.
        limit: The cut falls at most here, before the last byte of the document.
    """
    for at in range(limit, start, -1):
        if raw[at] in _WHITESPACE:
            return at
    at = limit
    while at > start + 1 and (raw[at] & 0xC0) == 0x80:  # inside a multi-byte character
        at -= 1
    return at
