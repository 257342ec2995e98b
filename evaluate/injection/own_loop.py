"""What `evaluate.inject` is given, resolved into states, positions and the model that takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from align.maps.fitted import Adapter, Aligner
from evaluate.injection.live import LiveInjection, Placed
from evaluate.injection.loading import Loaded, adopt, check_card, choose
from evaluate.injection.reading import Read, read, tokenized
from evaluate.injection.wire import crossing, wire
from featstore.errors import AdapterError, SpecError
from featstore.models.aside import aside
from featstore.models.probe.prove import Needs, prove
from featstore.models.probe.refusals import refuse_hiding, refuse_injecting
from featstore.models.references import NOTHING, Allowed
from featstore.models.residual import ResidualStream
from featstore.models.stack import residual_stream
from featstore.runtime.arguments import several, shown, typed

_WAYS = "give states= and positions=, or mapped= and positions=, or text= and source="


def pick(adapter: Adapter, key: str | None) -> Aligner:
    """One map of a run.

    Args:
        adapter: The maps of the run.
        key: Its layer pair, such as ``llama:16->mistral:16``; None where the run has one.

    Raises:
        AdapterError: The run has no map, or one that holds NaN or infinity.
        SpecError: The run has no such layer pair, or several and none was named.
    """
    chosen = {aligner.pair.key: aligner for aligner in choose(adapter, None)}
    if key is None and len(chosen) > 1:
        raise SpecError(f"this run has {len(chosen)} maps; choose one with key=: {', '.join(chosen)}")
    if key is not None and key not in chosen:
        raise SpecError(f"key {key!r}: this run has {', '.join(chosen)}; name one of these")
    return chosen[key] if key is not None else next(iter(chosen.values()))


def live_injection(
    model: Any,
    adapter: Adapter,
    *,
    key: str | None = None,
    states: Any = None,
    mapped: Any = None,
    positions: Any = None,
    text: str | Sequence[str] | None = None,
    source: Any = None,
    keep: str = "own",
    allow_side_channel: bool = False,
    allowed: Allowed = NOTHING,
) -> LiveInjection:
    """Resolve an injection into a loop of one's own; the arguments are those of :func:`evaluate.api.inject`.

    Args:
        model: The target.
        adapter: The maps of the run.
        key: Layer pair.
        states: Source states.
        mapped: States in the target's own space.
        positions: Where they go.
        text: Texts, in place of states and positions.
        source: The source model, with texts.
        keep: ``own`` or ``hide``.
        allow_side_channel: Whether a layer is taken that leaks past the stream.
        allowed: As of :func:`evaluate.injection.loading.adopt`.

    Raises:
        AdapterError: The states do not fit the map, or a model is not the run's.
        LayerRangeError: The model lacks the layer.
        ProbeError: The layer has a side channel, or ``hide`` does not hide there.
        SpecError: Anything else that does not fit.
    """
    given = {name for name, value in (("states", states), ("mapped", mapped), ("text", text)) if value is not None}
    if len(given) != 1 or (text is None) == (positions is None) or (text is None and source is not None):
        named = [*sorted(given), *(n for n, v in (("positions", positions), ("source", source)) if v is not None)]
        raise SpecError(f"inject() got {', '.join(named) or 'nothing to inject'}; {_WAYS}")
    aligner = pick(adapter, key)
    if text is not None:
        return _from_text(model, adapter, aligner, _texts(text), source, keep, allow_side_channel, allowed)
    places = _positions(positions)
    if mapped is not None:
        values = tuple(_tensor(each) for each in _by_prompt(mapped, places))
    else:
        values = tuple(_through(aligner, each) for each in _by_prompt(states, places))
    at = tuple(places if isinstance(places, list) else [places])
    stream = model.stream if isinstance(model, Loaded) else residual_stream(model)
    # What cannot be put in at all is refused before the model is tested.
    injection = LiveInjection(stream, Placed(aligner.pair.target_layer, values, at, keep), key=aligner.pair.key)
    injection.leak = _leak(stream, aligner.pair.target, injection, allow_side_channel=allow_side_channel)
    return injection


def _leak(stream: ResidualStream, name: str, injection: LiveInjection, *, allow_side_channel: bool) -> float | None:
    """What the swap test finds at the injection's layer, where the model passes the tests that it needs."""
    layers, hide = (injection.layer,), injection.keep == "hide"
    verdict = prove(stream.model, Needs(layers=layers, hide=hide)).verdict
    refuse_injecting(
        name,
        verdict,
        layers,
        allow_side_channel=typed("allow_side_channel", allow_side_channel, "bool"),
        remedy="inject at another layer, or give allow_side_channel=True: the injection's leak then says how much",
    )
    if hide:
        refuse_hiding(name, verdict, layers)
    return verdict.layers[str(injection.layer)].leak


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else several("text", given, "a text, or one for each prompt")
    for text in texts:
        typed("text", text, "str")
    return texts


def _positions(given: Any) -> NDArray[np.int64] | list[NDArray[np.int64]]:
    """Positions of one prompt as an array, those of several as a list of arrays."""
    values = given.tolist() if hasattr(given, "tolist") else given
    refusal = SpecError(
        f"positions {shown(given)}: give whole numbers for one prompt, or a list of them for each prompt"
    )
    if not isinstance(values, int | Iterable):
        raise refusal
    values = [values] if isinstance(values, int) else list(values)
    nested = [hasattr(value, "__len__") for value in values]
    rows = [list(value) for value in values] if values and all(nested) else [values]
    if any(nested) != all(nested) or not all(_whole(place) for row in rows for place in row):
        raise refusal
    arrays = [np.array([int(place) for place in row], dtype=np.int64) for row in rows]
    return arrays if values and all(nested) else arrays[0]


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and abs(int(value)) < 2**31


def _by_prompt(values: Any, places: NDArray[np.int64] | list[NDArray[np.int64]]) -> list[Any]:
    """One ``(n, width)`` array or tensor for every prompt."""
    if not isinstance(places, list):
        return [values[0] if getattr(values, "ndim", 2) == 3 and len(values) == 1 else values]
    if getattr(values, "ndim", 3) == 2 and len(places) == 1:
        return [values]
    if len(values) != len(places):
        raise SpecError(f"states for {len(values)} prompts and positions for {len(places)}; give both for each")
    return list(values)


def _tensor(values: Any) -> torch.Tensor:
    try:
        result = values if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise SpecError(f"states {shown(values)}: give floating point (n, width), numpy or torch") from error
    if result.ndim != 2 or not result.is_floating_point():
        raise SpecError(f"states of shape {tuple(result.shape)} and {result.dtype}: give floating point (n, width)")
    return result


def _through(aligner: Aligner, values: Any) -> torch.Tensor:
    """Source states through the map, in float32 on the host, as `evaluate stitch` maps them."""
    key, (width, _) = aligner.pair.key, aligner.widths
    if not aligner.takes_rows:
        raise AdapterError(
            f"{key} is a {aligner.kind} map: it reads whole windows, and single states cannot be put through it; give "
            "text= and source= instead of states="
        )
    rows = _tensor(values).detach().float().cpu().numpy()
    if rows.shape[1] != width:
        raise AdapterError(f"{key} takes states of width {width}, not {rows.shape[1]}; give those of its source layer")
    return torch.from_numpy(aligner.apply(rows))


def _from_text(
    model: Any,
    adapter: Adapter,
    aligner: Aligner,
    texts: Sequence[str],
    source: Any,
    keep: str,
    allow_side_channel: bool,
    allowed: Allowed,
) -> LiveInjection:
    """States of the source over texts, at the target's positions of the same texts."""
    check_card(adapter)
    to, pair = wire(adapter, aligner), aligner.pair
    if not texts:
        raise SpecError("there is no text to inject; give one at least")
    if source is None and pair.source != pair.target:
        raise SpecError(f"text= needs source=: the model {pair.source!r}, which reads the text")
    target = adopt(adapter, pair.target, model, allowed)
    reader = target if source is None else adopt(adapter, pair.source, source, allowed)
    there, here = (
        _read(loaded, texts, layers)
        for loaded, layers in ((reader, pair.source_layers), (target, (pair.target_layer,)))
    )
    states, places = [], []
    for row, text in enumerate(texts):
        crossed = crossing(there.windows[row], here.windows[row], there.sinks[row], here.sinks[row])
        states.append(torch.from_numpy(to.states(there.rows(row, pair.source_layers), crossed, to.pieces(text))))
        places.append(here.first(row) + crossed.places)
    placed = Placed(pair.target_layer, tuple(states), tuple(places), keep)
    inputs = _inputs(here.ids, here.padding, target.device)
    injection = LiveInjection(target.stream, placed, key=pair.key, inputs=inputs)
    injection.leak = _leak(target.stream, pair.target, injection, allow_side_channel=allow_side_channel)
    return injection


def _read(loaded: Loaded, texts: Sequence[str], layers: Sequence[int]) -> Read:
    """Texts as a model reads them by itself, whatever is being injected into it."""
    # A prompt is the beginning of a text that goes on; how to read it whole is known once that was tested.
    ready = loaded.ready(Needs(continuing=True))
    with aside(loaded.model):
        return read(ready, tokenized(loaded.name, loaded.info, texts, 0, remedy="shorten it"), layers)


def _inputs(ids: torch.Tensor, padding: torch.Tensor | None, device: torch.device) -> dict[str, torch.Tensor]:
    """What a model is called with: prompts of several lengths get the mask and the positions that they need."""
    inputs = {"input_ids": ids.to(device)}
    if padding is not None:
        real = (~padding).to(device)
        inputs |= {"attention_mask": real.long(), "position_ids": (real.cumsum(dim=1) - 1).clamp(min=0)}
    return inputs
