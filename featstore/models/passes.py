"""Passes over a batch of prompts, each of which goes on from what was read before.

How a model goes on is a property of the model that is measured (:class:`~featstore.models.layout.Continuing`): most
read any number of new tokens from a cache; some need to be told the positions; recurrent ones of the first generation
start anew unless tokens come one at a time; some have no cache at all, and the whole text is passed again.
"""

from __future__ import annotations

from typing import Any

import torch

from featstore.errors import UnsupportedArchitectureError
from featstore.models.caches import copied, grows, returned_cache, seen, selected, shared
from featstore.models.devices import input_device
from featstore.models.residual import ResidualStream, accepted


class Passes:
    """Passes over a batch, each of which reads what came before.

    A batch with padding gets the mask and the positions that it needs. Without padding no mask is passed: the path the
    models take alone.
    """

    def __init__(self, stream: ResidualStream) -> None:
        """Begin with nothing read.

        Args:
            stream: The model's residual stream, which says how the model goes on.
        """
        self._stream, self._how = stream, stream.continuing
        self._real: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None
        self._padded = False
        self._name = ""
        self._past: Any = None
        self._chunks: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def read(self, new: torch.Tensor, padding: torch.Tensor | None = None, *, keep: int = 1) -> torch.Tensor:
        """Pass further tokens.

        Args:
            new: int64 ``(batch, new tokens)``.
            padding: bool of the same shape, True at the left of a row where there is no token; None for none.
            keep: Of how many of them, the last ones, the logits are wanted, 1 or more.

        Returns:
            Logits ``(batch, keep, vocabulary)``.
        """
        new = new.to(input_device(self._stream.model))
        self._chunks.append((new, padding))
        if self._how.kind == "stepwise" and self._ids is not None and new.shape[1] > 1:
            steps = [self._pass(new[:, i : i + 1], None, 1) for i in range(new.shape[1])]
            self.logits: torch.Tensor = torch.cat(steps, dim=1)[:, -keep:]
        else:
            self.logits = self._pass(new, padding, keep)
        return self.logits

    def _pass(self, new: torch.Tensor, padding: torch.Tensor | None, keep: int) -> torch.Tensor:
        real = torch.ones_like(new, dtype=torch.bool) if padding is None else ~padding.to(new.device)
        self._padded |= padding is not None
        self._real = real if self._real is None else torch.cat([self._real, real], dim=1)
        self._ids = new if self._ids is None else torch.cat([self._ids, new], dim=1)
        again = self._how.kind == "recomputed"
        given = self._ids if again else new
        extra: dict[str, Any] = {"use_cache": not again}
        if self._padded or self._how.positions:
            places = (self._real.cumsum(dim=1) - 1).clamp(min=0)
            extra["position_ids"] = places[:, -given.shape[1] :]
        if self._padded:
            # A cache that counts nothing has taken in what came before, and its blocks mask the tokens they are given.
            told = given.shape[1] if seen(self._past) is None else self._real.shape[1]
            extra["attention_mask"] = self._real[:, -told:].long()
        if not self._how.whole_logits:
            extra["logits_to_keep"] = keep
        if self._past is not None:
            extra[self._name] = self._past
        model = self._stream.model
        output = model(input_ids=given, **accepted(model, extra))
        if not again:
            self._name, self._past = returned_cache(output)
        logits: torch.Tensor = output.logits[:, -keep:]
        return logits

    def branch(self, rows: torch.Tensor | None = None) -> Passes:
        """What may go on otherwise, while this one stays as it is.

        Args:
            rows: int64, the rows that the new batch has, each as often as is wished; None for all of them once.

        Raises:
            UnsupportedArchitectureError: The cache is written in place, so that two cannot go on from it.
        """
        other = Passes(self._stream)
        if self._ids is None or self._real is None:
            return other
        if rows is not None:
            rows = rows.to(self._ids.device)
        chunks = [
            (ids, padding) if rows is None else (ids[rows], _chosen(padding, rows)) for ids, padding in self._chunks
        ]
        if self._how.branching == "reread" and self._how.kind != "recomputed":
            for ids, padding in chunks:
                other.read(ids, padding)
            return other
        other._chunks, other._padded, other._name = chunks, self._padded, self._name
        other._real, other._ids = _chosen(self._real, rows), _chosen(self._ids, rows)
        if self._past is None:
            return other
        if getattr(self._past, "is_compileable", False):
            raise UnsupportedArchitectureError(
                f"two texts cannot go on from one {type(self._past).__name__}; use a cache that grows, such as "
                "DynamicCache"
            )
        # A cache that grows makes new tensors, so the two share what has been read until rows are chosen.
        plain = self._how.branching == "shared" and grows(self._past)
        other._past = shared(self._past) if plain else copied(self._past)
        if rows is not None:
            other._past = selected(other._past, rows)
        return other


def _chosen(values: Any, rows: torch.Tensor | None) -> Any:
    """Rows of a tensor; None stays None, and all rows stay as they are."""
    return values if values is None or rows is None else values.to(rows.device)[rows]
