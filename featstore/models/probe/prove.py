"""Prove the instrument on the model at hand: the tests a command needs, each once, and what they refuse.

Tests are looked up by the weights, the configuration and what ran them, in a file of the cache directory; what has been
tested on a model is not tested again by the next command.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from featstore.errors import CorruptDataError, FeatstoreError, ProbeError
from featstore.models.hiding import attention
from featstore.models.probe.continuing import test_continuing
from featstore.models.probe.hiding import test_hiding
from featstore.models.probe.injecting import test_injecting, two_texts
from featstore.models.probe.reading import test_reading
from featstore.models.residual import Batching, Continuing, ResidualStream
from featstore.models.stack import embedding_rows, residual_stream
from featstore.models.verdict import ContinuingVerdict, LayerVerdict, ReadingVerdict, Verdict
from featstore.runtime.caches import cache_directory
from featstore.runtime.provenance import digest, read_json, versions, write_json

#: Raised when a test changes: what it found before is looked for again.
_VERSION = 1
_LIBRARIES = ("torch", "transformers")


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


@dataclass(frozen=True, eq=False)
class Proven:
    """A model's stream with what was found out about it.

    Attributes:
        stream: Knows how its windows are batched, how it continues, and which blocks may be skipped.
        verdict: What was tested.
        key: Under which it is recalled; None where it is not.
    """

    stream: ResidualStream
    verdict: Verdict
    key: str | None = None


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


def recalled(key: str) -> Verdict | None:
    """What earlier commands found out under a key, or None.

    Args:
        key: From :func:`probe_key`.
    """
    path = _path(key)
    try:
        return Verdict.parse(read_json(path), str(path)) if path.is_file() else None
    except (CorruptDataError, OSError):
        return None  # it can be found out again


def _path(key: str) -> Path:
    return cache_directory() / "verdicts" / f"{key}.json"


def _keep(key: str, verdict: Verdict) -> None:
    try:
        write_json(_path(key), verdict.content())
    except (OSError, FeatstoreError):
        return  # a cache that cannot be written is no cache


def prove(model: nn.Module, needs: Needs = Needs(), *, key: str | None = None) -> Proven:
    """Find a model's stream and run the tests that a command needs and that have not been run.

    Args:
        model: A causal language model in eval mode.
        needs: What the command is about to do.
        key: From :func:`probe_key`; None where the model lies nowhere on disk, and nothing is recalled.

    Raises:
        UnsupportedArchitectureError: As :func:`featstore.models.stack.residual_stream`.
        ModelLoadError: The model's forward pass raises.
        LayerRangeError: A layer the model does not have.
        ProbeError: The model gives no finite states.
    """
    stream = residual_stream(model)
    held = recalled(key) if key else None
    if held is not None and (held.stack, held.blocks, held.width) != (stream.path, stream.depth, stream.width):
        held = None
    return further(Proven(stream, held or _first(stream), key), needs)


def further(proven: Proven, needs: Needs) -> Proven:
    """Run those tests that a command needs and that a verdict lacks, and keep what comes out.

    Args:
        proven: A stream and what is known of it.
        needs: What the command is about to do.

    Raises:
        LayerRangeError: A layer the model does not have.
        ProbeError: The model gives no finite states.
    """
    stream, verdict = proven.stream, proven.verdict
    for layer in needs.layers:
        stream.check(layer)
    found: dict[str, Any] = {}
    if verdict.reading is None:
        found["reading"] = test_reading(stream)
    reading = verdict.reading or found["reading"]
    if reading.future is None:
        raise ProbeError(
            f"model {type(stream.model).__name__} gives NaN or infinity on ordinary tokens; try --dtype float32, or "
            "check its weights"
        )
    continuing = verdict.continuing
    if continuing is None and (needs.continuing or needs.hide):
        found["continuing"] = continuing = test_continuing(stream) or ContinuingVerdict(kind="none")
    stream = _knowing(stream, reading, continuing, verdict.layers.items())
    layers = dict(verdict.layers)
    missing = [k for k in needs.layers if str(k) not in layers or (needs.hide and not _hide_known(layers[str(k)]))]
    if missing:
        texts = two_texts(stream)
        found["repeats"] = texts.repeats
        for layer in missing:
            entry = layers.get(str(layer)) or test_injecting(stream, texts, layer)
            stream = _knowing(stream, reading, continuing, [(str(layer), entry)])
            if needs.hide:
                hidden = test_hiding(stream, texts, layer).content()
                entry = LayerVerdict.parse({**entry.content(), **hidden})
            layers[str(layer)] = entry
        found["layers"] = {name: each.content() for name, each in sorted(layers.items(), key=lambda item: int(item[0]))}
    if found:
        plain = {name: value.content() if hasattr(value, "content") else value for name, value in found.items()}
        verdict = Verdict.parse({**verdict.content(), **plain})
        if proven.key:
            _keep(proven.key, verdict)
    return Proven(stream, verdict, proven.key)


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
