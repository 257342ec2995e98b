"""Moments kept in a store: what closed-form fits and linear CKA need of it, without a row being read.

``moments/<a>__<b>/<split>/<x>__<y>`` holds one block (:class:`featstore.store.moments.sums.Block`) of two layers of the
pair of models a and b, x and y being ``<model>.<layer>``: sums over the split's pairs of policy ``end`` that no sink
takes part in, about the pilot's origins. There is a block for every two layers, a layer with itself included, so five
layers of two models make 55. Products are stored as 24-bit correlations (:mod:`featstore.store.format.packed`), half of
them where a layer meets itself: at most 3 bytes an element, 48 MiB at width 4096 and 7.6 GB for three splits of 55
blocks, whatever the number of tokens. Everything else is float64. Stores from before hold float64 products.

Each block is a unit of its own, and its manifest entry names its *basis*: a hash of which rows were summed about which
origins. A block whose basis is no longer the store's is as good as missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ContradictionError, CorruptDataError
from featstore.runtime.provenance import digest
from featstore.store.format.packed import ONE, sums_of
from featstore.store.format.version import PACKED
from featstore.store.moments.sums import Block, Moments, assemble
from featstore.store.read.pairs import Pairs
from featstore.store.read.store import Store

#: Splits by their number in a store.
SPLITS = ("train", "val", "test")
#: Pairs of one float32 product. Shorter sums keep more digits, and the rows of a cut have to fit into memory.
CUT_ROWS = 4096
#: Default bound on the memory that summing takes.
MEMORY = 12 << 30
#: How far, in units of the last place, rounding may bring a quotient beyond 1.
_BEYOND = 256

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
        known = block in self._known and self._product(unit) is not None
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
        unit, own = unit_of(self.models, split, ordered), ordered[0] == ordered[1]
        x, y, totals = (self.store.vector(f"{unit}/{name}") for name in ("x", "y", "totals"))
        width = [self.store.model(model).width for model, _ in ordered]
        packed = self._product(unit) == PACKED
        whole = totals.shape == (4,) and 0 <= totals[0] < 2**53
        if not whole or (x.shape, y.shape) != ((2 + packed, width[0]), (2 + packed, width[1])):
            raise CorruptDataError(f"{self.store.path}/{unit} does not fit its layers; make it again")
        if packed:
            if not all(np.isfinite(side[2]).all() and (side[2] >= 0).all() for side in (x, y)):
                raise ContradictionError(
                    self.store.path,
                    f"{unit}: the roots of its sums of squares are no such roots; make the moments again",
                )
            stored = self.store.packed(f"{unit}/{PACKED}", half=own)
            if stored.max(initial=0) > 2 * ONE + _BEYOND:
                raise ContradictionError(
                    self.store.path,
                    f"{unit}: a product is larger than its sums of squares allow; make the moments again",
                )
            product = sums_of(stored, (x[2], y[2]))
        else:
            product = self.store.vector(f"{unit}/product")
        if product.shape != tuple(width):
            raise CorruptDataError(f"{self.store.path}/{unit} does not fit its layers; make it again")
        block = Block(int(totals[0]), product, x[:2], y[:2], totals[1:])
        wrong = next(block_problems(unit, block, self.counts[split], own), None)
        if wrong is not None:
            raise ContradictionError(self.store.path, wrong)
        return block if ordered == wanted else block.swapped

    def _product(self, unit: str) -> str | None:
        """Name of the array that holds a block's product; None for none."""
        return next((name for name in (PACKED, "product") if self.store.has(f"{unit}/{name}")), None)

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
