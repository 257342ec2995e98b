"""A low-rank update of a fixed map, trained by gradient (Hu et al. 2021)."""

from __future__ import annotations

from align.maps.registry import MapType

TYPE = MapType(
    name="lora",
    order=50,
    summary="a low-rank update of --skip, trained by gradient",
    title="LoRA",
    options=frozenset({"rank", "alpha", "skip", "scale"}),
    module="align.training.modules:low_rank",
    sharing="base",
    solved_as="reduced-rank",
)
