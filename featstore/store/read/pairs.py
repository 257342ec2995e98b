"""Which token states of two models belong together.

The state of a causal model at a token that ends at byte e summarises the window up to e, whatever the tokenizer. Two
states pair when their windows are the same and their byte ends are equal. Where several tokens of one model end at the
same byte (byte fallback), the last one has read the whole character and is the one that pairs. Special tokens never
pair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from featstore.errors import PairingError, SpecError

POLICIES = ("end", "word")
_SPACES = np.frombuffer(b" \t\n\r\v\f", dtype=np.uint8)


@dataclass(frozen=True)
class Pairs:
    """Rows of two models that belong together, in document order, with what is needed to select among them.

    Attributes:
        source: Name of the first model.
        target: Name of the second; may be the same.
        row_source: int64 ``(m,)``.
        row_target: int64 ``(m,)``.
        split: uint8 ``(m,)``, 0 train, 1 validation, 2 test.
        document: int32 ``(m,)``.
        sink: bool ``(m,)``, either token is an attention sink.
        coverage: Share of each side's ordinary tokens that have a partner, (source, target).
    """

    source: str
    target: str
    row_source: NDArray[np.int64]
    row_target: NDArray[np.int64]
    split: NDArray[np.uint8]
    document: NDArray[np.int32]
    sink: NDArray[np.bool_]
    coverage: tuple[float, float]

    def __len__(self) -> int:
        return len(self.row_source)

    def where(self, keep: NDArray[np.bool_]) -> Pairs:
        """The pairs for which a condition holds.

        Args:
            keep: bool ``(m,)``.
        """
        names = ("row_source", "row_target", "split", "document", "sink")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})

    def select(self, split: int | None = None, *, keep_sinks: bool = False) -> Pairs:
        """The pairs of a split, without attention sinks unless asked for.

        Args:
            split: 0 train, 1 validation, 2 test, or None for all.
            keep_sinks: Lift the mask.

        Raises:
            SpecError: Another split.
        """
        if split not in (None, 0, 1, 2):
            raise SpecError(f"split {split!r}: give 0 for train, 1 for validation, 2 for test, or None for all")
        keep = np.ones(len(self), dtype=bool) if keep_sinks else ~self.sink
        if split is not None:
            keep &= self.split == split
        return self.where(keep)

    def need(self, minimum: int, what: str) -> Pairs:
        """Return the pairs if there are enough of them.

        Args:
            minimum: Fewest acceptable.
            what: What they are needed for, for the message.

        Raises:
            PairingError: There are fewer.
        """
        if len(self) < minimum:
            raise PairingError(
                f"{len(self)} pairs of {self.source} and {self.target} for {what}, at least {minimum} are needed; "
                "extract more text (--max-tokens, more documents) or lift the mask with --keep-sinks"
            )
        return self


def last_at_each_end(
    window: NDArray[np.int32], byte_end: NDArray[np.int32], special: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every (window, byte end) the last ordinary token that ends there.

    Args:
        window: int32 ``(n,)``, non-decreasing.
        byte_end: int32 ``(n,)``, non-decreasing within a window among ordinary tokens.
        special: bool ``(n,)``.

    Returns:
        ``(keys, rows)``: sorted int64 keys ``window * 2^32 + byte_end`` and the row of each.
    """
    rows = np.flatnonzero(~special)
    keys = (window[rows].astype(np.int64) << 32) | byte_end[rows].astype(np.int64)
    last = np.r_[keys[1:] != keys[:-1], True] if len(keys) else np.zeros(0, dtype=bool)
    return keys[last], rows[last].astype(np.int64)


def match(
    keys_a: NDArray[np.int64],
    rows_a: NDArray[np.int64],
    keys_b: NDArray[np.int64],
    rows_b: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Join two models' tokens on equal window and byte end.

    Args:
        keys_a: From :func:`last_at_each_end`.
        rows_a: Rows of the first model.
        keys_b: The same of the second.
        rows_b: Rows of the second model.

    Returns:
        ``(keys, row_a, row_b)`` in document order.
    """
    keys, at_a, at_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    return keys, rows_a[at_a], rows_b[at_b]


def ends_a_word(
    keys: NDArray[np.int64],
    window_offset: NDArray[np.int64],
    window_stop: NDArray[np.int64],
    text: NDArray[np.uint8],
) -> NDArray[np.bool_]:
    """Which of the keys' byte ends are followed by whitespace or the end of their window (policy ``word``).

    Args:
        keys: ``window * 2^32 + byte_end``.
        window_offset: int64 ``(windows,)``, where each window begins in ``text``.
        window_stop: int64 ``(windows,)``, where it ends.
        text: uint8 corpus bytes.
    """
    window = keys >> 32
    position = window_offset[window] + (keys & 0xFFFFFFFF)
    inside = position < window_stop[window]
    following = text[np.minimum(position, len(text) - 1)]
    result: NDArray[np.bool_] = ~inside | np.isin(following, _SPACES)
    return result


def check_policy(policy: str) -> str:
    """Validate ``--policy``.

    Args:
        policy: As typed.

    Raises:
        SpecError: Unknown.
    """
    if policy not in POLICIES:
        raise SpecError(f"pair policy {policy!r}: choose one of {', '.join(POLICIES)}")
    return policy
