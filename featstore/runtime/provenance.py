"""Hashes, versions and atomic small files: how every artefact says where it came from."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from featstore.errors import CorruptDataError
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: An existing file.

    Raises:
        CorruptDataError: The file is not a JSON object; the message names it.
        FileNotFoundError: There is no such file.
    """
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: Its UTF-8 text.
        where: Named in errors.

    Raises:
        CorruptDataError: Not a JSON object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of absurd length
        raise CorruptDataError(f"{where} is not valid JSON ({error}); restore it or re-create it") from error
    if not isinstance(value, dict):
        raise CorruptDataError(f"{where} holds a JSON {type(value).__name__}, expected an object")
    return value
