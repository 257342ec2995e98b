"""What a model says after a prompt: new tokens, read from the cache that the prompt filled.

Prompts of several lengths are padded at the left and get the positions they would have alone, so a row's text does not
depend on its neighbours (beyond rounding).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from featstore.errors import SpecError
from featstore.models.devices import input_device
from featstore.models.passes import Passes
from featstore.models.residual import ResidualStream
from featstore.models.sampling import Sampling, next_tokens

#: Prompts that go through a model together at most, however short they are.
_ROWS = 64


def left_padded(rows: Sequence[Sequence[int]], *, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Make one batch of prompts of several lengths.

    Args:
        rows: Token ids, none empty.
        fill: Any id of the vocabulary; it is never read.

    Returns:
        int64 ids ``(batch, tokens)``, and bool padding of the same shape, None where all are of one length.

    Raises:
        SpecError: No rows, or an empty one.
    """
    if not rows or not all(len(row) for row in rows):
        raise SpecError("a prompt without tokens cannot be continued; give each row at least one")
    tokens = max(len(row) for row in rows)
    ids = torch.tensor([[fill] * (tokens - len(row)) + [int(token) for token in row] for row in rows])
    short = torch.tensor([tokens - len(row) for row in rows])
    return ids, torch.arange(tokens)[None] < short[:, None] if bool(short.any()) else None


@torch.inference_mode()
def continued(
    stream: ResidualStream,
    ids: torch.Tensor,
    padding: torch.Tensor | None,
    *,
    length: int,
    stops: Collection[int],
    sample: Sampling | None,
    numbers: Sequence[int],
) -> list[list[int]]:
    """Go on with prompts that have been checked.

    Args:
        stream: The model's residual stream, which says how the model goes on.
        ids: int64 ``(batch, tokens)``, on the model's device.
        padding: bool ``(batch, tokens)``, True at the left of a row where there is no token; None for none.
        length: New tokens at most, 1 or more.
        stops: Tokens that end a text.
        sample: How to draw; None for the likeliest token each time.
        numbers: Numbers of the rows, 0 or more, which fix their draws.

    Returns:
        Per row its new tokens, the stop included.
    """
    texts: list[list[int]] = [[] for _ in numbers]
    open_rows = set(range(len(texts)))
    passes = Passes(stream)
    logits = passes.read(ids, padding)
    for step in range(length):
        new = next_tokens(logits[:, -1], sample, numbers, step)
        for row in sorted(open_rows):
            texts[row].append(new[row])
            if new[row] in stops:
                open_rows.discard(row)
        if not open_rows or step == length - 1:
            break
        # A finished row goes on while others are not done; that is not part of its text.
        logits = passes.read(torch.tensor(new)[:, None])
    return texts


def stops_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens after which a model has said all it had to say.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [named] if isinstance(named, int) else list(named or [])
    return frozenset([*found, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else found)


def batches(stream: ResidualStream, lengths: Sequence[int], length: int, tokens: int) -> list[list[int]]:
    """Prompts that may go through a model together, the longest first.

    Args:
        stream: Says which may.
        lengths: Tokens of every prompt.
        length: New tokens at most.
        tokens: Padded tokens of a batch at most, the new ones included, unless it is a single prompt.

    Returns:
        Places in ``lengths``, each once.
    """
    switch = stream.batching.switch
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    found: list[list[int]] = []
    for place in order:
        first = found[-1][0] if found else place
        full = bool(found) and (
            len(found[-1]) >= min(_ROWS, max(tokens // (lengths[first] + length), 1))
            or (not stream.continuing.padding and lengths[place] != lengths[first])
            or (switch is not None and lengths[place] <= switch < lengths[first])
        )
        if not found or full:
            found.append([])
        found[-1].append(place)
    return found


def answers(
    stream: ResidualStream,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    stops: Collection[int],
    sample: Sampling | None,
    numbers: Sequence[int],
) -> list[list[int]]:
    """What a model says after each prompt of one batch of :func:`batches`.

    Args:
        stream: The model's residual stream.
        prompts: Token ids, none empty.
        length: As of :func:`continued`.
        stops: As of :func:`continued`.
        sample: As of :func:`continued`.
        numbers: As of :func:`continued`.

    Returns:
        Per prompt its new tokens, the stop included.
    """
    ids, padding = left_padded(prompts)
    device = input_device(stream.model)
    said: list[list[int]] = continued(
        stream,
        ids.to(device),
        None if padding is None else padding.to(device),
        length=length,
        stops=stops,
        sample=sample,
        numbers=numbers,
    )
    return said
