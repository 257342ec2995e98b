"""What a store holds beside rows, as records: a model's attributes, its token table, the text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError
from featstore.runtime.schema import parse
from featstore.store.format.attributes import ModelAttributes


@dataclass(frozen=True)
class StoredModel:
    """One model's attributes in a store.

    Attributes:
        name: Short name.
        depth: Number of blocks.
        width: Hidden width.
        rows: Token states.
        layers: Layers stored.
        attributes: All recorded attributes.
    """

    name: str
    depth: int
    width: int
    rows: int
    layers: tuple[int, ...]
    attributes: dict[str, Any]

    @classmethod
    def parse(cls, name: str, attributes: Any, where: str) -> StoredModel:
        """Validate a model group's attributes.

        Args:
            name: Short name.
            attributes: The ``featstore`` attribute of the group.
            where: Named in errors.

        Raises:
            CorruptDataError: Something is missing or of the wrong type.
        """
        if not isinstance(attributes, dict):
            raise CorruptDataError(f"{where} lacks its featstore attributes; restore it or extract again")
        said = parse(ModelAttributes, attributes, where)
        if max(said.layers) > said.depth:
            raise CorruptDataError(
                f"{where}: layers {list(said.layers)} do not fit a depth of {said.depth}; restore it or extract again"
            )
        return cls(name, said.depth, said.width, said.rows, said.layers, attributes)


#: Columns that follow from text and tokenizer alone.
TOKEN_COLUMNS = ("id", "byte_end", "window", "special", "exact", "role")


@dataclass(frozen=True)
class Tokens:
    """One model's token table.

    Attributes:
        id: int32 ``(n,)``.
        byte_end: int32 ``(n,)``, within the window.
        window: int32 ``(n,)``.
        special: bool ``(n,)``.
        exact: bool ``(n,)``, whether the token has read ``byte_end`` bytes and no others.
        role: uint8 ``(n,)``, who wrote the last byte that it has read: a number in :data:`featstore.text.roles.ROLES`.
        sink: bool ``(n,)``, norm beyond the threshold at any stored layer, or the first token of a window that
            begins without a start token.
    """

    id: NDArray[np.int32]
    byte_end: NDArray[np.int32]
    window: NDArray[np.int32]
    special: NDArray[np.bool_]
    exact: NDArray[np.bool_]
    role: NDArray[np.uint8]
    sink: NDArray[np.bool_]


@dataclass(frozen=True)
class StoredCorpus:
    """The text the models read.

    Attributes:
        text: uint8 bytes of all documents.
        document_start: int64 ``(documents + 1,)``.
        document_id: uint8 ``(documents, 32)``.
        document_split: uint8 ``(documents,)``.
        window_document: int32 ``(windows,)``.
        window_start: int64 ``(windows,)``, within the document.
        window_end: int64 ``(windows,)``.
        message_document: int32 ``(messages,)``; empty for ordinary text.
        message_role: uint8 ``(messages,)``, numbers in :data:`featstore.text.roles.ROLES`.
        message_start: int64 ``(messages,)``, within the document.
        message_end: int64 ``(messages,)``.
        message_rest: uint8, what messages have besides, as JSON; empty, as the next three, where documents are no
            conversations.
        message_rest_start: int64 ``(messages + 1,)``.
        document_tools: uint8, the tools that were offered, as JSON.
        document_tools_start: int64 ``(documents + 1,)``.
    """

    text: NDArray[np.uint8]
    document_start: NDArray[np.int64]
    document_id: NDArray[np.uint8]
    document_split: NDArray[np.uint8]
    window_document: NDArray[np.int32]
    window_start: NDArray[np.int64]
    window_end: NDArray[np.int64]
    message_document: NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    message_role: NDArray[np.uint8] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    message_start: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    message_end: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    message_rest: NDArray[np.uint8] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    message_rest_start: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    document_tools: NDArray[np.uint8] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    document_tools_start: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def window_text(self, window: int) -> str:
        """The text of a window.

        Args:
            window: Window number.
        """
        base = self.document_start[self.window_document[window]]
        return self.text[base + self.window_start[window] : base + self.window_end[window]].tobytes().decode()

    @property
    def window_offset(self) -> NDArray[np.int64]:
        """Where each window begins in ``text``."""
        return self.document_start[self.window_document] + self.window_start

    @property
    def window_stop(self) -> NDArray[np.int64]:
        """Where each window ends in ``text``."""
        return self.document_start[self.window_document] + self.window_end

    @property
    def window_unit(self) -> NDArray[np.int32]:
        """What each window is resampled with: the number of the first document that has its document's id.

        Answers to one prompt, and equal texts, are one unit.
        """
        _, first, of = np.unique(self.document_id, axis=0, return_index=True, return_inverse=True)
        return first.astype(np.int32)[of.reshape(-1)][self.window_document]

    @property
    def window_split(self) -> NDArray[np.uint8]:
        """Split of each window's document."""
        return self.document_split[self.window_document]
