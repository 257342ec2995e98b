"""The rows that measures over rows see: the same pairs for every layer, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align.moments.places import places
from align.similarity.floors.exchange import Sampled
from align.similarity.floors.strata import by_place
from featstore.errors import NonFiniteStateError, SpecError
from featstore.runtime.console import human_bytes
from featstore.store import Store
from featstore.store.read.pairs import Pairs

Layers = list[NDArray[np.float32]]

#: Rows at most: what is computed from all pairs of rows grows with their square.
MAX_ROWS = 16_384
#: Rows that a sample is never smaller than for lack of memory; below, measures say little.
_LEAST = 256
#: How often the rows of a layer are in memory at a time: as they are, as a control, and as some measure needs them.
_COPIES = 3
_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Sample:
    """Paired rows of two models' layers.

    Attributes:
        xs: float32 ``(n, d)`` of every layer of the first model, about its origin.
        ys: The same of the second model.
        origins: What was taken off, ``(d,)`` a layer, of both models.
        rows: Document, place in it and token of each row.
        of: How many pairs there were to choose from.
        pairs: The chosen ones.
    """

    xs: Layers
    ys: Layers
    origins: tuple[Layers, Layers]
    rows: Sampled
    of: int
    pairs: Pairs

    @property
    def document(self) -> NDArray[np.int64]:
        """int64 ``(n,)``, the document of each row."""
        return self.rows.document

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.document)


def affordable_rows(widths: Sequence[int], max_rows: int, memory: int) -> int:
    """How many rows of layers of these widths a sample may have.

    Args:
        widths: Of all layers together.
        max_rows: More are never taken.
        memory: Bytes for the rows and the copies that controls and measures make of them.

    Raises:
        SpecError: Fewer than four rows are asked for, or the memory does not hold even a small sample.
    """
    if max_rows < 4:
        raise SpecError(f"--max-rows {max_rows}: similarity needs at least 4 rows")
    a_row = _COPIES * 4 * sum(widths)
    fitting = memory // a_row
    if fitting < min(_LEAST, max_rows):
        raise SpecError(
            f"--memory {human_bytes(memory)} holds {fitting} rows of {len(widths)} layers; give at least "
            f"{human_bytes(min(_LEAST, max_rows) * a_row)}, or fewer --layers"
        )
    return min(max_rows, fitting)


def draw(
    store: Store,
    pairs: Pairs,
    layers: tuple[Sequence[int], Sequence[int]],
    *,
    max_rows: int = MAX_ROWS,
    memory: int,
    seed: int = 0,
    tick: Callable[[float], None] = lambda _: None,
) -> Sample:
    """Read a sample of pairs, the same of every layer, and at the same places of documents of similar length.

    Args:
        store: Complete store.
        pairs: To choose from.
        layers: Of the pairs' first and second model. Of one model with itself the second half is the first.
        max_rows: Pairs at most.
        memory: Bytes, as :func:`affordable_rows` takes it.
        seed: Of the choice.
        tick: Called with the number of rows read since the last call, over all layers.

    Raises:
        SpecError: Too few rows are allowed, or they do not fit into memory.
        NonFiniteStateError: A row is not finite; the message names it.
    """
    models = (pairs.source, pairs.target)
    alone = models[0] == models[1]
    held = layers[:1] if alone else layers
    widths = [store.model(model).width for model, ks in zip(models, held, strict=False) for _ in ks]
    origin = origin_of(store, pairs)
    taken_rows = by_place(origin.document, origin.place, affordable_rows(widths, max_rows, memory), seed)
    keep = np.zeros(len(pairs), dtype=bool)
    keep[taken_rows] = True
    chosen = pairs.where(keep)
    rows = Sampled(origin.document[keep], origin.place[keep], origin.token[keep])
    sides: list[Layers] = []
    origins: list[Layers] = []
    for model, ks, numbers in zip(models, held, (chosen.row_source, chosen.row_target), strict=False):
        taken = [store.origin(model, k).astype(np.float32) for k in ks]
        sides.append([read_rows(store, model, k, numbers, o, tick) for k, o in zip(ks, taken, strict=True)])
        origins.append(taken)
    xs, ys = sides[0], sides[-1]
    return Sample(xs, ys, (origins[0], origins[-1]), rows, len(pairs), chosen)


def origin_of(store: Store, pairs: Pairs) -> Sampled:
    """Document, place and source token of every pair.

    Args:
        store: Complete store.
        pairs: Any.
    """
    token = store.tokens(pairs.source).id[pairs.row_source].astype(np.int64)
    return Sampled(pairs.document.astype(np.int64), places(store, pairs), token)


def read_rows(
    store: Store,
    model: str,
    layer: int,
    numbers: NDArray[np.integer],
    origin: NDArray[np.float32],
    tick: Callable[[float], None] = lambda _: None,
) -> NDArray[np.float32]:
    """Rows of a layer about an origin.

    Args:
        store: Complete store.
        model: Its name.
        layer: Which.
        numbers: Row numbers, ascending.
        origin: ``(d,)``.
        tick: Called with the number of rows read since the last call.

    Raises:
        NonFiniteStateError: A row is not finite.
    """
    reader = store.rows(model, layer)
    found = np.empty((len(numbers), len(origin)), dtype=np.float32)
    for start in range(0, len(numbers), _BLOCK):
        part = slice(start, start + _BLOCK)
        np.subtract(reader[numbers[part]], origin, out=found[part])
        if not np.isfinite(found[part]).all():
            bad = int(np.flatnonzero(~np.isfinite(found[part]).all(axis=1))[0]) + start
            raise NonFiniteStateError(
                f"row {int(numbers[bad])} of layer {layer} of {model!r} is not finite; check with `featstore verify "
                f"{store.path}`"
            )
        tick(len(found[part]))
    return found
