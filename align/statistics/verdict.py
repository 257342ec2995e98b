"""What an interval says of a claim: supported, contradicted, or undecided, and what would decide it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import stdtrit

from align.statistics.linearised import LEVEL, Estimate

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


@dataclass(frozen=True)
class Verdict:
    """What an estimate says of a claimed range.

    Attributes:
        state: ``supported`` where the whole interval lies inside the range, ``contradicted`` where it lies wholly
            outside, ``undecided`` elsewhere.
        documents: Documents of the kind at hand that would decide it if the figure stayed as it is; None where it is
            decided, or where nothing would (the figure lies on the range's edge), or nothing is known of its spread.
    """

    state: str
    documents: int | None


def judge(estimate: Estimate, low: float = -math.inf, high: float = math.inf) -> Verdict:
    """Judge a claim that a figure lies within a range (Schuirmann 1987 for the two-sided case).

    Args:
        estimate: The figure.
        low: The range's lower end.
        high: Its upper end.
    """
    if estimate.low is None or estimate.high is None:
        return Verdict(UNDECIDED, None)
    if low <= estimate.low and estimate.high <= high:
        return Verdict(SUPPORTED, None)
    if estimate.high < low or estimate.low > high:
        return Verdict(CONTRADICTED, None)
    return Verdict(UNDECIDED, _needed(estimate, min(abs(estimate.value - low), abs(estimate.value - high))))


def _needed(estimate: Estimate, room: float) -> int | None:
    """Documents whose interval would reach no further than some room to either side."""
    half = max(estimate.value - (estimate.low or 0.0), (estimate.high or 0.0) - estimate.value)
    if not (room > 0 and math.isfinite(room) and math.isfinite(half) and half > 0 and estimate.freedom > 0):
        return None
    # Half a width is t(freedom) times the spread of one effective document over the root of their number.
    spread = half / float(stdtrit(estimate.freedom, (1 + LEVEL) / 2)) * math.sqrt(estimate.effective)
    size = estimate.documents / estimate.effective
    few, many = estimate.effective, 2 * estimate.effective

    def reach(effective: float) -> float:
        return float(stdtrit(effective - 1, (1 + LEVEL) / 2)) * spread / math.sqrt(effective)

    while reach(many) > room:
        few, many = many, 2 * many
        if many > 1e9:
            return None
    while many - few > 0.5:
        middle = (few + many) / 2
        few, many = (middle, many) if reach(middle) > room else (few, middle)
    return math.ceil(many * size)
