"""What is found out about a model by running it: its stream's axes, which windows share a pass, how it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Axes:
    """How a model lays out its stream.

    Attributes:
        batch: Axis of sequences.
        tokens: Axis of tokens.
        sizes: Sizes of the other axes, in their order; the last one is the hidden size.
    """

    batch: int
    tokens: int
    sizes: tuple[int, ...]

    @property
    def width(self) -> int:
        """Width of a row."""
        width = 1
        for size in self.sizes:
            width *= size
        return width

    @property
    def streams(self) -> int:
        """Streams side by side that a row folds."""
        return self.width // self.sizes[-1]

    def rows(self, native: torch.Tensor) -> torch.Tensor:
        """The stream as rows.

        Args:
            native: In the model's own axes.

        Returns:
            ``(batch, tokens, width)``; a view where the model has that layout.
        """
        if (self.batch, self.tokens, len(self.sizes)) == (0, 1, 1):
            return native
        return native.movedim((self.batch, self.tokens), (0, 1)).flatten(2)

    def native(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as the stream that the model expects.

        Args:
            rows: ``(batch, tokens, width)``.
        """
        if (self.batch, self.tokens, len(self.sizes)) == (0, 1, 1):
            return rows
        return rows.unflatten(2, self.sizes).movedim((0, 1), (self.batch, self.tokens)).contiguous()


@dataclass(frozen=True)
class Batching:
    """Which windows may share a forward pass without changing each other's states.

    Attributes:
        kind: ``padded`` (any, padded at the right), ``equal`` (windows of one length, without padding) or ``single``.
        switch: Windows on either side of this length never share a pass, or None: the model chooses its position
            encoding by the longest sequence of a batch (LongRoPE).
    """

    kind: str = "padded"
    switch: int | None = None

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Split a batch into passes.

        Args:
            lengths: Tokens of every window.

        Returns:
            Places in ``lengths`` that go together, each once.
        """
        keys: list[Any]
        if self.kind == "single":
            keys = list(range(len(lengths)))
        elif self.kind == "equal":
            keys = list(lengths)
        else:
            keys = [self.switch is not None and length > self.switch for length in lengths]
        groups: dict[Any, list[int]] = {}
        for place, key in enumerate(keys):
            groups.setdefault(key, []).append(place)
        return list(groups.values())


@dataclass(frozen=True)
class Continuing:
    """How a model goes on from what it has read.

    Attributes:
        kind: ``cached`` (any number of tokens at once), ``stepwise`` (one at a time) or ``recomputed`` (no usable
            cache: the whole text is passed again).
        positions: Whether it must be told the positions of new tokens.
        whole_logits: Whether it must compute the logits of all tokens for its stream to be whole.
        padding: Whether prompts of several lengths may share a batch, padded at the left.
        branching: ``shared`` (two may go on from one cache), ``copied`` (from copies of it) or ``reread``.
    """

    kind: str = "cached"
    positions: bool = False
    whole_logits: bool = False
    padding: bool = True
    branching: str = "shared"
