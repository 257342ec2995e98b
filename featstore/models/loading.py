"""A model reference to its configuration, tokenizer and weights.

A reference is a hub id, a local directory, or a GGUF file; all three go through transformers, always with
``trust_remote_code`` off. Failures become one line that says which model, what went wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featstore.errors import ModelLoadError, SpecError, UnsupportedArchitectureError
from featstore.models import configuration
from featstore.models.adapters import apply_adapter, find_adapter, require_peft, tokenizer_place, without_adapter
from featstore.models.devices import (
    DeviceMap,
    Modules,
    Placement,
    input_device,
    offload_folder,
    place,
    resolve_dtype,
    whole_map,
)
from featstore.models.files import weight_files
from featstore.models.opening import choose, loading, located, read_config, who
from featstore.models.pickled import refuse_pickled_adapter, said_of_a_hub, weights_keywords
from featstore.models.references import ModelSpec
from featstore.models.skeletons import (
    asked_of,
    check_running,
    embedding_rows,
    skeleton,
)
from featstore.models.tokenizers import load_tokenizer
from featstore.models.unread import Unread, beside_text, leave_out
from featstore.models.weights import check_ids, describe_weights, quantization_of, refuse_incomplete
from featstore.runtime.provenance import digest


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are loaded.

    Attributes:
        spec: Name and reference as given.
        family: ``model_type`` of the configuration (``llama``, ``mistral``, ...).
        depth: Number of blocks L that the configuration claims; None where it names none.
        width: Hidden width d that the configuration claims; None where it names none.
        vocabulary: Number of token ids.
        context: Longest sequence the position encoding was made for; :data:`featstore.models.configuration.UNLIMITED`
            where nothing limits it.
        config_hash: SHA-256 of the configuration without volatile entries.
        tokenizer_hash: SHA-256 of the tokenizer's full definition.
        tokenizer: A fast tokenizer (offsets are needed).
        quantization: How the checkpoint is quantised, or None.
        adapter: The adapter that is applied to the model, or None.
        start_token: ``{"id", "text"}`` of the token that the tokenizer puts before a text, or None.
        start_token_asked: The start token that the tokenizer's configuration asks for, or None.
    """

    spec: ModelSpec
    family: str
    depth: int | None
    width: int | None
    vocabulary: int
    context: int
    config_hash: str
    tokenizer_hash: str
    tokenizer: Any
    quantization: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    start_token: dict[str, Any] | None = None
    start_token_asked: str | None = None

    @property
    def peculiarities(self) -> str:
        """What is out of the ordinary about its weights, to follow the words that it is being loaded; often empty."""
        return describe_weights(self.quantization, self.adapter)

    @property
    def blocks(self) -> int:
        """Number of blocks L, where something depends on it.

        Raises:
            UnsupportedArchitectureError: The configuration names none, and none was measured.
        """
        return self._known(self.depth, "number of blocks")

    @property
    def hidden(self) -> int:
        """Hidden width d, where something depends on it.

        Raises:
            UnsupportedArchitectureError: The configuration names none, and none was measured.
        """
        return self._known(self.width, "hidden width")

    def _known(self, value: int | None, what: str) -> int:
        if value is None:
            raise UnsupportedArchitectureError(
                f"model {self.spec.name!r} ({self.spec.ref}): the configuration of a {self.family} names no {what}, "
                "and none was measured; use another model"
            )
        return value

    def describe(self) -> dict[str, Any]:
        """The entries recorded in stores and adapter cards."""
        return {
            "reference": self.spec.ref,
            "revision": self.spec.revision,
            "family": self.family,
            "depth": self.depth,
            "width": self.width,
            "vocabulary": self.vocabulary,
            "config_sha256": self.config_hash,
            "tokenizer_sha256": self.tokenizer_hash,
            "start_token": self.start_token,
            **({"start_token_asked": self.start_token_asked} if self.start_token_asked else {}),
            **({"quantization": self.quantization} if self.quantization else {}),
            **({"adapter": self.adapter} if self.adapter else {}),
        }


def inspect_model(spec: ModelSpec, control_tokens: str = "text") -> ModelInfo:
    """Load a model's configuration and tokenizer.

    Args:
        spec: Name and reference.
        control_tokens: What control tokens that a text quotes are read as: ``text`` or ``special``.

    Raises:
        ModelLoadError: Not found, no network, damaged, no causal language model, without a fast tokenizer, or with
            one whose files cannot be read as they mean.
        GatedModelError: The licence must be accepted first.
        MissingPackageError: An adapter lies beside it, and peft is not installed.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    with loading(spec):
        adapter = find_adapter(spec)
        if adapter:
            require_peft(adapter)
            refuse_pickled_adapter(adapter)
        base = adapter.base if adapter else spec
        config = read_config(base)
        where = located(tokenizer_place(spec, base))
        try:
            loaded = load_tokenizer(where, control_tokens)
        except ModelLoadError as error:
            raise ModelLoadError(f"{who(spec)}: {error}") from error
    ids = configuration.vocabulary(config)
    if ids is None:
        raise ModelLoadError(
            f"model {spec.name!r} ({spec.ref}): the configuration of a {config.model_type} names no vocabulary; give a "
            "causal language model"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelLoadError(
            f"model {spec.name!r} ({spec.ref}): transformers has no causal language model for a {config.model_type}; "
            "give one, or the text model inside this one"
        )
    return ModelInfo(
        spec=spec,
        family=str(config.model_type),
        depth=configuration.claimed_depth(config),
        width=configuration.claimed_width(config),
        vocabulary=ids,
        context=configuration.context_length(config),
        config_hash=digest(configuration.identity(config)),
        tokenizer_hash=loaded.hash,
        tokenizer=loaded.tokenizer,
        quantization=quantization_of(config, base.ref),
        adapter=adapter.describe() if adapter else None,
        start_token=loaded.start,
        start_token_asked=loaded.asked,
    )


def load_model(
    spec: ModelSpec,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    device_map: DeviceMap | None = None,
) -> nn.Module:
    """Load a causal language model for inference.

    Args:
        spec: Name and reference.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: ``auto`` (bfloat16 on CUDA, float32 on CPU), or a name.
        attention: One of :data:`~featstore.models.attention.ATTENTIONS`; ``auto`` for sdpa where the model has it,
            else its own.
        device_map: Where its modules go, instead of one device.

    Returns:
        The model in eval mode in its place, gradients off.

    Raises:
        ModelLoadError: As :func:`inspect_model`, or the weights are missing.
        PickledWeightsError: There are no weights but pickled ones, and they are not allowed.
        MissingPackageError: As :func:`inspect_model`.
        AttentionError: The attention is not in the list, the model does not have it, or another one runs.
        SpecError: Unknown dtype or device, or a map that does not fit.
        WeightsError: The checkpoint lacks tensors of the model, or holds others; or an adapter does not act.
    """
    from transformers import AutoModelForCausalLM

    # A wrong word for any of these is no failure of the model, as which `loading` would report it.
    where = place(device, device_map, spec.name)
    with loading(spec):
        adapter = find_adapter(spec)
        if adapter:
            require_peft(adapter)
            refuse_pickled_adapter(adapter)
        base = adapter.base if adapter else spec
        config = read_config(base)
        quantization = quantization_of(None if base.ref.endswith(".gguf") else config, base.ref)
        keywords = weights_keywords(base, config)
    choose(config, asked_of(base, attention))
    keywords |= {"dtype": resolve_dtype(dtype, where.device)}
    modules = check_place(spec, where)
    packed = quantization is not None and not quantization.get("dequantized")
    with offload_folder(where) as folder:
        if modules is not None:
            keywords |= {"device_map": modules, **folder.keywords()}
        elif packed:
            # Packed weights cannot be moved or cast afterwards: they are read to where they stay.
            keywords["device_map"] = {"": str(where.device)}
        with loading(spec):
            # What does not match is refused here, by name, rather than by transformers, which names nothing.
            try:
                model, found = AutoModelForCausalLM.from_pretrained(
                    **located(base),
                    config=config,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **keywords,
                    **(without_adapter() if adapter else {}),
                )
            except OSError as error:
                refusal = said_of_a_hub(base, error)
                if refusal is None:
                    raise
                raise refusal from error
            check_running(base, model, attention)
            without = _without(base, found["unexpected_keys"])
            if without:
                leave_out(model, str(without))
                found = {**found, "unexpected_keys": set(found["unexpected_keys"]) - without.names}
            refuse_incomplete(f"model {spec.name!r} ({base.ref})", model, found)
            if adapter:
                of_adapter = apply_adapter(model, adapter, located(spec))
                refuse_incomplete(f"model {spec.name!r} ({spec.ref})", model, of_adapter, what="adapter")
        folder.belongs_to(model)
    if packed:
        # Some libraries unpack when the whole model runs for the first time; later passes run parts of it.
        with torch.no_grad(), loading(spec):
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=input_device(model)), use_cache=False)
    elif modules is None:
        model.to(where.device)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model


def check_place(spec: ModelSpec, where: Placement) -> str | Modules | None:
    """Whether a device map fits a model, before its weights are read.

    Args:
        spec: Name and reference.
        where: From :func:`featstore.models.devices.place`.

    Returns:
        The map as transformers takes it.

    Raises:
        ModelLoadError: As :func:`inspect_model`.
        SpecError: The model has no such module, one of its modules has no device, or an adapter lies beside it.
    """
    if where.modules is None:
        return None
    with loading(spec):
        adapter = find_adapter(spec)
    if adapter:
        # peft wraps modules whose weights accelerate then brings to other places: the adapter would act wrongly.
        raise SpecError(
            f"--device-map {where.name}: {who(spec)} has an adapter, which cannot be spread; merge it into its model "
            "with peft (merge_and_unload) and use the result, or leave the map out"
        )
    by_module = isinstance(where.modules, dict)
    return whole_map(where, skeleton(spec), who(spec)) if by_module else where.modules


def weight_bytes(spec: ModelSpec) -> int | None:
    """Size of a model's weight files, or None where they are not on this disk yet.

    Args:
        spec: Name and reference.
    """
    adapter = find_adapter(spec, local=True)
    files = (*weight_files(adapter.base), *adapter.files) if adapter else weight_files(spec)
    return sum(file.stat().st_size for file in files) or None


def refuse_unknown_ids(info: ModelInfo, ids: NDArray[np.integer[Any]]) -> None:
    """Refuse token ids that a model's embedding has no row for, before its weights are loaded.

    Args:
        info: The model.
        ids: Token ids of any shape.

    Raises:
        VocabularyError: The message names the token, its id, the embedding's rows and the remedy.
    """
    if not ids.size or int(ids.max()) < info.vocabulary:
        return
    # Some embeddings have more rows than the configuration has token ids: only the model itself tells.
    check_ids(info.spec.name, ids, max(info.vocabulary, embedding_rows(info.spec)), info.tokenizer)


def _without(base: ModelSpec, unexpected: Collection[str]) -> Unread | None:
    """What a model of the text part of a checkpoint is complete without; None for nothing."""
    if not unexpected or base.ref.endswith(".gguf"):
        return None
    return beside_text(read_config(base), unexpected)
