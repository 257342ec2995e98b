"""A matrix of low rank, alone or added to a fixed map: reduced-rank ridge regression."""

from __future__ import annotations

from align.maps.registry import MapType

TYPE = MapType(
    name="reduced-rank",
    order=40,
    summary="a matrix of low rank, added to --skip",
    title="Reduced-rank",
    options=frozenset({"rank", "skip", "scale"}),
    closed="align.closed_form.reduced_rank:solve",
    label="reduced-rank {rank} on {skip}",
    # Without a word about a skip this is plain reduced-rank regression.
    defaults={"skip": "none"},
)
