"""One self-contained interactive page about the similarity of all layers, from the contents of ``cka.json``."""

from align.similarity.page.document import render, write

__all__ = ["render", "write"]
