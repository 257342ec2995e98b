"""Whether the stream at a layer is all that later blocks know: self-injection and the swap test.

A model's own stream, put back, must give its own logits to the bit: the hook is in place. That cannot show a side
channel (per-layer embeddings, keys shared with earlier blocks, routing by token id), through which later blocks learn
of the text past the stream. The swap test can: text B is run with the *whole* stream of text A at the layer. If the
stream is all that matters, the logits are A's, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from featstore.models.probe.differences import spread
from featstore.models.residual import ResidualStream, at_site, forward, skipping_below, watching
from featstore.models.stack import ordinary_ids
from featstore.models.verdict import LayerVerdict

_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Texts:
    """Two texts, what a model says to them, and its stream.

    Attributes:
        ids: Of A and B, int64 ``(1, tokens)`` each.
        logits: Of A and B.
        streams: Of A and B, ``{layer: (1, tokens, width)}``.
        repeats: Largest difference between the logits of two passes over A.
        noise: Largest difference between the logits of A alone and beside B, over the largest logit: what another
            company of the same row does to its last bits.
    """

    ids: tuple[torch.Tensor, torch.Tensor]
    logits: tuple[torch.Tensor, torch.Tensor]
    streams: tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]
    repeats: float
    noise: float


@torch.inference_mode()
def two_texts(stream: ResidualStream) -> Texts:
    """Run two texts that have no token in common: four passes.

    Args:
        stream: The model's residual stream.
    """
    first = ordinary_ids(stream.model, 1, _TOKENS, seed=3)
    second = ordinary_ids(stream.model, 1, _TOKENS, seed=4)
    again = 5
    while bool((first == second).any()):
        second = torch.where(first == second, ordinary_ids(stream.model, 1, _TOKENS, seed=again), second)
        again += 1
    logits, streams = [], []
    for ids in (first, second):
        with watching(stream, range(stream.depth + 1)) as states:
            logits.append(forward(stream.model, input_ids=ids).logits)
        streams.append(states)
    repeats = spread(logits[0], forward(stream.model, input_ids=first).logits)
    beside = forward(stream.model, input_ids=torch.cat([first, second])).logits[:1]
    noise = spread(logits[0], beside) / float(logits[0].abs().max())
    return Texts((first, second), (logits[0], logits[1]), (streams[0], streams[1]), repeats, noise)


@torch.inference_mode()
def test_injecting(stream: ResidualStream, texts: Texts, layer: int) -> LayerVerdict:
    """Self-injection, the swap test, and whether the blocks below may be skipped: three passes.

    Args:
        stream: The model's residual stream.
        texts: From :func:`two_texts`.
        layer: 0..L.
    """
    first, second = texts.ids
    wanted, other = texts.logits
    whole = texts.streams[0][layer]
    own = _with(stream, first, layer, whole)
    swapped = _with(stream, second, layer, whole)
    reach = spread(other, wanted)
    # What two equal passes differ by is no leak.
    left = spread(swapped, wanted)
    leak = 0.0 if left <= 4 * texts.repeats else left / reach if reach else math.inf
    identical = spread(own, wanted) <= 4 * texts.repeats if texts.repeats else bool(torch.equal(own, wanted))
    return LayerVerdict(
        self_identical=identical,
        leak=leak if math.isfinite(leak) else None,
        skips=identical and _skips(stream, first, layer, whole, wanted, texts.repeats),
    )


def _with(stream: ResidualStream, ids: torch.Tensor, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    with at_site(stream, layer, lambda _: hidden):
        logits: torch.Tensor = forward(stream.model, input_ids=ids).logits
    return logits


def _skips(
    stream: ResidualStream, ids: torch.Tensor, layer: int, hidden: torch.Tensor, wanted: torch.Tensor, noise: float
) -> bool:
    """Whether the blocks below may be left out; some give later blocks more than their stream."""
    trial = replace(stream, skips=frozenset([layer]))
    try:
        with skipping_below(trial, layer):
            return spread(_with(trial, ids, layer, hidden), wanted) <= 4 * noise
    except Exception:  # noqa: BLE001 - whatever a model does without its first blocks, it needs them
        return False
