"""Whole windows of states through a few latents (:mod:`align.compress`)."""

from __future__ import annotations

from align.maps.formula import Formula
from align.maps.registry import MapType

_TRAINED = "a compress map is trained on mse in float32, a batch a step"

TYPE = MapType(
    name="compress",
    order=70,
    summary="whole windows through a few latents, trained by gradient",
    title="Compress",
    options=frozenset({"latents", "latent_dim"}),
    windows=True,
    formula=Formula("compress", {}, None),
    judged_by="affine",
    refuses={
        "loss": _TRAINED,
        "accumulate": _TRAINED,
        "precision": _TRAINED,
        "joint": "a compress map reads one layer",
        "eval_models": "the states of a compress map cannot be injected token by token",
    },
    # Every position of a window is a sample, so four windows are a thousand of them; on a store of few windows the
    # number of steps is what counts.
    defaults={"batch_size": 4, "lr": 2e-3},
)
