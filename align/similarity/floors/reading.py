"""A floor as ``cka.json`` has it, in the few figures that a sentence needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.judging.table import limit
from align.statistics import SIGNIFICANT

#: What is exchanged, as tables and sentences name it.
NAMES = {"documents": "documents exchanged", "token": "same token elsewhere"}


@dataclass(frozen=True)
class Reading:
    """A floor in a few figures.

    Attributes:
        name: As :data:`NAMES` has it.
        low: Smallest mean over exchanges of any pair of layers.
        high: Largest mean.
        edge: Largest 95th percentile (of a distance: smallest 5th).
        above: Pairs of layers whose corrected p value is at most :data:`align.statistics.SIGNIFICANT`.
        pairs: Pairs of layers with a p value.
        rows: Rows of the floor.
        documents: Their documents.
        draws: Exchanges.
        reason: Why there is none; the figures are then 0.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    edge: float = 0.0
    above: int = 0
    pairs: int = 0
    rows: int = 0
    documents: int = 0
    draws: int = 0
    reason: str | None = None

    @property
    def is_decided(self) -> bool:
        """Whether a p value, 1 / (1 + exchanges) at the smallest, can show anything."""
        return self.draws >= limit("few-exchanges", "exchanges")


def readings(
    permutations: Mapping[str, Mapping[str, Any]], closer: str = "higher", *, alone: bool = False
) -> list[Reading]:
    """The floors of the main figure or of a measure.

    Args:
        permutations: By name, as in ``cka.json``.
        closer: Whether higher or lower values are closer.
        alone: Whether both models are one: each pair of layers counts once, and none of a layer with itself.
    """
    found = []
    for key, floor in permutations.items():
        name = NAMES.get(key, key)
        tables = [floor.get(table) or () for table in ("mean", "p95", "p_max")]
        alike = len({tuple(len(row) for row in table) for table in tables}) == 1
        cells = [
            (mean, edge, p)
            for i, rows in enumerate(zip(*tables, strict=True) if alike else ())
            for j, (mean, edge, p) in enumerate(zip(*rows, strict=True))
            if not any(value is None or value != value for value in (mean, edge, p)) and not (alone and j <= i)
        ]
        if not cells:
            found.append(Reading(name, reason=floor.get("reason") or "no pair of layers is defined"))
            continue
        means, edges, ps = zip(*cells, strict=True)
        found.append(
            Reading(
                name,
                min(means),
                max(means),
                max(edges) if closer == "higher" else min(edges),
                sum(p <= SIGNIFICANT for p in ps),
                len(ps),
                floor.get("rows") or 0,
                floor.get("documents") or 0,
                floor.get("draws") or 0,
            )
        )
    return found
