"""Check a store against its own checksums, shapes and text.

First the bytes: every committed file against the manifest, every chunk that an array must have. Only where they are
right the contents: what a writer with a bug, or a hand that meant well, would have sealed with correct checksums.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError, FeatstoreError
from featstore.runtime.console import Tick, progress
from featstore.runtime.provenance import read_json
from featstore.store.format.shards import file_checksum
from featstore.store.format.version import MANIFEST, METADATA_UNIT
from featstore.store.moments.stored import has_rows
from featstore.store.read.first import first_rows
from featstore.store.read.links import links_of, outside_damage
from featstore.store.read.pairs import POLICIES
from featstore.store.read.store import Store, open_store
from featstore.store.read.tables import TableReader
from featstore.store.write.index import SINK_RULE, pair_rows, pairs_unit, sink_mask
from featstore.store.write.table import table_unit
from featstore.store.write.writer import StoreWriter, read_entry
from featstore.text.roles import ROLES, roles_at

#: Rows that are decoded at a time.
_STEP = 4096
#: Share by which a norm may lie on the other side of the sink threshold in a store whose values were rounded after
#: the mask had been made.
_ROUNDED = 0.1


def verify_store(path: Path, *, allow_links: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Verify every committed file, then what the files say.

    Args:
        path: The store.
        allow_links: Accept links that lead outside the store; otherwise each is damage.
        quiet: No progress.

    Returns:
        ``{"store", "files", "bytes", "damage": [...], "not_checked": [...], "links": [...]}``; an empty list of damage
        means the store is whole, as far as it could be checked. Of ``links`` see
        :class:`featstore.store.read.links.Link`.

    Raises:
        StoreNotFoundError: Nothing there.
        StoreFormatError: Not a feature store.
        StoreStateError: Unfinished.
    """
    try:
        store = open_store(path)
        store.manifest  # noqa: B018 - read now: a damaged entry is damage found, too
    except CorruptDataError as error:
        return {"store": str(path), "files": 0, "bytes": 0, "damage": [str(error)], "not_checked": [], "links": []}
    damage = [*_check_manifest(store), *(_check_files(store, quiet=quiet) or _check_recorded(store))]
    not_checked: list[str] = []
    if not damage:
        # Contents are only worth reading once the bytes are known to be right.
        damage = list(_check_contents(store, quiet=quiet))
        not_checked = list(_without_rows(store))
    links = links_of(store)
    if not allow_links:
        damage += outside_damage(links)
    total = sum(record["bytes"] for record in store.manifest.values())
    return {
        "store": str(path),
        "files": len(store.manifest),
        "bytes": total,
        "damage": damage,
        "not_checked": not_checked,
        "links": [link.to_dict() for link in links],
    }


# Bytes --------------------------------------------------------------------------------------------------------------


def _check_manifest(store: Store) -> list[str]:
    """Rows of the manifest that are not what they were when the store was sealed, whatever it is that they say."""
    root = store.directory / MANIFEST
    units = read_entry(root / f"{METADATA_UNIT}.json", METADATA_UNIT).get("units")
    if not isinstance(units, dict):
        return [f"{MANIFEST}/{METADATA_UNIT}.json does not list the units"]
    present = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.json")}
    lost = [f"{MANIFEST}/{unit}.json: missing" for unit in units if unit not in present]
    return lost + [
        f"{MANIFEST}/{unit}.json: checksum differs from the one recorded when the store was sealed"
        for unit, path in sorted(present.items())
        if unit in units and file_checksum(path.read_bytes()) != units[unit]
    ]


def _check_files(store: Store, *, quiet: bool) -> list[str]:
    damage = []
    total = sum(record["bytes"] for record in store.manifest.values())
    with progress("verify", total, "B", quiet=quiet) as tick:
        for name, record in store.manifest.items():
            path = store.directory / name
            if not path.is_file():
                damage.append(f"{name}: missing")
            elif (size := path.stat().st_size) != record["bytes"]:
                damage.append(f"{name}: {size} bytes, the manifest says {record['bytes']}")
            elif file_checksum(path.read_bytes()) != record["crc32"]:
                damage.append(f"{name}: checksum differs from the manifest")
            tick(record["bytes"])
    return damage


def _check_recorded(store: Store) -> list[str]:
    """Chunks that an array must have but the manifest does not name: nothing would notice damage to them."""
    damage = []
    for document in [name for name in store.manifest if name.endswith("/zarr.json")]:
        array = read_json(store.directory / document)
        if array["node_type"] != "array":
            continue
        (rows, *rest), size = array["shape"], array["chunk_grid"]["configuration"]["chunk_shape"][0]
        for i in range(-(-rows // size)):
            chunk = document.removesuffix("zarr.json") + "/".join(["c", str(i), *("0" for _ in rest)])
            if chunk not in store.manifest:
                damage.append(f"{chunk}: not in the manifest")
    return damage


# Contents -----------------------------------------------------------------------------------------------------------


def _check_contents(store: Store, *, quiet: bool) -> Iterator[str]:
    sites = [(name, k) for name in store.models for k in store.model(name).layers if has_rows(store, name, k)]
    total = sum(store.model(name).rows for name, _ in sites)
    with progress("verify contents", total, "rows", quiet=quiet) as tick:
        checks = [("corpus", partial(_check_corpus, store))]
        checks += [(name, partial(_check_tokens, store, name)) for name in store.models]
        checks += [(name, partial(_check_layer, store, name, layer, tick)) for name, layer in sites]
        checks += [(name, partial(_check_sinks, store, name)) for name in store.models]
        for first, second in combinations(store.models, 2):
            what = f"pairs of {first} and {second}"
            checks += [(what, partial(_check_pairs, store, first, second, policy)) for policy in POLICIES]
        for what, check in checks:
            try:
                yield from check()
            except FeatstoreError as error:
                yield str(error)
            except (IndexError, ValueError) as error:
                yield f"{what}: {error}"


def _without_rows(store: Store) -> Iterator[str]:
    for name in store.models:
        absent = [k for k in store.model(name).layers if not has_rows(store, name, k)]
        if absent:
            yield f"{name}: layers {', '.join(map(str, absent))} hold moments and no rows"


def _check_corpus(store: Store) -> Iterator[str]:
    """Windows follow each other through every document, and what they cut out is text."""
    corpus = store.corpus
    length = np.diff(corpus.document_start)
    same = np.r_[False, corpus.window_document[1:] == corpus.window_document[:-1]]
    begins = np.where(same, np.r_[0, corpus.window_end[:-1]], 0)
    ends = np.r_[~same[1:], True]
    if (corpus.window_start != begins).any() or (corpus.window_end[ends] != length[corpus.window_document[ends]]).any():
        yield "corpus: the windows do not cover the documents"
        return
    if corpus.document_start[-1] != len(corpus.text) or (corpus.document_split > 2).any():
        yield "corpus: the documents do not fit the text, or a split is unknown"
    for window in range(len(corpus.window_document)):
        try:
            corpus.window_text(window)
        except UnicodeDecodeError:
            yield f"corpus: window {window} is not UTF-8"
            return
    yield from _check_messages(store)


def _check_messages(store: Store) -> Iterator[str]:
    """Messages lie within their documents, in order; those of conversations cover them, and what is beside is JSON."""
    corpus, length = store.corpus, np.diff(store.corpus.document_start)
    document, start, end = corpus.message_document, corpus.message_start, corpus.message_end
    if not len(document) == len(start) == len(end) == len(corpus.message_role):
        yield "corpus: messages have documents, roles and ends of different numbers"
        return
    chats = len(corpus.message_rest_start) > 0
    if chats != (store.attributes["corpus"].get("form") == "messages"):
        yield "corpus: the store does not say truly whether its documents are messages"
    if not len(document):
        return
    same = np.r_[False, document[1:] == document[:-1]]
    before, last = np.where(same, np.r_[0, end[:-1]], 0), np.r_[~same[1:], True]
    outside = (document < 0).any() or (document >= len(length)).any() or (np.diff(document) < 0).any()
    if outside or (start < before).any() or (end < start).any() or (end > length[document]).any():
        yield "corpus: the messages do not lie within their documents, in order"
    elif (corpus.message_role >= len(ROLES)).any():
        yield "corpus: a message has an unknown role"
    elif chats:
        covered = not (start != before).any() and np.array_equal(document[last], np.arange(len(length)))
        if not covered or (end[last] != length).any() or len(corpus.window_document) != len(length):
            yield "corpus: the messages do not cover their documents, one window each"
        for name, kind, values, starts, count in (
            ("message/rest", dict, corpus.message_rest, corpus.message_rest_start, len(document)),
            ("document/tools", list, corpus.document_tools, corpus.document_tools_start, len(length)),
        ):
            yield from _check_json(f"corpus/{name}", kind, values.tobytes(), starts, count)


def _check_json(name: str, kind: type, raw: bytes, starts: NDArray[np.int64], count: int) -> Iterator[str]:
    """JSON texts lie end to end and are values of a kind."""
    if len(starts) != count + 1 or starts[0] != 0 or starts[-1] != len(raw) or (np.diff(starts) < 0).any():
        yield f"{name}: the offsets do not fit"
        return
    for number, (first, last) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        try:
            sound = first == last or isinstance(json.loads(raw[first:last]), kind)
        except ValueError:
            sound = False
        if not sound:
            yield f"{name}: number {number} is not what JSON holds"
            return


def _check_tokens(store: Store, name: str) -> Iterator[str]:
    """The token table fits the text: in order, within its windows, and nothing but whitespace is left unread."""
    model, table, corpus = store.model(name), store.tokens(name), store.corpus
    wrong = [(field, len(column)) for field, column in vars(table).items() if len(column) != model.rows]
    for field, rows in wrong:
        yield f"{name}: tokens/{field} has {rows} rows, expected {model.rows}"
    if wrong:
        return
    lengths = corpus.window_end - corpus.window_start
    counts = np.bincount(table.window, minlength=len(lengths))
    if len(counts) != len(lengths) or (np.diff(table.window) < 0).any():
        yield f"{name}: the tokens' windows are not those of the corpus, in order"
        return
    if (table.byte_end < 0).any() or (table.byte_end > lengths[table.window]).any():
        yield f"{name}: a token ends beyond its window"
        return
    if table.byte_end[table.special].any():
        yield f"{name}: a special token claims to have read text"
    end = corpus.window_start[table.window] + table.byte_end
    messages = (corpus.message_document, corpus.message_role, corpus.message_start, corpus.message_end)
    roles = roles_at(corpus.window_document[table.window], end, *messages)
    if not np.array_equal(table.role, np.where(table.special, 0, roles)):
        yield f"{name}: the tokens' roles are not those of the messages"
    ordinary = np.flatnonzero(~table.special)
    window, byte_end = table.window[ordinary], table.byte_end[ordinary].astype(np.int64)
    if (np.diff(byte_end)[window[1:] == window[:-1]] < 0).any():
        yield f"{name}: a token ends before the one that precedes it"
        return
    if len(corpus.message_rest_start):
        return  # what a template trims is unread, and its own token may hold the end of a message
    read = np.zeros(len(lengths), np.int64)
    read[window] = byte_end  # the last one of each window stays
    for number in np.flatnonzero(read < lengths):
        rest = corpus.window_text(int(number)).encode()[read[number] :]
        if rest.decode(errors="replace").strip():
            yield f"{name}: the tokens of window {number} end before its text does"
            return


def _check_layer(store: Store, name: str, layer: int, tick: Tick) -> Iterator[str]:
    """Shapes, finite values and norms of one layer, and the scales that belong to it."""
    model, reader, norms = store.model(name), store.rows(name, layer), store.norms(name, layer)
    where = f"{name}: layer {layer}"
    if reader.shape != (model.rows, model.width) or norms.shape != (model.rows,):
        yield f"{where} has shape {reader.shape} and {len(norms)} norms, expected {(model.rows, model.width)}"
        return
    base = f"models/{name}"
    table = reader.table if isinstance(reader, TableReader) else None
    if reader.form.row_scaled:
        scale = store.vector(f"{base}/row_scale/{layer}" if table is None else f"{table_unit(name)}/row_scale")
        rows = model.rows if table is None else table.rows
        if scale.shape != (rows,) or not np.isfinite(scale).all() or (scale < 0).any():
            yield f"{where}: the row scales are not {rows} finite numbers"
    if reader.form.column_scaled:
        columns = store.vector(f"{base}/column_scale/{layer}")
        if columns.shape != (model.width,) or not (np.isfinite(columns) & (columns > 0)).all():
            yield f"{where}: the column scales are not {model.width} positive numbers"
            return
    if table is not None:
        ids = store.vector(f"{table_unit(name)}/id")
        if not np.array_equal(ids, np.unique(store.tokens(name).id)):
            yield f"{where}: the table is not of the token ids that occur, each once and in order"
    origin = store.origin(name, layer)
    if origin.shape != (model.width,) or not np.isfinite(origin).all():
        yield f"{where}: the origin is not {model.width} finite numbers"
    for start in range(0, model.rows, _STEP):
        values = reader[start : start + _STEP]
        wrong = ~np.isclose(np.linalg.norm(values, axis=1), norms[start : start + _STEP], rtol=1e-3, atol=1e-6)
        tick(len(values))
        if wrong.any():
            row = start + int(np.flatnonzero(wrong)[0])
            yield f"{where}, row {row}: the state is not finite or differs from its norm"
            return


def _check_sinks(store: Store, name: str) -> Iterator[str]:
    """The mask is that of the norms; a conversion keeps the one it found, so there the borderline is wide."""
    if any(not has_rows(store, name, layer) for layer in store.model(name).layers):
        return
    threshold, sink = float(store.attributes["mask"]["sink_threshold"]), store.tokens(name).sink
    rounded = _was_rounded(store.attributes.get("converted_from"))
    sure = sink_mask(store, name, threshold * (1 + _ROUNDED * rounded))
    possible = sink_mask(store, name, threshold * (1 - _ROUNDED * rounded))
    entry = StoreWriter(store.directory).entry(f"models/{name}/sinks") or {}
    if not str(entry.get("basis", "")).endswith(SINK_RULE):
        # The mask was derived when norms alone decided; it is derived anew when the store is next written to.
        sure &= sink | ~first_rows(*store.columns(name, "window", "byte_end", "special").values())
    wrong = np.flatnonzero((sure & ~sink) | (sink & ~possible))
    if len(wrong):
        yield f"{name}: the sink mask is not that of the norms at {len(wrong)} rows, first at row {wrong[0]}"


def _was_rounded(link: dict[str, Any] | None) -> bool:
    return link is not None and (not link["exact"] or _was_rounded(link["converted_from"]))


def _check_pairs(store: Store, first: str, second: str, policy: str) -> Iterator[str]:
    unit = pairs_unit(first, second, policy)
    if not (store.directory / unit / "zarr.json").is_file():
        if policy == POLICIES[0]:
            yield f"pairs of {first} and {second}: there is no index"
        return
    pairs = store.pairs(first, second, policy)
    what = f"pairs of {first} and {second}" + f" ({policy})" * (policy != POLICIES[0])
    a, b = store.tokens(first), store.tokens(second)
    same_window = a.window[pairs.row_source] == b.window[pairs.row_target]
    same_end = a.byte_end[pairs.row_source] == b.byte_end[pairs.row_target]
    apart = int((~(same_window & same_end)).sum())
    if apart:
        yield f"{what}: {apart} do not end at the same byte"
        return
    rows = pair_rows(store, first, second, policy)
    if not all(
        np.array_equal(ours, held) for ours, held in zip(rows, (pairs.row_source, pairs.row_target), strict=True)
    ):
        yield f"{what}: they are not all those, and only those, that the tokens make"
    recorded = read_json(store.directory / unit / "zarr.json")["attributes"]["featstore"]["coverage"]
    if not np.allclose([recorded[first], recorded[second]], pairs.coverage):
        yield f"{what}: the recorded coverage is not that of the tokens"
