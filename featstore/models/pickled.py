"""Weights that are pickled: unpickling runs what the file says, so they are read only where that is allowed.

transformers unpickles tensors only (``weights_only``), which has had holes. It does so by the name of a file: also
where an index of safetensors lists one that is pickled, or a configuration names one, whatever it was asked to use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from featstore.errors import PickledWeightsError
from featstore.models.adapters import SAFE_ADAPTER, Adapter, fetched
from featstore.models.files import local_file
from featstore.models.opening import who
from featstore.models.references import ModelSpec
from featstore.runtime.provenance import read_json

_SAFE = ".safetensors"
_INDEX = "model.safetensors.index.json"
#: Whole and in parts, as transformers looks for them.
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def weights_keywords(spec: ModelSpec, config: Any) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` that say which weight files may be read, once they were looked at.

    Args:
        spec: Where the model is; not an adapter.
        config: Its configuration.

    Returns:
        Nothing for a GGUF file, and where pickled weights are allowed.

    Raises:
        PickledWeightsError: The model has no weights but pickled ones, and they are not allowed.
        CorruptDataError: An index is damaged.
    """
    if spec.allowed.pickles or spec.ref.endswith(".gguf"):
        return {}
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        _refuse(spec, [str(named)])
    # A whole file is taken before those of an index.
    elif local_file(spec, "model.safetensors") is None:
        index = fetched(spec, _INDEX)
        if index is not None:
            _refuse(spec, map(str, dict(read_json(index).get("weight_map") or {}).values()))
        elif (pickled := next((name for name in _PICKLED if local_file(spec, name)), None)) is not None:
            _refuse(spec, [pickled])
    return {"use_safetensors": True}


def refuse_pickled_adapter(adapter: Adapter) -> None:
    """Refuse an adapter whose weights are pickled, unless that is allowed.

    Args:
        adapter: From :func:`featstore.models.adapters.find_adapter`.

    Raises:
        PickledWeightsError: It has no others.
    """
    if not adapter.spec.allowed.pickles and fetched(adapter.spec, SAFE_ADAPTER) is None:
        _refuse(adapter.spec, ["adapter_model.bin"])


def said_of_a_hub(spec: ModelSpec, error: BaseException) -> PickledWeightsError | None:
    """The refusal that transformers' words mean, of a model in a hub without safetensors; None for any other words.

    Args:
        spec: Where the model is.
        error: As raised while it was loaded.
    """
    return _error(spec, "its repository") if "cannot be loaded with `safetensors`" in str(error) else None


def _refuse(spec: ModelSpec, files: Iterable[str]) -> None:
    for name in files:
        if not name.endswith((_SAFE, f"{_SAFE}.index.json")):
            raise _error(spec, name)


def _error(spec: ModelSpec, file: str) -> PickledWeightsError:
    return PickledWeightsError(
        f"{who(spec)} has only pickled weights ({file}), and unpickling can run what a file says: save it again with "
        "safetensors (model.save_pretrained), or allow that with --allow-pickle-weights (allow_pickle_weights=True in "
        "Python)"
    )
