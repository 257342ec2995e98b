"""Check a store against its own checksums, shapes and text.

First the bytes: every committed file against the manifest, every chunk that an array must have. Only where they are
right the contents: what a writer with a bug, or a hand that meant well, would have sealed with correct checksums.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ContradictionError, CorruptDataError, FeatstoreError, OldStoreWarning
from featstore.runtime.console import Tick, progress
from featstore.runtime.provenance import parse_json
from featstore.store.format.attributes import ConversionLink
from featstore.store.format.documents import consolidated
from featstore.store.format.version import FORMAT_VERSION, old_store
from featstore.store.inspect.entries import recorded
from featstore.store.moments.stored import SPLITS, SitePair, StoredMoments, all_blocks, has_rows
from featstore.store.read.columns import pieces
from featstore.store.read.contents import pair_problems
from featstore.store.read.links import links_of, outside_damage
from featstore.store.read.pairs import POLICIES
from featstore.store.read.portable import store_files
from featstore.store.read.recorded import MOST_LINES, Records, announced_problems, size_problems
from featstore.store.read.store import Store, open_files
from featstore.store.read.tables import TableReader
from featstore.store.write.index import SINK_RULE, pair_pieces, pairs_unit, sink_pieces
from featstore.store.write.table import table_unit
from featstore.store.write.writer import StoreWriter
from featstore.text.roles import roles_at

#: Rows that are compared with moments at a time.
_STEP = 4096
#: Decoded rows of a layer at a time, and their bytes: wide rows come in thousands, narrow ones in tens of thousands.
_ROWS, _ROWS_BYTES = 1 << 16, 1 << 26
#: Share of its norm by which a product of stored sums with a random vector may differ from that of the rows.
_PRODUCT = 1e-5
#: Bytes of a file that are read at a time.
_PIECE = 1 << 22
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
        store = _announced(open_files(store_files(path)))
        records, damage = recorded(store)
    except CorruptDataError as error:
        return {"store": str(path), "files": 0, "bytes": 0, "damage": [str(error)], "not_checked": [], "links": []}
    damage += _check_files(store, records, quiet=quiet)
    damage += _check_documents(store, records)
    if not damage:
        damage = list(_check_copies(store))
    not_checked: list[str] = []
    if not damage:
        # Contents are only worth reading once the bytes are known to be right.
        # Several checks read the same arrays, which say so each time.
        damage = list(dict.fromkeys(_check_contents(store, quiet=quiet)))
        not_checked = list(_without_rows(store))
    links = links_of(store)
    if not allow_links:
        damage += outside_damage(links)
    return {
        "store": str(path),
        "files": len(records),
        "bytes": sum(record["bytes"] for _, record in records.items()),
        "damage": damage
        if len(damage) <= MOST_LINES
        else [*damage[:MOST_LINES], f"and {len(damage) - MOST_LINES} more"],
        "not_checked": not_checked,
        "links": [link.to_dict() for link in links],
    }


def _announced(store: Store) -> Store:
    """A store, once an older version has been announced as :func:`open_store` does; nothing of it is checked yet."""
    if store.version < FORMAT_VERSION:
        warnings.warn(old_store(store.path, store.version), OldStoreWarning, stacklevel=3)
    return store


# Bytes --------------------------------------------------------------------------------------------------------------


def _check_files(store: Store, records: Records, *, quiet: bool) -> list[str]:
    """Sizes first, and checksums of files of the right size, a piece at a time."""
    damage = list(size_problems(records, store.files.size))
    wrong = {line.partition(":")[0] for line in damage}
    total = sum(record["bytes"] for name, record in records.items() if name not in wrong)
    with progress("verify", total, "B", quiet=quiet) as tick:
        for name, record in records.items():
            if name not in wrong and _checksum(store.directory / name, tick) != record["crc32"]:
                damage.append(f"{name}: checksum differs from the manifest")
    return damage


def _checksum(path: Path, tick: Tick) -> str:
    """CRC-32 of a file, which may be larger than memory."""
    found = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                found = zlib.crc32(piece, found)
                tick(len(piece))
    except OSError as error:
        return error.strerror or "unreadable"
    return f"{found:08x}"


def _check_documents(store: Store, records: Records) -> Iterator[str]:
    """Every document is what its place asks for, and the manifest names what they announce."""
    try:
        arrays = store.arrays
    except CorruptDataError as error:
        yield str(error)
        return
    yield from announced_problems(arrays, records)


def _check_copies(store: Store) -> Iterator[str]:
    """The root's copies of documents, which other readers believe, are those that the documents' writer makes."""
    root = parse_json(store.files.read("zarr.json") or b"", "zarr.json")
    held = {name: store.document(name) for name in store.groups_and_arrays}
    copies = root.get("consolidated_metadata")
    # Stores of version 1 copied every document.
    if copies is not None and store.version >= FORMAT_VERSION and copies != consolidated(held):
        yield "zarr.json: the consolidated metadata are not copies of the documents"


# Contents -----------------------------------------------------------------------------------------------------------


def _check_contents(store: Store, *, quiet: bool) -> Iterator[str]:
    sites = [(name, k) for name in store.models for k in store.model(name).layers if has_rows(store, name, k)]
    total = sum(store.model(name).rows for name, _ in sites)
    with progress("verify contents", total, "rows", quiet=quiet) as tick:
        checks: list[tuple[str, Callable[[], Iterator[str]]]] = [("corpus", partial(_check_corpus, store))]
        checks += [(name, partial(_check_tokens, store, name)) for name in store.models]
        checks += [(name, partial(_check_layer, store, name, layer, tick)) for name, layer in sites]
        checks += [(name, partial(_check_sinks, store, name)) for name in store.models]
        for first, second in combinations(store.models, 2):
            what = f"pairs of {first} and {second}"
            checks += [(what, partial(_check_pairs, store, first, second, policy)) for policy in POLICIES]
            checks += [(f"moments of {first} and {second}", partial(_check_moments, store, first, second, quiet))]
        for what, check in checks:
            try:
                yield from check()
            except FeatstoreError as error:
                yield _line(error)
            except (IndexError, ValueError) as error:
                yield f"{what}: {error}"


def _line(error: FeatstoreError) -> str:
    """What is wrong; where, the whole command is about."""
    return error.what if isinstance(error, ContradictionError) else str(error)


def _without_rows(store: Store) -> Iterator[str]:
    for name in store.models:
        absent = [k for k in store.model(name).layers if not has_rows(store, name, k)]
        if absent:
            yield f"{name}: layers {', '.join(map(str, absent))} hold moments and no rows"


def _check_corpus(store: Store) -> Iterator[str]:
    """Windows follow each other through every document, and what they cut out is text."""
    corpus = store.corpus
    for window in range(len(corpus.window_document)):
        try:
            corpus.window_text(window)
        except UnicodeDecodeError:
            yield f"corpus: window {window} is not UTF-8"
            return
    yield from _check_messages(store)


def _check_messages(store: Store) -> Iterator[str]:
    """Messages of conversations cover their documents, one window each, and what is beside them is JSON."""
    corpus, length = store.corpus, np.diff(store.corpus.document_start)
    document, start, end = corpus.message_document, corpus.message_start, corpus.message_end
    chats = len(corpus.message_rest_start) > 0
    if chats != (store.root.corpus.form == "messages"):
        yield "corpus: the store does not say truly whether its documents are messages"
    if not chats or not len(document):
        return
    same = np.r_[False, document[1:] == document[:-1]]
    before, last = np.where(same, np.r_[0, end[:-1]], 0), np.r_[~same[1:], True]
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
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            yield f"{name}: number {number} is not what JSON holds"
            return


def _check_tokens(store: Store, name: str) -> Iterator[str]:
    """The token table fits the text, and nothing but whitespace is left unread."""
    table, corpus = store.tokens(name), store.corpus
    messages = (corpus.message_document, corpus.message_role, corpus.message_start, corpus.message_end)
    lengths = corpus.window_end - corpus.window_start
    read, same = np.zeros(len(lengths), np.int64), True
    for at in pieces(len(table.id)):
        window, byte_end, special = table.window[at], table.byte_end[at], table.special[at]
        roles = roles_at(corpus.window_document[window], corpus.window_start[window] + byte_end, *messages)
        same &= np.array_equal(table.role[at], np.where(special, 0, roles))
        ordinary = np.flatnonzero(~special)
        read[window[ordinary]] = byte_end[ordinary]  # the last one of each window stays
    if not same:
        yield f"{name}: the tokens' roles are not those of the messages"
    if len(corpus.message_rest_start):
        return  # what a template trims is unread, and its own token may hold the end of a message
    for number in np.flatnonzero(read < lengths):
        rest = corpus.window_text(int(number)).encode()[read[number] :]
        if rest.decode(errors="replace").strip():
            yield f"{name}: the tokens of window {number} end before its text does"
            return


def _check_layer(store: Store, name: str, layer: int, tick: Tick) -> Iterator[str]:
    """Shapes, finite values and norms of one layer, and the scales that belong to it."""
    model, reader, norms = store.model(name), store.rows(name, layer), store.norms(name, layer)
    where = f"{name}: layer {layer}"
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
    step = max(min(_ROWS, _ROWS_BYTES // (4 * model.width)), 1)
    for start in range(0, model.rows, step):
        values = reader[start : start + step]
        wrong = ~np.isclose(np.linalg.norm(values, axis=1), norms[start : start + step], rtol=1e-3, atol=1e-6)
        tick(len(values))
        if wrong.any():
            row = start + int(np.flatnonzero(wrong)[0])
            yield f"{where}, row {row}: the state is not finite or differs from its norm"
            return


def _check_sinks(store: Store, name: str) -> Iterator[str]:
    """The mask is that of the norms; a conversion keeps the one it found, so there the borderline is wide."""
    if any(not has_rows(store, name, layer) for layer in store.model(name).layers):
        return
    threshold, sink = float(store.root.mask.sink_threshold), store.tokens(name).sink
    rounded = _was_rounded(store.root.converted_from)
    entry = StoreWriter(store.directory).entry(f"models/{name}/sinks") or {}
    # Where the mask was derived when norms alone decided, it is derived anew when the store is next written to.
    by_first = str(entry.get("basis", "")).endswith(SINK_RULE)
    count, first_wrong = 0, 0
    for at, first, (sure, possible) in sink_pieces(
        store, name, threshold * (1 + _ROUNDED * rounded), threshold * (1 - _ROUNDED * rounded)
    ):
        held = sink[at]
        must = sure | first if by_first else sure & (held | ~first)
        wrong = np.flatnonzero((must & ~held) | (held & ~(possible | first)))
        if len(wrong):
            first_wrong = first_wrong if count else at.start + int(wrong[0])
            count += len(wrong)
    if count:
        yield f"{name}: the sink mask is not that of the norms at {count} rows, first at row {first_wrong}"


def _was_rounded(link: ConversionLink | None) -> bool:
    return link is not None and (not link.exact or _was_rounded(link.converted_from))


def _check_pairs(store: Store, first: str, second: str, policy: str) -> Iterator[str]:
    unit = pairs_unit(first, second, policy)
    if not store.has(f"{unit}/row_a"):
        return  # documents have told already whether there must be one
    what = f"pairs of {first} and {second}" + f" ({policy})" * (policy != POLICIES[0])
    columns: tuple[Any, Any] = store.pair_columns(first, second, policy)
    row_a, row_b = columns
    wrong = list(pair_problems(what, row_a, row_b, store.tokens(first), store.tokens(second)))
    if wrong:
        yield from wrong
        return
    at, same = 0, True
    for made_a, made_b in pair_pieces(store, first, second, policy):
        here = slice(at, at + len(made_a))
        same = same and np.array_equal(row_a[here], made_a) and np.array_equal(row_b[here], made_b)
        at = here.stop
    if not same or at != len(row_a):
        yield f"{what}: they are not all those, and only those, that the tokens make"
    # Refuses an index of which something else is recorded.
    store.pairs(first, second, policy)


def _check_moments(store: Store, first: str, second: str, quiet: bool) -> Iterator[str]:
    """Stored sums that are still of the pairs and origins are over as many, finite, and agree with each other and rows.

    A product of sums is compared with the rows by a random vector: X'(Y v) takes a pass over the rows and no product of
    widths, and differs from (X'Y) v wherever one element does.
    """
    stored = StoredMoments(store, first, second)
    for split in range(len(SPLITS)):
        held = [block for block in all_blocks(store, stored.models) if stored.holds(split, block)]
        wrong: set[SitePair] = set()
        for block in held:
            try:
                stored.block(block, split)
            except CorruptDataError as error:
                wrong.add(block)
                yield _line(error)
        whole = [block for block in held if block not in wrong and all(has_rows(store, *site) for site in block)]
        if whole:
            yield from _check_products(store, stored, split, whole, quiet=quiet)


def _check_products(
    store: Store, stored: StoredMoments, split: int, blocks: list[SitePair], *, quiet: bool
) -> Iterator[str]:
    """Products of stored sums with random vectors are those of the rows."""
    sites = dict.fromkeys(site for block in blocks for site in block)
    rng = np.random.default_rng(split)
    vector = {site: rng.standard_normal(store.model(site[0]).width) for site in sites}
    origin = {site: store.origin(*site) for site in sites}
    found = {block: np.zeros(store.model(block[0][0]).width) for block in blocks}
    squares = {site: np.zeros(store.model(site[0]).width) for site in sites}
    part = stored.pairs.where(stored.pairs.split == split)
    numbers = {part.source: part.row_source, part.target: part.row_target}
    with progress(f"verify {SPLITS[split]} moments", len(part), "pairs", quiet=quiet) as tick:
        for start in range(0, len(part), _STEP):
            cut = slice(start, start + _STEP)
            along = {}
            for site in sites:
                rows = store.rows(*site)[numbers[site[0]][cut]] - origin[site]
                squares[site] += np.einsum("ij,ij->j", rows, rows)
                along[site] = rows @ vector[site]
            for site in sites:
                # Read once more, so that the rows of one layer at a time are in memory.
                rows = store.rows(*site)[numbers[site[0]][cut]] - origin[site]
                for block in blocks:
                    if block[0] == site:
                        found[block] += rows.T @ along[block[1]]
            tick(min(_STEP, len(part) - start))
    for x, y in blocks:
        # What elements may be off by, each of its own sign: some of rounding, of float32 products and of 24 bits.
        scale = np.sqrt(squares[x]) * np.sqrt(squares[y] @ vector[y] ** 2)
        off = np.abs(stored.block((x, y), split).product @ vector[y] - found[x, y])
        if (off > _PRODUCT * scale + 1e-12).any():
            names = " and ".join(f"{model} {layer}" for model, layer in (x, y))
            yield f"moments of {names} ({SPLITS[split]}): they are not the sums of the rows"
