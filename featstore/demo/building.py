"""Model directories that appear complete or not at all, with a card that says what they were made of."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from featstore.errors import CorruptDataError, NoSpaceError
from featstore.runtime.console import human_bytes
from featstore.runtime.provenance import fsync_directory, read_json, write_json

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
    """Let one process build at a time; the others then find the result."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(directory: Path, card: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``directory`` once its content is complete."""
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as parent:
        aside = Path(parent) / directory.name
        aside.mkdir()
        yield aside
        write_json(aside / _CARD, card)
        for path in aside.iterdir():
            # safetensors writes files that only their owner can read; a model directory is there to be shared.
            path.chmod(0o644)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        if directory.exists():
            directory.replace(Path(parent) / "old")
        aside.replace(directory)
        fsync_directory(directory.parent)


def save_model(into: Path, config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a model as transformers reads it: weights, configuration, and what ends a continuation.

    Args:
        into: A directory.
        config: Names the start and the end token.
        weights: By name, in the dtype that the file shall have.
    """
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        into / WEIGHTS,
        metadata={"format": "pt"},
    )
    config.save_pretrained(into)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id,
    ).save_pretrained(into)
