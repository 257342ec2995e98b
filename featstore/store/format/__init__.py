"""The format itself: elements, shards and array documents. Bytes and dictionaries in and out; no store is opened."""
