"""Which files hold a model's weights, by the same order of preference as transformers has. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from featstore.models.references import ModelSpec, expanded
from featstore.runtime.provenance import read_json

#: Single files and indexes of several, in the order in which transformers looks for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def weight_files(spec: ModelSpec) -> tuple[Path, ...]:
    """The files that a model's weights are read from, without those of an adapter.

    Args:
        spec: Name and reference.

    Returns:
        Existing files, sorted; none where they (or some of them) are not on this disk.

    Raises:
        CorruptDataError: An index or the configuration is damaged.
    """
    path = expanded(spec.ref)
    if path.suffix == ".gguf":
        return (path,) if path.is_file() else ()
    config = local_file(spec, "config.json")
    # A configuration may name the file itself.
    named = read_json(config, foreign=True).get("transformers_weights") if config else None
    for name in (named,) if isinstance(named, str) else _WEIGHTS:
        found = local_file(spec, name)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return (found,)
        shards = {str(shard) for shard in dict(read_json(found, foreign=True).get("weight_map", {})).values()}
        files = [local_file(spec, shard) for shard in shards]
        present = sorted(file for file in files if file is not None)
        return tuple(present) if len(present) == len(shards) else ()
    return ()


def adapter_files(spec: ModelSpec) -> tuple[Path, ...]:
    """The file that an adapter's weights are read from, or none.

    Args:
        spec: Where the adapter is.
    """
    found = (local_file(spec, name) for name in _ADAPTER_WEIGHTS)
    return next(((file,) for file in found if file is not None), ())


def local_file(spec: ModelSpec, name: str) -> Path | None:
    """A file of a model: in its directory, or in the snapshot of the hub's cache; None where it is not on this disk.

    Args:
        spec: Name and reference; a directory or a hub id.
        name: File name.
    """
    path = expanded(spec.ref)
    if path.is_dir():
        return path / name if (path / name).is_file() else None
    if path.is_file() or spec.ref.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(spec.ref, name, revision=spec.revision or "main")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
