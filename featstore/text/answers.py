"""A prompt and what a model wrote after it: one document.

New tokens become text by their own bytes, so that a space before the first word stays. Every model then tokenises the
document anew: what the writer itself reads there may be other tokens than those it wrote.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping, Sequence
from typing import Any

from featstore.errors import SpecError
from featstore.text import tokens
from featstore.text.bytes import token_bytes
from featstore.text.documents import Document
from featstore.text.normalisation import normalised
from featstore.text.roles import GENERATED, Part
from featstore.text.windows import space_cut

#: More bytes than a token has on average in any text: what lies beyond is not tokenised to see whether it fits.
_TOKEN_BYTES = 64


def spoken(tokenizer: Any, ids: Sequence[int]) -> str:
    """New tokens as text, without control tokens.

    Args:
        tokenizer: The model's fast tokenizer.
        ids: What the model wrote.

    Returns:
        Text without the character that the last token cut; what was no UTF-8 before that is U+FFFD.
    """
    vocabulary = token_bytes(tokenizer)
    known = [i for i in ids if i < len(vocabulary.pieces) and vocabulary.reachable[i] and not vocabulary.control[i]]
    pieces = [vocabulary.pieces[i] for i in known]
    if None in pieces:
        # Tokens whose bytes cannot be told have the text that their decoder makes of them.
        text = tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).rstrip("\ufffd")
    raw = b"".join(piece for piece in pieces if piece is not None)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens after which a model goes on with a text: as it reads it, without what its tokenizer puts at the end.

    Args:
        tokenizer: The model's fast tokenizer.
        text: The prompt.

    Raises:
        OffsetError: As :func:`featstore.text.tokens.tokenize`.
    """
    return _open_ended(tokenizer, tokens.tokenize(tokenizer, [text])[0])


def _open_ended(tokenizer: Any, window: tokens.TokenizedWindow) -> list[int]:
    ids: list[int] = window.ids.tolist()
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while len(ids) > 1 and ids[-1] in ends:
        ids.pop()
    return ids


def fitting(text: str, tokenizers: Mapping[str, Any], limits: Mapping[str, int], new: int) -> str:
    """The beginning of a text after which every model has room for its answer.

    Args:
        text: The whole prompt.
        tokenizers: Fast tokenizers of the models that answer.
        limits: Tokens that each of them can read and write in all.
        new: Tokens of an answer.

    Returns:
        The text, or as much of it as fits, cut before whitespace where there is any.

    Raises:
        OffsetError: As :func:`featstore.text.tokens.tokenize`.
        SpecError: No word fits before the answer.
    """
    for name, tokenizer in tokenizers.items():
        room = limits[name] - new
        while room > 0:
            raw = text.encode()
            if len(raw) > room * _TOKEN_BYTES:
                raw = raw[: space_cut(raw, room * _TOKEN_BYTES)]
                text = raw.decode()
            window = tokens.tokenize(tokenizer, [text])[0]
            if len(_open_ended(tokenizer, window)) <= room:
                break
            end = int(window.byte_end[: room + 1].max(initial=0))
            if end < 4:
                room = 0
                break
            text = raw[: space_cut(raw, min(end, len(raw) - 1))].decode()
        if room < 1 or not text.strip():
            raise SpecError(
                f"--generate {new}: a context of {limits[name]} tokens leaves model {name!r} no room for a prompt; "
                "ask for fewer"
            )
    return text


def answered(prompt: Document, answer: str, form: str) -> Document:
    """A prompt and an answer to it as one document, which is split as the prompt is.

    Args:
        prompt: What was answered.
        answer: What a model wrote; nothing for no answer.
        form: Unicode form of the text, ``none`` or ``nfc``.
    """
    [text] = normalised([prompt.text + answer], form)
    # An accent that the answer begins with goes into the prompt's last character, which is then the answer's.
    start = len(os.path.commonprefix([text, prompt.text]).encode())
    end = len(text.encode())
    part = (Part(GENERATED, start, end),) if end > start else ()
    return Document(text, prompt.id, (*prompt.parts, *part))
