"""An adapter beside a model's files (LoRA and its kind): found, applied through peft, and known to be applied.

transformers applies such an adapter by itself where peft is installed, and passes over it without a word where it is
not. It also reports what was missing from the adapter's file *instead of* what was missing from the model's. Here the
model is loaded first, then the adapter, and each is checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from featstore.errors import MissingPackageError, ModelLoadError, WeightsError
from featstore.models.files import adapter_files, local_file, weight_files
from featstore.models.references import ModelSpec, expanded
from featstore.models.trust import vouch
from featstore.runtime.extras import install_words
from featstore.runtime.provenance import read_json

_CONFIG = "adapter_config.json"
#: An adapter's weights that are not pickled.
SAFE_ADAPTER = "adapter_model.safetensors"
#: Under this name an adapter is known to peft; transformers' own default.
_NAME = "default"
#: Kinds of adapters that are tensors and numbers alone. The configurations of other kinds name further models,
#: adapters, tokenizers or files, which peft would fetch and read.
_KINDS = (
    *("ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA"),
    *("HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "POLY", "PSOFT"),
    *("PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA"),
    *("VERA", "WAVEFT"),
)
#: What to do about a base that the user has not named.
_NAME_IT = "name it once yourself: featstore doctor --quick --model base=REF"
#: No model has a folder of this name: looking for an adapter there finds none.
_NOWHERE = "no-adapter"


@dataclass(frozen=True)
class Adapter:
    """An adapter and the model that it changes.

    Attributes:
        spec: Where the adapter is.
        base: Where the model is that it is applied to.
        config: Its ``adapter_config.json``.
    """

    spec: ModelSpec
    base: ModelSpec
    config: dict[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """Its weight files, as far as they are on this disk."""
        return adapter_files(self.spec)

    def describe(self) -> dict[str, Any]:
        """What a store records of it: ``type``, ``base``, and of LoRA ``r``, ``lora_alpha`` and ``target_modules``."""
        targets = self.config.get("target_modules")
        told: dict[str, Any] = {key: self.config[key] for key in ("r", "lora_alpha") if key in self.config}
        return {
            "type": str(self.config.get("peft_type", "unknown")),
            "base": self.base.ref,
            **told,
            **({"target_modules": sorted(targets) if isinstance(targets, list) else targets} if targets else {}),
        }


def find_adapter(spec: ModelSpec, *, local: bool = False) -> Adapter | None:
    """The adapter that a reference names or that lies beside its model; None for a model without one.

    Args:
        spec: Name and reference.
        local: Look on this disk only.

    Raises:
        CorruptDataError: Its configuration is damaged.
        ModelLoadError: It does not say which model it is for, or that is an adapter itself; or it is of a kind that
            may name further files.
        StrangeReferenceError: The model that it is for is none that the user named.
    """
    if spec.ref.endswith(".gguf"):
        return None
    file = local_file(spec, _CONFIG) if local else fetched(spec, _CONFIG)
    if file is None:
        return None
    config = read_json(file, foreign=True)
    kind = config.get("peft_type")
    if kind not in _KINDS:
        raise ModelLoadError(
            f"model {spec.name!r} ({spec.ref}): {_CONFIG} has peft_type {kind!r}, which may name "
            "further files; merge the adapter into its model with peft, or use one of another kind, such as LORA"
        )
    # A directory with a whole model and an adapter beside it is both; transformers reads hub repositories otherwise.
    if expanded(spec.ref).is_dir() and weight_files(spec):
        return Adapter(spec, spec, config)
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelLoadError(
            f"model {spec.name!r} ({spec.ref}): {_CONFIG} has no base_model_name_or_path; write the model that the "
            "adapter was trained on there"
        )
    revision = config.get("revision")
    base = ModelSpec(spec.name, named, revision if isinstance(revision, str) else None, spec.allowed)
    if not local:
        vouch([base], f"{_CONFIG} of {spec.ref}", beside=expanded(spec.ref), remedy=_NAME_IT)
    within = local_file(base, _CONFIG)
    if within is not None and not weight_files(base):
        raise ModelLoadError(
            f"model {spec.name!r} ({spec.ref}): {_CONFIG} names {named!r}, an adapter as well; merge that one into its "
            "model first (merge_and_unload), and name the result there"
        )
    return Adapter(spec, base, config)


def with_bases(specs: Iterable[ModelSpec]) -> list[ModelSpec]:
    """Models and, of adapters among them, what these are applied to, once all of it was found.

    Whoever typed an adapter and got so far has named its base before, has seen it, or has it in the same folder.

    Args:
        specs: Names and references.

    Raises:
        CorruptDataError: As :func:`find_adapter`.
        ModelLoadError: As :func:`find_adapter`.
    """
    listed = list(specs)
    found = (find_adapter(spec, local=True) for spec in listed)
    return [*listed, *(adapter.base for adapter in found if adapter is not None)]


def tokenizer_place(spec: ModelSpec, base: ModelSpec) -> ModelSpec:
    """Where a model's tokenizer is: with the adapter if one was saved there, else with its base.

    Args:
        spec: Name and reference as given.
        base: Where the model is that an adapter is applied to; the same for a model without one.
    """
    return spec if spec == base or fetched(spec, "tokenizer_config.json") else base


def fetched(spec: ModelSpec, name: str) -> Path | None:
    """A file of a model, from the hub if need be; None where it is not there or cannot be asked for.

    Args:
        spec: Name and reference.
        name: File name.
    """
    found = local_file(spec, name)
    if found is not None or expanded(spec.ref).exists() or spec.ref.startswith((".", "/", "~")):
        return found
    from transformers.utils import cached_file

    fetched = cached_file(
        spec.ref,
        name,
        revision=spec.revision or "main",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(fetched) if fetched else None


def require_peft(adapter: Adapter) -> None:
    """Refuse an adapter that nothing would apply.

    Args:
        adapter: From :func:`find_adapter`.

    Raises:
        MissingPackageError: peft is not installed.
    """
    from transformers.utils import is_peft_available

    if not is_peft_available():
        raise MissingPackageError(
            f"model {adapter.spec.name!r} ({adapter.spec.ref}) comes with an adapter ({_CONFIG}), which only peft can "
            f"apply: `{install_words('peft')}`, or take {_CONFIG} and adapter_model.* away to use the model without it"
        )


def without_adapter() -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` under which transformers leaves an adapter alone."""
    return {"adapter_kwargs": {"subfolder": _NOWHERE}}


def apply_adapter(model: Any, adapter: Adapter, where: dict[str, Any]) -> dict[str, Any]:
    """Put an adapter into a loaded model and check that every layer of it is active.

    Args:
        model: The adapter's base, a transformers model; is changed.
        adapter: From :func:`find_adapter`.
        where: Keyword arguments of ``from_pretrained`` that name the adapter's place.

    Returns:
        transformers' account of the adapter's tensors.

    Raises:
        WeightsError: No layer of the model has the adapter, or one has it switched off.
    """
    more: dict[str, Any] = {"adapter_kwargs": {"revision": where["revision"]}} if "revision" in where else {}
    # transformers has to be told where there is no safetensors file: in a folder it does not look for the other one.
    more["use_safetensors"] = fetched(adapter.spec, SAFE_ADAPTER) is not None
    found = model.load_adapter(where["pretrained_model_name_or_path"], adapter_name=_NAME, **more)
    idle = inactive(model)
    if idle is not None:
        raise WeightsError(
            f"model {adapter.spec.name!r} ({adapter.spec.ref}): the adapter was loaded, but {idle}; check "
            f"target_modules in {_CONFIG}, or merge it with peft (merge_and_unload) and use the result"
        )
    return {} if found is None else dict(found.to_dict())


def inactive(model: nn.Module) -> str | None:
    """Why an adapter would not act, in words; None where every layer of it does.

    Args:
        model: With the adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not layers:
        return "no layer of the model has it"
    off = [
        name
        for name, layer in layers.items()
        if layer.disable_adapters or not ({_NAME} & {*layer.active_adapters, *layer.merged_adapters})
    ]
    return f"{len(off)} of {len(layers)} layers have it switched off ({off[0]})" if off else None
