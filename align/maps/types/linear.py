"""Any matrix between states as they are, without subtracting means."""

from __future__ import annotations

from align.maps.registry import MapType

TYPE = MapType(
    name="linear",
    order=20,
    summary="any matrix, without an intercept",
    title="Linear",
    closed="align.closed_form.ridge:linear",
    module="align.training.modules:full",
    centred=False,
    label="linear ridge",
)
