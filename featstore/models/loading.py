"""A model reference to its configuration, tokenizer and weights.

A reference is a hub id, a local directory, or a GGUF file; all three go through transformers, always with
``trust_remote_code`` off. Failures become one line that says which model, what went wrong and what to do.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featstore.errors import GatedModelError, ModelLoadError, SpecError
from featstore.models.references import ModelSpec
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
        }


def inspect_model(spec: ModelSpec) -> ModelInfo:
    """Load a model's configuration and tokenizer.

    Args:
        spec: Name and reference.

    Raises:
        ModelLoadError: Not found, no network, damaged, or without a fast tokenizer.
        GatedModelError: The licence must be accepted first.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _loading(spec):
        config = AutoConfig.from_pretrained(**_where(spec))
        tokenizer = AutoTokenizer.from_pretrained(**_where(spec), use_fast=True)
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
        SpecError: Unknown dtype or device.
    """
    from transformers import AutoModelForCausalLM

    # A wrong word for either is no failure of the model, as which `_loading` would report it.
    place = resolve_device(device)
    chosen = resolve_dtype(dtype, place)
    with _loading(spec):
        model = AutoModelForCausalLM.from_pretrained(**_where(spec), dtype=chosen, attn_implementation=attention)
    model.to(place).eval()
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
    """Size of a local model's weight files, or None where they are not on this disk yet.

    Args:
        spec: Name and reference.
    """
    path = Path(spec.ref).expanduser()
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        try:
            repos = scan_cache_dir().repos
        except CacheNotFound:
            return None
        files = {
            file.blob_path: file.size_on_disk
            for repo in repos
            if repo.repo_id == spec.ref and repo.repo_type == "model"
            for revision in repo.revisions
            for file in revision.files
            if file.file_name.endswith((".safetensors", ".bin"))
        }
        return sum(files.values()) or None
    return sum(f.stat().st_size for f in path.glob("*.safetensors"))


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of a fixed sample of the weights, to notice that a card's model is not the one at hand.

    Args:
        model: Loaded in any dtype; values are rounded to bfloat16 first, so that the dtype does not matter.

    Returns:
        Hexadecimal digits.
    """
    words = []
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)[:8].to(torch.bfloat16).float().cpu().tolist()
        words.append([name, struct.pack(f"<{len(flat)}f", *flat).hex()])
    return digest(words)


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
    try:
        yield
    except ModelLoadError:
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


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
