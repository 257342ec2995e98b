"""Text out of files, shown as what it is: characters that would steer a terminal are written as escapes.

A name, a reference or a document may hold anything. Printed as it stands it could move the cursor, colour what follows,
reverse the order of letters or forge a line of its own; a lone surrogate, which JSON allows, cannot be encoded at all.
"""

from __future__ import annotations

import re

#: Control characters but tab and line feed, marks that change the order of what stands beside them, separators that a
#: terminal takes for line ends, and halves of characters.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LINES = {"\n": "\\n", "\t": "\\t"}
#: JSON escapes control characters below the space by itself.
_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text of several lines for a terminal: what would steer it is written out, line feeds and tabs stay.

    Args:
        text: Anything.
    """
    return _STEERING.sub(lambda found: _escape(found[0]), text)


def inline(value: object) -> str:
    """A value of a file within a line: :func:`visible`, and no line feed or tab.

    Args:
        value: Anything; shown as ``str`` has it.
    """
    return re.sub("[\n\t]", lambda found: _LINES[found[0]], visible(str(value)))


def encodable(document: str) -> str:
    """A JSON document that any UTF-8 stream carries and any terminal may show.

    Args:
        document: As ``json.dumps`` writes it, where such characters stand in strings alone.

    Returns:
        The same document: the characters are written as JSON's own escapes.
    """
    return _JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", document)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
