"""A verdict in words: what a model is right for, and what is refused for which reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from featstore.models.verdict import ContinuingVerdict, LayerVerdict, ReadingVerdict, Verdict

_UNTESTED = "not tested"
_FIGURE = re.compile(r"(?<=differ by )[\d.e+-]+|(?<=differ by )inf")


def lines(verdict: Verdict) -> list[str]:
    """A verdict for people: a line a topic.

    Args:
        verdict: What was tested on a model.
    """
    return [f"{topic}: {words}" for topic, words in topics(verdict).items()]


def topics(verdict: Verdict) -> dict[str, str]:
    """What a verdict says, by topic.

    Args:
        verdict: What was tested on a model.

    Returns:
        Words on ``model``, ``extraction``, ``layer 0``, ``injection``, ``hide``, ``continuing``, ``padding`` and
        ``attention``.
    """
    return {
        "model": _model(verdict),
        "extraction": extraction(verdict.reading),
        "layer 0": _layer_0(verdict.reading),
        "injection": injection(verdict),
        "hide": hide(verdict.layers),
        "continuing": continuing(verdict.continuing),
        "padding": padding(verdict.continuing),
        "attention": verdict.attention or "the model names no implementation",
    }


def _model(verdict: Verdict) -> str:
    hidden = verdict.width // max(verdict.streams, 1)
    streams = f", {verdict.streams} streams of {hidden} side by side" if verdict.streams > 1 else ""
    blocks = "1 block" if verdict.blocks == 1 else f"{verdict.blocks} blocks"
    without = f"; loaded without its {verdict.left_out}" if verdict.left_out else ""
    return f"{blocks} in {verdict.stack}, rows of width {verdict.width}{streams}, {verdict.stream_dtype}{without}"


def extraction(reading: ReadingVerdict | None) -> str:
    """Whether states can be stored, and which windows may share a pass.

    Args:
        reading: What was tested; None for nothing.
    """
    if reading is None:
        return _UNTESTED
    if reading.not_finite is not None:
        return f"refused: layer {reading.not_finite} holds NaN or infinity"
    words = f"right, {batching(reading)}"
    if reading.causal is False:
        words += f"; the model reads ahead (states change by {figure(reading.future)} when only later tokens change)"
    return words


def batching(reading: ReadingVerdict) -> str:
    """Which windows share a pass, and why not all do.

    Args:
        reading: What was tested.
    """
    if reading.batching == "single":
        return f"each window in a pass of its own (neighbours in a pass change states by {figure(reading.neighbours)})"
    if reading.batching == "equal":
        worst = max((value for value in (reading.padding, reading.far) if value is not None), default=None)
        return f"windows of one length share a pass (longer ones beside them change states by {figure(worst)})"
    if reading.switch is not None:
        return (
            f"windows share a pass, those of at most {reading.switch} tokens apart from longer ones (the position "
            "encoding changes there)"
        )
    return "windows of any length share a pass"


def _layer_0(reading: ReadingVerdict | None) -> str:
    if reading is None or reading.layer_0_is_table is None:
        return _UNTESTED
    if reading.layer_0_is_table:
        return "depends on the token alone, and can be stored as a table"
    return f"depends on the position (one id at two positions differs by {figure(reading.layer_0)}): no table"


def injection(verdict: Verdict) -> str:
    """Where states can be put in, and where that is refused.

    Args:
        verdict: What was tested.
    """
    layers = by_number(verdict.layers)
    if not layers:
        return _UNTESTED
    if verdict.reading is not None and verdict.reading.causal is False:
        return "refused: the model reads ahead, so states know the text after them"
    moved = [k for k, entry in layers.items() if not entry.self_identical]
    leaking = [k for k, entry in layers.items() if entry.self_identical and entry.leak != 0]
    right = sorted(set(layers) - set(moved) - set(leaking))
    parts = [f"right at {_layers(right)}" if right else "right at no layer that was tested"]
    if leaking:
        leaks = _range(layers[k].leak for k in leaking)
        parts.append(
            f"refused at {_layers(leaking)}: the swap test leaks {leaks}, later blocks also learn of the text past "
            "the stream (--allow-side-channel)"
        )
    if moved:
        parts.append(f"refused at {_layers(moved)}: self-injection changes the logits")
    return "; ".join(parts)


def hide(layers: Mapping[str, LayerVerdict]) -> str:
    """Where the prompt can be hidden, and why not elsewhere.

    Args:
        layers: What was tested, by layer.
    """
    found = by_number(layers)
    held = [k for k, entry in found.items() if entry.hide_refused is None and entry.hide is not None]
    refused: dict[str, list[int]] = {}
    for k, entry in found.items():
        if entry.hide_refused is not None:
            refused.setdefault(_FIGURE.sub("{}", entry.hide_refused), []).append(k)
    if not held and not refused:
        return _UNTESTED
    parts = [f"holds at {_layers(held)}"] if held else []
    for reason, at in refused.items():
        figures = [max((v for v in (found[k].hide, found[k].hide_cached) if v is not None), default=None) for k in at]
        parts.append(f"refused at {_layers(at)}: {reason.replace('{}', _range(figures))}")
    return "; ".join(parts)


def continuing(way: ContinuingVerdict | None) -> str:
    """How a text goes on from a prompt.

    Args:
        way: What was tested; None for nothing.
    """
    if way is None:
        return _UNTESTED
    kinds = {
        "cached": "from a cache, any number of tokens at once",
        "stepwise": "from a cache, one token at a time",
        "recomputed": "without a cache, the whole text passed again",
    }
    if way.kind not in kinds:
        return "refused: no way gives the logits of one pass over the whole text"
    words = kinds[way.kind]
    if way.positions:
        words += ", told its positions"
    if way.whole_logits:
        words += ", with the logits of all tokens"
    if way.branching == "reread" and way.kind != "recomputed":
        words += "; a prompt is read again for each text that goes on from it"
    return words


def padding(way: ContinuingVerdict | None) -> str:
    """Whether prompts of several lengths may share a batch.

    Args:
        way: What was tested; None for nothing.
    """
    if way is None or way.kind == "none":
        return _UNTESTED
    if way.padded:
        return "prompts of several lengths share a batch, padded at the left"
    return f"prompts of one length share a batch (padding at the left changes logits by {figure(way.padding)})"


def figure(value: float | None) -> str:
    """A relative difference in two digits.

    Args:
        value: None where it is no finite number.
    """
    return "without bound" if value is None else f"{value:.2g}"


def by_number(layers: Mapping[str, LayerVerdict]) -> dict[int, LayerVerdict]:
    """What was tested by the number of the layer, in order; a damaged file may have names that are none.

    Args:
        layers: By name.
    """
    return {int(name): layers[name] for name in sorted(filter(str.isdecimal, layers), key=int)}


def numbers(values: Iterable[int]) -> str:
    """Whole numbers in few words: ``0, 2 to 5``.

    Args:
        values: In any order.
    """
    spans: list[list[int]] = []
    for value in sorted(set(values)):
        if spans and spans[-1][-1] == value - 1:
            spans[-1].append(value)
        else:
            spans.append([value])
    # Two neighbours are shorter one by one.
    words = [[str(v) for v in span] if len(span) < 3 else [f"{span[0]} to {span[-1]}"] for span in spans]
    return ", ".join(word for span in words for word in span)


def _layers(values: Iterable[int]) -> str:
    chosen = list(values)
    return f"{'layer' if len(chosen) == 1 else 'layers'} {numbers(chosen)}"


def _range(values: Iterable[float | None]) -> str:
    found = list(values)
    finite = [value for value in found if value is not None]
    if len(finite) < len(found) or not finite:
        return figure(None)
    low, high = figure(min(finite)), figure(max(finite))
    return low if low == high else f"{low} to {high}"
