"""Moments into a store: what an extraction summed while it went, the rest from its rows, packed block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError, StoreStateError
from featstore.runtime.console import Tick, progress
from featstore.runtime.processes import Ranks
from featstore.runtime.provenance import digest
from featstore.store.format.packed import most_bytes, pack, packed_document
from featstore.store.format.version import PACKED
from featstore.store.moments.pieces import PieceSums, Sums, piece_rows
from featstore.store.moments.stored import (
    CUT_ROWS,
    MEMORY,
    SPLITS,
    Site,
    SitePair,
    StoredMoments,
    all_blocks,
    has_rows,
    unit_of,
)
from featstore.store.moments.sums import Rows
from featstore.store.read.pairs import Pairs
from featstore.store.read.portable import store_files
from featstore.store.read.store import Store, open_files
from featstore.store.write.space import check_space
from featstore.store.write.writer import StoreWriter, adding_to

#: Where totals lie while they are being summed, below the store; gone once they are stored.
ASIDE = ".sums"


def missing_blocks(writer: StoreWriter, stored: StoredMoments, split: int) -> list[SitePair]:
    """The blocks of a split that have to be summed: not there, or of other rows.

    Args:
        writer: The store's writer.
        stored: Of the two models.
        split: 0 train, 1 validation, 2 test.
    """
    return [
        block
        for block in all_blocks(stored.store, stored.models)
        if (writer.entry(unit_of(stored.models, split, block)) or {}).get("basis") != stored.basis(split, block)
    ]


def pieces_of(store: Store, second: str) -> tuple[int, int]:
    """How many pieces the pairs of two models have, and rows of a piece.

    Args:
        store: Any store.
        second: The model later in store order.
    """
    model = store.model(second)
    rows = piece_rows(int(model.attributes.get("shard_rows") or model.rows))
    return -(-model.rows // rows), rows


def sums_aside(
    writer: StoreWriter,
    models: tuple[str, str],
    wanted: Mapping[int, list[SitePair]],
    memory: int,
    ranks: Ranks | None = None,
) -> PieceSums:
    """Totals of some blocks, with what lies aside of the same pairs.

    Args:
        writer: The store's writer; tokens and pilots of both models are committed.
        models: In store order.
        wanted: Blocks by split.
        memory: Bytes to use at most.
        ranks: This process among several.

    Raises:
        SpecError: Too little memory.
    """
    store, ranks = writer.view, ranks or Ranks()
    # All that decides which pairs there are, which of them are sinks, and how they are cut.
    parts: list[Any] = [store.attributes["corpus"].get("sha256"), store.attributes["mask"], CUT_ROWS]
    for name in models:
        held = store.model(name)
        parts += [held.attributes.get("tokens_sha256"), list(held.layers), store.median_norms(name)]
    count, rows = pieces_of(store, models[1])
    folder = f"{ASIDE}/{'__'.join(models)}/{digest([*parts, rows])[:16]}"
    writer.check(folder)
    return PieceSums(writer.path / folder, f"{ranks.rank}-{ranks.world}", store, wanted, count, memory, rows)


class StoredRows:
    """The rows of a store's pairs, piece by piece.

    Args:
        store: With the rows.
        pairs: Of its two models, without sinks, the second model as target.
        rows: Of a piece.
    """

    def __init__(self, store: Store, pairs: Pairs, rows: int) -> None:
        self._store, self._rows = store, rows
        self._parts = [pairs.where(pairs.split == split) for split in range(len(SPLITS))]

    def numbers(self, piece: int, split: int) -> Mapping[str, NDArray[np.int64]]:
        """As :class:`featstore.store.moments.pieces.PairedRows`."""
        part = self._parts[split]
        first, end = np.searchsorted(part.row_target, [piece * self._rows, (piece + 1) * self._rows])
        return {part.source: part.row_source[first:end], part.target: part.row_target[first:end]}

    def rows(self, site: Site, numbers: NDArray[np.int64]) -> Rows:
        """As :class:`featstore.store.moments.pieces.PairedRows`."""
        return self._store.rows(*site)[numbers]


def write_moments(
    writer: StoreWriter,
    first: str,
    second: str,
    *,
    memory: int = MEMORY,
    quiet: bool = False,
) -> int:
    """Store the blocks of two models that are missing: from sums that lie aside, and the rest from rows.

    Args:
        writer: The store's writer; pair index and sink masks of both models are committed.
        first: Model earlier in store order.
        second: The other.
        memory: Bytes to use at most; totals that have no room lie in files below the store meanwhile.
        quiet: No progress.

    Returns:
        Blocks written.

    Raises:
        StoreStateError: A layer's rows are needed and not there.
        SpecError: Too little memory for a single block.
        NoSpaceError: The disk cannot hold them.
    """
    store = writer.view
    stored = StoredMoments(store, first, second)
    wanted = {split: missing_blocks(writer, stored, split) for split in range(len(SPLITS))}
    blocks = [(split, block) for split in wanted for block in wanted[split]]
    if not blocks:
        return 0
    needed = sum(most_bytes((store.model(x[0]).width, store.model(y[0]).width), x == y) for _, (x, y) in blocks)
    check_space(writer.path, needed, "free some, or store fewer layers")
    total = sum(stored.counts[split] for split in wanted if wanted[split])
    with progress(f"moments {first} {second}", total, "pairs", quiet=quiet) as tick:
        # Splits one after the other: they have no row in common, and the totals of one are a third of all.
        for split, own in wanted.items():
            sums = _summed(writer, stored, split, own, memory, Ranks(), tick)
            for block in own:
                found = sums.merged(split, block)
                if found.totals[0] != stored.counts[split]:
                    writer.remove(ASIDE)
                    raise CorruptDataError(
                        f"{writer.path}/{ASIDE} held sums over {found.totals[0]:.0f} {SPLITS[split]} pairs of {first} "
                        f"and {second}, not {stored.counts[split]}; it was removed, run the same command again"
                    )
                _commit(writer, stored, split, block, found)
    writer.remove(f"{ASIDE}/{first}__{second}")
    return len(blocks)


def sum_share(writer: StoreWriter, first: str, second: str, ranks: Ranks, *, memory: int = MEMORY) -> None:
    """Sum this process's share of what :func:`write_moments` will need, and leave it aside.

    Args:
        writer: As there; nothing is committed.
        first: Model earlier in store order.
        second: The other.
        ranks: This process among several.
        memory: Bytes to use at most.

    Raises:
        StoreStateError: A layer's rows are needed and not there.
        SpecError: Too little memory.
    """
    stored = StoredMoments(writer.view, first, second)
    for split in range(len(SPLITS)):
        blocks = missing_blocks(writer, stored, split)
        _summed(writer, stored, split, blocks, memory, ranks, lambda _: None).flush()


def _summed(
    writer: StoreWriter,
    stored: StoredMoments,
    split: int,
    blocks: list[SitePair],
    memory: int,
    ranks: Ranks,
    tick: Tick,
) -> PieceSums:
    """Sums of a split's blocks, with what this process's share of the pieces lacked."""
    store, second = writer.view, stored.models[1]
    sums = sums_aside(writer, stored.models, {split: blocks}, memory, ranks)
    count, rows = pieces_of(store, second)
    source = StoredRows(store, stored.pairs, rows)
    share = ranks.share(count)
    sizes = {piece: len(source.numbers(piece, split)[second]) for piece in (range(count) if share is None else share)}
    lacking = [piece for piece, size in sizes.items() if size and sums.missing(piece)]
    tick(sum(size for piece, size in sizes.items() if piece not in set(lacking)))
    if lacking:
        _need_rows(store, blocks)
        check_space(writer.path, sums.aside, "free some, or allow more --memory")
    for piece in lacking:
        sums.add(piece, source)
        tick(sizes[piece])
    return sums


def _need_rows(store: Store, blocks: list[SitePair]) -> None:
    for model, layer in sorted({site for block in blocks for site in block}):
        if not has_rows(store, model, layer):
            raise StoreStateError(
                f"{store.path} lacks moments of layer {layer} of {model!r} and holds no rows to sum; "
                "extract with --moments-only again"
            )


def _commit(writer: StoreWriter, stored: StoredMoments, split: int, block: SitePair, sums: Sums) -> None:
    """Write a block as a unit."""
    unit, own = unit_of(stored.models, split, block), block[0] == block[1]
    x, y = sums.x.copy(), sums.y.copy()
    if own:
        # The products of a diagonal are float32, the sums of squares float64.
        np.fill_diagonal(sums.product, x[2])
    x[2], y[2] = np.sqrt(x[2]), np.sqrt(y[2])
    # An outdated block stops counting before its first file changes.
    writer.drop(unit)
    writer.remove(f"{unit}/product")  # of a version before
    for above in _groups_above(unit):
        writer.group(above, {})
    product = f"{unit}/{PACKED}"
    writer.describe({product: packed_document(sums.product.shape)})
    writer.vectors(
        unit,
        {f"{unit}/x": x, f"{unit}/y": y, f"{unit}/totals": sums.totals},
        more={f"{product}/c/0/0": pack(sums.product, (x[2], y[2]), half=own)},
        basis=stored.basis(split, block),
    )


def _groups_above(unit: str) -> Iterator[str]:
    parts = unit.split("/")
    for depth in range(1, len(parts) + 1):
        yield "/".join(parts[:depth])


def add_moments(path: Path, *, memory: int = MEMORY, quiet: bool = False) -> dict[str, Any]:
    """Add the moments of every two models to a complete store; those that are there and still right stay.

    Args:
        path: The store.
        memory: Bytes to use at most.
        quiet: No progress.

    Returns:
        ``{"moments": {"a__b": {"blocks": count, "written": count, "bytes": size}}}``, the size of all their files.

    Raises:
        FeatstoreError: No such store, rows or disk space, or another process is writing.
    """
    ranks = Ranks.from_environment()
    if not ranks.first:
        _sum_all(StoreWriter(path, open_files(store_files(path))), memory, ranks)
        return {"moments": {}}
    found = {}
    with adding_to(path) as writer:
        store = writer.view
        if len(store.models) < 2:
            raise StoreStateError(
                f"{path} holds one model, {store.models[0]!r}; moments are of pairs: add another model"
            )
        if ranks.world > 1:
            _sum_all(writer, memory, ranks)
        for models in combinations(store.models, 2):
            written = write_moments(writer, *models, memory=memory, quiet=quiet)
            units = [
                unit_of((models[0], models[1]), split, block)
                for split in range(len(SPLITS))
                for block in all_blocks(store, (models[0], models[1]))
            ]
            size = sum(record["bytes"] for unit in units for record in (writer.entry(unit) or {})["files"].values())
            found["__".join(models)] = {"blocks": len(units), "written": written, "bytes": size}
        writer.remove(ASIDE)
        writer.seal(writer.attributes() or {})
    return {"moments": found}


def _sum_all(writer: StoreWriter, memory: int, ranks: Ranks) -> None:
    """This process's share of every two models; returns when all have done theirs."""
    for first, second in combinations(writer.view.models, 2):
        sum_share(writer, first, second, ranks, memory=memory)
    ranks.wait()
