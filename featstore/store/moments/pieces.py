"""Sums over pieces of the pairs: by any number of processes, in any order, killed or not, to the same bits.

The pairs of two models are cut into *pieces* by the rows of the second one, along its shards, and each split of a
piece every :data:`featstore.store.moments.stored.CUT_ROWS` pairs. Which cuts there are follows from the store alone.
What a cut sums to is rounded to multiples of a power of two that follows from the layers' median norms, :data:`GRAIN`
of an ordinary element: float64 adds such numbers without rounding (up to some 8 million pairs for elements as large as
the diagonal, many more for others; beyond, to 1e-16), so the order in which pieces are added does not touch the bits.

Totals of some blocks stay in memory, as many as are allowed; the others lie in files aside, a file for every block,
split and process, which is replaced once a piece has been added to it. Each file says which pieces it holds, so that a
process that was killed loses the piece it was at, and, of the totals in memory, what it added since the last
:data:`FLUSH` seconds.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.errors import FitError, SpecError
from featstore.runtime.console import human_bytes
from featstore.runtime.writing import replacing_by_name
from featstore.store.moments.stored import CUT_ROWS, Site, SitePair
from featstore.store.moments.sums import Rows, about, product_threads
from featstore.store.read.store import Store

#: Rows of the second model in a piece, at most.
PIECE_ROWS = 16_384
#: Seconds after which totals in memory are written aside.
FLUSH = 300.0
#: What sums of products of a cut are rounded to, relative to an ordinary product of two elements.
GRAIN = 2.0**-30
#: The same of sums that squared norms take part in, and of sums of rows.
_FINE = 2.0**-26
#: Beyond, float32 has no such powers of two to round to.
_SMALLEST = 2.0**-80

Floats = NDArray[np.float64]
#: A split and two sites.
Key = tuple[int, SitePair]


class PairedRows(Protocol):
    """Where paired rows come from."""

    def numbers(self, piece: int, split: int) -> Mapping[str, NDArray[np.int64]]:
        """Row numbers by model of a piece's pairs in a split, in document order and without sinks."""

    def rows(self, site: Site, numbers: NDArray[np.int64]) -> Rows:
        """Rows of a layer by number, ascending, as they are stored."""


@dataclass(eq=False)
class Sums:
    """What the pairs of some pieces sum to.

    Attributes:
        product: float64 ``(dx, dy)``.
        x: float64 ``(3, dx)``: the sum of x, X'b, and the sum of squares.
        y: float64 ``(3, dy)``: the sum of y, Y'a, and the sum of squares.
        totals: float64 ``(4,)``: pairs, and the sums of a_i, of b_i and of a_i b_i.
        pieces: bool, by piece, which these are.
    """

    product: Floats
    x: Floats
    y: Floats
    totals: Floats
    pieces: NDArray[np.bool_]

    @classmethod
    def zeros(cls, widths: tuple[int, int], pieces: int) -> Sums:
        """Of no pairs.

        Args:
            widths: Of both sides.
            pieces: How many there are in all.
        """
        dx, dy = widths
        vectors = (np.zeros((3, dx)), np.zeros((3, dy)), np.zeros(4))
        return cls(np.zeros((dx, dy)), *vectors, np.zeros(pieces, dtype=bool))

    def add(self, other: Sums) -> None:
        """Add sums of other pieces.

        Args:
            other: Of the same sites.
        """
        self.product += other.product
        self.x += other.x
        self.y += other.y
        self.totals += other.totals
        self.pieces |= other.pieces


def piece_rows(shard_rows: int) -> int:
    """Rows of the second model in a piece: a shard's, or a part of a longer shard.

    Args:
        shard_rows: Of the second model.
    """
    parts = -(-shard_rows // PIECE_ROWS)
    while shard_rows % parts:
        parts += 1
    return shard_rows // parts


def grain_unit(median_norm: float, width: int) -> float:
    """The power of two nearest to the size of an ordinary element of a layer.

    Args:
        median_norm: Of its rows.
        width: Of its rows.
    """
    size = median_norm / np.sqrt(width)
    return float(2.0 ** np.round(np.log2(size))) if np.isfinite(size) and size > 0 else 1.0


def least_memory(widths: Sequence[int], rows: int) -> tuple[int, int]:
    """Bytes that summing pieces takes at least.

    Args:
        widths: Of every layer of the blocks.
        rows: Of a piece.

    Returns:
        What is needed once (the rows of a piece about the origin, those of a layer as they were read, a total on its
        way to the disk), and by each thread (a total and a product).
    """
    block = 8 * max(widths) ** 2
    return 4 * rows * (sum(widths) + 2 * max(widths)) + block, 3 * block // 2


class PieceSums:
    """Totals of the blocks of two models, and those that processes before, or beside, have written aside.

    Args:
        folder: Where totals lie aside; made. It is of one set of pairs and origins.
        owner: Name of this process among those that share the work.
        store: With the origins and median norms of both models.
        wanted: Blocks to be summed, by split.
        pieces: How many pieces there are.
        memory: Bytes to use at most.
        rows: Of a piece, at most.

    Raises:
        SpecError: That is too little.
    """

    def __init__(
        self,
        folder: Path,
        owner: str,
        store: Store,
        wanted: Mapping[int, Sequence[SitePair]],
        pieces: int,
        memory: int,
        rows: int,
    ) -> None:
        self.folder, self.owner, self.pieces = folder, owner, pieces
        self.wanted = {split: list(blocks) for split, blocks in wanted.items()}
        self.keys: list[Key] = [(split, block) for split, blocks in self.wanted.items() for block in blocks]
        sites = dict.fromkeys(site for _, block in self.keys for site in block)
        self._width = {site: store.model(site[0]).width for site in sites}
        self._origin = {site: store.origin(*site) for site in sites}
        self._unit = {
            (model, layer): grain_unit(store.median_norms(model)[str(layer)], self._width[model, layer])
            for model, layer in sites
        }
        self._threads, resident = self._fit(memory, rows)
        self._resident: dict[Key, Sums] = {}
        self._stays = set(resident)
        self._flushed = time.monotonic()
        self._done: dict[Key, NDArray[np.bool_]] = {}
        for key in self.keys:
            covered = np.zeros(pieces, dtype=bool)
            for path in self._files(key):
                covered |= _pieces_in(path, pieces)
            self._done[key] = covered

    def _fit(self, memory: int, rows: int) -> tuple[int, list[Key]]:
        """Threads that have room, and the totals that have."""
        if not self.keys:
            return 1, []
        sizes = {key: 8 * self._width[key[1][0]] * self._width[key[1][1]] for key in self.keys}
        fixed, each = least_memory(list(self._width.values()), rows)
        if fixed + each > memory:
            raise SpecError(
                f"--moments-memory {human_bytes(memory)} is too little: one block and the rows of a piece take "
                f"{human_bytes(fixed + each)}, allow it"
            )
        threads = max(min(product_threads(), (memory - fixed) // each), 1)
        room, found = memory - fixed - threads * each, []
        for key, size in sizes.items():
            if size > room:
                break
            room -= size
            found.append(key)
        return threads, found

    @property
    def aside(self) -> int:
        """Bytes of the totals that do not stay in memory."""
        return sum(
            8 * self._width[x] * self._width[y] for split, (x, y) in self.keys if (split, (x, y)) not in self._stays
        )

    def missing(self, piece: int) -> bool:
        """Whether a block lacks a piece.

        Args:
            piece: Its number.
        """
        return any(not self._done[key][piece] for key in self.keys)

    def add(self, piece: int, source: PairedRows) -> int:
        """Add a piece to every block that lacks it.

        Args:
            piece: Its number.
            source: Of its rows.

        Returns:
            Pairs times blocks.

        Raises:
            FitError: A row is not finite.
        """
        count = 0
        for split, blocks in self.wanted.items():
            lacking = [block for block in blocks if not self._done[split, block][piece]]
            if not lacking:
                continue
            numbers = source.numbers(piece, split)
            pairs = len(next(iter(numbers.values())))
            if pairs:
                self._add(piece, split, lacking, source, numbers)
            for block in lacking:
                self._done[split, block][piece] = True
                if not pairs and (split, block) in self._stays:
                    self._total((split, block)).pieces[piece] = True
            count += pairs * len(lacking)
        if time.monotonic() - self._flushed > FLUSH:
            self.flush()
        return count

    def _add(
        self,
        piece: int,
        split: int,
        blocks: Sequence[SitePair],
        source: PairedRows,
        numbers: Mapping[str, NDArray[np.int64]],
    ) -> None:
        from threadpoolctl import threadpool_limits

        cuts: dict[Site, list[_Cut]] = {}
        for site in dict.fromkeys(site for block in blocks for site in block):
            rows = about(source.rows(site, numbers[site[0]]), self._origin[site], np.float32)
            cuts[site] = [_Cut.of(rows[at : at + CUT_ROWS], site, at) for at in range(0, len(rows), CUT_ROWS)]
        # A product on one thread has the same bits on every machine; several run side by side.
        with threadpool_limits(1), ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(partial(self._add_block, piece, split, cuts), blocks):
                pass

    def _add_block(self, piece: int, split: int, cuts: Mapping[Site, list[_Cut]], block: SitePair) -> None:
        total = self._total((split, block))
        ux, uy = (self._unit[site] for site in block)
        dx, dy = (self._width[site] for site in block)
        for x, y in zip(cuts[block[0]], cuts[block[1]], strict=True):
            product = x.rows.T @ y.rows
            grain = ux * uy * GRAIN
            if _SMALLEST < grain < 1 / _SMALLEST:
                # Powers of two, so that only the rounding rounds.
                product *= 1 / grain
                np.rint(product, out=product)
                product *= grain
            total.product += product
            of = ux * uy * _FINE
            total.x += _snapped(
                [x.sum, np.einsum("ij,i->j", x.rows, y.norms, dtype=np.float64), x.squares],
                [ux * GRAIN, of * uy * dy, ux * ux * _FINE],
            )
            total.y += _snapped(
                [y.sum, np.einsum("ij,i->j", y.rows, x.norms, dtype=np.float64), y.squares],
                [uy * GRAIN, of * ux * dx, uy * uy * _FINE],
            )
            a, b = x.norms, y.norms
            scalars = np.array([len(a), a.sum(), b.sum(), (a * b).sum()])
            quanta = np.array([1.0, ux * ux * _FINE * dx, uy * uy * _FINE * dy, of * ux * uy * dx * dy])
            total.totals += np.rint(scalars / _power(quanta)) * _power(quanta)
        total.pieces[piece] = True
        if (split, block) not in self._stays:
            self._write((split, block), total)

    def _total(self, key: Key) -> Sums:
        """What this process has added to a block so far."""
        if key in self._resident:
            return self._resident[key]
        path = self._path(key, self.owner)
        widths = (self._width[key[1][0]], self._width[key[1][1]])
        total = _read(path, self.pieces) if path.is_file() else None
        total = Sums.zeros(widths, self.pieces) if total is None else total
        if key in self._stays:
            self._resident[key] = total
        return total

    def flush(self) -> None:
        """Write aside the totals that are in memory."""
        for key, total in self._resident.items():
            self._write(key, total)
        self._flushed = time.monotonic()

    def merged(self, split: int, block: SitePair) -> Sums:
        """The totals of a block, of all processes; those of this one are given up.

        Args:
            split: Its split.
            block: Two sites.
        """
        key = (split, block)
        found = self._resident.pop(key, None)
        for path in self._files(key):
            if found is not None and path == self._path(key, self.owner):
                continue  # older than what is in memory
            more = _read(path, self.pieces)
            if more is None:
                continue
            if found is None:
                found = more
            else:
                found.add(more)
        widths = (self._width[block[0]], self._width[block[1]])
        return Sums.zeros(widths, self.pieces) if found is None else found

    def _folder(self, key: Key) -> Path:
        split, (x, y) = key
        return self.folder / str(split) / f"{x[0]}.{x[1]}__{y[0]}.{y[1]}"

    def _path(self, key: Key, owner: str) -> Path:
        return self._folder(key) / f"{owner}.npz"

    def _files(self, key: Key) -> Iterator[Path]:
        folder = self._folder(key)
        yield from sorted(folder.glob("*.npz")) if folder.is_dir() else ()

    def _write(self, key: Key, total: Sums) -> None:
        path = self._path(key, self.owner)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_by_name(path) as aside, aside.open("wb") as handle:
            np.savez(handle, **vars(total))


@dataclass(frozen=True, eq=False)
class _Cut:
    """Rows of a cut about the origin, float32, and what every block of their layer needs of them, float64."""

    rows: Rows
    norms: Floats
    sum: Floats
    squares: Floats

    @classmethod
    def of(cls, rows: Rows, site: Site, at: int) -> _Cut:
        norms = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        # No product can overflow while every squared norm is below this. Written so that NaN fails it too.
        limit = float(np.finfo(np.float32).max) / CUT_ROWS
        if not norms.max() <= limit:
            bad = at + int(np.flatnonzero(~(norms <= limit))[0])
            raise FitError(
                f"row {bad} of the pairs of a piece holds NaN, infinity or a value too large to square (model "
                f"{site[0]!r}, layer {site[1]})"
                "; extract that layer in bfloat16 or float32, or mask the row"
            )
        squares = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        return cls(rows, norms, rows.sum(axis=0, dtype=np.float64), squares)


def _power(quanta: Floats) -> Floats:
    """The powers of two at or below some numbers."""
    power: Floats = 2.0 ** np.floor(np.log2(quanta))
    return power


def _snapped(vectors: Sequence[Floats], quanta: Sequence[float]) -> Floats:
    """Vectors as multiples of powers of two, stacked."""
    step = _power(np.array(quanta))[:, None]
    snapped: Floats = np.rint(np.stack(vectors) / step) * step
    return snapped


#: What opening half a file can raise.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


def _read(path: Path, pieces: int) -> Sums | None:
    """Sums written aside; None where a crash of the machine left half a file, or pieces were cut otherwise."""
    try:
        with np.load(path) as held:
            found = Sums(**{name: held[name] for name in ("product", "x", "y", "totals", "pieces")})
    except _UNREADABLE:
        return None
    return found if found.pieces.shape == (pieces,) else None


def _pieces_in(path: Path, pieces: int) -> NDArray[np.bool_]:
    """Which pieces a file holds; none of a damaged one, which goes."""
    try:
        with np.load(path) as held:
            found: NDArray[np.bool_] = held["pieces"]
    except _UNREADABLE:
        found = np.zeros(0, dtype=bool)
    if found.shape == (pieces,):
        return found
    path.unlink(missing_ok=True)
    return np.zeros(pieces, dtype=bool)
