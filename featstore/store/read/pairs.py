"""Which token states of two models belong together.

The state of a causal model at a token that ends at byte e summarises the window up to e, whatever the tokenizer. Two
states pair when their windows are the same and their byte ends are equal: both have read the same bytes. Ends are those
of the tokens' own bytes, so one that ends inside a character pairs only with one that ends at the same byte of it, and
only where that is asked for (policy ``byte``). Where several tokens of one model end at the same byte, the last one
pairs. Special tokens never pair, nor do tokens that have read nothing yet, or of which nobody can tell what they have
read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import PairingError, SpecError
from featstore.store.read.columns import RowSet
from featstore.text.roles import ROLES, count_roles, parse_roles

#: Every character that both have read whole; of those the ends of words; also bytes inside a character.
POLICIES = ("end", "word", "byte")
#: Unicode's White_Space.
_SPACES = [
    character.encode()
    for character in "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
    + "".join(map(chr, range(0x2000, 0x200B)))
]
_LONGEST_SPACE = 3
#: Rows of a model from which its tokens and pairs are read and made piece by piece, not held.
LARGE = 1 << 24
#: Pairs that are held in memory where there are no more of them.
HELD = 1 << 22
_NOWHERE: NDArray[np.int64] = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Pairs:
    """Rows of two models that belong together, in document order, with what is needed to select among them.

    Of very many pairs the columns are :class:`featstore.store.read.columns.Column`, which index as arrays do and make
    what is asked for; the rows of either side are a :class:`featstore.store.read.columns.RowSet`.

    Attributes:
        source: Name of the first model.
        target: Name of the second; may be the same.
        row_source: int64 ``(m,)``.
        row_target: int64 ``(m,)``.
        split: uint8 ``(m,)``, 0 train, 1 validation, 2 test.
        document: int32 ``(m,)``; documents of one id, such as answers to one prompt, have the number of the first.
        sink: bool ``(m,)``, either token is an attention sink.
        role: uint8 ``(m,)``, who wrote the last byte that both have read: a number in
            :data:`featstore.text.roles.ROLES`.
        token: int32 ``(m,)``, id of the source's token.
        coverage: Share of each side's ordinary tokens that have a partner, (source, target).
    """

    source: str
    target: str
    row_source: NDArray[np.int64]
    row_target: NDArray[np.int64]
    split: NDArray[np.uint8]
    document: NDArray[np.int32]
    sink: NDArray[np.bool_]
    role: NDArray[np.uint8]
    token: NDArray[np.int32]
    coverage: tuple[float, float]

    def __len__(self) -> int:
        return len(self.row_source)

    def where(self, keep: NDArray[np.bool_]) -> Pairs:
        """The pairs for which a condition holds.

        Args:
            keep: bool ``(m,)``.
        """
        names = ("row_source", "row_target", "split", "document", "sink", "role", "token")
        rows: tuple[Any, Any] = self.row_source, self.row_target
        if not all(isinstance(side, RowSet) for side in rows):
            return replace(self, **{name: getattr(self, name)[keep] for name in names})
        source, target = (side.where(keep) for side in rows)
        chosen = {name: getattr(self, name).over(source) for name in names[2:]}
        found = replace(self, row_source=source, row_target=target, **chosen)
        if len(source) > HELD:
            return found
        arrays: dict[str, Any] = {name: np.asarray(getattr(found, name)) for name in names}
        return replace(found, **arrays)

    def select(
        self, split: int | None = None, *, keep_sinks: bool = False, roles: str | Iterable[str] | None = None
    ) -> Pairs:
        """The pairs of a split, without attention sinks unless asked for; of all roles, or of some.

        Args:
            split: 0 train, 1 validation, 2 test, or None for all.
            keep_sinks: Lift the mask.
            roles: Who wrote the last byte read: ``"assistant"``, ``"user,assistant"``, or several names; None for all.

        Raises:
            SpecError: Another split, or an unknown role.
            PairingError: There are pairs, and none of these roles.
        """
        if split not in (None, 0, 1, 2):
            raise SpecError(f"split {split!r}: give 0 for train, 1 for validation, 2 for test, or None for all")
        numbers = parse_roles(roles)
        keep = np.ones(len(self), dtype=bool) if keep_sinks else ~self.sink
        if split is not None:
            keep &= self.split == split
        if numbers is not None:
            wanted = np.isin(self.role, numbers)
            if len(self) and not wanted.any():
                names = ROLES[numbers[0]] if len(numbers) == 1 else f"any of {', '.join(ROLES[n] for n in numbers)}"
                held = ", ".join(f"{name} ({count})" for name, count in count_roles(self.role).items())
                raise PairingError(
                    f"no pairs of {self.source} and {self.target} have the role {names}; they have {held}: choose "
                    "--roles among these"
                )
            keep &= wanted
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
                "extract more text (--max-tokens, more documents), lift the mask with --keep-sinks or select more "
                "--roles"
            )
        return self


def last_at_each_end(
    window: NDArray[np.int32],
    byte_end: NDArray[np.int32],
    special: NDArray[np.bool_],
    exact: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every (window, byte end) the last ordinary token that has read the window up to there and nothing else.

    Args:
        window: int32 ``(n,)``, non-decreasing.
        byte_end: int32 ``(n,)``, non-decreasing within a window among ordinary tokens; 0 has read nothing.
        special: bool ``(n,)``.
        exact: bool ``(n,)``.

    Returns:
        ``(keys, rows)``: sorted int64 keys ``window * 2^32 + byte_end`` and the row of each.
    """
    rows = np.flatnonzero(~special & exact & (byte_end > 0))
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


def match_ends(
    first: tuple[NDArray[np.int64], NDArray[np.int64]],
    second: tuple[NDArray[np.int64], NDArray[np.int64]],
    policy: str,
    window_offset: NDArray[np.int64],
    window_stop: NDArray[np.int64],
    text: NDArray[np.uint8],
    message_stop: NDArray[np.int64] = _NOWHERE,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Join two models' tokens under a policy.

    Args:
        first: Keys and rows of the first model, from :func:`last_at_each_end`.
        second: Those of the other.
        policy: ``end``, ``word`` or ``byte``.
        window_offset: int64 ``(windows,)``, where each window begins in ``text``.
        window_stop: int64 ``(windows,)``, where it ends.
        text: uint8 corpus bytes.
        message_stop: int64 ``(messages,)``, where messages end in ``text``; a word ends there as well.

    Returns:
        ``(keys, row_a, row_b)`` in document order.
    """
    keys, row_a, row_b = match(*first, *second)
    if policy == "byte":
        return keys, row_a, row_b
    keep = (
        ends_a_word(keys, window_offset, window_stop, text, message_stop)
        if policy == "word"
        else ends_a_character(keys, window_offset, window_stop, text)
    )
    return keys[keep], row_a[keep], row_b[keep]


def ends_a_character(
    keys: NDArray[np.int64],
    window_offset: NDArray[np.int64],
    window_stop: NDArray[np.int64],
    text: NDArray[np.uint8],
) -> NDArray[np.bool_]:
    """Which of the keys' byte ends are not inside a character.

    Args:
        keys: ``window * 2^32 + byte_end``.
        window_offset: int64 ``(windows,)``, where each window begins in ``text``.
        window_stop: int64 ``(windows,)``, where it ends.
        text: uint8 corpus bytes.
    """
    position, inside = _positions(keys, window_offset, window_stop)
    following: NDArray[np.uint8] = text[np.minimum(position, len(text) - 1)]
    result: NDArray[np.bool_] = ~inside | (following & 0xC0 != 0x80)
    return result


def ends_a_word(
    keys: NDArray[np.int64],
    window_offset: NDArray[np.int64],
    window_stop: NDArray[np.int64],
    text: NDArray[np.uint8],
    message_stop: NDArray[np.int64] = _NOWHERE,
) -> NDArray[np.bool_]:
    """Which of the keys' byte ends are followed by whitespace, the end of their message or that of their window.

    Args:
        keys: ``window * 2^32 + byte_end``.
        window_offset: int64 ``(windows,)``, where each window begins in ``text``.
        window_stop: int64 ``(windows,)``, where it ends.
        text: uint8 corpus bytes.
        message_stop: int64 ``(messages,)``, where messages end in ``text``.
    """
    position, inside = _positions(keys, window_offset, window_stop)
    following = [text[np.minimum(position + ahead, len(text) - 1)] for ahead in range(_LONGEST_SPACE)]
    result = ~inside | np.isin(position, message_stop)
    for space in _SPACES:
        result |= np.logical_and.reduce([following[ahead] == byte for ahead, byte in enumerate(space)])
    return result


def _positions(
    keys: NDArray[np.int64], window_offset: NDArray[np.int64], window_stop: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where in the corpus's bytes the keys' tokens end, and whether their windows go on there."""
    window = keys >> 32
    position = window_offset[window] + (keys & 0xFFFFFFFF)
    return position, position < window_stop[window]


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
