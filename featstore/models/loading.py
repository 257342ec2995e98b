"""A model reference to its configuration, tokenizer and weights.

A reference is a hub id, a local directory, or a GGUF file; all three go through transformers, always with
``trust_remote_code`` off. Failures become one line that says which model, what went wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featstore.errors import FeatstoreError, GatedModelError, ModelLoadError, SpecError
from featstore.models.adapters import apply_adapter, find_adapter, require_peft, tokenizer_place, without_adapter
from featstore.models.files import weight_files
from featstore.models.references import ModelSpec
from featstore.models.weights import check_ids, describe_weights, quantization_of, refuse_incomplete
from featstore.runtime.provenance import digest

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

#: Configuration entries that describe the file or the library rather than the model.
_VOLATILE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "use_cache",
)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are loaded.

    Attributes:
        spec: Name and reference as given.
        family: ``model_type`` of the configuration (``llama``, ``mistral``, ...).
        depth: Number of blocks L.
        width: Hidden width d.
        vocabulary: Number of token ids.
        context: Longest sequence the position encoding was made for.
        config_hash: SHA-256 of the configuration without volatile entries.
        tokenizer_hash: SHA-256 of the tokenizer's full definition.
        tokenizer: A fast tokenizer (offsets are needed).
        quantization: How the checkpoint is quantised, or None.
        adapter: The adapter that is applied to the model, or None.
    """

    spec: ModelSpec
    family: str
    depth: int
    width: int
    vocabulary: int
    context: int
    config_hash: str
    tokenizer_hash: str
    tokenizer: Any
    quantization: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None

    @property
    def peculiarities(self) -> str:
        """What is out of the ordinary about its weights, to follow the words that it is being loaded; often empty."""
        return describe_weights(self.quantization, self.adapter)

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
            **({"quantization": self.quantization} if self.quantization else {}),
            **({"adapter": self.adapter} if self.adapter else {}),
        }


def inspect_model(spec: ModelSpec) -> ModelInfo:
    """Load a model's configuration and tokenizer.

    Args:
        spec: Name and reference.

    Raises:
        ModelLoadError: Not found, no network, damaged, or without a fast tokenizer.
        GatedModelError: The licence must be accepted first.
        MissingPackageError: An adapter lies beside it, and peft is not installed.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _loading(spec):
        adapter = find_adapter(spec)
        if adapter:
            require_peft(adapter)
        base = adapter.base if adapter else spec
        config = AutoConfig.from_pretrained(**_where(base))
        tokenizer = AutoTokenizer.from_pretrained(**_where(tokenizer_place(spec, base)), use_fast=True)
    if not tokenizer.is_fast:
        raise ModelLoadError(
            f"model {spec.name!r} ({spec.ref}): its tokenizer gives no character offsets; a fast tokenizer is needed"
        )
    values = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    text = config.get_text_config()
    definition = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]
    return ModelInfo(
        spec=spec,
        family=str(config.model_type),
        depth=int(text.num_hidden_layers),
        width=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        context=int(getattr(text, "max_position_embeddings", 1 << 30)),
        config_hash=digest(values),
        tokenizer_hash=digest(definition),
        tokenizer=tokenizer,
        quantization=quantization_of(config, base.ref),
        adapter=adapter.describe() if adapter else None,
    )


def load_model(spec: ModelSpec, *, device: str = "auto", dtype: str = "auto", attention: str = "sdpa") -> nn.Module:
    """Load a causal language model for inference.

    Args:
        spec: Name and reference.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: ``auto`` (bfloat16 on CUDA, float32 on CPU), or a name.
        attention: transformers' attention implementation.

    Returns:
        The model in eval mode on the device, gradients off.

    Raises:
        ModelLoadError: As :func:`inspect_model`, or the weights are missing.
        MissingPackageError: As :func:`inspect_model`.
        SpecError: Unknown dtype or device.
        WeightsError: The checkpoint lacks tensors of the model, or holds others; or an adapter does not act.
    """
    from transformers import AutoModelForCausalLM

    # A wrong word for either is no failure of the model, as which `_loading` would report it.
    place = resolve_device(device)
    chosen = resolve_dtype(dtype, place)
    with _loading(spec):
        adapter = find_adapter(spec)
        if adapter:
            require_peft(adapter)
        base = adapter.base if adapter else spec
        more: dict[str, Any] = without_adapter() if adapter else {}
        quantization = _quantization(base)
        packed = quantization is not None and not quantization.get("dequantized")
        if packed:
            # Packed weights cannot be moved or cast afterwards: they are read to where they stay.
            more["device_map"] = {"": str(place)}
        # What does not match is refused here, by name, rather than by transformers, which names nothing.
        model, found = AutoModelForCausalLM.from_pretrained(
            **_where(base),
            dtype=chosen,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **more,
        )
        refuse_incomplete(f"model {spec.name!r} ({base.ref})", model, found)
        if adapter:
            of_adapter = apply_adapter(model, adapter, _where(spec))
            refuse_incomplete(f"model {spec.name!r} ({spec.ref})", model, of_adapter, what="adapter")
        if packed:
            # Some libraries unpack when the whole model runs for the first time; later passes run parts of it.
            with torch.no_grad():
                model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=place), use_cache=False)
        else:
            model.to(place)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model


def resolve_device(name: str) -> torch.device:
    """Turn ``--device`` into a device.

    Args:
        name: ``auto`` or a torch device name.

    Raises:
        SpecError: Not a device, or CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpecError(f"device {name!r}: write auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SpecError(f"device {name!r}: this machine has no usable CUDA device; use --device cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn ``--dtype`` into a dtype.

    Args:
        name: ``auto`` or a dtype name.
        device: Where the model will run.

    Raises:
        SpecError: Unknown name.
    """
    if name == "auto":
        # CPUs without AVX512-BF16 emulate bfloat16 products many times slower than float32.
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise SpecError(f"dtype {name!r}: choose one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


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
def _loading(spec: ModelSpec) -> Iterator[None]:
    """Turn what transformers and the hub raise into one line about this model."""
    from huggingface_hub.errors import GatedRepoError
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    # A table of what does not match comes before the line that says so.
    logging.set_verbosity_error()
    try:
        yield
    except FeatstoreError:
        raise
    except Exception as error:
        chain = list(_causes(error))
        name = f"model {spec.name!r} ({spec.ref})"
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
