"""Tiny models on disk."""

from __future__ import annotations

from pathlib import Path


def save_with_tokenizer(model, directory: Path, tokenizer) -> Path:
    """Save a model and its tokenizer, as a user has them."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
