"""Hashes, versions and atomic small files: how every artefact says where it came from."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from featstore.errors import CorruptDataError, MemberError
from featstore.runtime.schema import pointer, shown
from featstore.runtime.writing import make_folder, replacing, write_all

#: Versions that can change a number; recorded beside every result.
TRACKED = ("numpy", "torch", "transformers", "tokenizers", "zarr", "scipy", "scikit-learn", "dask")


def canonical_json(value: Any) -> str:
    """Serialise so that equal values give equal text, whatever order they were built in.

    Args:
        value: Anything the standard encoder takes; NaN is refused.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of :func:`canonical_json`, as 64 hexadecimal digits.

    Args:
        value: A JSON value.
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the libraries that can change a number."""
    found = {}
    for name in TRACKED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file so that readers see the old content or the new, never a part.

    Args:
        path: Destination; its directory is created. A link there is replaced, not followed.
        data: The content; text is written as UTF-8.

    Raises:
        WriteError: It cannot be written there.
        NoSpaceError: The disk is full; the old content is still there.
    """
    make_folder(path.parent)
    with replacing(path) as handle:
        write_all(handle, data.encode() if isinstance(data, str) else data)


def json_text(value: Any) -> str:
    """The text of a JSON document, sorted and indented, so that equal values give equal bytes.

    Args:
        value: A JSON value; NaN is refused.
    """
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically.

    Args:
        path: Destination.
        value: A JSON value; NaN is refused.
    """
    write_atomic(path, json_text(value))


def read_json(path: Path, *, foreign: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: An existing file.
        foreign: As for :func:`parse_json`.

    Raises:
        CorruptDataError: The file is not a JSON object; the message names it.
        FileNotFoundError: There is no such file.
    """
    return parse_json(path.read_bytes(), str(path), foreign=foreign)


#: Levels of objects and lists that a document may have; ours have a dozen. Copying and writing recurse as deep.
MAX_DEPTH = 64
#: What no double and no counter of ours exceeds; beyond it arithmetic on a document's numbers overflows.
_LARGEST_INTEGER = 2**64
#: Text without any of these has no number and no string that is refused below: most documents are looked at once.
_SUSPICIOUS = re.compile(r"\d{20}|[eE]\+?\d{3}|\\u[dD][89a-fA-F]|NaN|Infinity")
_HALF = re.compile("[\ud800-\udfff]")


def parse_json(data: bytes, where: str, *, foreign: bool = False) -> dict[str, Any]:
    """Parse a JSON object that may come from anybody: what is returned can be walked, copied, compared and written.

    Args:
        data: Its UTF-8 text.
        where: Named in errors.
        foreign: Another library wrote it: what Python's own encoder may write beside JSON (NaN, infinities), a byte
            order mark and a key that stands twice (the last one counts) are let pass.

    Raises:
        CorruptDataError: Not a JSON object, a key twice in one object, or more than :data:`MAX_DEPTH` levels.
        MemberError: A number that is not finite or has more than 64 bits, or half of a surrogate pair.
    """
    try:
        text = data.decode("utf-8-sig" if foreign else "utf-8")
        value = json.loads(text, object_pairs_hook=None if foreign else _members)
        _check_depth(value)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of absurd length
        raise CorruptDataError(f"{where} is not valid JSON ({error}); restore it or re-create it") from error
    if not isinstance(value, dict):
        raise CorruptDataError(f"{where} holds a JSON {type(value).__name__}, expected an object; restore the file")
    if _SUSPICIOUS.search(text):
        _check_scalars(value, (), where, foreign=foreign)
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's members, each of which stands once: readers disagree about which of two counts."""
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"key {shown(twice)} stands twice in one object")
    return members


def _children(value: Any) -> Iterable[Any]:
    return value.values() if type(value) is dict else value


def _check_depth(value: Any) -> None:
    """Refuse nesting on which whatever recurses later would run out of stack."""
    level, depth = [value], 0
    while level := [each for each in level if type(each) is dict or type(each) is list]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels of objects and lists")
        level = [inner for each in level for inner in _children(each)]


def _check_scalars(value: Any, place: tuple[str | int, ...], where: str, *, foreign: bool) -> None:
    """Refuse numbers and strings that cannot be calculated with or written again."""
    if type(value) is dict or type(value) is list:
        for key, inner in value.items() if type(value) is dict else enumerate(value):
            if type(key) is str:
                _check_scalars(key, place, where, foreign=foreign)
            _check_scalars(inner, (*place, key), where, foreign=foreign)
        return
    wrong = None
    if type(value) is str:
        wrong = _HALF.search(value) and "text without half a surrogate pair"
    elif type(value) is float and not foreign and not math.isfinite(value):
        wrong = "a finite number"
    elif type(value) is int and not foreign and abs(value) >= _LARGEST_INTEGER:
        wrong = "an integer of at most 64 bits"
    if wrong:
        raise MemberError(f"{where}: {pointer(place)} is {shown(value)}, expected {wrong}; restore it or re-create it")
