"""How far a scan is, on disk.

Kept is, for each block of layers, its sums over the runs of rows so far, or its finished figures. Runs are added up in
one order, so the sums over the first runs are all that has to be kept: one file for each block, replaced by one rename,
whose size does not grow with the rows. Files are NumPy archives without pickle, whose members carry checksums. Every
file names the scan it belongs to, and those of another scan are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from align.similarity.scan.planning import Plan, Selection, Site
from align.solvers.row_effects import Documents
from featstore.errors import CorruptDataError, FeatstoreError, StoreStateError
from featstore.runtime.provenance import digest, write_atomic
from featstore.runtime.records import EMPTY, Flag, Record, Table, Whole, parsed
from featstore.store import Store
from featstore.store.read.columns import pieces
from featstore.store.read.pairs import Pairs

FORMAT = 1
_REMEDY = "remove it and scan anew"
_META = "meta"
_NAME = re.compile(r"block-(\d{4,})\.npz\Z")
#: What a process that was killed while writing left behind.
_ASIDE = re.compile(r"\.block-\d{4,}\.npz\..*\.part\Z")

Arrays = dict[str, NDArray[Any]]


def identity_of(
    store: Store,
    pairs: Pairs,
    selection: Selection,
    sites: Sequence[Site],
    cuts: Plan,
    documents: Documents | None = None,
) -> dict[str, Any]:
    """All that decides the sums of a scan, as JSON values; where the store lies does not.

    Args:
        store: The store.
        pairs: What was selected of it.
        selection: How.
        sites: The layers.
        cuts: The plan.
        documents: Of the pairs, where sums are by document.
    """
    rows, origins = hashlib.sha256(), hashlib.sha256()
    for numbers in (pairs.row_source, pairs.row_target):
        for at in pieces(len(numbers)):
            rows.update(np.ascontiguousarray(numbers[at]).tobytes())
    for site in sites:
        origins.update(store.origin(site.model, site.layer).tobytes())
    return {
        "store": selection.fingerprint,
        "models": [selection.source, selection.target],
        "policy": selection.policy,
        "keep_sinks": selection.keep_sinks,
        # Only where there are any: scans that were interrupted before there were roles go on.
        **({} if selection.roles is None else {"roles": list(selection.roles)}),
        "layers": [[site.model, site.layer, site.source] for site in sites],
        "rows": rows.hexdigest(),
        "origins": origins.hexdigest(),
        "groups": [list(group) for group in cuts.groups],
        "n": cuts.n,
        "run": cuts.run,
        "cut": cuts.cut,
        # Sums about the mean, not about the origin, and of other kinds.
        **({} if documents is None else {"documents": hashlib.sha256(documents.sizes.tobytes()).hexdigest()}),
    }


@dataclass(frozen=True, eq=False)
class Kept:
    """What is on disk of a block of layers.

    Attributes:
        runs: Runs of rows that are in it, from the first on.
        complete: Whether these are the finished figures; else sums.
        arrays: By name.
    """

    runs: int
    complete: bool
    arrays: Arrays


def write_block(directory: Path, block: int, kept: Kept, identity: Mapping[str, Any]) -> None:
    """Replace what is on disk of a block.

    Args:
        directory: Where files go; created.
        block: Number of the block.
        kept: Its state.
        identity: What makes this scan this one: JSON values without NaN.

    Raises:
        NoSpaceError: The disk is full; the old state is still there.
    """
    meta = {"format": FORMAT, "identity": dict(identity), "sha256": digest(identity), "block": block}
    meta |= {"runs": kept.runs, "complete": kept.complete}
    text = np.frombuffer(json.dumps(meta, allow_nan=False).encode(), np.uint8)
    buffer = io.BytesIO()
    members: dict[str, Any] = {_META: text, **kept.arrays}
    np.savez(buffer, **members)
    write_atomic(directory / f"block-{block:04d}.npz", buffer.getvalue())


def read_blocks(directory: Path, identity: Mapping[str, Any]) -> dict[int, Kept]:
    """What is on disk of a scan, by block.

    Args:
        directory: Where the files are; need not exist.
        identity: Of the scan that wants to go on.

    Raises:
        CorruptDataError: A file is not the state of a scan, or is damaged.
        StoreStateError: It is that of another scan, or of another version of this program.
    """
    if not directory.is_dir():
        return {}
    found = sorted((int(match[1]), path) for path in directory.iterdir() if (match := _NAME.match(path.name)))
    return {number: _read(path, number, identity) for number, path in found}


class _Meta(Record):
    """What a file says of itself, beside its arrays."""

    always: ClassVar[tuple[str, ...]] = ("format", "identity", "sha256", "block", "runs", "complete")

    format: Whole = FORMAT
    identity: Table[Any] = EMPTY
    sha256: str = ""
    block: Whole = 0
    runs: Whole = 0
    complete: Flag = False


def _read(path: Path, number: int, identity: Mapping[str, Any]) -> Kept:
    try:
        if not path.is_file():
            raise _damaged(path, "it is not a file")
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if _META not in members:
                raise _damaged(path, f"it has no {_META}")
            # What is announced is there: nothing is unpacked into more than the file holds.
            size = path.stat().st_size
            if any(info.compress_type or info.file_size > size for info in members.values()):
                raise _damaged(path, "it announces more than it holds")
            # The text first: sums of another scan are not worth reading.
            meta = parsed(_Meta, _member(archive, members[_META]).tobytes(), f"{path}, {_META}", remedy=_REMEDY)
            if meta.format != FORMAT:
                raise StoreStateError(f"{path} is of format {meta.format}; this version reads {FORMAT}: remove it")
            if meta.sha256 != digest(identity):
                told = _differences(meta.identity, identity)
                raise StoreStateError(f"{path} is of another scan: {told}; remove it, or let this scan write elsewhere")
            if meta.block != number:
                raise _damaged(path, f"it holds block {meta.block}")
            arrays = {name: _member(archive, info) for name, info in members.items() if name != _META}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, FeatstoreError):
            raise
        raise _damaged(path, "its archive does not read") from error
    return Kept(meta.runs, meta.complete, arrays)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """An array of an archive, of a plain type and of the size that its bytes have.

    Raises:
        ValueError: It is none.
    """
    stream = io.BytesIO(archive.read(info))
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError("another version of array")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    data = stream.read()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array that is not what it announces")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy(order="K")


def _damaged(path: Path, why: str) -> CorruptDataError:
    return CorruptDataError(f"{path} is not the state of a scan ({why}); {_REMEDY}")


def misfit(directory: Path, block: int, why: str) -> CorruptDataError:
    """An error about a file whose arrays are not those of its block.

    Args:
        directory: Where the files are.
        block: Number of the block.
        why: What is wrong.
    """
    return _damaged(directory / f"block-{block:04d}.npz", why)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} is {_short(theirs.get(name))} there and {_short(ours.get(name))} here" for name in names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def discard(directory: Path) -> None:
    """Remove the state of a finished scan, and the directory if nothing else is in it.

    Args:
        directory: Where the files are; need not exist.
    """
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if _NAME.match(path.name) or _ASIDE.match(path.name):
            path.unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()
