"""A scaled rotation between centred states, of all dimensions or within some principal components."""

from __future__ import annotations

from align.maps.registry import MapType

TYPE = MapType(
    name="procrustes",
    order=10,
    summary="a rotation times one factor",
    title="Procrustes",
    options=frozenset({"scale", "components"}),
    closed="align.closed_form.procrustes:solve",
    isometric=True,
    sharing="whole",
)
