"""Closed forms of many layer pairs at once: one thread of a core for each, because LAPACK hardly gains from several.

Measured on two cores: the SVD of a 256 x 256 matrix takes 14 ms on one thread and 18 on two, of 1024 x 1024 577 and
438. Two systems side by side on a thread each take as long as one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import threadpool_limits

from align.closed_form.fit import Fit, Solver
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.moments.scan import Scan

#: Bytes that the systems solved side by side may take together.
MEMORY = 4 << 30
#: float64 matrices of the larger width that one thread holds: the source's basis and both Grams in it, a product, its
#: factors and LAPACK's work space.
_MATRICES = 12
#: Systems of this width and more are fitted one after the other.
_WIDE = 1024
#: With fewer sources a thread than this, the last ones would leave threads idle.
_FEW = 4


def worth_threads(wanted: Sequence[LayerPair], moments: Mapping[str, Scan], device: str = "cpu") -> bool:
    """Whether layer pairs are better fitted side by side than one after the other on all cores.

    Wide systems fill the cores by themselves, and side by side each of them needs its memory.

    Args:
        wanted: Layer pairs.
        moments: Of each, by key.
        device: Where systems are solved.
    """
    width = max((max(moments[pair.key].train.c.shape) for pair in wanted), default=1)
    return device == "cpu" and width < _WIDE and _threads(wanted, moments) > 1


def fit_all(
    fits: Mapping[str, Fit],
    wanted: Sequence[LayerPair],
    moments: Mapping[str, Scan],
    *,
    device: str = "cpu",
    tick: Callable[[float], None] = lambda _: None,
) -> dict[str, dict[str, Aligner]]:
    """Fit several kinds of map to every layer pair.

    What the pairs of one source share is decomposed once (:class:`align.closed_form.fit.Solver`), so a thread takes the
    pairs of a source; all of them where there are many sources, else some, at the price of another decomposition, so
    that no core waits for the last source. On a GPU they follow one another: there a single system fills the machine.

    Args:
        fits: What to fit, by a name of the caller's.
        wanted: Layer pairs.
        moments: Of each, by key.
        device: Where systems are solved, as :class:`align.closed_form.fit.Solver` takes it.
        tick: Called with the number of layer pairs done since the last call, from any thread.

    Returns:
        By key, in the order of ``wanted``, the maps by name.

    Raises:
        FitError: A fit was refused; of several the first in the order of ``wanted``'s sources.
        SpecError: There is no such device.
    """
    sources: dict[tuple[int, ...], list[LayerPair]] = {}
    for pair in wanted:
        sources.setdefault(pair.source_layers, []).append(pair)

    def solve(part: Sequence[LayerPair]) -> dict[str, dict[str, Aligner]]:
        solver, done = Solver(device), {}
        for pair in part:
            done[pair.key] = {name: solver.fit(fit, pair, moments[pair.key]) for name, fit in fits.items()}
            tick(1)
        return done

    threads = _threads(wanted, moments) if device == "cpu" else 1
    if threads <= 1:
        found = [solve(part) for part in sources.values()]
    else:
        pieces = threads if len(sources) < _FEW * threads else 1
        parts = [part for pairs in sources.values() for part in _cut(pairs, pieces)]
        cores = len(os.sched_getaffinity(0))
        with threadpool_limits(max(1, cores // threads)), ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(solve, parts))
    by_key = {key: maps for part in found for key, maps in part.items()}
    return {pair.key: by_key[pair.key] for pair in wanted}


def _cut(pairs: list[LayerPair], pieces: int) -> list[list[LayerPair]]:
    size = -(-len(pairs) // pieces)
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def _threads(wanted: Sequence[LayerPair], moments: Mapping[str, Scan]) -> int:
    width = max((max(moments[pair.key].train.c.shape) for pair in wanted), default=1)
    fitting = MEMORY // (_MATRICES * 8 * width * width)
    return max(1, min(len(os.sched_getaffinity(0)), len(wanted), fitting))
