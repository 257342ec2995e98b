"""Any matrix between centred states: ridge regression with an intercept."""

from __future__ import annotations

from align.maps.registry import MapType

TYPE = MapType(
    name="affine",
    order=30,
    summary="any matrix with an intercept",
    title="Affine",
    closed="align.closed_form.ridge:affine",
    module="align.training.modules:full",
    sharing="base",
    label="affine ridge",
)
