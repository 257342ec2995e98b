"""The two-prompt test: whether ``hide`` hides.

Two prompts of equal length that have no token in common, the first word included, take the same states at the same
places. What reads only those states must come out the same, exactly: the logits at the places in one pass, and of
everything that follows the prompt from a cache, from branches of it, with padding at the left.
"""

from __future__ import annotations

import math

import torch

from featstore.errors import FeatstoreError
from featstore.models.caches import recurrent_blocks, returned_cache
from featstore.models.hiding import check_attention
from featstore.models.injection import Injection, inject
from featstore.models.passes import Passes
from featstore.models.probe.differences import spread
from featstore.models.probe.injecting import Texts
from featstore.models.residual import ResidualStream, forward
from featstore.models.stack import ordinary_ids
from featstore.models.verdict import LayerVerdict

#: Places that take a state, the prompt's last one among them; the first word never does.
_PLACES = (3, 4, 7, 11, 15)
_PADDED = 3


#: Difference of logits over the largest logit that is none in any case.
_NONE = 1e-5


@torch.inference_mode()
def test_hiding(stream: ResidualStream, texts: Texts, layer: int) -> LayerVerdict:
    """Run the two-prompt test at a layer: two passes, and two texts continued from a cache.

    Args:
        stream: The model's residual stream, which knows how to continue.
        texts: From :func:`featstore.models.probe.injecting.two_texts`.
        layer: 0..L.

    Returns:
        ``hide`` and ``hide_cached``, and the reason where hiding does not hold. Both differences are 0 to the bit where
        every row is computed by itself. Experts are computed for all rows that chose them, and the hidden rows of two
        prompts choose others: that moves the last bits, as another text in the batch does.
    """
    one_pass = cached = None
    try:
        check_attention(stream)
        one_pass = _apart(*(_one_pass(stream, texts, layer, which) for which in (0, 1)))
        cached = _apart(*(_cached(stream, texts, layer, which) for which in (0, 1)))
    except Exception as error:  # noqa: BLE001 - blocks that take no mask raise all kinds of things
        reason = (str(error).strip().splitlines() or [""])[0]
        raised = reason if isinstance(error, FeatstoreError) else f"{type(error).__name__}: {reason}"
        return LayerVerdict(hide=one_pass, hide_refused=_recurrent(stream, texts) or raised[:200])
    worst = max(math.inf if value is None else value for value in (one_pass, cached))
    if worst <= max(_NONE, 2 * texts.noise):
        return LayerVerdict(hide=one_pass, hide_cached=cached)
    leaks = f"two prompts with the same injected states differ by {worst:.2g} of the largest logit"
    why = _recurrent(stream, texts)
    return LayerVerdict(hide=one_pass, hide_cached=cached, hide_refused=f"{leaks}: {why}" if why else leaks)


def _recurrent(stream: ResidualStream, texts: Texts) -> str:
    """The reason where blocks remember the prompt beside its keys and values; empty where none does."""
    try:
        past = returned_cache(stream.model(input_ids=texts.ids[0], use_cache=True))[1]
    except Exception:  # noqa: BLE001 - then the cache is not the reason
        return ""
    blocks = recurrent_blocks(past)
    if not blocks:
        return ""
    one = len(blocks) == 1
    return (
        f"{'block' if one else 'blocks'} {', '.join(map(str, blocks[:6]))}{', ...' if len(blocks) > 6 else ''} "
        f"{'keeps' if one else 'keep'} a recurrent or convolution state, which no attention mask can hide"
    )


def _apart(first: torch.Tensor, second: torch.Tensor) -> float | None:
    size = float(first.float().abs().max())
    difference = spread(first, second) / size if size else math.inf
    return difference if math.isfinite(difference) else None


def _injection(texts: Texts, layer: int, which: int, rows: int) -> Injection:
    own = texts.streams[which][layer]
    hidden, replaced = own.clone(), torch.zeros(own.shape[:2], dtype=torch.bool, device=own.device)
    # The states of neither: those that both have, one token on, in another order.
    shared = texts.streams[0][layer].roll(1, dims=1) + texts.streams[1][layer].roll(1, dims=1)
    places = torch.tensor(_PLACES, device=own.device)
    hidden[:, places] = shared[:, places] / 2
    replaced[:, places] = True
    padding = None
    if rows > 1:
        hidden, replaced = hidden.repeat(rows, 1, 1), replaced.repeat(rows, 1)
        padding = torch.zeros_like(replaced)
        padding[1, :_PADDED] = True
        # Places 3, 4, ... of the padded row are its first tokens: the first of them is its start, and takes no state.
        replaced[1, _PADDED] = False
        hidden[1, _PADDED] = own[0, _PADDED]
    return Injection(layer, hidden, replaced, "hide", padding)


def _one_pass(stream: ResidualStream, texts: Texts, layer: int, which: int) -> torch.Tensor:
    injection = _injection(texts, layer, which, 1)
    with inject(stream, injection, whole=True):
        logits: torch.Tensor = forward(stream.model, input_ids=texts.ids[which]).logits
    return logits[:, list(_PLACES)]


def _cached(stream: ResidualStream, texts: Texts, layer: int, which: int) -> torch.Tensor:
    """Logits after the prompt, of tokens one at a time and several at once, and of a branch.

    A prompt alone, for which most models make no mask once a single token follows, and beside a padded one.
    """
    found = []
    for rows in (1, 2) if stream.continuing.padding else (1,):
        injection = _injection(texts, layer, which, rows)
        ids = texts.ids[which].repeat(rows, 1)
        more = ordinary_ids(stream.model, 1, 5, seed=6).repeat(rows, 1)
        with inject(stream, injection, whole=False):
            passes = Passes(stream)
            read = [passes.read(ids, injection.padding)]
            branch = passes.branch()
            read += [passes.read(more[:, :1]), branch.read(more.flip(1)[:, :2], keep=2)]
            read += [passes.read(more[:, 1:4], keep=3), passes.read(more[:, 4:])]
        found.append(torch.cat(read, dim=1).flatten(0, 1))
    return torch.cat(found)
