"""A rotation between centred states, optionally scaled or within some principal components."""

from __future__ import annotations

from align.maps.registry import MapType

TYPE = MapType(
    name="procrustes",
    order=10,
    summary="a rotation",
    title="Procrustes",
    options=frozenset({"scale", "components"}),
    closed="align.closed_form.procrustes:solve",
    isometric=True,
    sharing="whole",
)
