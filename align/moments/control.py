"""The shuffled control of fits: train moments whose targets come from other documents, at equal places.

What is the same at a place of any document, and what rows of one document share, a map may use without knowing which
text it reads. Shuffled rows take that away along with the pairing; here it stays. Source rows and target rows are the
same as before, so only products between both sides are summed anew, in one pass over the train rows of a layer pair.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from align.layers import LayerPair
from align.moments.places import places
from align.moments.scatter import Moments, end_to_end
from featstore.store import Store
from featstore.store.moments.sums import BlockSums
from featstore.store.read.pairs import Pairs

#: Rows of one read and of one product: of wide states four times as many would take more than the sums.
_CUT = 4096


def next_document(document: NDArray[np.int64], place: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A partner for every row: the row at the same place of the next document, documents in one random circle.

    The next document is the next one that has the place. Places that a single document has are exchanged among
    themselves.

    Args:
        document: int64 ``(n,)``.
        place: int64 ``(n,)``, no two equal within a document.
        rng: Of the circle.

    Returns:
        int64 ``(n,)``, a permutation.
    """
    names, numbers = np.unique(document, return_inverse=True)
    circle = rng.permutation(len(names))[numbers.ravel()]
    order = np.lexsort((circle, place))
    opens = np.flatnonzero(np.diff(place[order], prepend=place[order][:1] - 1))
    sizes = np.diff(np.append(opens, len(order)))
    start, size = np.repeat(opens, sizes), np.repeat(sizes, sizes)
    partner = np.empty(len(order), dtype=np.int64)
    partner[order] = order[start + (np.arange(len(order)) - start + 1) % size]
    alone = np.sort(order[size == 1])
    partner[alone] = np.roll(alone, -(len(alone) // 2) or -1)
    return partner


def exchanged(store: Store, train: Pairs, pair: LayerPair, moments: Moments, seed: tuple[int, ...]) -> Moments:
    """Train moments with the target rows of other documents.

    Args:
        store: Complete store that holds the rows.
        train: The train pairs.
        pair: Which layers.
        moments: Of these pairs and layers.
        seed: Of the exchange.

    Raises:
        LayerRangeError: A layer that the store does not hold.
        FitError: A row that is not finite.
    """
    line = next_document(train.document.astype(np.int64), places(store, train), np.random.default_rng(seed))
    target = train.row_target[line]
    sources = list(pair.source_layers)
    widths = [store.model(pair.source).width] * len(sources)
    origins = {(0, pair.target_layer): moments.origin_y}
    for layer, (start, stop) in zip(sources, pairwise(accumulate(widths, initial=0)), strict=True):
        origins[1, layer] = moments.origin_x[start:stop]
    blocks_wanted = [((1, layer), (0, pair.target_layer)) for layer in sources]
    sums: BlockSums[tuple[int, int]] = BlockSums(origins, blocks_wanted, block_rows=_CUT)
    targets = store.rows(pair.target, pair.target_layer)
    readers = {layer: store.rows(pair.source, layer) for layer in sources}
    for start in range(0, len(train), _CUT):
        cut = slice(start, start + _CUT)
        states = {(0, pair.target_layer): targets[target[cut]]}
        states |= {(1, layer): reader[train.row_source[cut]] for layer, reader in readers.items()}
        sums.add(states)
        for reader in readers.values():
            reader.release()
    # Other documents lie anywhere: each cut goes through all of the target's rows.
    targets.release()
    blocks = sums.blocks()
    cross = end_to_end([blocks[(1, layer), (0, pair.target_layer)] for layer in sources])
    return replace(moments, c=cross.product, d=float(cross.totals[2]), ux=cross.x[1], uy=cross.y[1])
