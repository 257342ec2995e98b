"""``tokens.safetensors`` of a run directory: what its token baselines predict, one table for each target layer.

Layer pairs with the same target have the same baseline, so a table is named by :func:`align.tokens.table.table_key`:
``<source>-><target>:<layer>.ids`` int64 ``(m,)``, ``.states`` float32 ``(m, dy)`` and ``.mean`` float32 ``(dy,)``. The
tables of a run take 2 GiB together at most (:data:`align.tokens.table.TABLES_MEMORY`); rarer tokens are predicted to
have the mean state.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from align.layers import LayerPair
from align.results import TokenFit
from align.tokens.table import TokenTable, table_key
from featstore.errors import AdapterError, CorruptDataError
from featstore.runtime.provenance import parse_json
from featstore.runtime.records import EMPTY, Fault, Record, Table, Whole, parsed, retold
from featstore.runtime.schema import shown
from featstore.runtime.tensors import opened
from featstore.runtime.writing import cannot_write, replacing_by_name, system_error

FILE = "tokens.safetensors"
VERSION = 1
_PARTS = ("ids", "states", "mean")
_REMEDY = "the run is damaged: restore it or train it again"


def save_tables(directory: Path, tables: Mapping[str, TokenTable], pairs: Iterable[LayerPair], *, store: str) -> None:
    """Write the tables of a run, atomically; no file where there are none.

    Args:
        directory: Run directory.
        tables: By :func:`align.tokens.table.table_key`.
        pairs: The run's layer pairs.
        store: Fingerprint of the store they were fitted on.

    Raises:
        WriteError: The file cannot be written.
        NoSpaceError: The disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if not tables:
        return
    tensors = {f"{key}.{part}": getattr(table, part) for key, table in tables.items() for part in _PARTS}
    keys = {pair.key: table_key(pair.source, pair.target, pair.target_layer) for pair in pairs}
    about = {
        "format": VERSION,
        "store": store,
        "tables": {key: table.facts for key, table in tables.items()},
        "pairs": {pair: key for pair, key in keys.items() if key in tables},
    }
    # By name and not through memory: the tables may be as large as what is free.
    try:
        with replacing_by_name(directory / FILE) as aside:
            save_file(tensors, aside, metadata={"about": json.dumps(about, sort_keys=True, allow_nan=False)})
    except SafetensorError as error:
        if (said := system_error(error)) is None:
            raise
        raise cannot_write(directory / FILE, said) from error


@dataclass(frozen=True)
class TokenFile:
    """The tables of a run, each read when it is asked for.

    Attributes:
        path: The file.
        store: Fingerprint of the store they were fitted on.
        pairs: Key of its table by layer pair.
        facts: How each table was fitted, by its key; what ``metrics.json`` says under ``token``.
    """

    path: Path
    store: str
    pairs: Mapping[str, str]
    facts: Mapping[str, TokenFit]

    def table(self, pair: str) -> TokenTable:
        """The table of a layer pair. Tokens that are not in it are predicted to have the mean state.

        Args:
            pair: Key of the layer pair.

        Raises:
            AdapterError: The run has no table for it, or the file is damaged.
        """
        if pair not in self.pairs:
            raise AdapterError(
                f"{self.path} has no token baseline of {pair!r}; it has those of {', '.join(self.pairs) or 'no pair'}"
            )
        key = self.pairs[pair]
        with opened(self.path, AdapterError, remedy=_REMEDY) as tensors:
            mean = tensors.finite(f"{key}.mean", (None,))
            ids = tensors.read(f"{key}.ids", "I64", (None,))
            states = tensors.finite(f"{key}.states", (len(ids), len(mean)))
            if (np.diff(ids) <= 0).any() or (len(ids) and ids[0] < 0):
                raise tensors.damaged(f"{key + '.ids'!r} is not ascending from 0 on")
        return TokenTable(ids, states, mean, self.facts[key].content() if key in self.facts else {})


class TokenAbout(Record):
    """What the file says of its tables, as JSON under ``about`` in its metadata.

    Attributes:
        format: Version of this file, 1.
        store: Fingerprint of the store they were fitted on.
        tables: How each was fitted, by its key.
        pairs: Key of its table by layer pair.
    """

    always: ClassVar[tuple[str, ...]] = ("format", "store", "tables", "pairs")

    format: Whole = VERSION
    store: str = ""
    tables: Table[TokenFit] = EMPTY
    pairs: Table[str] = EMPTY

    def faults(self) -> Iterator[Fault]:
        """A layer pair whose table is not there."""
        for pair, key in self.pairs.items():
            if key not in self.tables:
                yield ("pairs", pair), f"is {shown(key)}, expected one of tables"


def load_tables(directory: Path) -> TokenFile:
    """Open the token baselines of a run.

    Args:
        directory: Run directory.

    Raises:
        AdapterError: There are none, they are of a newer format, or the file is damaged.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        raise AdapterError(
            f"{str(directory)!r} has no {FILE}: it was made by an earlier version, or its store holds no rows; train "
            "it again with `align train`"
        )
    with opened(path, AdapterError, remedy=_REMEDY) as tensors:
        text, where = tensors.metadata.get("about", "{}").encode(errors="replace"), f"{path}, about"
        try:
            version = parse_json(text, where).get("format")
            if isinstance(version, int) and version > VERSION:
                raise AdapterError(f"{path} has format {shown(version)}, this version reads {VERSION}; upgrade")
            about = parsed(TokenAbout, text, where, remedy=_REMEDY)
        except CorruptDataError as error:
            raise retold(error, AdapterError, _REMEDY) from error
        for key in about.tables:
            # What a later step reads is compared with what is there before anything is computed.
            for part in _PARTS:
                if f"{key}.{part}" not in tensors.heads:
                    raise tensors.damaged(f"has no tensor {shown(f'{key}.{part}')}")
    return TokenFile(path, about.store, about.pairs, about.tables)
