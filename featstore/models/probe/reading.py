"""Whether a stored row is a function of its own text: causality, padding, neighbours, far positions, layer 0.

Every test compares a text's states with those that it has under another condition that should not matter. Where it
does matter, the windows are batched so that it does not arise.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from featstore.models.layout import Batching
from featstore.models.probe.differences import furthest, rounding, spread
from featstore.models.residual import ResidualStream, accepted, capture, forward, watching
from featstore.models.stack import ordinary_ids
from featstore.models.verdict import ReadingVerdict

#: Tokens of the long and of the short text of the tests.
_LONG, _SHORT = 16, 9


@torch.inference_mode()
def test_reading(stream: ResidualStream) -> ReadingVerdict:
    """Run the tests that storing states needs: seven passes of at most 3 x 16 tokens.

    Args:
        stream: The model's residual stream.
    """
    layers = range(stream.depth + 1)
    ids = ordinary_ids(stream.model, 3, _LONG, seed=1)
    # One id at three places, for layer 0.
    ids[0, 2] = ids[0, 11] = ids[1, 5]
    together = capture(stream, ids, layers)
    alone = capture(stream, ids[:1], layers)
    short = capture(stream, ids[:1, :_SHORT], layers)
    other = ids[:1].clone()
    other[:, _SHORT:] = ids[2, _SHORT:]
    changed = capture(stream, other, layers)
    limit = rounding(stream.model, stream.dtype)

    def first(states: dict[int, torch.Tensor], tokens: int) -> dict[int, torch.Tensor]:
        return {layer: hidden[:1, :tokens] for layer, hidden in states.items()}

    future = furthest(first(alone, _SHORT), first(changed, _SHORT))
    padding = furthest(short, first(together, _SHORT))
    neighbours = furthest(alone, first(together, _LONG))
    far = _far(stream, ids)
    layer_0 = max(spread(together[0][0, 2], together[0][0, 11]), spread(together[0][0, 2], together[0][1, 5]))
    causal = future <= rounding(stream.model, stream.dtype, same_shape=True)
    # What reads ahead reads the padding after it, however little that moves its states.
    batching = _batching(stream, padding if causal else math.inf, neighbours, far, limit)
    bad = [layer for layer, hidden in alone.items() if not bool(torch.isfinite(hidden).all())]
    return ReadingVerdict(
        not_finite=min(bad, default=None),
        future=_number(future),
        padding=_number(padding),
        neighbours=_number(neighbours),
        far=None if far is None else _number(far),
        layer_0=_number(layer_0),
        causal=causal,
        batching=batching.kind,
        switch=batching.switch,
        layer_0_is_table=layer_0 == 0,
    )


def _number(value: float) -> float | None:
    """A figure for a JSON file, which has no infinity."""
    return value if math.isfinite(value) else None


def _batching(stream: ResidualStream, padding: float, neighbours: float, far: float | None, limit: float) -> Batching:
    """What keeps a text's states its own."""
    if neighbours > limit:
        return Batching("single")
    if padding > limit:
        return Batching("equal")
    if far is not None and far > limit:
        switch = _switch(stream)
        return Batching("equal") if switch is None else Batching("padded", switch)
    return Batching()


def _far(stream: ResidualStream, ids: torch.Tensor) -> float | None:
    """Change of a text's states when another row of its pass is near the end of the context.

    A model that chooses its position encoding by the longest sequence of a batch shows it here, without a long pass.
    """
    context = getattr(_text_config(stream), "max_position_embeddings", None)
    near = torch.arange(_LONG, device=ids.device).repeat(2, 1)
    if not isinstance(context, int) or context <= 2 * _LONG or not accepted(stream.model, {"position_ids": near}):
        return None
    there = near.clone()
    there[1] += context - _LONG
    found = []
    for places in (near, there):
        with watching(stream, range(stream.depth + 1)) as states:
            try:
                forward(stream.model, input_ids=ids[:2], position_ids=places)
            except (RuntimeError, ValueError, IndexError, TypeError):
                return None  # the model wants positions of another kind, and gets none from us
        found.append({layer: hidden[:1] for layer, hidden in states.items()})
    return furthest(*found)


def _text_config(stream: ResidualStream) -> Any:
    config = getattr(stream.model, "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config


def _switch(stream: ResidualStream) -> int | None:
    """The length at which the configuration says that the position encoding changes."""

    def look(values: Any) -> int | None:
        if not isinstance(values, dict):
            return None
        own = values.get("original_max_position_embeddings")
        if isinstance(own, int) and not isinstance(own, bool):
            return own
        return next((found for value in values.values() if (found := look(value)) is not None), None)

    config = _text_config(stream)
    return look(config.to_dict()) if config is not None else None
