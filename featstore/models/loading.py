"""A model reference to its configuration, tokenizer and weights.

A reference is a hub id, a local directory, or a GGUF file; all three go through transformers, always with
``trust_remote_code`` off. Failures become one line that says which model, what went wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featstore.errors import FeatstoreError, GatedModelError, ModelLoadError, SpecError, UnsupportedArchitectureError
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
from featstore.models.references import ModelSpec
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
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with _loading(spec):
        adapter = find_adapter(spec)
        if adapter:
            require_peft(adapter)
        base = adapter.base if adapter else spec
        config = AutoConfig.from_pretrained(**_where(base))
        where = _where(tokenizer_place(spec, base))
        try:
            loaded = load_tokenizer(where, control_tokens)
        except ModelLoadError as error:
            raise ModelLoadError(f"{_who(spec)}: {error}") from error
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
        attention: transformers' attention implementation; ``auto`` for sdpa where the model has it, else its own.
        device_map: Where its modules go, instead of one device.

    Returns:
        The model in eval mode in its place, gradients off.

    Raises:
        ModelLoadError: As :func:`inspect_model`, or the weights are missing.
        MissingPackageError: As :func:`inspect_model`.
        SpecError: Unknown dtype or device, a map that does not fit, or an attention that the model does not have.
        WeightsError: The checkpoint lacks tensors of the model, or holds others; or an adapter does not act.
    """
    from transformers import AutoModelForCausalLM

    # A wrong word for any of these is no failure of the model, as which `_loading` would report it.
    where = place(device, device_map, spec.name)
    with _loading(spec):
        adapter = find_adapter(spec)
        if adapter:
            require_peft(adapter)
        base = adapter.base if adapter else spec
        quantization = _quantization(base)
    keywords: dict[str, Any] = {"dtype": resolve_dtype(dtype, where.device), **_attention_keywords(base, attention)}
    modules = check_place(spec, where)
    packed = quantization is not None and not quantization.get("dequantized")
    with offload_folder(where) as folder:
        if modules is not None:
            keywords |= {"device_map": modules, **folder.keywords()}
        elif packed:
            # Packed weights cannot be moved or cast afterwards: they are read to where they stay.
            keywords["device_map"] = {"": str(where.device)}
        with _loading(spec):
            # What does not match is refused here, by name, rather than by transformers, which names nothing.
            model, found = AutoModelForCausalLM.from_pretrained(
                **_where(base),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **keywords,
                **(without_adapter() if adapter else {}),
            )
            without = _without(base, found["unexpected_keys"])
            if without:
                leave_out(model, str(without))
                found = {**found, "unexpected_keys": set(found["unexpected_keys"]) - without.names}
            refuse_incomplete(f"model {spec.name!r} ({base.ref})", model, found)
            if adapter:
                of_adapter = apply_adapter(model, adapter, _where(spec))
                refuse_incomplete(f"model {spec.name!r} ({spec.ref})", model, of_adapter, what="adapter")
        folder.belongs_to(model)
    if packed:
        # Some libraries unpack when the whole model runs for the first time; later passes run parts of it.
        with torch.no_grad(), _loading(spec):
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
    with _loading(spec):
        adapter = find_adapter(spec)
    if adapter:
        # peft wraps modules whose weights accelerate then brings to other places: the adapter would act wrongly.
        raise SpecError(
            f"--device-map {where.name}: {_who(spec)} has an adapter, which cannot be spread; merge it into its model "
            "with peft (merge_and_unload) and use the result, or leave the map out"
        )
    by_module = isinstance(where.modules, dict)
    return whole_map(where, skeleton(spec), _who(spec)) if by_module else where.modules


def running_attention(model: Any) -> str:
    """The attention implementation that a model's text blocks run.

    Args:
        model: A transformers causal language model, or a wrapper around one.
    """
    return str(model.config.get_text_config()._attn_implementation)  # noqa: SLF001 - the one place that says so


def choose_attention(spec: ModelSpec, wanted: str = "auto") -> str:
    """The attention implementation that a model will run, before its weights are read.

    Args:
        spec: Name and reference.
        wanted: One of transformers' implementations; ``auto`` for sdpa where the model has it, else its own.

    Raises:
        ModelLoadError: As :func:`inspect_model`.
        SpecError: The model does not have it.
    """
    if wanted == "auto":
        return running_attention(skeleton(spec))
    told = _attention_keywords(spec, wanted).get("attn_implementation")
    return running_attention(skeleton(spec, told))


def _attention_keywords(spec: ModelSpec, wanted: str) -> dict[str, str]:
    """What ``from_pretrained`` is told, so that the text blocks of a model run an attention implementation."""
    if wanted == "auto":
        return {}  # transformers takes sdpa where a model has it, part by part
    with suppress(ValueError, ImportError):
        skeleton(spec, wanted)
        return {"attn_implementation": wanted}
    own = running_attention(skeleton(spec))
    if own == wanted:
        return {}  # the text blocks have it; another part of the model, such as a vision tower, does not
    has = " and ".join(dict.fromkeys((own, "eager")))
    raise SpecError(
        f"attention {wanted!r}: {_who(spec)} does not have it here; it has {has}: use --attn auto or one of them"
    )


def skeleton(spec: ModelSpec, attention: str | None = None) -> Any:
    """A model without weights, on torch's meta device: what it is made of, in a fraction of a second.

    An adapter adds nothing to it.

    Args:
        spec: Name and reference.
        attention: transformers' attention implementation; None for the model's own choice.

    Raises:
        ModelLoadError: As :func:`inspect_model`, or no causal language model has this configuration.
        ImportError: The attention needs a package that is not installed.
        ValueError: The model does not have the attention.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    keywords = {} if attention is None else {"attn_implementation": attention}
    with _loading(spec):
        adapter = find_adapter(spec)
        config = AutoConfig.from_pretrained(**_where(adapter.base if adapter else spec))
    with _loading(spec, but=() if attention is None else (ImportError, ValueError)), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **keywords)


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
    check_ids(info.spec.name, ids, max(info.vocabulary, _embedding_rows(info.spec)), info.tokenizer)


def _embedding_rows(spec: ModelSpec) -> int:
    """Rows of the embedding of a model that is built without memory for its weights; 0 where it cannot be built."""
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = find_adapter(spec, local=True)
    try:
        config = AutoConfig.from_pretrained(**_where(adapter.base if adapter else spec))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return int(model.get_input_embeddings().weight.shape[0])
    except Exception:  # noqa: BLE001 - whatever prevents it: the configuration has to do
        return 0


def _quantization(base: ModelSpec) -> dict[str, Any] | None:
    """How a checkpoint is quantised; a GGUF file is not opened for that, which takes seconds."""
    from transformers import AutoConfig

    config = None if base.ref.endswith(".gguf") else AutoConfig.from_pretrained(**_where(base))
    return quantization_of(config, base.ref)


def _without(base: ModelSpec, unexpected: Collection[str]) -> Unread | None:
    """What a model of the text part of a checkpoint is complete without; None for nothing."""
    from transformers import AutoConfig

    if not unexpected or base.ref.endswith(".gguf"):
        return None
    return beside_text(AutoConfig.from_pretrained(**_where(base)), unexpected)


def _who(spec: ModelSpec) -> str:
    return f"model {spec.name!r} ({spec.ref})"


def _where(spec: ModelSpec) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` for a reference."""
    path = Path(spec.ref).expanduser()
    common: dict[str, Any] = {"trust_remote_code": False}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"model {spec.name!r}: no GGUF file at {spec.ref!r}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, **common}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path), **common}
    if spec.ref.startswith((".", "/", "~")):
        raise ModelLoadError(
            f"model {spec.name!r}: no directory {spec.ref!r}; give a hub id, a directory or a .gguf file"
        )
    return {
        "pretrained_model_name_or_path": spec.ref,
        "revision": spec.revision or "main",
        **common,
    }


@contextmanager
def _loading(spec: ModelSpec, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what transformers and the hub raise into one line about this model, but for some errors."""
    from huggingface_hub.errors import GatedRepoError
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    # A table of what does not match comes before the line that says so.
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        if isinstance(error, (FeatstoreError, *but)):
            raise
        chain = list(_causes(error))
        name = _who(spec)
        if any(isinstance(e, GatedRepoError) or "gated repo" in str(e).lower() for e in chain):
            raise GatedModelError(
                f"{name} is gated: accept its licence at https://huggingface.co/{spec.ref}, then run `hf auth login`"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"{name} cannot be loaded: {reason} Check the name with `featstore doctor`, the network (HF_HUB_OFFLINE), "
            "or give a local directory or GGUF file"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
