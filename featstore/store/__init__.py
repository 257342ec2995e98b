"""The store: formats, shards and manifest below; reader, pairs, loader and checks above. Needs numpy and zarr only."""

from featstore.store.read.records import StoredCorpus, StoredModel, Tokens
from featstore.store.read.store import Store, open_store

__all__ = ["Store", "StoredCorpus", "StoredModel", "Tokens", "open_store"]
