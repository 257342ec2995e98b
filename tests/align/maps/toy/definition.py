"""Each dimension times a number of its own: the record."""

from __future__ import annotations

from align.maps.registry import MapType

TYPE = MapType(
    name="diagonal",
    order=5,
    summary="each dimension times a number of its own",
    title="Diagonal",
    closed="tests.align.maps.toy.solver:solve",
)
