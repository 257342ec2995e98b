"""Hashes, versions and atomic small files: how every artefact says where it came from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from featstore.errors import CorruptDataError, NoSpaceError

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


def fsync_directory(path: Path) -> None:
    """Make a rename inside a directory survive a power cut.

    Args:
        path: The directory.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file so that readers see the old content or the new, never a part.

    Args:
        path: Destination; its directory is created.
        data: The content; text is written as UTF-8.

    Raises:
        NoSpaceError: The disk is full; the old content is still there.
    """
    try:
        _write_atomic(path, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpaceError(
            f"cannot write {path} ({error.strerror}); what was committed is kept: free some space and run the same "
            "command again"
        ) from error


def _write_atomic(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; a store is meant to be shared like any other output.
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


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
