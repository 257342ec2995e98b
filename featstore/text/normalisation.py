"""Unicode normalisation of text as it is read, where the models' tokenizers normalise anyway.

A tokenizer that composes characters reports offsets that fit another text than the one it was given. Text that is
composed (NFC) before it is stored is the text that such a tokenizer reads.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from featstore.errors import SpecError
from featstore.text.conversation import Conversation

#: What can be asked for; ``auto`` is decided by the tokenizers.
CHOICES = ("auto", "none", "nfc")

#: Steps that compose, decompose or replace characters by what Unicode calls their equivalents; SentencePiece's
#: tables (nmt_nfkc) are ``Precompiled``.
_UNICODE_STEPS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Precompiled", "StripAccents"})


def check_choice(text: str) -> None:
    """Check ``--normalise``.

    Args:
        text: As typed.

    Raises:
        SpecError: None of :data:`CHOICES`.
    """
    if text not in CHOICES:
        raise SpecError(f"--normalise {text!r}: choose auto, none or nfc")


def normalises(tokenizer: Any) -> bool:
    """Whether a tokenizer brings text into a Unicode normal form before it cuts it into tokens.

    Steps such as ``Replace``, ``Prepend``, ``Lowercase`` and ``Nmt`` do not: decomposed characters stay as they are.

    Args:
        tokenizer: A transformers tokenizer; one that is not backed by the tokenizers library has no steps to tell.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    # What the library pickles is the step as JSON; that of the whole tokenizer would carry its vocabulary.
    return normalizer is not None and _is_unicode(json.loads(normalizer.__getstate__()))


def normalised(texts: Iterable[str | Conversation], form: str) -> Iterator[str | Conversation]:
    """Bring texts, and the contents of messages, into a form, lazily.

    Args:
        texts: Document texts or conversations.
        form: ``none`` or ``nfc``.
    """
    for text in texts:
        if isinstance(text, Conversation):
            yield text.normalised(form)
        else:
            yield unicodedata.normalize("NFC", text) if form == "nfc" else text


def _is_unicode(step: dict[str, Any]) -> bool:
    if step["type"] == "Sequence":
        return any(_is_unicode(one) for one in step["normalizers"])
    if step["type"] == "BertNormalizer":  # accents are stripped from decomposed text; by default where it lowers case
        return bool(step["lowercase"] if step["strip_accents"] is None else step["strip_accents"])
    return step["type"] in _UNICODE_STEPS
