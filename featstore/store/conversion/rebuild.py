"""Token tables that were derived again take the place of a store's, and all that follows from them is derived again.

Row numbers stay, because token ids do: states are never touched. What is to be done is settled before the first write,
and kept in the root's ``rebuilding``, so that a rebuild that was killed ends as it would have ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import StoreStateError
from featstore.store.format import documents
from featstore.store.format.version import FORMAT_VERSION, REBUILDING
from featstore.store.moments.stored import SPLITS, StoredMoments, all_blocks, has_rows, unit_of
from featstore.store.moments.writing import write_moments
from featstore.store.read.pairs import POLICIES
from featstore.store.read.records import StoredModel, Tokens
from featstore.store.read.store import Store
from featstore.store.write.index import pair_rows, pairs_unit, sink_mask, write_pairs, write_sinks
from featstore.store.write.table import table_unit
from featstore.store.write.upgrade import begin_rebuild, upgrade_metadata
from featstore.store.write.writer import StoreWriter

#: What older stores do not say of their text: it was read as it was, and control tokens in it were kept.
_OLD_TEXT = {"normalise": "none", "control_tokens": "special"}
#: Arrays of the corpus that version 1 does not have, all empty there.
_MESSAGES = {"document": np.int32, "role": np.uint8, "start": np.int64, "end": np.int64}


@dataclass(frozen=True)
class NewTable:
    """A model's token table, derived again.

    Attributes:
        columns: By name, each ``(n,)``; ids and windows are the stored ones.
        attributes: The model's attributes that say of it what it is, ``tokens_sha256`` among them.
    """

    columns: Mapping[str, NDArray[Any]]
    attributes: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of the table."""
        return str(self.attributes["tokens_sha256"])


class _AsRebuilt(Store):
    """A store as it will be: with new token tables, and masks and pairs that are derived from them."""

    def __init__(self, store: Store, tables: Mapping[str, NewTable]) -> None:
        super().__init__(store.files, store.attributes, "")
        self._tables = tables

    @cached_property
    def _stored(self) -> dict[str, StoredModel]:
        held = super()._stored
        return {
            name: replace(model, attributes={**model.attributes, **self._tables[name].attributes})
            for name, model in held.items()
        }

    def columns(self, model: str, *names: str) -> dict[str, NDArray[Any]]:
        threshold = float(self.attributes["mask"]["sink_threshold"])
        table = self._tables[model].columns
        return {name: sink_mask(self, model, threshold) if name == "sink" else table[name] for name in names}

    def _check_tokens(self, model: str, table: Tokens) -> None:
        """Nothing: the tables come from the tokenizers, and what the store records is of the old ones."""

    def _check_pairs(self, names: tuple[str, str], policy: str, coverage: tuple[float, float]) -> None:
        """Nothing, either: the pairs are those of the new tables."""

    def pair_index(self, first: str, second: str, policy: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return pair_rows(self, first, second, policy)


def rebuild_store(writer: StoreWriter, tables: Mapping[str, NewTable], *, quiet: bool = False) -> dict[str, Any]:
    """Replace a store's token tables and derive masks, pairs and moments again; a version 1 store becomes version 2.

    Args:
        writer: From ``adding_to(path, rebuild=True)``.
        tables: By model, of every model.
        quiet: No progress.

    Returns:
        ``from_version``; ``fingerprint_before`` and, where anything was written, ``fingerprint_after``; ``changed``,
        whether anything that is read differs; ``models``: by name ``rows``, and of how many of them the end, the
        special mark, the exactness, the role and the sink mask changed; ``pairs``: by models and policy the pairs
        ``before`` and ``after``, ``removed`` and ``added``; ``moments``: by models how many blocks are ``kept``, and
        whether the others are ``summed`` again.

    Raises:
        StoreStateError: Moments would have to be summed again and there are no rows; or a rebuild that was stopped had
            other tables.
    """
    store = writer.view
    hashes = {name: table.sha256 for name, table in tables.items()}
    work = store.attributes.get(REBUILDING)
    if not isinstance(work, dict):
        work = _settle(writer, store, tables) | {"tables": hashes}
        if not work["report"]["changed"] and _is_current(writer, store, tables):
            return dict(work["report"])
        begin_rebuild(writer, work)
    elif work["tables"] != hashes:
        other = ", ".join(name for name in hashes if work["tables"].get(name) != hashes[name])
        raise StoreStateError(
            f"{store.path} is half rebuilt with other tokenizers ({other}) than those that are here now; complete it "
            "with the same ones, or with the same version of the tokenizers package"
        )
    report: dict[str, Any] = work["report"]
    for unit, basis in work["sums"].items():
        writer.restate(unit, basis=basis)
    for name, table in tables.items():
        _write_table(writer, name, table)
    if not (writer.path / "corpus" / "message" / "document").is_dir():
        writer.group("corpus/message", {})
        empty = {f"corpus/message/{name}": np.zeros(0, dtype=kind) for name, kind in _MESSAGES.items()}
        writer.describe({name: documents.vector_document(array, 1) for name, array in empty.items()})
    for name in tables:
        write_sinks(writer, name)
    for models, policies in report["pairs"].items():
        first, second = _names(tables, models)
        for policy in policies:
            write_pairs(writer, first, second, policy)
        if report["moments"].get(models, {}).get("summed"):
            write_moments(writer, first, second, quiet=quiet)
    root: dict[str, Any] = (writer.attributes() or {})["featstore"]
    report["fingerprint_after"] = writer.view.fingerprint
    past = [*root.get("rebuilt", ()), report]
    upgrade_metadata(writer, {"corpus": _OLD_TEXT | root["corpus"], "rebuilt": past})
    return report


def _names(tables: Mapping[str, NewTable], key: str) -> tuple[str, str]:
    """The two models of a key; names may hold underscores themselves."""
    return next(pair for pair in combinations(tables, 2) if "__".join(pair) == key)


def _is_current(writer: StoreWriter, store: Store, tables: Mapping[str, NewTable]) -> bool:
    """Whether the store says all that a rebuilt one says."""
    return (
        store.version >= FORMAT_VERSION
        and _OLD_TEXT.keys() <= store.attributes["corpus"].keys()
        and all(table.attributes.items() <= store.model(name).attributes.items() for name, table in tables.items())
        and all((writer.entry(f"models/{n}/tokens") or {}).get("sha256") == t.sha256 for n, t in tables.items())
    )


# What will change ---------------------------------------------------------------------------------------------------


def _settle(writer: StoreWriter, store: Store, tables: Mapping[str, NewTable]) -> dict[str, Any]:
    """What a rebuild will change, and which sums stay: ``report``, and ``sums``, the new basis of units that stay."""
    future = _AsRebuilt(store, tables)
    models = {}
    for name in tables:
        old, new = store.tokens(name), future.tokens(name)
        changed = {
            "ends_changed": old.byte_end != new.byte_end,
            "special_changed": old.special != new.special,
            "exact_changed": old.exact != new.exact,
            "role_changed": old.role != new.role,
            "sinks_changed": old.sink != new.sink,
        }
        models[name] = {"rows": len(new.id)} | {key: int(which.sum()) for key, which in changed.items()}
    pairs: dict[str, dict[str, Any]] = {}
    moments: dict[str, dict[str, Any]] = {}
    sums: dict[str, str] = {}
    for first, second in combinations(store.models, 2):
        key = f"{first}__{second}"
        pairs[key] = {
            policy: _moved(store, future, first, second, policy)
            for policy in POLICIES
            if store.has(f"{pairs_unit(first, second, policy)}/row_a")
        }
        stay, lost = _sums(writer, StoredMoments(store, first, second), StoredMoments(future, first, second))
        if lost and not all(has_rows(store, name, k) for name in (first, second) for k in store.model(name).layers):
            raise StoreStateError(
                f"{store.path} holds moments of {first} and {second} over pairs that would change, and no rows to sum "
                "again; nothing was changed: extract it again with --moments-only"
            )
        if stay or lost:
            moments[key] = {"kept": len(stay), "summed": lost}
            sums |= stay
    for name in tables:
        sums |= _restated(writer, store, name, tables[name])
    counts = [value for each in models.values() for what, value in each.items() if what != "rows"]
    counts += [each[what] for of in pairs.values() for each in of.values() for what in ("removed", "added")]
    report = {
        "from_version": store.version,
        "fingerprint_before": store.fingerprint,
        "changed": any(counts),
        "models": models,
        "pairs": pairs,
        "moments": moments,
    }
    return {"report": report, "sums": sums}


def _moved(store: Store, future: Store, first: str, second: str, policy: str) -> dict[str, int]:
    """How many pairs there are and will be, and which of them are others."""
    count = store.model(second).rows
    before, after = (
        row_a * count + row_b for row_a, row_b in (one.pair_index(first, second, policy) for one in (store, future))
    )
    return {
        "before": len(before),
        "after": len(after),
        "removed": len(np.setdiff1d(before, after, assume_unique=True)),
        "added": len(np.setdiff1d(after, before, assume_unique=True)),
    }


def _sums(writer: StoreWriter, old: StoredMoments, new: StoredMoments) -> tuple[dict[str, str], bool]:
    """The new basis of the blocks whose rows stay the same, and whether there are others."""
    stay: dict[str, str] = {}
    lost = False
    for split in range(len(SPLITS)):
        before, after = (stored.pairs.where(stored.pairs.split == split) for stored in (old, new))
        same = np.array_equal(before.row_source, after.row_source) and np.array_equal(
            before.row_target, after.row_target
        )
        for block in all_blocks(old.store, old.models):
            unit = unit_of(old.models, split, block)
            if (writer.entry(unit) or {}).get("basis") != old.basis(split, block):
                continue  # not there, or outdated as it is
            if same:
                stay[unit] = new.basis(split, block)
            lost |= not same
    return stay, lost


def _restated(writer: StoreWriter, store: Store, name: str, table: NewTable) -> dict[str, str]:
    """The new basis of what token ids alone decide: the layer 0 table, and norms that were stored without rows."""
    held = str(store.model(name).attributes.get("tokens_sha256"))
    found = {}
    for unit in (table_unit(name), f"models/{name}/norms"):
        basis = (writer.entry(unit) or {}).get("basis")
        if basis is not None and str(basis).startswith(held):
            found[unit] = table.sha256 + str(basis).removeprefix(held)
    return found


def _write_table(writer: StoreWriter, name: str, table: NewTable) -> None:
    unit = f"models/{name}/tokens"
    if (writer.entry(unit) or {}).get("sha256") != table.sha256:
        columns = {f"{unit}/{key}": column for key, column in table.columns.items()}
        writer.vectors(unit, columns, sha256=table.sha256)
    own = (writer.attributes(f"models/{name}") or {})["featstore"]
    if not table.attributes.items() <= own.items():
        writer.group(f"models/{name}", {"featstore": {**own, **table.attributes}})
