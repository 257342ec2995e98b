"""What a record holds beyond what it declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from featstore.runtime.records import Record, read, write


def undeclared(value: Any, at: str = "") -> Iterator[str]:
    """Places of members that no record declares."""
    if isinstance(value, Record):
        yield from (f"{at}/{name}" for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from undeclared(getattr(value, name), f"{at}/{name}")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from undeclared(each, f"{at}/{key}")
    elif isinstance(value, tuple):
        for i, each in enumerate(value):
            yield from undeclared(each, f"{at}/{i}")


def check_file(kind: type[Record], path: Path, aside: Path) -> None:
    """A file that a command wrote: all its members are declared, and written again it has the same bytes."""
    record = read(kind, path)
    assert list(undeclared(record)) == []
    assert write(record, aside, name=path.name).read_bytes() == path.read_bytes()
