"""Model directories that appear complete or not at all, with a card that says what they were made of."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from featstore.errors import CorruptDataError, NoSpaceError
from featstore.runtime import writing
from featstore.runtime.console import human_bytes
from featstore.runtime.provenance import read_json, write_json

_CARD = "calibration.json"
#: A model's weights within its directory.
WEIGHTS = "model.safetensors"


def is_built(directory: Path, card: dict[str, Any]) -> bool:
    """Whether a directory is there and was made of what a card says."""
    try:
        return read_json(directory / _CARD) == card
    except (OSError, CorruptDataError):
        return False


def require_space(out: Path, needed: int, what: str) -> None:
    """Refuse to begin on a disk that is too full.

    Args:
        out: A directory on it.
        needed: Bytes.
        what: What is being built.

    Raises:
        NoSpaceError: Less is free.
    """
    free = shutil.disk_usage(out).free
    if free < needed:
        raise NoSpaceError(
            f"building {what} takes {human_bytes(needed)} and {out} has {human_bytes(free)} free; "
            "make room or choose another directory"
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Let one process build at a time; the others then find the result.

    Args:
        out: The directory that is built in; made.

    Raises:
        WriteError: It cannot be made, or what stands in the place of its lock is no file.
    """
    writing.make_folder(out)
    with writing.locked(out / ".lock"):
        yield


@contextmanager
def replacing(directory: Path, card: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``directory`` once its content is complete.

    A link there is replaced, and what it leads to stays as it is.

    Raises:
        WriteError: The directory cannot be written.
        NoSpaceError: The disk is full.
    """
    with (
        writing.refusing(directory),
        tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as parent,
    ):
        aside = Path(parent) / directory.name
        aside.mkdir()
        yield aside
        write_json(aside / _CARD, card)
        # safetensors writes files that only their owner can read, whatever the umask says.
        writing.settle(aside)
        if os.path.lexists(directory):
            directory.replace(Path(parent) / "old")
        aside.replace(directory)
        writing.fsync_directory(directory.parent)


def save_model(into: Path, config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a model as transformers reads it: weights, configuration, and what ends a continuation.

    Args:
        into: A directory.
        config: Names the start and the end token.
        weights: By name, in the dtype that the file shall have.
    """
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    try:
        save_file(tensors, into / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        if (said := writing.system_error(error)) is None:
            raise
        raise writing.cannot_write(into / WEIGHTS, said) from error
    config.save_pretrained(into)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id,
    ).save_pretrained(into)
