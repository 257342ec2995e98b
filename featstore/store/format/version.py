"""The version of the format, and the names that every version shares."""

from __future__ import annotations

#: What a store's root says; readers accept this and older ones.
FORMAT_VERSION = 1
#: The manifest's unit for metadata: the documents of every group and array.
METADATA_UNIT = "metadata"
#: Where the manifest's documents lie.
MANIFEST = "manifest"
