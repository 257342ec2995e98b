"""Which tokens of two tokenizers have read the same bytes: in truth, and by the rule of the store."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.store.read.pairs import last_at_each_end, match, match_ends
from featstore.text.tokens import TokenizedWindow
from tests.support.real_tokenizers import FAMILIES, PIECES, STAND_INS
from tests.support.token_bytes import places, spelled_by_pieces, spelled_by_stand_ins, true_ends, true_keys

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer's ids spell bytes.

    Attributes:
        tokens: Bytes by id.
        form: Unicode form that it brings a text to, or None.
        space: What stands for a space.
        unknown: Id of the token that stands for characters without a token, or None. It is text, of bytes untold.
    """

    tokens: dict[int, bytes] = field(repr=False)
    form: str | None
    space: str
    unknown: int | None = None

    def of_tokens(self, ids: Sequence[int], text: str) -> list[bytes]:
        """What every token of a text spells."""
        tokens = [self.tokens[i] for i in ids]
        if self.unknown not in ids:
            return tokens
        characters = {token.decode(errors="ignore") for token in self.tokens.values()}
        expected = places(text, self.form, self.space)[0].decode()
        position = 0
        for at, token in enumerate(tokens):
            if ids[at] == self.unknown and not expected.startswith(token.decode(), position):
                run = itertools.takewhile(lambda character: character not in characters, expected[position:])
                tokens[at] = "".join(run).encode()
            elif at == 0 and not expected.startswith(token.decode()):
                position -= len(self.space)
            position += len(tokens[at].decode())
        return tokens

    @classmethod
    def of(cls, tokenizer: Any, kind: str, form: str | None = None) -> Spelling:
        """Of a vocabulary of one of the two kinds of :mod:`tests.support.real_tokenizers`."""
        read = {STAND_INS: spelled_by_stand_ins, PIECES: spelled_by_pieces}[kind]
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        unknown = model.get("unk_id", tokenizer.get_vocab().get(model.get("unk_token")))
        # Where bytes are spelt it stands for nothing, and is a control token like others.
        unknown = None if model.get("byte_fallback") else unknown
        return cls(read(tokenizer), form, {STAND_INS: " ", PIECES: "▁"}[kind], unknown)

    @classmethod
    def of_family(cls, name: str, tokenizer: Any) -> Spelling:
        """Of a real tokenizer."""
        return (
            cls.of(tokenizer, FAMILIES[name].spelling, FAMILIES[name].form)
            if name in FAMILIES
            else cls.of(tokenizer, STAND_INS)
        )


@dataclass(frozen=True)
class Reading:
    """What a tokenizer reads in some windows, in truth.

    Attributes:
        ids: Token ids of every window.
        special: Which of them the tokenizer added, or are control tokens all the same: some models read one in a text
            that quotes its name, whatever they are told. None of these pairs.
        ends: Bytes of the window read once each is.
        keys: int64 ``window * 2^32 + end`` of the ends at which a token may pair.
        rows: int64, the token of each, counted over all windows.
    """

    ids: list[list[int]]
    special: list[NDArray[np.bool_]]
    ends: list[Ints]
    keys: Ints
    rows: Ints


def read(tokenizer: Any, spelling: Spelling, windows: Sequence[str]) -> Reading:
    """Tokenise windows and reconstruct what every token has read.

    Raises:
        AssertionError: The tokens of a window do not spell it.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    controls = [i for i, token in backend.get_added_tokens_decoder().items() if token.special and i != spelling.unknown]
    ids, special, ends, keys, rows, row = [], [], [], [], [], 0
    for number, (text, encoding) in enumerate(zip(windows, backend.encode_batch(list(windows)), strict=True)):
        ids.append(encoding.ids)
        added = np.array(encoding.special_tokens_mask, dtype=bool)
        special.append(added | np.isin(encoding.ids, controls))
        tokens = spelling.of_tokens(encoding.ids, text)
        read_so_far = true_ends(text, tokens, added, form=spelling.form, space=spelling.space)
        ends.append(np.where(special[-1], 0, read_so_far))
        end, at = true_keys(text, ends[-1])
        keys.append((number << 32) | end)
        rows.append(at + row)
        row += len(encoding.ids)
    return Reading(ids, special, ends, np.concatenate(keys), np.concatenate(rows))


@dataclass(frozen=True)
class Verdict:
    """Pairs that a rule makes, beside those that are right.

    Attributes:
        made: How many it makes.
        right: How many are right: two tokens that are the last of each side to end at a byte, at a character's end.
        wrong: How many of those made join tokens that have not read the same bytes.
        beside: How many of those made have read the same bytes and are not right: they end inside a character.
        lost: How many right ones it does not make.
    """

    made: int
    right: int
    wrong: int
    beside: int
    lost: int


def judge(first: Reading, second: Reading, made: tuple[Ints, Ints]) -> Verdict:
    """Compare pairs of rows with the truth.

    Args:
        first: What one tokenizer reads.
        second: What the other reads in the same windows.
        made: Rows of the first and of the second.
    """
    _, row_a, row_b = match(first.keys, first.rows, second.keys, second.rows)
    end_a, end_b = (np.concatenate(reading.ends) for reading in (first, second))
    same = (end_a[made[0]] == end_b[made[1]]) & (end_a[made[0]] > 0)
    # A token has one partner at most.
    partner = np.full(len(end_a), -1)
    partner[row_a] = row_b
    right = partner[made[0]] == made[1]
    return Verdict(
        made=len(right),
        right=len(row_a),
        wrong=int((~same).sum()),
        beside=int((same & ~right).sum()),
        lost=len(row_a) - int(right.sum()),
    )


# The former rule ------------------------------------------------------------------------------------------------------


def former_keys(tokenizer: Any, windows: Sequence[str]) -> tuple[Ints, Ints]:
    """Keys and rows by character offsets, the last ordinary token at each end: the rule before format version 2."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    keys, rows, row = [], [], 0
    for number, (text, encoding) in enumerate(zip(windows, backend.encode_batch(list(windows)), strict=True)):
        bytes_before = np.r_[0, np.cumsum([len(character.encode()) for character in text], dtype=np.int64)]
        ordinary = np.flatnonzero(~np.array(encoding.special_tokens_mask, dtype=bool))
        end = bytes_before[np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[ordinary, 1]]
        last = np.r_[np.diff(end) != 0, True][: len(end)]
        keys.append((number << 32) | end[last])
        rows.append(ordinary[last] + row)
        row += len(encoding.ids)
    return np.concatenate(keys), np.concatenate(rows)


# The store's rule -----------------------------------------------------------------------------------------------------


def keys_of(tokenized: Sequence[TokenizedWindow]) -> tuple[Ints, Ints]:
    """Keys and rows of tokenised windows, as the store finds them in its token table."""
    window = np.repeat(np.arange(len(tokenized), dtype=np.int32), [len(one.ids) for one in tokenized])
    columns = ("byte_end", "special", "exact")
    return last_at_each_end(window, *(np.concatenate([getattr(one, name) for one in tokenized]) for name in columns))


def store_pairs(
    first: tuple[Ints, Ints], second: tuple[Ints, Ints], windows: Sequence[str], policy: str = "end"
) -> tuple[Ints, Ints]:
    """Rows that the store pairs.

    Args:
        first: From :func:`keys_of`.
        second: The other tokenizer's.
        windows: What both have read.
        policy: As ``--policy``.
    """
    stop = np.cumsum([len(text.encode()) for text in windows], dtype=np.int64)
    text = np.frombuffer("".join(windows).encode(), dtype=np.uint8)
    _, row_a, row_b = match_ends(first, second, policy, np.r_[0, stop[:-1]], stop, text)
    return row_a, row_b
