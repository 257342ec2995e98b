"""Which weights a model has: fingerprints, what a checkpoint lacks, how it is quantised, which token ids it knows."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featstore.errors import VocabularyError, WeightsError
from featstore.models.adapters import find_adapter
from featstore.models.devices import named_values
from featstore.models.files import weight_files
from featstore.models.fingerprint import Weights, fingerprint
from featstore.models.references import ModelSpec
from featstore.runtime.provenance import digest

#: Names of tensors that a message spells out.
_SHOWN = 3

# Fingerprints -------------------------------------------------------------------------------------------------------


def weights_fingerprint(spec: ModelSpec, *, fresh: bool = False, quiet: bool = False) -> str | None:
    """Hash every byte of a model's weights on disk, with those of an adapter that is applied to it.

    Hashes are kept by the files' sizes, times and inodes; files that have not changed are not read again.

    Args:
        spec: Name and reference.
        fresh: Read the files again in any case.
        quiet: No progress.

    Returns:
        ``blake3:`` and hexadecimal digits, or None where the files are not on this disk.

    Raises:
        WeightsError: A file is damaged.
        CorruptDataError: An index or a configuration is damaged.
    """
    adapter = find_adapter(spec, local=True)
    files = weight_files(adapter.base if adapter else spec)
    if not files or (adapter and not adapter.files):
        return None
    beside = (adapter.config, adapter.files) if adapter else None
    return fingerprint(files, spec.name, adapter=beside, fresh=fresh, quiet=quiet)


def sampled_fingerprint(model: nn.Module) -> str | None:
    """Hash a fixed sample of a loaded model's weights: all that is known of a module that lies nowhere on disk.

    Args:
        model: Loaded in any dtype; values are rounded to bfloat16 first, so that the dtype does not matter.

    Returns:
        Hexadecimal digits, or None where the values cannot be read (in a quantised layout).
    """
    words = []
    for name, parameter in named_values(model):
        # What is packed may be unpacked by the first pass, so that a sample would depend on when it is taken.
        if parameter.is_meta or not parameter.is_floating_point():
            return None
        try:
            flat = parameter.detach().reshape(-1)[:8].to(torch.bfloat16).float().cpu().tolist()
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
            return None
        words.append([name, struct.pack(f"<{len(flat)}f", *flat).hex()])
    return digest(sorted(words))


def weights_of(spec: ModelSpec, model: nn.Module, *, fresh: bool = False, quiet: bool = False) -> Weights:
    """Both fingerprints of a model that was loaded from a reference.

    Args:
        spec: Name and reference.
        model: As loaded.
        fresh: Hash the files again in any case.
        quiet: No progress.

    Raises:
        WeightsError: A file is damaged.
        CorruptDataError: An index or a configuration is damaged.
    """
    return Weights(weights_fingerprint(spec, fresh=fresh, quiet=quiet), sampled_fingerprint(model))


# What was loaded ----------------------------------------------------------------------------------------------------


def refuse_incomplete(name: str, model: nn.Module, found: Mapping[str, Any], *, what: str = "checkpoint") -> None:
    """Refuse a model whose tensors are not those of its checkpoint.

    Tensors that are only tied, and those that transformers knows to be of no use, are none of these.

    Args:
        name: The model as messages name it.
        model: As loaded.
        found: transformers' ``output_loading_info``; may be empty.
        what: The file, in words.

    Raises:
        WeightsError: Tensors are missing, of another shape, or unknown to the model; the message names the first.
    """
    missing = sorted(map(str, found.get("missing_keys") or ()))
    unexpected = sorted(map(str, found.get("unexpected_keys") or ()))
    mismatched = sorted((str(key), tuple(have), tuple(want)) for key, have, want in found.get("mismatched_keys") or ())
    kind = type(model).__name__
    told = []
    if mismatched:
        key, have, want = mismatched[0]
        rest = f" ({len(mismatched)} tensors differ in shape)" if len(mismatched) > 1 else ""
        told.append(f"{key} has shape {_shape(have)} in the {what} and {_shape(want)} in {kind}{rest}")
    if missing:
        told.append(f"the {what} lacks {_some(missing)} of {kind}, which would be random")
    if unexpected:
        told.append(f"the {what} holds {_some(unexpected)} that {kind} does not know")
    if told:
        remedy = _remedy(missing, unexpected, mismatched=bool(mismatched), what=what)
        raise WeightsError(f"{name}: {'; '.join(told)}. {remedy}")


def _remedy(missing: list[str], unexpected: list[str], *, mismatched: bool, what: str) -> str:
    prefix = _prefix(missing, unexpected)
    if prefix:
        return (
            f"The names in the {what} begin with {prefix!r}, as torch.compile and other wrappers leave them: save the "
            "inner model again, or strip the prefix from the names"
        )
    prefix = _prefix(unexpected, missing)
    if prefix:
        return f"The names in the {what} lack {prefix!r} at their beginning: put it there, or save the model again"
    if mismatched or missing:
        return f"Use the whole {what}, or correct the configuration (config.json) to say what it holds"
    return (
        f"Use a {what} of this architecture, correct the configuration (config.json), or take these tensors out of the "
        f"{what} if the model is complete without them"
    )


def _prefix(names: Sequence[str], others: Sequence[str]) -> str | None:
    """What stands before the names in others that do not have it: ``(a, b), (x.a, x.b)`` gives ``x.``."""
    held = set(others)
    # Buffers of the first name may be tied or left out; a few names are enough to see what stands before all of them.
    tried = {other.removesuffix(name) for name in names[:_SHOWN] for other in others if other.endswith(f".{name}")}
    for prefix in sorted(tried, key=len):
        if sum(prefix + name in held for name in names) * 2 > len(names):
            return prefix
    return None


def _some(names: list[str]) -> str:
    tensors = f"{len(names)} tensors" if len(names) > 1 else "1 tensor"
    return f"{tensors} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "()"


# Quantised checkpoints ----------------------------------------------------------------------------------------------


def quantization_of(config: Any, reference: str) -> dict[str, Any] | None:
    """How a checkpoint is quantised, or None for one that is not.

    Args:
        config: transformers' configuration.
        reference: Where the model is; GGUF files are told by their name.

    Returns:
        ``method``, ``bits`` where they are known, and ``dequantized`` where the weights are plain once loaded.
    """
    if reference.endswith(".gguf"):
        return {"method": "gguf", "dequantized": True}
    values = getattr(config, "quantization_config", None)
    if values is None:
        values = getattr(config.get_text_config(), "quantization_config", None)
    if values is None:
        return None
    told: Mapping[str, Any] = values if isinstance(values, Mapping) else values.to_dict()
    method = told.get("quant_method", "unknown")
    found: dict[str, Any] = {"method": str(getattr(method, "value", method))}
    flags = [bits for bits in (4, 8) if told.get(f"load_in_{bits}bit")]
    bits = told.get("bits", told.get("nbits", flags[0] if flags else None))
    if isinstance(bits, int):
        found["bits"] = bits
    if told.get("dequantize"):
        found["dequantized"] = True
    return found


def describe_weights(quantization: Mapping[str, Any] | None, adapter: Mapping[str, Any] | None) -> str:
    """What is out of the ordinary about a model's weights, to be said when it is loaded; empty for nothing.

    Args:
        quantization: From :func:`quantization_of`.
        adapter: From :meth:`featstore.models.adapters.Adapter.describe`.
    """
    words = ""
    if quantization:
        bits = f", {quantization['bits']} bits" if "bits" in quantization else ""
        plain = ", dequantised on loading" if quantization.get("dequantized") else ""
        words += f", a quantised checkpoint ({quantization['method']}{bits}{plain})"
    if adapter:
        rank = f", r {adapter['r']}" if "r" in adapter else ""
        words += f", with its adapter applied ({adapter['type']}{rank})"
    return words


# Token ids ----------------------------------------------------------------------------------------------------------


def check_ids(name: str, ids: NDArray[np.integer[Any]], rows: int, tokenizer: Any) -> None:
    """Refuse token ids that an embedding has no row for.

    Args:
        name: The model's name, for the message.
        ids: Token ids of any shape.
        rows: Rows of the model's embedding.
        tokenizer: Names the token.

    Raises:
        VocabularyError: An id is not in 0..rows-1.
    """
    if not ids.size or (ids.max() < rows and ids.min() >= 0):
        return
    beyond = np.unique(ids[(ids >= rows) | (ids < 0)])
    token = tokenizer.convert_ids_to_tokens(int(beyond[0]))
    more = f" ({len(beyond)} such tokens occur)" if len(beyond) > 1 else ""
    raise VocabularyError(
        f"model {name!r}: token {token!r} has id {beyond[0]}, the embedding has {rows} rows "
        f"(ids 0 to {rows - 1}){more}; use the tokenizer that the model was trained with, or give it the rows with "
        "model.resize_token_embeddings(len(tokenizer)), train them and save it"
    )
