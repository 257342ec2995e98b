"""The two-prompt check in its own way: another's states in two prompts, and a loop over the model's own cache.

Nothing of the probe or of `Passes` is used: the model is called as its own ``generate`` calls it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from featstore.models.injection import Injection, inject
from featstore.models.residual import ResidualStream
from tests.support.architectures.kinds import some_ids
from tests.support.truth import expected_rows

_TOKENS = 14
#: Places that take a state of a third text. The first word never does, the last always.
_PLACES = [2, 5, 6, 9, 13]


@torch.inference_mode()
def prompts_apart(
    model: nn.Module, name: str, stream: ResidualStream, keep: str, layers: Iterable[int]
) -> dict[int, float]:
    """How far what follows two prompts is apart that have no word in common and take the same states.

    Args:
        model: A tiny model.
        name: Its type.
        stream: Its residual stream, which knows how the model goes on.
        keep: ``hide`` or ``own``.
        layers: Where states are put in.

    Returns:
        ``{layer: difference of the logits, relative to the largest}``: at the places in one pass, and of the prompt's
        end and three further tokens; infinity where a pass raises.
    """
    first, second, third = (some_ids(seed, _TOKENS) for seed in (21, 22, 23))
    second = torch.where(first == second, 3 + second % 286, second)
    rows = [expected_rows(model, name, ids) for ids in (first, second, third)]
    found = {}
    for layer in layers:
        said = []
        for ids, own in ((first, rows[0]), (second, rows[1])):
            hidden, replaced = own[layer].clone(), torch.zeros((1, _TOKENS), dtype=torch.bool)
            hidden[:, _PLACES] = rows[2][layer][:, _PLACES]
            replaced[:, _PLACES] = True
            try:
                said.append(_said(model, stream, ids, Injection(layer, hidden, replaced, keep)))
            except Exception:  # noqa: BLE001 - blocks that take no mask raise all kinds of things
                break
        found[layer] = float((said[0] - said[1]).abs().max() / said[0].abs().max()) if len(said) == 2 else float("inf")
    return found


def _said(model: nn.Module, stream: ResidualStream, ids: torch.Tensor, injection: Injection) -> torch.Tensor:
    with inject(stream, injection, whole=True):
        at_once = model(input_ids=ids, use_cache=False).logits[:, _PLACES]
    with inject(stream, injection, whole=False):
        return torch.cat([at_once, *_continued(model, stream, ids)], dim=1)


def _continued(model: nn.Module, stream: ResidualStream, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits after the prompt and of three tokens that go on from it, by the way that the stream knows."""
    way, more, logits, past = stream.continuing, some_ids(24, 3), [], {}
    for given in (ids, *(more[:, i : i + 1] for i in range(3))):
        whole = torch.cat([ids, more[:, : len(logits)]], dim=1)
        if way.kind == "recomputed":
            logits.append(model(input_ids=whole, use_cache=False).logits[:, -1:])
            continue
        places: dict[str, Any] = {}
        if way.positions:
            places["position_ids"] = torch.arange(whole.shape[1])[None, -given.shape[1] :]
        output = model(input_ids=given, use_cache=True, **places, **past)
        past = {key: output[key] for key in ("past_key_values", "cache_params", "state") if output.get(key) is not None}
        logits.append(output.logits[:, -1:])
    return logits
