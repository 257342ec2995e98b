"""A training's state in one file, from which it goes on as if it had never stopped.

``state.safetensors`` holds the tensors; its metadata holds the rest as JSON. One file is written by one rename, so
whenever a process is killed, what lies there is the state before or the state after, and tensors and counters are of
the same step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError, StoreStateError
from featstore.runtime.provenance import digest, parse_json, write_atomic
from featstore.runtime.records import retold
from featstore.runtime.schema import shown
from featstore.runtime.tensors import NUMPY, Tensors, opened

FILE = "state.safetensors"
_FORMAT = 1

Arrays = dict[str, NDArray[Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A state that was read.

    Attributes:
        path: The file.
        tensors: Arrays by name, finite.
        progress: Counters, sums and records.
    """

    path: Path
    tensors: Arrays
    progress: dict[str, Any]

    def counters(self, kind: type[T]) -> T:
        """The counters as what a training keeps them in.

        Args:
            kind: A dataclass.

        Raises:
            CorruptDataError: They are others, or of other types.
        """
        hints = get_type_hints(kind)
        for name, value in self.progress.items():
            if name not in hints:
                raise self.damaged(f"its progress has {shown(name)}, expected one of {', '.join(hints)}")
            if not _is(value, hints[name]):
                raise self.damaged(f"its progress has {name} {shown(value)}, expected what a training counts there")
        return kind(**self.progress)

    def array(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor of the shape that a training keeps there.

        Args:
            name: Of the tensor.
            shape: Its shape.

        Raises:
            CorruptDataError: It is missing or of another shape.
        """
        if name not in self.tensors or self.tensors[name].shape != shape:
            held = f"of shape {self.tensors[name].shape}" if name in self.tensors else "missing"
            raise self.damaged(f"tensor {shown(name)} is {held}, expected {shape}")
        return self.tensors[name]

    def damaged(self, why: str) -> CorruptDataError:
        """An error about this state.

        Args:
            why: What is wrong.
        """
        return CorruptDataError(f"{self.path}: {why}; {_ANEW}")


def _is(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type; counters start at 0, and NaN is no number."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if isinstance(kind, type) and kind in (dict, list):
        members = value.values() if isinstance(value, dict) else value
        return isinstance(value, kind) and all(_is(each, inner[-1]) for each in members)
    if inner:
        return any(_is(value, each) for each in inner)
    if kind is Any:
        return True
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    return isinstance(value, kind)


def write_checkpoint(
    directory: Path, tensors: Mapping[str, NDArray[Any]], progress: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Replace the state of a training.

    Args:
        directory: Where ``state.safetensors`` goes; created.
        tensors: Arrays by name.
        progress: JSON values; floats survive to the last bit, NaN and infinity included.
        identity: What makes this training this one, JSON values without NaN.

    Raises:
        NoSpaceError: The disk is full; the old state is still there.
    """
    from safetensors.numpy import save

    metadata = {
        "format": str(_FORMAT),
        "identity": json.dumps(identity, allow_nan=False),
        "identity_sha256": digest(identity),
        "progress": json.dumps(progress),
    }
    data = save({name: np.asarray(array, order="C") for name, array in tensors.items()}, metadata=metadata)
    write_atomic(directory / FILE, data)


def read_checkpoint(directory: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The state of a training.

    Args:
        directory: Where ``state.safetensors`` is.
        identity: What makes the training that wants to go on.

    Returns:
        The state, or None where there is none.

    Raises:
        CorruptDataError: The file is not a state of a training.
        StoreStateError: It is one of another training, or of another version of this program.
    """
    path = directory / FILE
    if not path.exists():
        return None
    with opened(path, remedy=_ANEW) as file:
        missing = [name for name in ("format", "identity", "identity_sha256", "progress") if name not in file.metadata]
        if missing:
            raise file.damaged(f"has no {missing[0]}")
        if file.metadata["format"] != str(_FORMAT):
            version = shown(file.metadata["format"])
            raise StoreStateError(f"{path} is of format {version}; this version reads {_FORMAT}: train anew")
        theirs = _values(file.metadata["identity"], f"{path}, identity")
        if file.metadata["identity_sha256"] != digest(theirs):
            raise file.damaged("has an identity that is not that of its checksum")
        if file.metadata["identity_sha256"] != digest(identity):
            raise StoreStateError(f"{path} is of another run: {_differences(theirs, identity)}; {_REMEDY}")
        progress = _values(file.metadata["progress"], f"{path}, progress")
        tensors = {name: _state(file, name) for name in file.heads}
    return Checkpoint(path, tensors, progress)


def _state(file: Tensors, name: str) -> NDArray[Any]:
    if file.heads[name].dtype not in NUMPY:
        raise file.damaged(f"{name!r} is {file.heads[name].dtype}, expected one of {', '.join(NUMPY)}")
    found = file.read(name, file.heads[name].dtype)
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise file.damaged(f"{name!r} holds NaN or infinity")
    return found


def _values(text: str, where: str) -> dict[str, Any]:
    """A JSON object of our own, infinities included, with which counters begin."""
    try:
        return parse_json(text.encode(errors="replace"), where, foreign=True)
    except CorruptDataError as error:
        raise retold(error, CorruptDataError, _ANEW) from error


_ANEW = "this is not a state of a training to go on from: remove it and train from the beginning"
_REMEDY = "resume with the settings it was made with, or train into another directory"


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    told = (f"{name} is {shown(theirs.get(name))} there and {shown(ours.get(name))} here" for name in names)
    return ", ".join(told)
