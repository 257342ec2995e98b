"""A store of an older format version becomes one of this: what a rebuild does around deriving tables and pairs again.

:func:`begin_rebuild`, the new units, :func:`upgrade_metadata`. From the first to the last nobody reads the store. A
rebuild that is killed in between is run again: text, token ids and states are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featstore.store.format import documents
from featstore.store.format.version import FORMAT_VERSION, REBUILDING
from featstore.store.write.listing import metadata_documents
from featstore.store.write.writer import StoreWriter

#: Folders of a model whose values no rebuild touches; they may lie on another disk.
_OF_STATES = (["resid"], ["norm"], ["row_scale"], ["column_scale"], ["origin"], ["median_norm"], ["embedding"])


def begin_rebuild(writer: StoreWriter, work: Mapping[str, Any] | None = None) -> None:
    """Close a store to readers, this version's and older ones', until :func:`upgrade_metadata` has sealed it.

    Args:
        writer: Of a complete store, or of one that was killed half rebuilt; from
            ``adding_to(path, rebuild=True)``.
        work: What has to be known to go on when the rebuild is killed; root attribute ``rebuilding`` until it is done.

    Raises:
        StoreAccessError: A folder that the rebuild writes to is a link; nothing has been changed.
    """
    for name, document in metadata_documents(writer.path).items():
        states = name.startswith("models/") and name.split("/")[2:3] in _OF_STATES
        array = document.get("node_type") == "array"
        if not states or (array and documents.named(name, documents.upgraded(document)) != document):
            writer.check(name)
    closed = {"format_version": FORMAT_VERSION, "complete": False, REBUILDING: dict(work or {}) or True}
    writer.group("", {"featstore": _own(writer) | closed})


def upgrade_metadata(writer: StoreWriter, changes: Mapping[str, Any] | None = None) -> None:
    """Give every array the names of its dimensions, and seal the store as one of this format version.

    Args:
        writer: Of the store, closed by :func:`begin_rebuild`; all that is derived again is committed.
        changes: Root attributes that this version has besides, or has otherwise.
    """
    for name, document in metadata_documents(writer.path).items():
        if document.get("node_type") == "array":
            writer.describe({name: documents.upgraded(document)})
    own = {key: value for key, value in _own(writer).items() if key != REBUILDING}
    own |= dict(changes or {}) | {"format_version": FORMAT_VERSION, "complete": True}
    writer.seal({"featstore": own})


def _own(writer: StoreWriter) -> dict[str, Any]:
    own: dict[str, Any] = (writer.attributes() or {}).get("featstore", {})
    return own
