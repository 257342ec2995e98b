"""Load the models that a run's card names, and check them against the card."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from align.maps.fitted import Adapter, Aligner
from featstore.errors import AdapterError, SpecError
from featstore.models import loading as models
from featstore.models import residual as sites
from featstore.models.attention import AUTO, parse_attention
from featstore.models.devices import DeviceMap, check_models, input_device, place, resolve_dtype
from featstore.models.fingerprint import SCHEME, UNKNOWN, Weights
from featstore.models.probe.prove import Needs, Proven, further, key_of, prove
from featstore.models.probe.refusals import refuse_continuing, refuse_hiding, refuse_injecting
from featstore.models.references import NOTHING, Allowed, ModelSpec, parse_layers, parse_models
from featstore.models.stack import embedding_rows, residual_stream
from featstore.models.trust import remember, vouch
from featstore.models.verdict import Verdict
from featstore.models.weights import sampled_fingerprint, weights_fingerprint, weights_of
from featstore.runtime.console import err

#: What injecting needs of a card, and of its entry for every model of a map.
_IN_CARD = (("type",), ("store", "fingerprint"), ("mask", "sink_threshold"))
_MODEL = ("reference", "depth", "width", "config_sha256", "tokenizer_sha256", "median_norm")
#: What a card may leave open: states made elsewhere have no model that could be compared.
_OPEN = ("reference", "config_sha256", "tokenizer_sha256")
#: What is compared of a model, by the name that a message gives it, and where a card has it.
_ENTRIES = {
    "depth": "depth",
    "width": "width",
    "configuration": "config_sha256",
    "tokenizer": "tokenizer_sha256",
}


@dataclass(frozen=True)
class Loaded:
    """A model ready to be read from and injected into.

    Attributes:
        name: Its name in the card.
        info: Configuration and tokenizer.
        model: The language model with its head.
        stream: Its residual stream.
        median_norm: Median norm by layer, from the store's pilot.
        sink_threshold: Multiple of the median beyond which a token is a sink.
        weights: Fingerprints of the weights it was loaded with; none for a model that was made in memory.
        verdict: What was tested on the model.
        key: Under which the verdict is recalled.
    """

    name: str
    info: models.ModelInfo
    model: Any
    stream: sites.ResidualStream
    median_norm: dict[int, float]
    sink_threshold: float
    weights: Weights = UNKNOWN
    verdict: Verdict = field(default_factory=Verdict)
    key: str | None = None

    def __repr__(self) -> str:
        """One line; the model's own would fill a page."""
        kind = f"{self.info.family}, {self.stream.depth} blocks of width {self.stream.width}"
        return f"Loaded({self.name!r}, {kind}, {str(self.model.dtype).removeprefix('torch.')} on {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return input_device(self.model)

    def is_sink(self, states: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Which positions are attention sinks, judged at the layers given.

        Args:
            states: ``{layer: (..., width)}``.

        Returns:
            bool ``(...)``.
        """
        flags = [
            hidden.float().norm(dim=-1) > self.sink_threshold * self.median_norm[layer]
            for layer, hidden in states.items()
        ]
        # Under a device map, layers come from several devices.
        return torch.stack([flag.to(flags[0].device) for flag in flags]).any(dim=0)

    def ready(self, needs: Needs, *, allow_side_channel: bool = False) -> Loaded:
        """The model with the tests that a command needs, which it has passed.

        Args:
            needs: What the command is about to do.
            allow_side_channel: Whether layers are taken that leak past the stream.

        Raises:
            LayerRangeError: The model lacks a layer.
            ProbeError: A test fails.
        """
        loaded = self.tested(needs)
        refuse_injecting(self.name, loaded.verdict, needs.layers, allow_side_channel=allow_side_channel)
        if needs.continuing:
            refuse_continuing(self.name, loaded.verdict)
        if needs.hide:
            refuse_hiding(self.name, loaded.verdict, needs.layers)
        return loaded

    def tested(self, needs: Needs) -> Loaded:
        """The model with the tests that a command needs, passed or not.

        Args:
            needs: What the command is about to do.

        Raises:
            LayerRangeError: The model lacks a layer.
            NonFiniteStateError: The model gives NaN or infinity on ordinary tokens.
        """
        proven = further(Proven(self.stream, self.verdict, self.key, self.name), needs)
        return replace(self, stream=proven.stream, verdict=proven.verdict)


@dataclass(frozen=True)
class Known:
    """A model that is at hand and is the one the card names, but for its weights, which are not loaded yet.

    Attributes:
        spec: Where it is.
        info: Configuration and tokenizer.
    """

    spec: ModelSpec
    info: models.ModelInfo


def check(
    adapter: Adapter,
    name: str,
    overrides: Sequence[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: DeviceMap | None = None,
    allowed: Allowed = NOTHING,
) -> Known:
    """Find a model of a run and compare it with the card: all that can be wrong before the wait for its weights.

    Args:
        adapter: The maps of the run.
        name: Model name in its card.
        overrides: ``NAME=REF`` values for models that moved.
        device: Where it is to run.
        dtype: Compute dtype.
        device_map: Where its modules are to go, instead of one device.
        allowed: Whether a model is read that the card names and the user has not, and pickled weights.

    Raises:
        StrangeReferenceError: The card names a model that the user has not named.
        AdapterError: The model at hand is not the one the run was fitted to.
        ModelLoadError: There is none.
        SpecError: An override names a model the run does not have, or the device or dtype is unknown.
    """
    check_models(device_map, adapter.card["models"])
    where = place(device, device_map, name)
    resolve_dtype(dtype, where.device)
    _attention(adapter, name)
    [spec] = _specs(adapter, [name], overrides, allowed)
    known = _known(adapter, spec)
    models.check_place(known.spec, where)
    return known


def _specs(
    adapter: Adapter, names: Sequence[str], overrides: Sequence[str], allowed: Allowed, *, quiet: bool = False
) -> list[ModelSpec]:
    """Where models of a run are: where the user says, else where the card says and the user has named or allows."""
    typed = {spec.name: spec for spec in parse_models(overrides, allowed)}
    _check_names(adapter, typed)
    remember(typed.values(), quiet=quiet)
    held = {name: _reference(adapter, name, allowed) for name in names if name not in typed}
    vouch(list(held.values()), _card(adapter), quiet=quiet)
    return [typed.get(name) or held[name] for name in names]


def _reference(adapter: Adapter, name: str, allowed: Allowed) -> ModelSpec:
    """Where a run's card says that a model is."""
    entry = adapter.card["models"][name]
    reference, revision = entry["reference"], entry.get("revision")
    if not isinstance(reference, str) or not isinstance(revision, str | None):
        raise AdapterError(f"{_card(adapter)} says of {name!r} no reference that is text; train it again")
    return ModelSpec(name, reference, revision, allowed)


def _card(adapter: Adapter) -> str:
    return f"the card of {adapter.directory}"


def _check_names(adapter: Adapter, names: Iterable[str]) -> None:
    card = adapter.card["models"]
    unknown = sorted(set(names) - set(card))
    if unknown:
        raise SpecError(f"--model {unknown[0]}=...: this run has {', '.join(card)}; name one of these")


def _known(adapter: Adapter, spec: ModelSpec) -> Known:
    """Compare a model's configuration and tokenizer with the card; depth and width are measured once it is loaded."""
    # Prompts are read as the text was that the map was fitted to, where the card says how.
    info = models.inspect_model(spec, adapter.card.get("corpus", {}).get("control_tokens", "text"))
    facts: dict[str, Any] = {"configuration": info.config_hash, "tokenizer": info.tokenizer_hash}
    if info.config_hash != adapter.card["models"][spec.name]["config_sha256"]:
        # Of another model, these say best that it is one.
        claims = {"depth": info.depth, "width": info.width}
        facts = {what: value for what, value in claims.items() if value is not None} | facts
    _compare(adapter, spec, facts)
    return Known(spec, info)


def _compare(adapter: Adapter, spec: ModelSpec, at_hand: Mapping[str, Any]) -> None:
    entry = adapter.card["models"][spec.name]
    for what, value in at_hand.items():
        wanted = entry[_ENTRIES[what]]
        if value != wanted:
            raise AdapterError(
                f"model {spec.name!r} ({spec.ref}) has {what} {str(value)[:12]}, the run was fitted to "
                f"{str(wanted)[:12]}; point to the right model with --model {spec.name}=REF"
            )


class Models:
    """Models of a run: all of them checked at once, before the wait for the weights of the first.

    Args:
        adapter: The maps of the run.
        names: Model names in its card.
        overrides: ``NAME=REF`` for models that moved.
        device: Where they are to run.
        dtype: Compute dtype.
        device_map: Where their modules are to go, instead of one device.
        quiet: Do not say that weights are being loaded.
        given: Those that are loaded already, by name.
        needs: By name what is about to be done with a model; the tests that this needs are run when it is loaded.
        allow_side_channel: Whether layers are taken that leak past the stream.
        allowed: Whether models are loaded that the card names and the user has not, and pickled weights read.

    Raises:
        StrangeReferenceError: The card names models that the user has not named; the message shows all of them.
        AdapterError: A model at hand is not the one the run was fitted to.
        ModelLoadError: There is none.
        SpecError: An override names a model the run does not have, or the device or dtype is unknown.
    """

    def __init__(
        self,
        adapter: Adapter,
        names: Iterable[str],
        overrides: Sequence[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        device_map: DeviceMap | None = None,
        quiet: bool = False,
        given: Mapping[str, Loaded] | None = None,
        needs: Mapping[str, Needs] | None = None,
        allow_side_channel: bool = False,
        allowed: Allowed = NOTHING,
    ) -> None:
        self._needs, self._allow = needs or {}, allow_side_channel
        self._adapter, self._quiet = adapter, quiet
        self._device, self._dtype, self._device_map = device, dtype, device_map
        self._given = given or {}
        self.names = tuple(dict.fromkeys(names))
        """Without repetition, in their order."""
        wanted = [name for name in self.names if name not in self._given]
        _specs(adapter, wanted, overrides, allowed, quiet=quiet)
        where: dict[str, Any] = {"device": device, "dtype": dtype, "device_map": device_map}
        self._known = {name: check(adapter, name, overrides, allowed=allowed, **where) for name in wanted}
        for name, known in self._known.items():
            entry = adapter.card["models"][name]
            if Weights.recorded(entry).whole:
                _check_weights(known.spec, Weights(weights_fingerprint(known.spec, quiet=quiet)), entry)

    def info(self, name: str) -> models.ModelInfo:
        """A model's configuration and tokenizer."""
        return self._given[name].info if name in self._given else self._known[name].info

    def load(self, name: str) -> Loaded:
        """A model with its weights, which are read anew at every call: who asks decides how long they stay.

        Raises:
            AdapterError: Its weights are not those the run was fitted to.
            ModelLoadError: They cannot be loaded.
            ProbeError: A test fails that what is to be done with the model needs.
        """
        loaded = self._given.get(name) or _load(
            self._adapter,
            self._known[name],
            device=self._device,
            dtype=self._dtype,
            device_map=self._device_map,
            quiet=self._quiet,
        )
        return loaded.ready(self._needs.get(name, Needs()), allow_side_channel=self._allow)

    @contextmanager
    def lent(self, name: str) -> Iterator[Loaded]:
        """A model for as long as the context lasts, so that the next one is loaded when this one is gone.

        Whoever keeps it, or a part of it, keeps it alive. What was given stays.

        Args:
            name: Of the model.

        Raises:
            FeatstoreError: As :meth:`load`.
        """
        try:
            yield self.load(name)
        finally:
            if name not in self._given:
                self.freed()

    def freed(self) -> None:
        """Free models that nobody holds any more: their modules know each other, and counting does not find that."""
        if self._known:
            gc.collect()

    def load_all(self) -> dict[str, Loaded]:
        """All of them, by name."""
        return {name: self.load(name) for name in self.names}


def load(
    adapter: Adapter,
    name: str,
    overrides: Sequence[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> Loaded:
    """One model of a run, as :class:`Models` loads it.

    Args:
        adapter: The maps of the run.
        name: Model name in its card.
        overrides: ``NAME=REF`` for models that moved.
        device: Where to run.
        dtype: Compute dtype.
        quiet: Do not say that the weights are being loaded.

    Raises:
        AdapterError: The model at hand is not the one the run was fitted to.
        ModelLoadError: It cannot be loaded.
        SpecError: An override names a model the run does not have, or the device or dtype is unknown.
    """
    return Models(adapter, [name], overrides, device=device, dtype=dtype, quiet=quiet).load(name)


def _load(
    adapter: Adapter, known: Known, *, device: str, dtype: str, device_map: DeviceMap | None, quiet: bool
) -> Loaded:
    if not quiet:
        err.print(f"loading {known.spec.name}{known.info.peculiarities}")
    model = models.load_model(
        known.spec,
        device=device,
        dtype=dtype,
        attention=_attention(adapter, known.spec.name),
        device_map=device_map,
    )
    loaded = _loaded(adapter, known, model, weights_of(known.spec, model, quiet=quiet), fresh=True)
    if loaded.verdict.left_out and not quiet:
        err.print(f"{known.spec.name} is read without its {loaded.verdict.left_out}")
    return loaded


def _attention(adapter: Adapter, name: str) -> str:
    """The attention that the states of a card's model came from; cards from before it was named leave it open."""
    return parse_attention(adapter.card["models"][name].get("attention", AUTO), _card(adapter))


def _loaded(adapter: Adapter, known: Known, model: Any, weights: Weights, *, fresh: bool = False) -> Loaded:
    """A model whose weights are those of the card, with what the card says of its states.

    ``fresh`` says that it has just been read from the files with these weights.
    """
    entry = adapter.card["models"][known.spec.name]
    _check_weights(known.spec, weights, entry, model)
    medians = {int(k): float(v) for k, v in entry["median_norm"].items()}
    threshold = float(adapter.card["mask"]["sink_threshold"])
    # A model in memory may have been edited since it was read; only a fresh one is known by its files.
    key = key_of(model, weights=weights.whole, config=known.info.config_hash) if fresh else None
    proven = prove(model, key=key, name=known.spec.name)
    _compare(adapter, known.spec, {"depth": proven.verdict.blocks, "width": proven.verdict.width})
    stream = _started(proven.stream, known.info)
    return Loaded(known.spec.name, known.info, model, stream, medians, threshold, weights, proven.verdict, proven.key)


def _started(stream: sites.ResidualStream, info: models.ModelInfo) -> sites.ResidualStream:
    """A stream whose start token is the one that its tokenizer puts first; the configuration's where it puts none."""
    # Not our own tokens: where their bytes lie is found out over the whole vocabulary, and nobody asks for that here.
    first = info.tokenizer("a", return_special_tokens_mask=True, return_attention_mask=False)
    ids, special = first["input_ids"], first["special_tokens_mask"]
    if not ids or not special[0] or int(ids[0]) >= embedding_rows(stream.model):
        return stream
    return replace(stream, start=int(ids[0]))


def adopt(adapter: Adapter, name: str, model: Any, allowed: Allowed = NOTHING) -> Loaded:
    """Take a model that is loaded already, and check it as one that is loaded here.

    Of weights in memory a sample is compared; of a :class:`Loaded` also the fingerprint of the files it came from.
    Its tokenizer is read from where the model came from; of a model that came from nowhere, from where the card says.

    Args:
        adapter: The maps of the run.
        name: Model name in its card.
        model: A transformers causal language model, or a :class:`Loaded`, of this run or another.
        allowed: Whether a tokenizer is read from where the card says, though the user has not named that.

    Raises:
        StrangeReferenceError: The model came from nowhere, and the card names a place that the user has not named.
        AdapterError: It is not the model that the run was fitted to.
        ModelLoadError: Its tokenizer cannot be found.
        SpecError: The run has no such model.
        UnsupportedArchitectureError: It has no decoder blocks.
    """
    _check_names(adapter, [name])
    entry = adapter.card["models"][name]
    if isinstance(model, Loaded):
        info = model.info
        known = Known(ModelSpec(name, info.spec.ref, info.spec.revision), info)
        _compare(
            adapter,
            known.spec,
            {"configuration": info.config_hash, "tokenizer": info.tokenizer_hash},
        )
        # The files may be those of the card, and the weights in memory edited since.
        sample = sampled_fingerprint(model.model)
        _check_weights(known.spec, Weights(None, sample), entry, model.model)
        return _loaded(adapter, known, model.model, Weights(model.weights.whole, sample))
    stream = residual_stream(model)
    place = str(getattr(model, "name_or_path", "") or "")
    if place:
        # Whoever loaded it named it.
        spec = ModelSpec(name, place, entry.get("revision") if place == entry["reference"] else None, allowed)
    else:
        spec = _reference(adapter, name, allowed)
        vouch([spec], _card(adapter))
    _compare(adapter, spec, {"depth": stream.depth, "width": stream.width})
    return _loaded(adapter, _known(adapter, spec), model, Weights(None, sampled_fingerprint(model)))


def _check_weights(spec: ModelSpec, weights: Weights, entry: Mapping[str, Any], model: Any = None) -> None:
    """Refuse a fine-tune: its configuration and tokenizer are those of the model it came from.

    A card whose store recorded no fingerprint passes, and so does one whose fingerprint cannot be compared with what is
    known of the model at hand.

    Args:
        spec: Name and reference.
        weights: Of the model at hand.
        entry: The card's entry for the model.
        model: As loaded; None before that.

    Raises:
        AdapterError: The weights are others than the card's.
    """
    recorded = Weights.recorded(entry)
    compared = recorded.against(weights)
    if compared is None or compared[0] == compared[1]:
        return
    wanted, at_hand = (value.removeprefix(SCHEME)[:12] for value in compared)
    if not compared[0].startswith(SCHEME) and model is not None:
        # A sample is rounded to bfloat16, which undoes what bfloat16 and float32 do to the same weights. What float16
        # has rounded near zero, it cannot undo.
        dtypes = {entry.get("compute_dtype"), str(next(model.parameters()).dtype).removeprefix("torch.")}
        if "float16" in dtypes and len(dtypes) > 1:
            return
    raise AdapterError(
        f"model {spec.name!r} ({spec.ref}) has weights {at_hand}, the run was fitted to {wanted} under the same "
        f"configuration; point to the right model with --model {spec.name}=REF, or extract and train again with this "
        "one"
    )


def choose(adapter: Adapter, layers: str | None) -> list[Aligner]:
    """The maps of a run, or those of some source layers; of every kind.

    Args:
        adapter: The maps of the run.
        layers: Source layers as typed, None for all.

    Raises:
        AdapterError: The run has no map, or one that holds NaN or infinity.
        SpecError: The run has no such layer.
    """
    chosen = list(adapter.aligners.values())
    _check_maps(adapter, chosen)
    if layers is None:
        return chosen
    depths = {name: int(entry["depth"]) for name, entry in adapter.card["models"].items()}
    wanted = parse_layers([layers], depths)
    picked = [a for a in chosen if set(a.pair.source_layers) & set(wanted[a.pair.source])]
    if not picked:
        held = sorted({layer for a in chosen for layer in a.pair.source_layers})
        raise SpecError(f"--layers {layers}: this run maps layers {', '.join(map(str, held))}; choose among these")
    return picked


def _check_maps(adapter: Adapter, aligners: Sequence[Aligner]) -> None:
    """Refuse a damaged run before a model is looked for: its weights may take minutes."""
    if not aligners:
        raise AdapterError(f"the run in {adapter.directory} holds no map; train it again")
    for aligner in aligners:
        broken = [name for name, tensor in aligner.tensors.items() if not np.isfinite(tensor).all()]
        if broken:
            raise AdapterError(
                f"{aligner.pair.key}: {broken[0]} in {adapter.directory} holds NaN or infinity; train it again"
            )


def check_card(adapter: Adapter) -> None:
    """Check that a run's card says what injecting its maps needs, and that its sources do not read ahead.

    Args:
        adapter: The maps of the run.

    Raises:
        AdapterError: It lacks something.
        ProbeError: The states of a source know the text after them.
    """
    pairs = [aligner.pair for aligner in adapter.aligners.values()]
    names = dict.fromkeys(name for pair in pairs for name in (pair.source, pair.target))
    for path in (*_IN_CARD, *(("models", name, key) for name in names for key in _MODEL)):
        at: Any = adapter.card
        for key in path:
            if not isinstance(at, Mapping) or key not in at or (at[key] is None and key not in _OPEN):
                raise AdapterError(f"the card of {adapter.directory} lacks {'.'.join(path)}; train it again")
            at = at[key]
    for name in dict.fromkeys(pair.source for pair in pairs):
        verified = adapter.card["models"][name].get("verified")
        if verified is not None:
            refuse_injecting(name, Verdict.parse(verified, _card(adapter)), ())
