"""Tiny models on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def save_with_tokenizer(model, directory: Path, tokenizer_from: Path) -> Path:
    """Save a model beside the tokenizer files of another directory."""
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():
            shutil.copy(tokenizer_from / name, directory / name)
    return directory
