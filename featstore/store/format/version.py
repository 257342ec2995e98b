"""The version of the format, what older ones lack, and the names that every version shares.

Version 2: pairs join states that have read the same bytes; every array names its dimensions; the consolidated metadata
leaves out arrays whose data type only some readers know.

Version 3: version 2 with stored moments as 24-bit correlations. A store says so only where it holds such moments, so
that readers of version 2 read every other one.
"""

from __future__ import annotations

#: What the root of a store without packed moments says; below it, pairs and documents are those of an older format.
FORMAT_VERSION = 2
#: What the root of a store with packed moments says; readers accept this and older ones.
PACKED_VERSION = 3
#: Last part of the path of every packed array.
PACKED = "correlation"
#: Root attribute that is true while a store of an older version is being rebuilt: until then nobody reads it.
REBUILDING = "rebuilding"
#: The manifest's unit for metadata: the documents of every group and array.
METADATA_UNIT = "metadata"
#: Where the manifest's documents lie.
MANIFEST = "manifest"


def rebuild_command(store: object) -> str:
    """The command that makes a store of an older version one of this.

    Args:
        store: Its directory or URL.
    """
    return f"`featstore pair --rebuild {store}`"


def old_store(store: object, version: int) -> str:
    """What a reader of a store of an older version has to know, in one line.

    Args:
        store: Its directory or URL.
        version: The version that its root names.
    """
    return (
        f"{store} has format version {version}, whose pairs may join states that have read different bytes; "
        f"{rebuild_command(store)} derives token tables and pairs again, without running a model"
    )
