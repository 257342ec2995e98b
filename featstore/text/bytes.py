"""The bytes of every token of a vocabulary.

Two tokenizers meet in bytes, and a token may end inside a character, where offsets, which count characters, cannot say
what it has read. Its own bytes can. Three alphabets cover nearly every causal model: byte-level BPE writes each byte as
a printable stand-in, SentencePiece writes text with "▁" for a space, and where it falls back to bytes a token is named
``<0xNN>``. Whatever is read off the names is then compared with what the tokenizer's own decoder makes of every token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

#: What SentencePiece writes for a space.
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
#: Never assigned to a character (Unicode calls it a noncharacter).
_NO_CHARACTER = "\U0010fffe"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: By tokenizer: how many tokens it had when it was read, and its bytes.
_KNOWN: WeakKeyDictionary[Any, tuple[int, TokenBytes]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenBytes:
    """A vocabulary as bytes.

    Attributes:
        pieces: The bytes of every token id; None where they cannot be told.
        length: int32 ``(ids,)``, how many they are; -1 where they cannot be told.
        control: bool ``(ids,)``, tokens that are not text wherever they stand.
        reachable: bool ``(ids,)``, tokens that a text can have at all; some vocabularies hold names that are not spelt
            in their own alphabet, and numbers without a name.
        spaced: Whether "▁" and a space are one to this tokenizer.
    """

    pieces: tuple[bytes | None, ...]
    length: NDArray[np.int32]
    control: NDArray[np.bool_]
    reachable: NDArray[np.bool_]
    spaced: bool

    @property
    def unknown(self) -> int:
        """Number of ordinary tokens that a text can have and whose bytes cannot be told, the unknown token included."""
        return int(((self.length < 0) & self.reachable & ~self.control).sum())

    @property
    def told(self) -> bool:
        """Whether byte ends come from the tokens' bytes rather than from offsets alone."""
        return bool((self.length[~self.control] >= 0).any())


def token_bytes(tokenizer: Any) -> TokenBytes:
    """The bytes of every token, as far as the tokenizer's definition and its decoder agree on them.

    Args:
        tokenizer: A fast transformers tokenizer.

    Returns:
        The same object for the same tokenizer, as long as tokens are not added to it.
    """
    count = len(tokenizer)
    held = _KNOWN.get(tokenizer)
    if held is None or held[0] != count:
        held = _KNOWN[tokenizer] = (count, _read(tokenizer))
    return held[1]


def _read(tokenizer: Any) -> TokenBytes:
    backend = tokenizer.backend_tokenizer
    parts = _definition(backend)
    kinds = set(_types(parts))
    spaced = "Metaspace" in kinds or SPACE in json.dumps(parts, ensure_ascii=False)
    # An ending such as "</w>" stands for a space that the text need not have.
    opaque = bool({"WordPiece", "BPEDecoder", "CTC"} & kinds) or bool(getattr(backend.model, "end_of_word_suffix", ""))
    vocabulary = tokenizer.get_vocab()
    count = max(vocabulary.values(), default=-1) + 1
    names: list[str | None] = [None] * count
    for name, number in vocabulary.items():
        names[number] = name
    pieces: list[bytes | None] = [None] * count
    reachable = np.array([name is not None for name in names])
    if not opaque:
        fallback = "ByteFallback" in kinds or bool(getattr(backend.model, "byte_fallback", False))
        for number, name in enumerate(names):
            if name is None:
                continue
            pieces[number] = _stand_ins(name) if "ByteLevel" in kinds else _spelt(name, spaced, fallback)
            reachable[number] = pieces[number] is not None
    control = np.zeros(count, dtype=bool)
    for number, token in tokenizer.added_tokens_decoder.items():
        # What was added is matched in the text as it stands, whatever alphabet the vocabulary is written in.
        pieces[number] = None if opaque else _spelt(token.content, spaced, fallback=False)
        control[number], reachable[number] = token.special, True
    if not opaque:
        _believe_the_decoder(backend, pieces, set(tokenizer.added_tokens_decoder))
    unknown = _unknown(backend.model)
    if unknown is not None and unknown < count:
        # It stands for whatever it replaced, which is text.
        pieces[unknown], control[unknown] = None, False
    length = np.array([-1 if piece is None else len(piece) for piece in pieces], dtype=np.int32)
    return TokenBytes(tuple(pieces), length, control, reachable, spaced)


def _definition(backend: Any) -> list[Any]:
    """What the tokenizer does around its model, as JSON; the vocabulary itself is left out, which may be large.

    Each part of a tokenizer states itself as the JSON that ``tokenizer.json`` holds of it; one that was written in
    Python cannot, and then says nothing of the alphabet.
    """
    found = []
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        try:
            found.append(None if part is None else json.loads(part.__getstate__()))
        except Exception:  # noqa: BLE001 - the library's own error for a part written in Python
            found.append(None)
    return found


def _types(part: Any) -> list[str]:
    """The ``type`` of every component, nested ones included."""
    if isinstance(part, dict):
        own = [part["type"]] if isinstance(part.get("type"), str) else []
        return own + [name for value in part.values() for name in _types(value)]
    return [name for value in part for name in _types(value)] if isinstance(part, list) else []


def _unknown(model: Any) -> int | None:
    """The id of the model's unknown token: what it makes of a character that no vocabulary has."""
    name = getattr(model, "unk_token", None)
    if name is not None:
        number: int | None = model.token_to_id(name)
        return number
    try:
        made = model.tokenize(_NO_CHARACTER)
    except Exception:  # noqa: BLE001 - the library's own error where a model has no unknown token
        return None
    # A Unigram model does not tell its unknown token, but gives its number to what it cannot spell.
    return next((token.id for token in made if model.id_to_token(token.id) != token.value), None)


@cache
def byte_of_stand_in() -> dict[str, int]:
    """The byte behind each printable stand-in of byte-level BPE (Radford et al. 2019, GPT-2's ``bytes_to_unicode``).

    Bytes that print as themselves in Latin-1 stand for themselves; the others follow, in order, from U+0100.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _stand_ins(name: str) -> bytes | None:
    table = byte_of_stand_in()
    found = [table.get(character) for character in name]
    return None if None in found else bytes(byte for byte in found if byte is not None)


def _spelt(name: str, spaced: bool, fallback: bool) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(name) if fallback else None
    if byte:
        return bytes([int(byte[1], 16)])
    return (name.replace(SPACE, " ") if spaced else name).encode()


def _believe_the_decoder(backend: Any, pieces: list[bytes | None], added: set[int]) -> None:
    """Forget the bytes of every token of the vocabulary that the tokenizer's own decoder reads otherwise."""
    numbers = [number for number, piece in enumerate(pieces) if piece is not None and number not in added]
    read = backend.decode_batch([[number] for number in numbers], skip_special_tokens=False)
    for number, text in zip(numbers, read, strict=True):
        piece = pieces[number]
        # A decoder that takes the dummy prefix away takes it from every token that is decoded alone.
        wanted = "" if piece is None else piece.decode(errors="replace")
        if text not in (wanted, wanted.removeprefix(" ")):
            pieces[number] = None
