"""Which rows the pilot looks at: the plan's first windows, without their sinks.

An extraction freezes origins and column scales from them before anything is stored; a conversion to another format
finds the same rows in the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: More tokens would not move medians and means.
PILOT_TOKENS = 4096
#: Rows beyond this multiple of the median norm are sinks to the pilot, whatever ``--sink-threshold`` says later.
_LOUD = 5


def pilot_windows(row_start: NDArray[np.int64], segments: Sequence[int] = ()) -> int:
    """How many of the first windows the pilot reads.

    At most a quarter of the rows of the plan that the store began with: documents added later must not move what the
    rows that are there are measured by.

    Args:
        row_start: int64 ``(windows + 1,)``; window w owns rows ``row_start[w]:row_start[w + 1]``.
        segments: Window counts at which earlier plans of the store ended.
    """
    first_segment = (*segments, len(row_start) - 1)[0]
    budget = min(PILOT_TOKENS, row_start[first_segment] // 4)
    end = int(np.searchsorted(row_start, budget, side="right")) - 1
    return min(max(end, 1), first_segment)


def without_sinks(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """Rows of ordinary norm: sinks would drag the mean, and every scale, far away from where the other rows are.

    Args:
        rows: float32 ``(rows, width)``, the pilot's.

    Returns:
        float32 ``(m, width)``, and the median norm of all rows.
    """
    norms: NDArray[Any] = np.linalg.norm(rows, axis=1)
    median = float(np.median(norms))
    return rows[norms <= _LOUD * median], median


def origin_of(ordinary: NDArray[np.float32], median: float) -> NDArray[np.float32]:
    """The point about which a layer's moments are summed: the mean of the rows of about the median norm.

    Where states lie far from zero, the few that do not (a first token's, say) would draw the mean away from all others,
    and sums of float32 products about such a point lose the others' variance.

    Args:
        ordinary: float32 ``(m, width)``, from :func:`without_sinks`.
        median: The median norm of all rows.

    Returns:
        float32 ``(width,)``.
    """
    near = ordinary[np.linalg.norm(ordinary, axis=1) * _LOUD >= median]
    mean: NDArray[np.float32] = near.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean
