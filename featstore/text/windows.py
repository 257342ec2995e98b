"""Documents to windows, and where a text may be cut.

A *window* is the unit a model reads: a stretch of document bytes that ends at the best boundary there is, so that two
tokenizers see exactly the same text and neither sees half a character. Which boundary is better, and how far back it
is looked for, is decided in ``docs/decisions/0024-windows-end-at-the-best-boundary.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import regex

from featstore.errors import SpecError

#: Finds the places of one kind in a text from a character on, from the right.
_Kind = Callable[[str, int], Iterator[int]]

#: The share of a window, at its end, in which a better kind of boundary goes before a later one.
_REACH = 4
#: Characters before that share that a boundary in it may begin with, such as line ends.
_BEHIND = 64

#: Bytes after a stretch that may decide whether its end is a boundary: closing quotes, the word that follows.
_AHEAD = 64

_LINE_END = r"(?:\r\n|\r(?!\n)|(?<!\r)\n|[\v\f\x85\u2028\u2029])"
_SPACE = r"[\p{White_Space}\u200b]"
_NO_BREAK = r"[\u00a0\u2007\u202f]"
#: What ends a sentence in some script; Unicode does not count the ellipsis and Tibetan's shad.
_TERMINAL = r"[\p{Sentence_Terminal}\u2025\u2026\u0f0d-\u0f11]"
#: Terminals that also stand inside words and numbers, or before a sentence that goes on.
_AMBIGUOUS = r"[.!?\u2024-\u2026]"
_CLOSE = r"\p{Close_Punctuation}\p{Final_Punctuation}"
_CONTINUING = r"[\p{GCB=Extend}\p{GCB=ZWJ}\p{GCB=SpacingMark}]"

# Every pattern is searched from the right, so that the first match is the last one in the text.
_BLANK_LINE = regex.compile(rf"(?r){_LINE_END}(?:[\t\p{{Zs}}]*{_LINE_END})+|\u2029")
_SENTENCE = regex.compile(
    rf"""(?rx)
      {_AMBIGUOUS} [{_CLOSE}\p{{Pi}}"']* (?={_SPACE}) (?!{_SPACE}+\p{{Lowercase}})
    | (?!{_AMBIGUOUS}|\uff0e\d) {_TERMINAL}
      (?: [{_CLOSE}\p{{Pi}}"']* (?={_SPACE}) | [{_CLOSE}]* (?!{_TERMINAL}|[{_CLOSE}"']|{_CONTINUING}) )
    """
)
_BREAKING = regex.compile(rf"(?r)(?<!\p{{GCB=Prepend}})(?!{_NO_BREAK}|(?<=\r)\n){_SPACE}")
_JOINING = regex.compile(rf"(?r)(?<!\p{{GCB=Prepend}}){_NO_BREAK}")
#: A place that is between two grapheme clusters whatever lies before: clusters are counted from here.
_BETWEEN = regex.compile(
    r"(?r)(?<=[\p{GCB=Other}\p{GCB=Control}\p{GCB=CR}\p{GCB=LF}\p{GCB=SpacingMark}])"
    r"[\p{GCB=Other}\p{GCB=Control}\p{GCB=CR}]"
)
_CLUSTER = regex.compile(r"\X")


def windows(raw: bytes, size: int) -> list[tuple[int, int]]:
    """Cut a document's bytes into windows of at most ``size`` bytes.

    A window ends, in this order, after a blank line, after a sentence, before whitespace (which opens the next window),
    or between two grapheme clusters. The first three are looked for in the last quarter of the allowed stretch; where
    it has none of them, the last one before that quarter is taken, of whichever kind. A no-break space will do where
    there is nothing else. Only a cluster that is longer than a window is cut, between whole characters.

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
    whole = 0  # the first boundary between clusters at or after the start
    while len(raw) - start > size:
        limit = start + size
        whole = max(whole, start)
        end = _best_cut(raw, start, whole, limit, _KINDS) if whole <= limit else None
        if end is None:
            whole = _cluster_end(raw, start, size) if whole == start else whole
            end = _character_cut(raw, limit)
        ranges.append((start, end))
        start = end
    if start < len(raw):
        ranges.append((start, len(raw)))
    return ranges


def space_cut(raw: bytes, limit: int) -> int:
    """The last place at which a text may be cut short, before whitespace where there is any.

    Args:
        raw: UTF-8 bytes, more than ``limit``.
        limit: Bytes to keep at most, at least 4.

    Returns:
        Bytes to keep: up to the last whitespace; without any, up to the last whole grapheme cluster; of a single
        cluster, up to the last whole character.
    """
    end = _best_cut(raw, 0, 0, limit, (_spaces,))
    return _character_cut(raw, limit) if end is None else end


def _best_cut(raw: bytes, start: int, whole: int, limit: int, kinds: tuple[_Kind, ...]) -> int | None:
    """The best cut in (start, limit], not before ``whole``; None inside a cluster that goes on past the limit."""
    text = raw[whole : limit + _AHEAD].decode(errors="ignore")
    end = _characters(raw, whole, limit)
    least = 1 if whole == start else 0
    near = max(_characters(raw, whole, limit - (limit - start) // _REACH), least)
    found = next((at for kind in kinds if (at := _last(kind, text, near - _BEHIND, end)) >= near), -1)
    if found < 0:
        found = max(_last(kind, text, 0, end) for kind in kinds)
    if found < least:
        found = _last(_no_break_spaces, text, 0, end)
    if found < least:
        found = _last_cluster(text, end)
    return whole + len(text[:found].encode()) if found >= least else None


def _last(kind: _Kind, text: str, start: int, end: int) -> int:
    """The last place of a kind at or before ``end``; -1 if there is none from ``start`` on."""
    return next((at for at in kind(text, max(start, 0)) if at <= end), -1)


def _characters(raw: bytes, start: int, end: int) -> int:
    """Whole characters of a stretch."""
    return len(raw[start:end].decode(errors="ignore"))


def _character_cut(raw: bytes, at: int) -> int:
    """The beginning of the character that holds a byte."""
    while (raw[at] & 0xC0) == 0x80:
        at -= 1
    return at


def _blank_lines(text: str, start: int) -> Iterator[int]:
    """Places after blank lines, and before one that does not fit: line ends stay together."""
    for match in _BLANK_LINE.finditer(text, start):
        yield match.end()
        if match.start() > start:  # else the line ends may begin before it
            yield match.start()


def _sentences(text: str, start: int) -> Iterator[int]:
    return (match.end() for match in _SENTENCE.finditer(text, start))


def _spaces(text: str, start: int) -> Iterator[int]:
    return (match.start() for match in _BREAKING.finditer(text, start))


def _no_break_spaces(text: str, start: int) -> Iterator[int]:
    return (match.start() for match in _JOINING.finditer(text, start))


_KINDS: tuple[_Kind, ...] = (_blank_lines, _sentences, _spaces)


def _last_cluster(text: str, end: int) -> int:
    """The last place at or before ``end`` that is between two grapheme clusters; 0 if there is none."""
    sure = _BETWEEN.search(text, 0, end + 1)
    at = sure.start() if sure else 0
    for match in _CLUSTER.finditer(text, at):
        if match.start() > end:
            break
        at = match.start()
    return at


def _cluster_end(raw: bytes, start: int, size: int) -> int:
    """Where the grapheme cluster that begins at ``start`` ends; it is longer than ``size`` bytes."""
    while True:
        size *= 2
        text = raw[start : start + size].decode(errors="ignore")
        cluster = _CLUSTER.match(text)[0]
        if len(cluster) < len(text) or start + size >= len(raw):
            return start + len(cluster.encode())
