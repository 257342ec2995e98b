"""Partial R2: what a map explains of the target's states beyond what the source's current token explains."""

from __future__ import annotations

from typing import Any

import numpy as np

from align.metrics.documents import DocumentSums
from align.metrics.rows import ROUNDING
from align.moments.scatter import Array
from align.statistics import ratio

#: The baseline that predicts from the token alone.
TOKEN = "token"  # noqa: S105 - a word of a text
EXPLAINED = "the token alone leaves no error"


def partial_r2(sse: Array, sse_token: Array, sst: Array) -> tuple[float | None, tuple[float, float] | None, str | None]:
    """``1 - SSE(map) / SSE(token)`` and its 95 % interval over documents.

    Args:
        sse: float64 ``(documents,)`` squared errors of the map.
        sse_token: Those of the prediction from the token alone.
        sst: Squared distances from the train mean, against which an error counts as none.

    Returns:
        Value, interval, and why the first that is None is None.
    """
    if not np.isfinite([sse.sum(), sse_token.sum(), sst.sum()]).all():
        return None, None, "a true or predicted state is not finite"
    if not sse_token.sum() > ROUNDING * sst.sum():
        return None, None, EXPLAINED
    found = -ratio(sse, sse_token)
    estimate = found.plus(1.0).estimate()
    return estimate.value, estimate.interval, estimate.reason


def add_partial(entry: dict[str, Any], sums: DocumentSums | str) -> None:
    """Put ``partial_r2`` and its interval beside every R2 of the test split, or null and the reason for it.

    Args:
        entry: A layer pair's entry of ``metrics.json`` with ``test``, ``baselines`` (:data:`TOKEN` among them) and
            ``reasons``; changed in place.
        sums: Of the test rows, the run's own map under the name ``map`` and baselines under theirs; or the reason why
            there are none.
    """
    places = {"map": ("test", entry["test"])}
    places |= {name: (f"baselines.{name}", figures) for name, figures in entry["baselines"].items()}
    reasons = entry["reasons"]
    for name, (place, figures) in places.items():
        if figures is None:
            continue
        value, interval, reason = None, None, None
        if isinstance(sums, str):
            reason = sums
        elif TOKEN not in sums.sse:
            reason = reasons.get(f"baselines.{TOKEN}", "there is no token baseline")
        elif name not in sums.sse:
            reason = "no sums over documents were made of this map"
        else:
            value, interval, reason = partial_r2(sums.sse[name], sums.sse[TOKEN], sums.sst)
        figures["partial_r2"] = value
        figures["partial_r2_ci95"] = None if interval is None else list(interval)
        for key in ("partial_r2", "partial_r2_ci95"):
            if figures[key] is None and reason is not None:
                reasons[f"{place}.{key}"] = reason
