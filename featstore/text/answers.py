"""A prompt and what a model wrote after it: one document.

New tokens become text by their own bytes, so that a space before the first word stays. Every model then tokenises the
document anew: what the writer itself reads there may be other tokens than those it wrote.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from featstore.errors import CorpusError, SpecError
from featstore.text import tokens
from featstore.text.bytes import token_bytes
from featstore.text.chat import DATE
from featstore.text.chat_tokens import tokenize_conversations
from featstore.text.conversation import Conversation, Message
from featstore.text.documents import Document, of_conversation
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
        Text without the character that its end cut; what was no UTF-8 before that is U+FFFD.
    """
    vocabulary = token_bytes(tokenizer)
    known = [i for i in ids if i < len(vocabulary.pieces) and vocabulary.reachable[i] and not vocabulary.control[i]]
    pieces = [vocabulary.pieces[i] for i in known]
    if None in pieces:
        # Tokens whose bytes cannot be told have the text that their decoder makes of them.
        text = str(tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    else:
        text = b"".join(piece for piece in pieces if piece is not None).decode(errors="replace")
    return text.rstrip("\ufffd")


def prompt_ids(tokenizer: Any, name: str, prompt: Document, date: str = DATE) -> list[int]:
    """The tokens after which a model goes on: a text as it reads it, or messages in its own template up to its turn.

    Args:
        tokenizer: The model's fast tokenizer.
        name: The model's name, for messages.
        prompt: A text, or a conversation of :func:`awaiting_answer`.
        date: The day that chat templates are told.

    Raises:
        CorpusError: As :func:`featstore.text.chat.render`.
        OffsetError: As :func:`featstore.text.tokens.tokenize`.
    """
    if prompt.conversation is None:
        return _open_ended(tokenizer, tokens.tokenize(tokenizer, [prompt.text])[0])
    [window] = tokenize_conversations(tokenizer, name, [prompt.conversation], add_generation_prompt=True, date=date)
    ids: list[int] = window.ids.tolist()
    return ids


def awaiting_answer(conversation: Conversation) -> Conversation:
    """A conversation in which it is the assistant's turn.

    Args:
        conversation: Messages.

    Raises:
        CorpusError: The last message is not a user's or a tool's.
    """
    last = conversation.messages[-1].role
    if last not in ("user", "tool"):
        raise CorpusError(
            f"{conversation.where}: the last of {len(conversation.messages)} messages is of role {last}; --generate "
            "answers what ends with a user or a tool: cut the conversation there, or leave --generate out"
        )
    return conversation


def _open_ended(tokenizer: Any, window: tokens.TokenizedWindow) -> list[int]:
    ids: list[int] = window.ids.tolist()
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    while len(ids) > 1 and ids[-1] in ends:
        ids.pop()
    return ids


def fitting(
    prompt: Document, tokenizers: Mapping[str, Any], limits: Mapping[str, int], new: int, date: str = DATE
) -> Document:
    """The beginning of a prompt after which every model has room for its answer; a conversation has to fit whole.

    Args:
        prompt: A text, or a conversation of :func:`awaiting_answer`.
        tokenizers: Fast tokenizers of the models that answer.
        limits: Tokens that each of them can read and write in all.
        new: Tokens of an answer.
        date: The day that chat templates are told.

    Returns:
        The prompt, or as much of its text as fits, cut before whitespace where there is any.

    Raises:
        CorpusError: A conversation does not fit.
        OffsetError: As :func:`featstore.text.tokens.tokenize`.
        SpecError: No word fits before the answer.
    """
    if prompt.conversation is None:
        text = _fitting_text(prompt.text, tokenizers, limits, new)
        return prompt if text == prompt.text else replace(prompt, text=text)
    for name, tokenizer in tokenizers.items():
        count = len(prompt_ids(tokenizer, name, prompt, date))
        if count + new > limits[name]:
            raise CorpusError(
                f"{prompt.conversation.where}: {count} tokens and {new} of an answer exceed the context of model "
                f"{name!r} ({limits[name]}); use a smaller --generate, or --max-document-bytes"
            )
    return prompt


def _fitting_text(text: str, tokenizers: Mapping[str, Any], limits: Mapping[str, int], new: int) -> str:
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
            end = int(window.byte_end[:room].max(initial=0))
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

    The answer is a part of its own: ``generated`` after a text, a message of the assistant's after messages.

    Args:
        prompt: What was answered.
        answer: What a model wrote; nothing for no answer.
        form: Unicode form of the text, ``none`` or ``nfc``.
    """
    if prompt.conversation is not None:
        content = answer.strip()  # as templates have it: the space after the turn's opening is theirs
        if not content:
            return prompt
        more = replace(prompt.conversation, messages=(*prompt.conversation.messages, Message("assistant", content)))
        return of_conversation(more.normalised(form), prompt.id)
    text = prompt.text + answer
    text = unicodedata.normalize("NFC", text) if form == "nfc" else text
    # An accent that the answer begins with goes into the prompt's last character, which is then the answer's.
    kept = min(len(text), len(prompt.text))
    kept = next((i for i in range(kept) if text[i] != prompt.text[i]), kept)
    start = len(text[:kept].encode())
    end = len(text.encode())
    part = (Part(GENERATED, start, end),) if end > start else ()
    return Document(text, prompt.id, (*prompt.parts, *part))
