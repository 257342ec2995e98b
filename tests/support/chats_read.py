"""What the tokens of a conversation have read, found out without the code that is tested.

The template's rendering is made by the library, what it trims is known of each, and what tokens have read of it is what
they spell, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featstore.text.conversation import Conversation
from featstore.text.tokens import TokenizedWindow
from tests.support.token_bytes import spelled_by_pieces, spelled_by_stand_ins


@dataclass(frozen=True)
class Spelt:
    """The truth about the tokens of one conversation.

    Attributes:
        byte_end: int64 ``(tokens,)``, bytes of the contents read; 0 where the last byte is the template's.
        special: bool ``(tokens,)``, whether it is.
    """

    byte_end: NDArray[np.int64]
    special: NDArray[np.bool_]


#: What a template keeps of a content, by its role.
Keeps: TypeAlias = Callable[[str, str], str]


def as_it_is(role: str, content: str) -> str:
    """A template that trims nothing."""
    del role
    return content


def stripped(role: str, content: str) -> str:
    """A template that trims every content."""
    del role
    return content.strip()


def read_by(
    tokenizer: Any, said: Conversation, ids: Sequence[int] | NDArray[np.int32], keeps: Keeps = as_it_is
) -> Spelt:
    """What every token has read.

    Args:
        tokenizer: With its template.
        said: The conversation.
        ids: Its tokens.
        keeps: What its template trims.
    """
    text, owner = _owner(tokenizer, said, keeps)
    at, ends, special = 0, [], []
    raw, pieces = text.encode(), _pieces(tokenizer)
    for number in np.asarray(ids).tolist():
        piece, before = pieces[number], at
        if raw.startswith(piece, at):
            at += len(piece)
        elif piece[:1] == b" " and raw.startswith(piece[1:], at):
            at += len(piece) - 1  # the space that SentencePiece puts before a text
        else:
            raise AssertionError(f"{piece!r} does not stand at byte {at} of {raw!r}")
        last = owner[at - 1] if at else -1
        control = number in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[number].special
        special.append(last < 0 or control)
        ends.append(0 if special[-1] else int(last) + 1)
        assert at > before or piece == b" "
    assert at == len(raw), "the tokens spell the whole rendering"
    return Spelt(np.array(ends), np.array(special))


def _owner(tokenizer: Any, said: Conversation, keeps: Keeps) -> tuple[str, NDArray[np.int64]]:
    """A rendering, and for each of its bytes the byte of the contents that it is; -1 where it is the template's.

    What the template writes is what it writes around words that stand nowhere else.
    """
    rows = [message.row() for message in said.messages]
    words = {number: f"zqj{number}jqz" for number, message in enumerate(said.messages) if message.content}
    tools = None if said.tools is None else list(said.tools)
    text, rest = (
        tokenizer.apply_chat_template(one, tools=tools, tokenize=False)
        for one in (rows, [row | ({"content": words[i]} if i in words else {}) for i, row in enumerate(rows)])
    )
    made, owner, base = "", [], 0
    for number, message in enumerate(said.messages):
        content = message.content
        if content:
            before, word, rest = rest.partition(words[number])
            assert word
            kept = keeps(message.role, content)
            first = base + len(content[: content.index(kept)].encode())
            owner += [-1] * len(before.encode()) + list(range(first, first + len(kept.encode())))
            made += before + kept
        base += len(content.encode())
    assert made + rest == text, "the template does what is known of it"
    return text, np.array(owner + [-1] * len(rest.encode()), dtype=np.int64)


@lru_cache(maxsize=64)
def _pieces(tokenizer: Any) -> dict[int, bytes]:
    level = "ByteLevel" in repr(tokenizer.backend_tokenizer.pre_tokenizer) + repr(tokenizer.backend_tokenizer.decoder)
    if level:
        return spelled_by_stand_ins(tokenizer)
    return {number: piece.replace("▁".encode(), b" ") for number, piece in spelled_by_pieces(tokenizer).items()}


def same_bytes(first: tuple[TokenizedWindow, Spelt], second: tuple[TokenizedWindow, Spelt]) -> tuple[int, int, int]:
    """Tokens of two readings that pair, those of them that have read different bytes, and right ones that are lost.

    Args:
        first: What a model reads, and the truth about it.
        second: The same of another model.
    """
    paired, true = ([{}, {}] for _ in range(2))
    for side, (window, truth) in enumerate((first, second)):
        for at in np.flatnonzero(~window.special & (window.byte_end > 0)):
            paired[side][int(window.byte_end[at])] = int(at)
        for at in np.flatnonzero(~truth.special):
            true[side][int(truth.byte_end[at])] = int(at)
    common = paired[0].keys() & paired[1].keys()
    wrong = sum(first[1].byte_end[paired[0][end]] != second[1].byte_end[paired[1][end]] for end in common)
    return len(common), int(wrong), len((true[0].keys() & true[1].keys()) - common)
