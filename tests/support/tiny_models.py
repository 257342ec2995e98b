"""Tiny models on disk and in memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the checks run without torch
    from torch import nn


def save_with_tokenizer(model, directory: Path, tokenizer) -> Path:
    """Save a model and its tokenizer, as a user has them."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@cache
def small(name: str) -> nn.Module:
    """A tiny random model of a type, built once a process; whoever changes it builds one of his own.

    Args:
        name: A causal type, or ``type@variant``, as of :func:`tests.support.architectures.building.build`.
    """
    from tests.support.architectures.building import build

    return build(name)
