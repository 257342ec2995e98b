"""The models an adapter's card names, checked against the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align.aligners import Adapter, Aligner
from featstore import models, sites
from featstore.console import err
from featstore.errors import AdapterError, SpecError
from featstore.spec import ModelSpec, parse_layers, parse_models


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
    """

    name: str
    info: models.ModelInfo
    model: Any
    stream: sites.ResidualStream
    median_norm: dict[int, float]
    sink_threshold: float

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(self.stream.decoder.parameters()).device

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
        return torch.stack(flags).any(dim=0)


def load(
    adapter: Adapter,
    name: str,
    overrides: Sequence[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
) -> Loaded:
    """Load a model of a run.

    Args:
        adapter: The run's adapter.
        name: Model name in its card.
        overrides: ``NAME=REF`` values for models that moved.
        device: Where to run.
        dtype: Compute dtype.
        quiet: Do not say that the weights are being loaded.

    Raises:
        AdapterError: The model at hand is not the one the adapter was fitted to.
        ModelLoadError: It cannot be loaded.
        SpecError: An override names a model the run does not have, or the device or dtype is unknown.
    """
    card = adapter.card["models"]
    moved = {spec.name: spec for spec in parse_models(overrides)}
    unknown = sorted(set(moved) - set(card))
    if unknown:
        raise SpecError(f"--model {unknown[0]}=...: this run has {', '.join(card)}")
    # Anything wrong with the words comes before the wait for the weights, and before it is announced.
    models.resolve_dtype(dtype, models.resolve_device(device))
    entry = card[name]
    spec = moved.get(name, ModelSpec(name, entry["reference"], entry.get("revision")))
    info = models.inspect_model(spec)
    for what, at_hand, wanted in (
        ("depth", info.depth, entry["depth"]),
        ("width", info.width, entry["width"]),
        ("configuration", info.config_hash, entry["config_sha256"]),
        ("tokenizer", info.tokenizer_hash, entry["tokenizer_sha256"]),
    ):
        if at_hand != wanted:
            raise AdapterError(
                f"model {name!r} ({spec.ref}) has {what} {str(at_hand)[:12]}, the adapter was fitted to "
                f"{str(wanted)[:12]}; point to the right model with --model {name}=REF"
            )
    if not quiet:
        err.print(f"loading {name}")
    model = models.load_model(spec, device=device, dtype=dtype, attention=entry.get("attention", "sdpa"))
    _check_weights(spec, model, entry)
    medians = {int(k): float(v) for k, v in entry["median_norm"].items()}
    threshold = float(adapter.card["mask"]["sink_threshold"])
    return Loaded(name, info, model, sites.residual_stream(model), medians, threshold)


def _check_weights(spec: ModelSpec, model: Any, entry: Mapping[str, Any]) -> None:
    """Refuse a fine-tune: its configuration and tokenizer are those of the model it came from.

    It takes milliseconds: :func:`featstore.models.weights_fingerprint` hashes a few values of every tensor. A card
    whose store recorded no fingerprint passes.
    """
    wanted = entry.get("weights_fingerprint")
    dtypes = {entry.get("compute_dtype"), str(next(model.parameters()).dtype).removeprefix("torch.")}
    # A fingerprint rounds to bfloat16, which undoes what bfloat16 and float32 do to the same weights. What float16 has
    # rounded near zero, it cannot undo.
    if wanted is None or ("float16" in dtypes and len(dtypes) > 1):
        return
    at_hand = models.weights_fingerprint(model)
    if at_hand != wanted:
        raise AdapterError(
            f"model {spec.name!r} ({spec.ref}) has weights {at_hand[:12]}, the adapter was fitted to "
            f"{str(wanted)[:12]} under the same configuration; point to the right model with --model {spec.name}=REF, "
            "or extract and train again with this one"
        )


def choose(adapter: Adapter, layers: str | None) -> list[Aligner]:
    """The maps of a run that can be injected, or those of some source layers.

    Args:
        adapter: The run's adapter.
        layers: Source layers as typed, None for all.

    Raises:
        AdapterError: Its maps take windows, not states.
        SpecError: The run has no such layer.
    """
    chosen = list(adapter.aligners.values())
    if not all(aligner.takes_rows for aligner in chosen):
        raise AdapterError(
            f"the run in {adapter.directory} is of type {adapter.card['type']!r}, whose maps read whole windows: their "
            "states cannot be injected token by token; its figures are in its metrics.json"
        )
    if layers is None:
        return chosen
    depths = {name: int(entry["depth"]) for name, entry in adapter.card["models"].items()}
    wanted = parse_layers([layers], depths)
    picked = [a for a in chosen if set(a.pair.source_layers) & set(wanted[a.pair.source])]
    if not picked:
        held = sorted({layer for a in chosen for layer in a.pair.source_layers})
        raise SpecError(f"--layers {layers}: this run maps layers {', '.join(map(str, held))}")
    return picked
