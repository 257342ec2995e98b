"""Moments kept in a store: what closed-form fits and linear CKA need of it, without a row being read.

``moments/<a>__<b>/<split>/<x>__<y>`` holds one block (:class:`featstore.store.moments.sums.Block`) of two layers of the
pair of models a and b, x and y being ``<model>.<layer>``: sums over the split's pairs of policy ``end`` that no sink
takes part in, about the pilot's origins. There is a block for every two layers, a layer with itself included, so five
layers of two models make 55. A block is float64, 8 dx dy bytes: 128 MiB at width 4096, and 22 GB for three splits of 55
blocks, whatever the number of tokens.

Pairs are summed in document order and cut every :data:`CUT_ROWS` pairs. Neither the memory allowed nor which blocks are
summed together touches the bits, so a run that was killed, or that comes after a layer was added, ends with the same
files as one that did all at once. Each block is a unit of its own, and its manifest entry names its *basis*: a hash of
which rows were summed about which origins. A block whose basis is no longer the store's is as good as missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ContradictionError, CorruptDataError, SpecError, StoreStateError
from featstore.runtime.console import Tick, human_bytes, progress
from featstore.runtime.provenance import digest
from featstore.store.moments.sums import Block, BlockSums, Moments, Multiply, assemble, product_threads, steady_products
from featstore.store.read.pairs import Pairs
from featstore.store.read.store import Store
from featstore.store.write.space import check_space
from featstore.store.write.writer import StoreWriter, adding_to

#: Splits by their number in a store.
SPLITS = ("train", "val", "test")
#: Pairs of one float32 product. Shorter sums keep more digits, and the rows of a cut have to fit into memory.
CUT_ROWS = 4096
#: Default bound on memory: 55 blocks of width 4096 take one pass over a split's rows.
MEMORY = 12 << 30

#: One layer of one model.
Site = tuple[str, int]
SitePair = tuple[Site, Site]


def all_blocks(store: Store, models: tuple[str, str]) -> list[SitePair]:
    """Every block of two models: each two of their layers, in store order and each layer with itself too.

    Args:
        store: Any store.
        models: Two models in store order.
    """
    sites = [(name, layer) for name in models for layer in sorted(store.model(name).layers)]
    return list(combinations_with_replacement(sites, 2))


def unit_of(models: tuple[str, str], split: int, block: SitePair) -> str:
    """Name of the unit that holds a block.

    Args:
        models: The two models whose pairs are summed, in store order.
        split: 0 train, 1 validation, 2 test.
        block: Of :func:`all_blocks`.
    """
    names = "__".join(f"{model}.{layer}" for model, layer in block)
    return f"moments/{'__'.join(models)}/{SPLITS[split]}/{names}"


def has_rows(store: Store, model: str, layer: int) -> bool:
    """Whether a store holds the states of a layer, and not their moments alone.

    Args:
        store: Any store.
        model: Model name.
        layer: A layer it lists.
    """
    return store.has_rows(model, layer)


class StoredMoments:
    """The moments a store holds of two models' pairs: policy ``end``, sinks masked.

    Args:
        store: A store with the pair index and the sink masks of both models.
        first: Model name.
        second: Another, in either order; a model paired with itself is another set of rows, of which none are kept.
    """

    def __init__(self, store: Store, first: str, second: str) -> None:
        self.store = store
        ordered = sorted((first, second), key=store.models.index)
        self.models: tuple[str, str] = (ordered[0], ordered[1])
        self._origins: dict[Site, str] = {}
        self._known = set(all_blocks(store, self.models))

    @cached_property
    def pairs(self) -> Pairs:
        """The pairs that are summed, of all splits."""
        return self.store.pairs(*self.models).select()

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Pairs of every split."""
        return tuple(np.bincount(self.pairs.split, minlength=len(SPLITS)).tolist())

    @cached_property
    def _rows(self) -> list[str]:
        parts = [self.pairs.where(self.pairs.split == split) for split in range(len(SPLITS))]
        return [digest([_sha256(part.row_source), _sha256(part.row_target)]) for part in parts]

    def basis(self, split: int, block: SitePair) -> str:
        """What a block must be the sum of, as a hash.

        Args:
            split: 0 train, 1 validation, 2 test.
            block: Of :func:`all_blocks`.
        """
        # Row numbers alone would not tell one text from another with as many tokens.
        text = [self.store.attributes.get("corpus", {}).get("sha256")]
        text += [self.store.model(name).attributes.get("tokens_sha256") for name in self.models]
        for site in block:
            if site not in self._origins:
                self._origins[site] = _sha256(self.store.origin(*site))
        origins = [self._origins[site] for site in block]
        return digest([*text, self._rows[split], *origins, CUT_ROWS])

    def holds(self, split: int, block: SitePair) -> bool:
        """Whether a block is there and still the sum of what it should be.

        Args:
            split: 0 train, 1 validation, 2 test.
            block: Two sites in either order.
        """
        block = self._ordered(block)
        unit = unit_of(self.models, split, block)
        known = block in self._known and self.store.has(f"{unit}/product")
        return known and (self.store.entry(unit) or {}).get("basis") == self.basis(split, block)

    def covers(self, pairs: Iterable[SitePair], splits: Sequence[int] = range(len(SPLITS))) -> bool:
        """Whether :meth:`read` has an answer for each of some pairs of sites.

        Args:
            pairs: Pairs of sites.
            splits: Splits needed.
        """
        needed = {self._ordered(block) for x, y in pairs for block in ((x, y), (x, x), (y, y))}
        return all(self.holds(split, block) for split in splits for block in sorted(needed))

    def read(self, x: Site, y: Site, split: int) -> Moments | None:
        """The moments of two layers, or None where a block they need is missing or outdated.

        Args:
            x: Source site, of either model.
            y: Target site, of either model.
            split: 0 train, 1 validation, 2 test.

        Raises:
            CorruptDataError: A file is damaged.
        """
        if not self.covers([(x, y)], [split]):
            return None
        return assemble(
            self.store.origin(*x),
            self.store.origin(*y),
            self.block((x, y), split),
            self.block((x, x), split),
            self.block((y, y), split),
        )

    def block(self, wanted: SitePair, split: int) -> Block:
        """One block, as it is stored.

        Args:
            wanted: Two sites in either order.
            split: 0 train, 1 validation, 2 test.

        Raises:
            CorruptDataError: A file is damaged, or the sums contradict the pairs or each other.
        """
        ordered = self._ordered(wanted)
        unit = unit_of(self.models, split, ordered)
        product, x, y, totals = (self.store.vector(f"{unit}/{name}") for name in ("product", "x", "y", "totals"))
        width = [self.store.model(model).width for model, _ in ordered]
        whole = totals.shape == (4,) and 0 <= totals[0] < 2**53
        if not whole or (product.shape, x.shape, y.shape) != ((*width,), (2, width[0]), (2, width[1])):
            raise CorruptDataError(f"{self.store.path}/{unit} does not fit its layers; make it again")
        block = Block(int(totals[0]), product, x, y, totals[1:])
        wrong = next(block_problems(unit, block, self.counts[split], ordered[0] == ordered[1]), None)
        if wrong is not None:
            raise ContradictionError(self.store.path, wrong)
        return block if ordered == wanted else block.swapped

    def _ordered(self, block: SitePair) -> SitePair:
        x, y = sorted(block, key=lambda site: (self.store.models.index(site[0]), site[1]))
        return x, y


def block_problems(what: str, block: Block, count: int, own: bool) -> Iterator[str]:
    """Sums over pairs are finite, over as many pairs as there are, and agree with each other.

    Args:
        what: The block, for messages.
        block: As stored.
        count: Pairs of its split.
        own: Whether it is of a layer with itself.
    """
    if block.n != count:
        yield f"{what}: it sums {block.n} pairs, the split has {count}"
        return
    parts = (block.product, block.x, block.y, block.totals)
    if not all(np.isfinite(part).all() for part in parts) or (block.totals < 0).any():
        yield f"{what}: the sums are not finite numbers"
        return
    if own:
        energy = float(np.trace(block.product))
        if not np.isclose(energy, block.totals[0], rtol=1e-4, atol=1e-6) or not np.allclose(
            block.totals[0], block.totals[1], rtol=1e-9
        ):
            yield f"{what}: the trace of its product, {energy:g}, is not the sum of squared norms, {block.totals[0]:g}"


def _sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


# Writing ------------------------------------------------------------------------------------------------------------


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


def memory_needed(store: Store, blocks: Sequence[SitePair]) -> int:
    """Bytes that summing some blocks in one pass takes at most.

    Args:
        store: Any store.
        blocks: Summed together.
    """
    sizes = [store.model(x).width * store.model(y).width for (x, _), (y, _) in blocks]
    width = sum(store.model(model).width for model, _ in {site for block in blocks for site in block})
    products = 4 * max(sizes) * product_threads()
    # The rows of a cut as they were read and about the origin; a total and its copies on the way to the disk.
    return 8 * sum(sizes) + products + 8 * CUT_ROWS * width + 16 * max(sizes)


def groups(store: Store, blocks: Sequence[SitePair], memory: int) -> Iterator[list[SitePair]]:
    """Cut blocks into groups that can each be summed in one pass.

    Args:
        store: Any store.
        blocks: In order.
        memory: Bytes a group may take.

    Raises:
        SpecError: Not even a single block fits.
    """
    group: list[SitePair] = []
    for block in blocks:
        if (least := memory_needed(store, [block])) > memory:
            raise SpecError(
                f"--moments-memory {human_bytes(memory)} is too little: one block takes {human_bytes(least)}, allow it"
            )
        if group and memory_needed(store, [*group, block]) > memory:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def commit_blocks(writer: StoreWriter, stored: StoredMoments, split: int, blocks: Mapping[SitePair, Block]) -> None:
    """Write blocks of a split, each as a unit.

    Args:
        writer: The store's writer.
        stored: Of the two models; says what they are sums of.
        split: 0 train, 1 validation, 2 test.
        blocks: From :meth:`featstore.store.moments.sums.BlockSums.blocks`.

    Raises:
        NoSpaceError: The disk filled up; the blocks written so far stay.
    """
    for block, sums in blocks.items():
        unit = unit_of(stored.models, split, block)
        # An outdated block stops counting before its first file changes.
        writer.drop(unit)
        *above, _ = unit.split("/")
        for depth in range(1, len(above) + 1):
            writer.group("/".join(above[:depth]), {})
        writer.group(unit, {})
        arrays = {
            f"{unit}/product": sums.product,
            f"{unit}/x": sums.x,
            f"{unit}/y": sums.y,
            f"{unit}/totals": np.concatenate([[float(sums.n)], sums.totals]),
        }
        writer.vectors(unit, arrays, basis=stored.basis(split, block))


def write_moments(writer: StoreWriter, first: str, second: str, *, memory: int = MEMORY, quiet: bool = False) -> int:
    """Sum the blocks of two models that a store lacks, from its rows.

    Args:
        writer: The store's writer; pair index and sink masks of both models are committed.
        first: Model earlier in store order.
        second: The other.
        memory: Bytes to use at most; blocks are worked through in groups, each a pass over the rows of its layers.
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
    passes = [
        (split, group)
        for split in range(len(SPLITS))
        for group in groups(store, missing_blocks(writer, stored, split), memory)
    ]
    blocks = [block for _, group in passes for block in group]
    for model, layer in sorted({site for block in blocks for site in block}):
        if not has_rows(store, model, layer):
            raise StoreStateError(
                f"{store.path} lacks moments of layer {layer} of {model!r} and holds no rows to sum; "
                "extract with --moments-only again"
            )
    needed = sum(8 * store.model(x).width * store.model(y).width for (x, _), (y, _) in blocks)
    check_space(writer.path, needed, "free some, or store fewer layers")
    parts = [stored.pairs.where(stored.pairs.split == split) for split in range(len(SPLITS))]
    total = sum(len(parts[split]) * len(group) for split, group in passes)
    with progress(f"moments {first} {second}", total, "pairs x blocks", quiet=quiet) as tick:
        for split, group in passes:
            commit_blocks(writer, stored, split, _sum(store, parts[split], group, tick))
    return len(blocks)


def block_sums(store: Store, blocks: Sequence[SitePair], multiply: Multiply = steady_products) -> BlockSums[Site]:
    """Empty sums of some blocks: feed them a split's pairs in document order, then commit what they hold.

    Args:
        store: Any store with the pilot's origins.
        blocks: Summed together.
        multiply: What makes the products; another than the default gives other last bits.
    """
    origins = {site: store.origin(*site) for block in blocks for site in block}
    return BlockSums(origins, blocks, block_rows=CUT_ROWS, multiply=multiply)


def _sum(store: Store, pairs: Pairs, blocks: Sequence[SitePair], tick: Tick) -> dict[SitePair, Block]:
    """One pass over the pairs of a split."""
    sums = block_sums(store, blocks)
    numbers = {pairs.source: pairs.row_source, pairs.target: pairs.row_target}
    for start in range(0, len(pairs), CUT_ROWS):
        cut = slice(start, min(start + CUT_ROWS, len(pairs)))
        sums.add({site: store.rows(*site)[numbers[site[0]][cut]] for site in sums.nodes})
        tick((cut.stop - cut.start) * len(blocks))
    return sums.blocks()


def add_moments(path: Path, *, memory: int = MEMORY, quiet: bool = False) -> dict[str, Any]:
    """Add the moments of every two models to a complete store; those that are there and still right stay.

    Args:
        path: The store.
        memory: Bytes to use at most.
        quiet: No progress.

    Returns:
        ``{"moments": {"a__b": {"blocks": count, "written": count, "bytes": size}}}``.

    Raises:
        FeatstoreError: No such store, rows or disk space, or another process is writing.
    """
    found = {}
    with adding_to(path) as writer:
        store = writer.view
        if len(store.models) < 2:
            raise StoreStateError(
                f"{path} holds one model, {store.models[0]!r}; moments are of pairs: add another model"
            )
        for first, second in combinations(store.models, 2):
            written = write_moments(writer, first, second, memory=memory, quiet=quiet)
            blocks = all_blocks(store, (first, second))
            size = sum(8 * store.model(x).width * store.model(y).width for (x, _), (y, _) in blocks) * len(SPLITS)
            found[f"{first}__{second}"] = {"blocks": len(blocks) * len(SPLITS), "written": written, "bytes": size}
        writer.seal(writer.attributes() or {})
    return {"moments": found}
