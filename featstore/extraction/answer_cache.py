"""Answers that have been generated before: a file of JSON lines for each model and way of asking, written as they come.

A command that was killed goes on from here. Losing it costs the time to generate again, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from featstore.runtime.caches import cache_directory
from featstore.runtime.writing import open_log

#: Changes where the same settings give other text.
VERSION = 1


def prompt_key(prompt: str) -> str:
    """The name of a prompt in the cache: SHA-256 of what the model is asked.

    Args:
        prompt: The text that is answered.
    """
    return hashlib.sha256(prompt.encode()).hexdigest()


class AnswerCache:
    """Answers by prompt."""

    def __init__(self, key: str) -> None:
        """Read what there is.

        Args:
            key: Names the model, how it is run and how it is asked.
        """
        self.path = cache_directory() / "answers" / f"{key}.jsonl"
        self._held: dict[str, str] = {}
        self.read()

    def read(self) -> None:
        """Read the file again: another process may have written to it."""
        with suppress(OSError):
            self._held |= _lines(self.path)

    def get(self, prompt: str) -> str | None:
        """An answer, or None.

        Args:
            prompt: From :func:`prompt_key`.
        """
        return self._held.get(prompt)

    def put(self, found: Mapping[str, str]) -> None:
        """Keep answers; a cache that cannot be written is kept in memory.

        Args:
            found: Answers by :func:`prompt_key`.
        """
        self._held |= found
        lines = "".join(json.dumps({"prompt": key, "answer": text}) + "\n" for key, text in found.items())
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open_log(self.path) as file:
                # What was being written when a command was killed stays a line of its own.
                file.seek(max(file.seek(0, 2) - 1, 0))
                torn = file.read(1) not in (b"", b"\n")
                file.write((b"\n" if torn else b"") + lines.encode())


def _lines(path: Path) -> dict[str, str]:
    """Whole lines of a cache; whatever else it holds is as if it were not there."""
    found = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
            prompt, answer = entry["prompt"], entry["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(prompt, str) and isinstance(answer, str):
            found[prompt] = answer
    return found
