"""Where text comes from: files, JSON lines and hub datasets, read lazily as the texts of documents."""

from __future__ import annotations

import glob
import json
import os
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from featstore.errors import CorpusError, SpecError
from featstore.text.conversation import Conversation, is_conversation, parse_conversation

_T = TypeVar("_T")

_LEVEL_1_HEADING = re.compile(r"^ = (?!=)(.*[^=]) = $")


@dataclass(frozen=True)
class Source:
    """Where text comes from, parsed from ``--dataset``.

    Attributes:
        kind: ``wikitext``, ``hf``, ``text`` or ``jsonl``.
        location: Repository, path or glob.
        config: Configuration of a hub dataset, or None.
        split: Split of a hub dataset.
        field: Name of the text field; rows with ``messages`` are conversations.
    """

    kind: str
    location: str
    config: str | None = None
    split: str = "train"
    field: str = "text"

    def to_dict(self) -> dict[str, Any]:
        """The source as recorded in the store."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @property
    def text(self) -> str:
        """The ``--dataset`` value that means this source."""
        if self.kind == "wikitext":
            return str(self.config)
        if self.kind == "hf":
            return f"hf:{self.location}{f'/{self.config}' if self.config else ''}:{self.split}"
        return f"{self.kind}:{self.location}"


def parse_source(text: str, field: str = "text") -> Source:
    """Parse ``--dataset``.

    Args:
        text: ``wikitext-103-raw-v1``, ``hf:REPO[/CONFIG][:SPLIT]``, ``text:PATH-OR-GLOB`` or ``jsonl:PATH``.
        field: Name of the text field in JSON lines and hub rows.

    Raises:
        SpecError: None of these forms.
    """
    kind, colon, rest = text.partition(":")
    if text.startswith("wikitext-") and not colon:
        return Source("wikitext", "Salesforce/wikitext", text, "train", field)
    if colon and rest and kind in ("text", "jsonl"):
        return Source(kind, rest, field=field)
    if colon and rest and kind == "hf":
        path, _, split = rest.partition(":")
        parts = path.split("/")
        if len(parts) <= 3 and all(parts):
            config = parts[2] if len(parts) == 3 else None
            return Source("hf", "/".join(parts[:2]), config, split or "train", field)
    raise SpecError(
        f"dataset {text!r}: write wikitext-103-raw-v1, hf:OWNER/REPO[/CONFIG][:SPLIT], text:PATH-OR-GLOB or jsonl:PATH"
    )


def iter_texts(source: Source) -> Iterator[str | Conversation]:
    """Read the documents' texts, or conversations where rows hold messages, in order, lazily.

    Args:
        source: Parsed by :func:`parse_source`.

    Raises:
        CorpusError: Nothing there, not UTF-8, a line that is not JSON or lacks the field, messages that are none, or
            text and messages in one source.
    """
    if source.kind == "text":
        yield from _text_files(source)
    elif source.kind == "jsonl":
        yield from _of_one_kind(_json_lines(source))
    elif source.kind == "wikitext":
        yield from join_wikitext(row for _, row in _hub_rows(source) if isinstance(row, str))
    else:
        yield from _of_one_kind(_hub_rows(source))


def _of_one_kind(rows: Iterable[tuple[str, str | Conversation]]) -> Iterator[str | Conversation]:
    """Rows without the places where they stand; the first one decides whether all are messages."""
    kinds = {str: "text", Conversation: "messages"}
    first: tuple[str, type] | None = None
    for where, row in rows:
        first = first or (where, type(row))
        if type(row) is not first[1]:
            raise CorpusError(
                f"{where}: {kinds[type(row)]}, where {first[0]} holds {kinds[first[1]]}; keep text and messages in "
                "sources of their own"
            )
        yield row


def _text_files(source: Source) -> Iterator[str]:
    files = _matching(source.location)
    if not files and os.path.isdir(source.location):  # noqa: PTH112 - a pattern may be longer than a name may be
        raise CorpusError(f"{source.location!r} is a directory; name its files, as in text:'{source.location}/*.txt'")
    if not files:
        raise CorpusError(f"no file matches {source.location!r}; give an existing path or a glob such as 'texts/*.txt'")
    for path in files:
        try:
            yield path.read_bytes().decode()  # not as text, which would drop carriage returns
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it first"
            ) from error


def _matching(location: str) -> list[Path]:
    """The files that a path or glob means, sorted; what exists under the very name comes before what it matches."""
    if os.path.isfile(location):  # noqa: PTH113 - a pattern may be longer than a name may be
        return [Path(location)]
    # A directory may have brackets in its name: the longest part that exists is no pattern.
    literal = location.rpartition("/")[0]
    while literal and not os.path.isdir(literal):  # noqa: PTH112 - as above
        literal = literal.rpartition("/")[0]
    pattern = glob.escape(literal) + location[len(literal) :]
    paths = sorted(Path(p) for p in glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute globs
    return [path for path in paths if path.is_file()]


def _json_lines(source: Source) -> Iterator[tuple[str, str | Conversation]]:
    path = Path(source.location)
    if not path.is_file():
        raise CorpusError(f"no file {str(path)!r}; give the path of a .jsonl file, one document a line")
    for number, line in enumerate(_raw_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            if isinstance(row, dict) and is_conversation(row, source.field):
                yield where, parse_conversation(row, where)
                continue
            text = row[source.field]
        except CorpusError:
            raise
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of absurd length
            raise CorpusError(f"{where}: not a JSON object ({error}); correct that line") from error
        except (KeyError, TypeError) as error:
            raise CorpusError(
                f"{where}: no field {source.field!r}; name the right one with --text-field (conversations: messages)"
            ) from error
        if not isinstance(text, str):
            raise CorpusError(
                f"{where}: field {source.field!r} is {type(text).__name__}, not text; name the field of the text"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise CorpusError(f"{where}: field {source.field!r} holds a lone surrogate; it is not text")
        yield where, text


def _raw_lines(path: Path) -> Iterator[bytes]:
    if path.suffix != ".gz":
        with path.open("rb") as lines:
            yield from lines
        return
    import gzip

    try:
        with gzip.open(path, "rb") as lines:
            yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} is not a whole gzip file ({error}); fetch or compress it again") from error


def _hub_rows(source: Source) -> Iterator[tuple[str, str | Conversation]]:
    import datasets

    try:
        # Streaming: a token budget usually needs a small part of the corpus.
        rows = datasets.load_dataset(source.location, source.config, split=source.split, streaming=True)
        for number, row in enumerate(rows, 1):
            where = f"dataset {source.location!r}, row {number}"
            if source.kind == "hf" and is_conversation(row, source.field):
                yield where, parse_conversation(row, where)
                continue
            text = row.get(source.field)
            if not isinstance(text, str):
                raise CorpusError(
                    f"dataset {source.location!r} has no text in field {source.field!r} ({type(text).__name__}); "
                    f"its fields are {', '.join(row)}: use --text-field"
                )
            yield where, text
    except (OSError, ValueError) as error:  # what datasets raises for missing, offline, misnamed
        if isinstance(error, CorpusError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorpusError(
            f"dataset {source.location!r} (config {source.config!r}, split {source.split!r}) cannot be read: {reason}. "
            "Check the name and the network (HF_HUB_OFFLINE), or read local text with --dataset text:PATH"
        ) from error


def shuffled(texts: Iterable[_T], seed: int, buffer: int = 10_000) -> Iterator[_T]:
    """Take texts in a seeded random order, within a buffer of bounded size.

    Corpora are often sorted; a token budget that reads only their start would see a few topics.

    Args:
        texts: Document texts or conversations.
        seed: 0 keeps corpus order.
        buffer: Texts held in memory.
    """
    if seed == 0:
        yield from texts
        return
    rng = random.Random(seed)
    held: list[_T] = []
    for text in texts:
        if len(held) < buffer:
            held.append(text)
            continue
        at = rng.randrange(buffer)
        yield held[at]
        held[at] = text
    rng.shuffle(held)
    yield from held


def join_wikitext(lines: Iterable[str]) -> Iterator[str]:
    """Join Wikitext's lines to articles at its level-1 headings (`` = Title = ``).

    Args:
        lines: Rows of the dataset, each ending with a newline or empty.
    """
    article: list[str] = []
    blank_before = True
    for line in lines:
        # A heading stands alone between blank lines; a formula in prose that looks like one does not.
        if blank_before and _LEVEL_1_HEADING.match(line.rstrip("\n")) and any(part.strip() for part in article):
            yield "".join(article)
            article = []
        article.append(line if line.endswith("\n") else line + "\n")
        blank_before = not line.strip()
    if any(part.strip() for part in article):
        yield "".join(article)
