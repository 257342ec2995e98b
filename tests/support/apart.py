"""A pair trained apart: the small model that comes with the package, with its untrained copy and with SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the checks run without torch
    from featstore.demo.small import SmallModels

#: Documents of the sample in the pair's store, and bytes of each.
DOCUMENTS, BYTES = 40, 400


def write_store(models: dict[str, Path], layers: tuple[str, ...], into: Path) -> Path:
    """Extract models on the opening of the sample, which the small model was not trained on.

    Args:
        models: Directories by name.
        layers: As typed after ``--layers``.
        into: An empty directory.
    """
    import featstore
    from featstore.demo.sample import sample_texts

    corpus, store = into / "articles.jsonl", into / "apart.zarr"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_texts()[:DOCUMENTS]))
    featstore.extract(
        models={name: str(path) for name, path in models.items()},
        layers=layers,
        dataset=f"jsonl:{corpus}",
        store=store,
        max_document_bytes=BYTES,
        device="cpu",
        quiet=True,
    )
    return store


def quick_store(small: SmallModels, into: Path) -> Path:
    """The trained model and its untrained copy: the same tokens, and only one of them has learnt anything."""
    return write_store(small.models, ("0%,50%",), into)
