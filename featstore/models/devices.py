"""Where a model is computed: one device, or a map from its modules to devices, the CPU and the disk.

Under a map, hooks of accelerate move a module's inputs to the device that it runs on, and bring the weights of modules
that lie on the CPU or the disk there for as long as they run. What is captured from such a model comes from several
devices, and what is put into it goes where the hidden states are.
"""

from __future__ import annotations

import json
import logging
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featstore.errors import SpecError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Maps that are made from the free memory of every device.
MADE = ("auto", "balanced")
#: Places where weights lie that are computed elsewhere.
_OFFLOADED = ("cpu", "disk")

#: A module's name to its device: the number of a GPU, ``cpu`` or ``disk``.
Modules = dict[str, int | str]


@dataclass(frozen=True)
class DeviceMap:
    """What ``--device-map`` says.

    Attributes:
        name: As given, for messages.
        every: The map of every model: one of :data:`MADE`, or by module; None where each model has its own.
        own: Maps by model.
    """

    name: str
    every: str | Modules | None
    own: Mapping[str, Modules]

    def of(self, model: str) -> str | Modules | None:
        """The map of one model; None where it goes to one device.

        Args:
            model: Short name.
        """
        return self.own.get(model, self.every)


@dataclass(frozen=True)
class Placement:
    """Where one model goes.

    Attributes:
        device: Where it is computed; under a map, its first device.
        modules: What transformers takes as ``device_map``; None for the one device.
        name: Of the map as given, for messages.
    """

    device: torch.device
    modules: str | Modules | None = None
    name: str = ""


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


def parse_device_map(given: Any) -> DeviceMap | None:
    """Turn ``--device-map`` into a map.

    Args:
        given: ``auto``, ``balanced``, or a JSON file with an object: modules to devices, or models to such objects. In
            Python also the object itself. None for no map.

    Raises:
        SpecError: No such file, not JSON, no such object, or a device that this machine lacks.
    """
    if given is None or isinstance(given, DeviceMap):
        return given
    if isinstance(given, str) and given in MADE:
        return DeviceMap(given, given, {})
    if isinstance(given, Mapping):
        return _read("given", dict(given))
    if not isinstance(given, (str, PathLike)):
        raise SpecError(f"--device-map {given!r}: write {', '.join(MADE)}, or the path of a JSON file")
    try:
        text = Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(
            f"--device-map {given}: cannot be read ({error.strerror}); write {', '.join(MADE)}, or a JSON file's path"
        ) from error
    except UnicodeDecodeError as error:
        raise SpecError(f'--device-map {given}: is no text; write JSON such as {{"model.layers.0": "cpu"}}') from error
    try:
        return _read(str(given), json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise SpecError(
            f'--device-map {given}: is not JSON ({error}); write such as {{"model.layers.0": "cpu"}}'
        ) from error


def _read(name: str, value: Any) -> DeviceMap:
    if not isinstance(value, dict) or not value:
        raise SpecError(f'--device-map {name}: holds no modules; write such as {{"": 0, "lm_head": "cpu"}}')
    inner = [key for key, item in value.items() if isinstance(item, Mapping)]
    if not inner:
        return DeviceMap(name, _modules(name, value), {})
    if len(inner) < len(value):
        flat = next(key for key in value if key not in inner)
        raise SpecError(f"--device-map {name}: {flat!r} has a device and {inner[0]!r} has modules; give one kind")
    return DeviceMap(name, None, {key: _modules(name, dict(item)) for key, item in value.items()})


def _modules(name: str, value: dict[Any, Any]) -> Modules:
    return {_module(name, key): _device(name, key, item) for key, item in value.items()}


def _module(name: str, key: Any) -> str:
    if not isinstance(key, str):
        raise SpecError(f"--device-map {name}: {key!r} is no name of a module; write such as 'model.layers.0'")
    return key


def _device(name: str, module: str, value: Any) -> int | str:
    """A device as accelerate is to have it: GPUs as numbers, so that one GPU has one name."""
    where = f"--device-map {name}: {module!r} goes to {value!r}"
    if value in _OFFLOADED:
        return str(value)
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        digits = value.partition(":")[2] or "0"
        number = int(digits) if digits.isdecimal() else None
    if number is None or number < 0:
        raise SpecError(f"{where}; write cpu, disk, or the number of a GPU")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= count:
        raise SpecError(f"{where}; this machine has {count or 'no'} usable GPU{'s' * (count != 1)}")
    return number


def place(device: str, device_map: DeviceMap | None, model: str) -> Placement:
    """Where a model goes.

    Args:
        device: Value of ``--device``.
        device_map: Value of ``--device-map``.
        model: Short name.

    Raises:
        SpecError: An unknown device, or a device beside a map.
    """
    if device_map is None:
        return Placement(resolve_device(device))
    if device != "auto":
        raise SpecError(
            f"--device {device} with --device-map {device_map.name}: a map says where everything goes; leave --device "
            "out"
        )
    modules = device_map.of(model)
    if modules is None or isinstance(modules, str):
        return Placement(resolve_device("auto"), modules, device_map.name)
    gpus = [item for item in modules.values() if isinstance(item, int)]
    return Placement(torch.device("cuda", min(gpus)) if gpus else torch.device("cpu"), modules, device_map.name)


def check_models(device_map: DeviceMap | None, models: Mapping[str, Any]) -> None:
    """Refuse maps of models that are not there.

    Args:
        device_map: Value of ``--device-map``.
        models: By short name.

    Raises:
        SpecError: A map is of another model.
    """
    unknown = [name for name in device_map.own if name not in models] if device_map else []
    if device_map and unknown:
        raise SpecError(
            f"--device-map {device_map.name}: has modules of {unknown[0]!r}; the models are {', '.join(models)}"
        )


def whole_map(placement: Placement, model: nn.Module, who: str) -> str | Modules | None:
    """A placement as transformers takes it: a map that names every module, or the word of one that is made.

    A name stands for all below it that no longer name is given to, and the empty name for the whole model.

    Args:
        placement: Where the model goes.
        model: The model, with weights or without (on torch's meta device).
        who: The model, for messages.

    Raises:
        SpecError: The model has no such module, the map leaves out some, or it parts weights that are the same.
    """
    given = placement.modules
    if given is None or isinstance(given, str):
        return given
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise SpecError(
            f"--device-map {placement.name}: {who} has no module {unknown[0]!r}; it has "
            f"{', '.join(_outline(model))}, and what is below them"
        )
    filled: Modules = {}
    absent = list(_fill(filled, given, model, "", given.get("")))
    if absent:
        raise SpecError(
            f'--device-map {placement.name}: gives no device to {", ".join(absent[:3])} of {who}; add "" for all others'
        )
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        here, there = _place_of(filled, one), _place_of(filled, other)
        if here != there:
            raise SpecError(
                f"--device-map {placement.name}: {one} goes to {here!r} and {other} to {there!r}, but in {who} they "
                "are the same weights; send both to one device"
            )
    return filled


def _fill(filled: Modules, given: Modules, module: nn.Module, name: str, place: int | str | None) -> Iterator[str]:
    """Give a device to what is at and below a module; yields the names that get none."""
    place = given.get(name, place)
    if not any(key != name and key.startswith(f"{name}." if name else "") for key in given):
        if place is not None:
            filled[name] = place
        elif any(True for _ in module.state_dict()):
            yield name
        return
    below = f"{name}." if name else ""
    for child, part in module.named_children():
        yield from _fill(filled, given, part, below + child, place)
    # What a module holds itself, beside its parts.
    parameters = [own for own, _ in module.named_parameters(recurse=False)]
    for own in (*parameters, *(own for own, _ in module.named_buffers(recurse=False))):
        here = given.get(below + own, place)
        if here is not None:
            filled[below + own] = here
        elif own in parameters:
            yield below + own


def _place_of(filled: Modules, name: str) -> int | str | None:
    """The device of a parameter: that of the longest name that it is below."""
    parts = name.split(".")
    above = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    return next((filled[each] for each in above if each in filled), None)


def _outline(model: nn.Module) -> list[str]:
    """Names of the modules down to the list of blocks."""
    names = []
    for name, child in model.named_children():
        names += [f"{name}.{inner}" for inner, _ in child.named_children()][:4] or [name]
    return names


@contextmanager
def offload_folder(placement: Placement) -> Iterator[_Folder]:
    """A folder for weights that a map puts on the disk and that cannot be read from the model's own files.

    It is made where temporary files go (``TMPDIR``): a store or a run directory may be read-only or far away, and what
    is left of a killed process must not be taken for a part of either. Given to a model, it goes when that goes.

    Args:
        placement: Where the model goes.
    """
    mapped = placement.modules is not None
    folder = _Folder(tempfile.TemporaryDirectory(prefix="featstore-offload-") if mapped else None)
    # It warns of weights on the meta device, which is how they are offloaded.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    try:
        yield folder
    except BaseException:
        folder.remove()
        raise


class _Folder:
    """A temporary directory, or none."""

    def __init__(self, directory: tempfile.TemporaryDirectory[str] | None) -> None:
        self._directory = directory

    def keywords(self) -> dict[str, Any]:
        """What ``from_pretrained`` is told of it."""
        return {} if self._directory is None else {"offload_folder": self._directory.name}

    def remove(self) -> None:
        if self._directory is not None:
            self._directory.cleanup()

    def belongs_to(self, model: nn.Module) -> None:
        """Remove it with the model, or at once where nothing has been written."""
        if self._directory is None:
            return
        if any(Path(self._directory.name).iterdir()):
            weakref.finalize(model, self._directory.cleanup)
        else:
            self._directory.cleanup()


def input_device(model: nn.Module) -> torch.device:
    """Where a model's token ids go.

    Under a device map the weights of the embedding may lie elsewhere than it is computed, or nowhere (torch's meta
    device), until they are needed.

    Args:
        model: A transformers model with or without a head, or any module.
    """
    embedding = None
    try:
        get = getattr(model, "get_input_embeddings", None)
        embedding = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # a model that has none
        pass
    if isinstance(embedding, nn.Module):
        found = _execution_device(embedding) or _weight_device(embedding)
        if found is not None:
            return found
    for module in model.modules():
        found = _execution_device(module)
        if found is not None:
            return found
    return _weight_device(model) or torch.device("cpu")


def _execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate has a module computed; None where it does not say."""
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        place = getattr(one, "execution_device", None)
        if place is not None:
            return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return None


def _weight_device(module: nn.Module) -> torch.device | None:
    return next((p.device for p in module.parameters() if p.device.type != "meta"), None)


def named_values(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name, each once, with their values wherever a device map has put them.

    Args:
        model: The model; the weights of what lies on the disk are read as they come by.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta":
            yield name, parameter
        elif name not in tied:  # apart, tied weights are two parameters
            yield name, _offloaded(model, name)


def _offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter's values, from the hook that brings them when they are needed."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:end])), "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            weights, rest = getattr(one, "weights_map", None), ".".join(parts[end:])
            if weights is not None and rest in weights:
                value: torch.Tensor = weights[rest]
                return value
    return model.get_parameter(name)
