"""How a model goes on from a prompt, so that it says what one pass over the whole text says.

The ways are tried from the cheapest to the surest; the first whose logits are those of the whole pass is taken.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from featstore.errors import FeatstoreError
from featstore.models.layout import Continuing
from featstore.models.passes import Passes
from featstore.models.probe.differences import apart, rounding
from featstore.models.residual import ResidualStream, forward, watching
from featstore.models.stack import ordinary_ids
from featstore.models.verdict import ContinuingVerdict

_WAYS = (
    Continuing(),
    Continuing(whole_logits=True),
    Continuing(positions=True),
    Continuing(kind="stepwise"),
    Continuing(kind="stepwise", positions=True),
    Continuing(kind="stepwise", positions=True, whole_logits=True),
    Continuing(kind="recomputed"),
    Continuing(kind="recomputed", whole_logits=True),
)
#: Tokens of the prompt, and after each of the further passes.
_PROMPT, _THEN = 9, (12, 13, 14)
#: What a way that does not suit a model may raise.
_UNSUITED = (
    RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError, FeatstoreError
)  # fmt: skip


@torch.inference_mode()
def test_continuing(stream: ResidualStream) -> ContinuingVerdict | None:
    """Find out how a model goes on, whether prompts may be padded, and whether two texts may go on from one.

    Args:
        stream: The model's residual stream.

    Returns:
        None where no way gives the logits of the whole pass.
    """
    ids = ordinary_ids(stream.model, 2, _THEN[-1], seed=2)
    whole = forward(stream.model, input_ids=ids).logits
    limit = rounding(stream.model, whole.dtype)
    for way in _WAYS:
        difference = _difference(replace(stream, continuing=way), ids, whole)
        if difference <= limit:
            break
    else:
        return None
    padding = _padding(replace(stream, continuing=way), ids)
    way = replace(way, padding=padding <= limit)
    if _branching(replace(stream, continuing=way), ids, whole) > limit:
        way = replace(way, branching="reread")
    return ContinuingVerdict(
        kind=way.kind,
        positions=way.positions,
        whole_logits=way.whole_logits,
        difference=difference,
        padded=way.padding,
        padding=padding if padding < float("inf") else None,
        branching=way.branching,
    )


def _difference(stream: ResidualStream, ids: torch.Tensor, whole: torch.Tensor) -> float:
    """Of the logits of a text that is read in parts, at the positions that are read; infinity where a part is lost."""
    try:
        passes = Passes(stream)
        with watching(stream, [0, stream.depth]) as states:
            read = [passes.read(ids[:, :_PROMPT])]
        if any(hidden.shape[:2] != (len(ids), _PROMPT) for hidden in states.values()):
            return float("inf")
        for start, end in zip((_PROMPT, *_THEN), _THEN, strict=False):
            read.append(passes.read(ids[:, start:end], keep=end - start))
    except _UNSUITED:
        return float("inf")
    return apart(whole[:, _PROMPT - 1 :], torch.cat(read, dim=1))


def _padding(stream: ResidualStream, ids: torch.Tensor) -> float:
    """Of the logits of a short text that is padded at the left beside a longer one, and of what follows it."""
    short = _PROMPT - 4
    rows = ids[:, :_PROMPT].clone()
    rows[1, : _PROMPT - short], rows[1, _PROMPT - short :] = ids[0, 0], ids[1, :short]
    padding = torch.zeros_like(rows, dtype=torch.bool)
    padding[1, : _PROMPT - short] = True
    more = ids[:, _PROMPT : _PROMPT + 2]
    try:
        beside, alone, longer = Passes(stream), Passes(stream), Passes(stream)
        both = torch.cat([beside.read(rows, padding), beside.read(more, keep=2)], dim=1)
        first = torch.cat([longer.read(rows[:1]), longer.read(more[:1], keep=2)], dim=1)
        second = torch.cat([alone.read(ids[1:, :short]), alone.read(more[1:], keep=2)], dim=1)
    except _UNSUITED:
        return float("inf")
    return apart(torch.cat([first, second]), both)


def _branching(stream: ResidualStream, ids: torch.Tensor, whole: torch.Tensor) -> float:
    """Of the logits of two texts that go on from one prompt, one of them with its rows chosen."""
    turned = torch.tensor([1, 0, 1])
    end = _THEN[0]
    try:
        trunk = Passes(stream)
        trunk.read(ids[:, :_PROMPT])
        chosen, other = trunk.branch(turned), trunk.branch()
        # Another text goes on first: what it writes must not be there when the first one goes on.
        other.read(ids.flip(0)[:, _PROMPT:end])
        mine = trunk.read(ids[:, _PROMPT:end], keep=end - _PROMPT)
        theirs = chosen.read(ids[turned][:, _PROMPT:end], keep=end - _PROMPT)
    except _UNSUITED:
        return float("inf")
    wanted = whole[:, _PROMPT:end]
    return max(apart(wanted, mine), apart(wanted[turned.to(wanted.device)], theirs))
