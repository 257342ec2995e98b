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
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.similarity.scan.planning import Plan, Selection, Site
from align.solvers.row_effects import Documents
from featstore.errors import CorruptDataError, StoreStateError
from featstore.runtime.provenance import digest, write_atomic
from featstore.store import Store
from featstore.store.read.pairs import Pairs

FORMAT = 1
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
        rows.update(np.ascontiguousarray(numbers).tobytes())
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


def _read(path: Path, number: int, identity: Mapping[str, Any]) -> Kept:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            # The text first: sums of another scan are not worth reading.
            meta = json.loads(file[_META].tobytes())
            known = meta["format"] == FORMAT
            theirs, claimed, block = meta["identity"], meta["sha256"], meta["block"]
            ours = known and claimed == digest(identity)
            arrays = {name: file[name] for name in file.files if name != _META} if ours else {}
            kept = Kept(int(meta["runs"]), bool(meta["complete"]), arrays)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"{path} is not the state of a scan ({error!r}); remove it and scan anew") from error
    if not known:
        raise StoreStateError(f"{path} is of format {meta['format']}; this version reads {FORMAT}: remove it")
    if not ours:
        names = [name for name in {**theirs, **identity} if theirs.get(name) != identity.get(name)]
        told = ", ".join(
            f"{name} is {_short(theirs.get(name))} there and {_short(identity.get(name))} here" for name in names
        )
        raise StoreStateError(f"{path} is of another scan: {told}; remove it, or let this scan write elsewhere")
    if block != number:
        raise CorruptDataError(f"{path} holds block {block}; remove it and scan anew")
    return kept


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
