"""The text sample that comes with this package: the opening prose of English Wikipedia articles, under CC BY-SA."""

from __future__ import annotations

import gzip
import json
from importlib import resources
from pathlib import Path


def sample_path() -> Path:
    """The committed text sample: JSON lines, gzipped, with ``title`` and ``text`` of each Wikipedia article."""
    return Path(str(resources.files("featstore") / "data" / "wikipedia_sample.jsonl.gz"))


def sample_articles() -> list[tuple[str, str]]:
    """Title and text of each article of the sample, in the order of the file."""
    rows = [json.loads(line) for line in gzip.decompress(sample_path().read_bytes()).splitlines()]
    return [(row["title"], row["text"]) for row in rows]


def sample_texts() -> list[str]:
    """The texts of the sample, an article each, in the order of the file; at most 4096 UTF-8 bytes of every article."""
    return [text for _, text in sample_articles()]
