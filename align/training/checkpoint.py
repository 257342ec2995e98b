"""A training's state in one file, from which it goes on as if it had never stopped.

``state.safetensors`` holds the tensors; its metadata holds the rest as JSON. One file is written by one rename, so
whenever a process is killed, what lies there is the state before or the state after, and tensors and counters are of
the same step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError, StoreStateError
from featstore.runtime.provenance import digest, write_atomic

FILE = "state.safetensors"
_FORMAT = 1

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A state that was read.

    Attributes:
        tensors: Arrays by name.
        progress: Counters, sums and records.
    """

    tensors: Arrays
    progress: dict[str, Any]


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
    from safetensors import SafetensorError, safe_open

    path = directory / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            known = metadata["format"] == str(_FORMAT)
            theirs = json.loads(metadata["identity"])
            progress = json.loads(metadata["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            claimed = metadata["identity_sha256"]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CorruptDataError(
            f"{path} is not a state of a training ({error!r}); remove it and train from the beginning"
        ) from error
    if not known:
        raise StoreStateError(f"{path} is of format {metadata['format']}; this version reads {_FORMAT}: train anew")
    if claimed != digest(identity):
        raise StoreStateError(f"{path} is of another run: {_differences(theirs, identity)}; {_REMEDY}")
    return Checkpoint(tensors, progress)


_REMEDY = "resume with the settings it was made with, or train into another directory"


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in names)
