"""When a free answer counts: the first of the task's answers that it names has to be right.

A text that lists many answers would be right about many questions if any of them counted. So it is taken for the one
that it names first, and to name a wrong one first is to be wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

#: An answer as it is looked for: its words in lower case, and whether they have to be in capitals.
Name = tuple[tuple[str, ...], bool]

_ARTICLES = {"a", "an", "the"}
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and accents.

    Args:
        text: Any.
    """
    return [word.casefold() for word in _plain(text)]


def _plain(text: str) -> list[str]:
    # Folded before and after: some letters become others with accents.
    decomposed = unicodedata.normalize("NFKD", text)
    return _WORD.findall("".join(c for c in decomposed if not unicodedata.combining(c)))


def name_of(answer: str) -> Name:
    """What is looked for in a text; an article before the answer does not matter.

    Two capitals, such as US, are no word in lower case: *us* is another one.

    Args:
        answer: As a task accepts it.
    """
    wanted = words(answer)
    if len(wanted) > 1 and wanted[0] in _ARTICLES:
        del wanted[0]
    return tuple(wanted), len(answer) == 2 and answer.isalpha() and answer.isupper()


class Names:
    """Answers that a text may name.

    Args:
        answers: Right and wrong ones.
    """

    def __init__(self, answers: Iterable[str]) -> None:
        self._by_first: dict[str, list[Name]] = {}
        for name in dict.fromkeys(name_of(answer) for answer in answers):
            if name[0]:
                self._by_first.setdefault(name[0][0], []).append(name)
        for found in self._by_first.values():
            # The longest first: "Great Britain" is not the Britain in it.
            found.sort(key=lambda name: -len(name[0]))

    def named(self, text: str) -> list[Name]:
        """The answers that a text names, in its order.

        Args:
            text: Any; all of its lines.
        """
        written = _plain(text)
        said = tuple(word.casefold() for word in written)
        found: list[Name] = []
        at = 0
        while at < len(said):
            step = 1
            for name in self._by_first.get(said[at], ()):
                size = len(name[0])
                if said[at : at + size] == name[0] and (not name[1] or written[at].isupper()):
                    found.append(name)
                    step = size
                    break
            at += step
        return found


def first_line(text: str) -> str:
    """The first line that is not empty; nothing of a text without one.

    Args:
        text: What was answered.
    """
    return next((line for line in text.splitlines() if line.strip()), "")


def is_right(text: str, answers: Sequence[str], names: Names) -> bool:
    """Whether the first of some answers that a text names in its first line is an accepted one.

    Case, accents, punctuation and an article before an answer do not matter.

    Args:
        text: What B wrote.
        answers: What is accepted.
        names: All that counts as an answer of the task, the accepted ones among them.
    """
    named = names.named(first_line(text))
    return bool(named) and named[0] in {name_of(answer) for answer in answers}
