"""Prove the instrument on the model at hand: the tests a command needs, each once, and what they refuse.

Tests are looked up by the weights, the configuration and what ran them, in a file of the cache directory; what has been
tested on a model is not tested again by the next command.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from featstore.errors import CorruptDataError, FeatstoreError, NonFiniteStateError
from featstore.models.aside import aside
from featstore.models.devices import input_device
from featstore.models.hiding import attention
from featstore.models.layout import Batching, Continuing
from featstore.models.probe.continuing import test_continuing
from featstore.models.probe.hiding import test_hiding
from featstore.models.probe.injecting import test_injecting, two_texts
from featstore.models.probe.reading import test_reading
from featstore.models.residual import ResidualStream, forward
from featstore.models.stack import embedding_rows, ordinary_ids, residual_stream
from featstore.models.unread import left_out
from featstore.models.verdict import ContinuingVerdict, LayerVerdict, ReadingVerdict, Verdict
from featstore.runtime.caches import cache_directory
from featstore.runtime.console import Tick
from featstore.runtime.provenance import digest, read_json, versions, write_json

#: Raised when a test changes: what it found before is looked for again.
_VERSION = 2
_LIBRARIES = ("torch", "transformers")
#: Of the pass whose logits are looked at.
_TOKENS = 16

#: What was found out about the models of this process, and how they were run then.
_REMEMBERED: WeakKeyDictionary[nn.Module, tuple[Any, Verdict]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Needs:
    """What a command is about to do with a model.

    Attributes:
        continuing: Generate from prompts.
        layers: Put states in at these.
        hide: Hide the prompt there.
    """

    continuing: bool = False
    layers: tuple[int, ...] = ()
    hide: bool = False

    @property
    def tests(self) -> int:
        """How many tests that makes at most; :func:`further` ticks after each."""
        layers = len(set(self.layers))
        return 1 + (self.continuing or self.hide) + bool(layers) + layers * (1 + self.hide)


def everything(stream: ResidualStream) -> Needs:
    """All that can be tested on a model.

    Args:
        stream: Its residual stream.
    """
    return Needs(continuing=True, layers=tuple(range(stream.depth + 1)), hide=True)


@dataclass(frozen=True, eq=False)
class Proven:
    """A model's stream with what was found out about it.

    Attributes:
        stream: Knows how its windows are batched, how it continues, and which blocks may be skipped.
        verdict: What was tested.
        key: Under which it is recalled; None where it is not.
        name: The model's, for messages.
    """

    stream: ResidualStream
    verdict: Verdict
    key: str | None = None
    name: str = ""


def probe_key(*, weights: str, config: str, device: str, dtype: str, attention: str) -> str:
    """The name under which what is found out about a model is kept.

    Args:
        weights: Fingerprint of the weights.
        config: Hash of the configuration.
        device: Device type.
        dtype: Number type of the weights in memory.
        attention: Implementation of attention that was asked for.
    """
    libraries = {name: version for name, version in versions().items() if name in _LIBRARIES}
    return digest([_VERSION, weights, config, device, dtype, attention, libraries])


def key_of(model: nn.Module, *, weights: str | None, config: str) -> str | None:
    """The name under which what is found out about a loaded model is kept; None where its weights have none.

    Args:
        model: A transformers causal language model, as loaded from the files with these weights.
        weights: Fingerprint over every byte of the files.
        config: Hash of the configuration.
    """
    if weights is None:
        return None
    return probe_key(
        weights=weights,
        config=config,
        device=input_device(model).type,
        dtype=str(_dtype(model)).removeprefix("torch."),
        attention=str(attention(residual_stream(model))),
    )


def _dtype(model: nn.Module) -> torch.dtype:
    """The number type of a model's first weights."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def recalled(key: str) -> Verdict | None:
    """What earlier commands found out under a key, or None.

    Args:
        key: From :func:`probe_key`.
    """
    path = _path(key)
    try:
        found = Verdict.parse(read_json(path), str(path)) if path.is_file() else None
    except (CorruptDataError, OSError):
        return None  # it can be found out again
    return found if found is not None and all(map(str.isdecimal, found.layers)) else None


def _path(key: str) -> Path:
    return cache_directory() / "verdicts" / f"{key}.json"


def _keep(key: str, verdict: Verdict) -> None:
    try:
        write_json(_path(key), verdict.content())
    except (OSError, FeatstoreError):
        return  # a cache that cannot be written is no cache


def prove(
    model: nn.Module,
    needs: Needs = Needs(),
    *,
    key: str | None = None,
    name: str = "",
    tick: Tick = lambda _: None,
) -> Proven:
    """Find a model's stream and run the tests that a command needs and that have not been run.

    What has been tested on a model in this process is remembered as long as the model lives.

    Args:
        model: A causal language model; tests leave training mode for their passes.
        needs: What the command is about to do.
        key: From :func:`key_of`; None where the model lies nowhere on disk, and nothing is recalled from there.
        name: The model's, for messages; its class by default.
        tick: Called after each test, of which there are ``needs.tests`` at most.

    Raises:
        UnsupportedArchitectureError: As :func:`featstore.models.stack.residual_stream`.
        ModelLoadError: The model's forward pass raises.
        LayerRangeError: A layer the model does not have.
        NonFiniteStateError: The model gives NaN or infinity on ordinary tokens.
    """
    stream = residual_stream(model, name)
    held = _remembered(stream)
    if held is None and key:
        held = recalled(key)
        if held is not None and (held.stack, held.blocks, held.width) != (stream.path, stream.depth, stream.width):
            held = None
    return further(Proven(stream, held or _first(stream), key, name or type(model).__name__), needs, tick=tick)


def further(proven: Proven, needs: Needs, *, tick: Tick = lambda _: None) -> Proven:
    """Run those tests that a command needs and that a verdict lacks, and keep what comes out.

    States that are being injected into the model are not in the way, and do not notice.

    Args:
        proven: A stream and what is known of it.
        needs: What the command is about to do.
        tick: As of :func:`prove`.

    Raises:
        LayerRangeError: A layer the model does not have.
        NonFiniteStateError: The model gives NaN or infinity on ordinary tokens.
    """
    for layer in needs.layers:
        proven.stream.check(layer)
    held = _remembered(proven.stream)
    verdict = proven.verdict if held is None else _joined(proven.verdict, held)
    with aside(proven.stream.model), _evaluating(proven.stream.model):
        found, stream = _tested(proven, verdict, needs, tick)
    if found:
        plain = {name: value.content() if hasattr(value, "content") else value for name, value in found.items()}
        verdict = Verdict.parse({**verdict.content(), **plain})
        if proven.key:
            _keep(proven.key, verdict)
    _REMEMBERED[stream.model] = (_circumstances(stream), verdict)
    return replace(proven, stream=stream, verdict=verdict)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Leave training mode for the tests: dropout would be taken for noise of the model."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tested(proven: Proven, verdict: Verdict, needs: Needs, tick: Tick) -> tuple[dict[str, Any], ResidualStream]:
    """What the missing tests find, and the stream that knows all of it."""
    stream = proven.stream
    found: dict[str, Any] = {}
    if verdict.reading is None:
        found["reading"] = test_reading(stream)
    tick(1)
    reading = verdict.reading or found["reading"]
    if reading.not_finite is not None:
        raise NonFiniteStateError(
            f"model {proven.name!r}, layer {reading.not_finite} holds NaN or infinity on ordinary tokens; try --dtype "
            "float32, or check the model's weights"
        )
    continuing = verdict.continuing
    layers = dict(verdict.layers)
    wanted = tuple(dict.fromkeys(needs.layers))
    missing = [k for k in wanted if str(k) not in layers or (needs.hide and not _hide_known(layers[str(k)]))]
    if missing or ((needs.continuing or needs.hide) and continuing is None):
        _refuse_logits(proven)
    if needs.continuing or needs.hide:
        if continuing is None:
            found["continuing"] = continuing = test_continuing(stream) or ContinuingVerdict(kind="none")
        tick(1)
    stream = _knowing(stream, reading, continuing, verdict.layers.items())
    tick((len(wanted) - len(missing)) * (1 + needs.hide))
    if missing:
        texts = two_texts(stream)
        tick(1)
        found["repeats"] = texts.repeats
        for layer in missing:
            entry = layers.get(str(layer)) or test_injecting(stream, texts, layer)
            tick(1)
            stream = _knowing(stream, reading, continuing, [(str(layer), entry)])
            if needs.hide:
                hidden = test_hiding(stream, texts, layer).content()
                entry = LayerVerdict.parse({**entry.content(), **hidden})
                tick(1)
            layers[str(layer)] = entry
        found["layers"] = {name: each.content() for name, each in sorted(layers.items(), key=lambda item: int(item[0]))}
    return found, stream


def _refuse_logits(proven: Proven) -> None:
    """Refuse a model whose states are whole and whose head gives no numbers: reading it is right, and nothing else."""
    with torch.inference_mode():
        logits = forward(proven.stream.model, input_ids=ordinary_ids(proven.stream.model, 1, _TOKENS)).logits
    if not bool(logits.isfinite().all()):
        raise NonFiniteStateError(
            f"model {proven.name!r}: the logits hold NaN or infinity on ordinary tokens; try --dtype float32, or "
            "check the weights of its head"
        )


def asked(verdict: Verdict, needs: Needs) -> Verdict:
    """The part of a verdict that a command asked for, which does not depend on what other commands had tested before.

    Args:
        verdict: All that is known of a model.
        needs: What the command did with it.
    """
    content = verdict.content()
    layers = {str(layer): verdict.layers[str(layer)].content() for layer in sorted(set(needs.layers))}
    for entry in layers.values() if not needs.hide else ():
        for name in [name for name in entry if name.startswith("hide")]:
            del entry[name]
    content["layers"] = layers
    if not layers:
        content.pop("repeats", None)
    if not (needs.continuing or needs.hide):
        content.pop("continuing", None)
    return Verdict.parse(content)


def _circumstances(stream: ResidualStream) -> Any:
    """What may change about a model while it lives, and with it what tests find."""
    place, kind = input_device(stream.model).type, _dtype(stream.model)
    return stream.path, stream.depth, stream.width, kind, place, attention(stream)


def _remembered(stream: ResidualStream) -> Verdict | None:
    circumstances, verdict = _REMEMBERED.get(stream.model, (None, None))
    return verdict if circumstances == _circumstances(stream) else None


def _joined(own: Verdict, held: Verdict) -> Verdict:
    """What two verdicts on one model say together; where both say something, the first one counts."""
    layers = dict(held.layers)
    for name, entry in own.layers.items():
        if name not in layers or _hide_known(entry) or not _hide_known(layers[name]):
            layers[name] = entry
    said = {name: value for name, value in own.content().items() if value is not None}
    plain = {name: layers[name].content() for name in sorted(layers, key=int)}
    return Verdict.parse({**held.content(), **said, "layers": plain} if plain else {**held.content(), **said})


def _hide_known(entry: LayerVerdict) -> bool:
    return entry.hide is not None or entry.hide_refused is not None


def _first(stream: ResidualStream) -> Verdict:
    """What finding the stream says of it."""
    libraries = {name: version for name, version in versions().items() if name in _LIBRARIES}
    return Verdict.parse(
        {
            "stack": stream.path,
            "blocks": stream.depth,
            "width": stream.width,
            "streams": stream.axes.streams,
            "stream_dtype": str(stream.dtype).removeprefix("torch."),
            "embeddings": embedding_rows(stream.model),
            "attention": attention(stream),
            "left_out": left_out(stream.model),
            "versions": libraries,
        }
    )


def _knowing(
    stream: ResidualStream,
    reading: ReadingVerdict,
    continuing: ContinuingVerdict | None,
    layers: Any,
) -> ResidualStream:
    """The stream with what was found out about it."""
    how = stream.continuing
    if continuing is not None:
        way = continuing
        how = Continuing(way.kind, way.positions, way.whole_logits, way.padded, way.branching)
    return replace(
        stream,
        batching=Batching(reading.batching, reading.switch),
        continuing=how,
        skips=stream.skips | {int(name) for name, entry in layers if entry.skips},
    )
