"""``tokens.safetensors`` of a run directory: what its token baselines predict, one table for each target layer.

Layer pairs with the same target have the same baseline, so a table is named by :func:`align.tokens.table.table_key`:
``<source>-><target>:<layer>.ids`` int64 ``(m,)``, ``.states`` float32 ``(m, dy)`` and ``.mean`` float32 ``(dy,)``. The
tables of a run take 2 GiB together at most (:data:`align.tokens.table.TABLES_MEMORY`); rarer tokens are predicted to
have the mean state.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.layers import LayerPair
from align.tokens.table import TokenTable, table_key
from featstore.errors import AdapterError
from featstore.runtime.writing import cannot_write, replacing_by_name, system_error

FILE = "tokens.safetensors"
VERSION = 1
_PARTS = ("ids", "states", "mean")


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
    facts: Mapping[str, dict[str, Any]]

    def table(self, pair: str) -> TokenTable:
        """The table of a layer pair. Tokens that are not in it are predicted to have the mean state.

        Args:
            pair: Key of the layer pair.

        Raises:
            AdapterError: The run has no table for it, or the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if pair not in self.pairs:
            raise AdapterError(
                f"{self.path} has no token baseline of {pair!r}; it has those of {', '.join(self.pairs) or 'no pair'}"
            )
        key = self.pairs[pair]
        try:
            with safe_open(self.path, framework="numpy") as tensors:
                ids, states, mean = (tensors.get_tensor(f"{key}.{part}") for part in _PARTS)
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error
        kinds = (ids.dtype, states.dtype, mean.dtype) == (np.int64, np.float32, np.float32)
        if not (kinds and ids.ndim == 1 and states.shape == (*ids.shape, *mean.shape) and (np.diff(ids) > 0).all()):
            raise _damaged(self.path, f"its table {key} has ids {ids.shape}, states {states.shape}, mean {mean.shape}")
        return TokenTable(ids, states, mean, dict(self.facts.get(key, {})))


def load_tables(directory: Path) -> TokenFile:
    """Open the token baselines of a run.

    Args:
        directory: Run directory.

    Raises:
        AdapterError: There are none, they are of a newer format, or the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(directory) / FILE
    if not path.is_file():
        raise AdapterError(
            f"{str(directory)!r} has no {FILE}: it was made by an earlier version, or its store holds no rows; train "
            "it again with `align train`"
        )
    try:
        with safe_open(path, framework="numpy") as tensors:
            about = json.loads((tensors.metadata() or {})["about"])
        if about["format"] != VERSION:
            raise AdapterError(f"{path} has format {about['format']!r}, this version reads {VERSION}; upgrade")
        return TokenFile(path, str(about["store"]), dict(about["pairs"]), dict(about["tables"]))
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> AdapterError:
    return AdapterError(f"{path} is damaged ({why}); train the run again")
