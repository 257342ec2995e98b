"""Conversations to token ids with byte ends: those of the contents, whatever a template writes around them.

A rendering is tokenised as its model would tokenise it, template and contents in one, since a token may hold the
template's line feed and the first letters of a content. Only where contents quote control tokens, which are to be read
as text, the stretches between the template's own control tokens are tokenised each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featstore.errors import OffsetError
from featstore.text.alignment import byte_ends, byte_offsets
from featstore.text.bytes import token_bytes
from featstore.text.chat import DATE, Rendering, render
from featstore.text.conversation import Conversation
from featstore.text.tokens import TokenizedWindow

#: Never assigned to a character, and joined with nothing where it is spelt in bytes.
_NO_CHARACTER = "\U0010fffe"
#: Ids, ends in bytes of the rendering, whether these are exact, and which tokens are control tokens.
_Stretch: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]


def tokenize_conversations(
    tokenizer: Any,
    name: str,
    conversations: Sequence[Conversation],
    *,
    add_generation_prompt: bool = False,
    date: str = DATE,
) -> list[TokenizedWindow]:
    """Tokenise conversations through the tokenizer's chat template.

    No start token is added to the one that templates write themselves. A token is ordinary if the last byte that it
    has read lies in a content, and special otherwise; ends count the bytes of the contents alone, one after another.

    Args:
        tokenizer: A fast transformers tokenizer with a chat template; its ``split_special_tokens`` says what control
            tokens that contents quote are read as.
        name: The model's name, for messages.
        conversations: What to read.
        add_generation_prompt: Whether templates open an answer at the end.
        date: The day that templates are told.

    Raises:
        CorpusError: As :func:`featstore.text.chat.render`.
        OffsetError: The tokens do not rebuild a rendering; the message names the row.
    """
    written = [
        render(tokenizer, name, one, add_generation_prompt=add_generation_prompt, date=date) for one in conversations
    ]
    reader = _Reader(tokenizer)
    encodings = reader.encode([one.text for one in written])
    result = []
    for conversation, rendering, encoding in zip(conversations, written, encodings, strict=True):
        try:
            result.append(reader.window(conversation, rendering, encoding))
        except OffsetError as error:
            raise OffsetError(f"{conversation.where}, as model {name!r} reads it: {error}") from error
    return result


def content_ends(
    end: NDArray[np.int64], exact: NDArray[np.bool_], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ends within a rendering to ends within the contents.

    Args:
        end: int64 ``(tokens,)``, bytes of the rendering read once each token is.
        exact: bool ``(tokens,)``; one that is not has read something of the byte after its end as well.
        places: int64 ``(contents, 3)``: a content's first byte in the rendering, the byte after its last, and where the
            first one is in the contents laid end to end; ascending.

    Returns:
        int64 ``(tokens,)`` ends, 0 where the last byte read is the template's; and bool ``(tokens,)`` whether it is a
        content's.
    """
    if not len(places):
        return np.zeros(len(end), dtype=np.int64), np.zeros(len(end), dtype=bool)
    last = end - exact
    of = np.searchsorted(places[:, 0], last, side="right") - 1
    inside = (of >= 0) & (last < places[of, 1])
    return np.where(inside, places[of, 2] + end - places[of, 0], 0), inside


class _Reader:
    """Tokens of renderings, by one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._vocabulary = tokenizer, token_bytes(tokenizer)
        self._quoted_as_text = bool(tokenizer.split_special_tokens)
        normalizer = tokenizer.backend_tokenizer.normalizer
        self._normalise = str if normalizer is None else normalizer.normalize_str

    def encode(self, texts: Sequence[str], *, controls_as_text: bool = False) -> Sequence[Any]:
        """Encodings of texts to which nothing is added."""
        batch = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=controls_as_text,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,
        )
        return batch.encodings or ()

    def window(self, conversation: Conversation, rendering: Rendering, encoding: Any) -> TokenizedWindow:
        """The tokens of one rendering.

        Args:
            conversation: What was rendered.
            rendering: As its template writes it.
            encoding: Of the rendering, with every control token read as such.
        """
        offset = byte_offsets(rendering.text)
        parts = list(self._stretches(rendering, encoding, offset))
        if not parts:
            raise OffsetError("the template writes nothing; give messages with content, or another template")
        ids, end, exact, control = (np.concatenate(column) for column in zip(*parts, strict=True))
        ends, inside = content_ends(end, exact, _places(conversation, rendering, offset))
        for place in rendering.contents:
            if place.skipped:
                # The template takes away the whitespace that this message begins with: its tokens have not read it.
                part = conversation.parts[place.message]
                exact &= (ends <= part.start) | (ends > part.end)
        special = control | ~inside
        ends[special], exact[special] = 0, True
        return TokenizedWindow(ids.astype(np.int32), ends.astype(np.int32), special, exact)

    def _stretches(self, rendering: Rendering, encoding: Any, offset: NDArray[np.int64]) -> Iterator[_Stretch]:
        """The template's control tokens one by one, and what stands between them, in order."""
        text, ids = rendering.text, np.array(encoding.ids, dtype=np.int32)
        controls = [(at, *encoding.token_to_chars(at)) for at in np.flatnonzero(self._vocabulary.control[ids]).tolist()]
        quotes = [one for one in controls if _is_quoted(rendering, *one[1:])] if self._quoted_as_text else []
        offsets = cache(lambda: np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2))
        first = begin = 0
        bounds = [one for one in controls if one not in quotes]
        for at, start, stop in [*bounds, (len(ids), len(text), len(text))]:
            if any(begin <= quote[1] < start for quote in quotes):
                yield from self._stretch(
                    text[begin:start], offset[begin], *self._as_text(text[begin:start], begin == 0)
                )
            else:
                here = slice(first, at), begin
                spans = partial(lambda rows, shift: offsets()[rows] - shift, *here)
                yield from self._stretch(text[begin:start], offset[begin], ids[first:at], spans)
            if at < len(ids):
                yield ids[at : at + 1], offset[[stop]], np.ones(1, dtype=bool), np.ones(1, dtype=bool)
            first, begin = at + 1, stop

    def _stretch(
        self, text: str, shift: int, ids: NDArray[np.int32], spans: Callable[[], NDArray[np.int64]]
    ) -> Iterator[_Stretch]:
        if len(ids):
            end, exact = byte_ends(self._vocabulary, self._normalise, text, ids, spans)
            yield ids, end + shift, exact, self._vocabulary.control[ids]
        elif text.strip():
            raise OffsetError(f"no token covers {text[:40]!r}; update `tokenizers` or use another tokenizer")

    def _as_text(self, text: str, at_start: bool) -> tuple[NDArray[np.int32], Callable[[], NDArray[np.int64]]]:
        """Ids and offsets of a stretch whose control tokens are text."""
        before = "" if at_start or not self._begins_otherwise else _NO_CHARACTER
        [whole] = self.encode([before + text], controls_as_text=True)
        left_out = 0
        if before:
            [alone] = self.encode([before], controls_as_text=True)
            left_out = len(alone.ids)
            if whole.ids[:left_out] != alone.ids:
                raise OffsetError(
                    f"what is quoted in {text[:40]!r} cannot be read as text by itself"
                    "; use another chat template, or another model"
                )
        spans = np.array(whole.offsets[left_out:], dtype=np.int64).reshape(-1, 2) - len(before)
        return np.array(whole.ids[left_out:], dtype=np.int32), lambda: spans

    @cached_property
    def _begins_otherwise(self) -> bool:
        """Whether a text by itself begins otherwise than after a control token, as with SentencePiece's space."""
        control = next(token for token in self._tokenizer.added_tokens_decoder.values() if token.special).content
        after, alone = self.encode([f"{control}a", "a"])
        return bool(after.ids[1:] != alone.ids)


def _is_quoted(rendering: Rendering, start: int, stop: int) -> bool:
    """Whether a control token stands in what a message, a tool or a call says, not in what the template writes."""
    if any(first <= start and stop <= last for first, last in rendering.quoted):
        return True
    for place in rendering.contents:
        shared = slice(max(start, place.start), min(stop, place.stop))
        # A control token may take the whitespace beside it along, which is no part of it.
        if shared.start < shared.stop and rendering.text[shared].strip():
            if not (place.start <= start and stop <= place.stop):
                raise OffsetError(
                    f"message {place.message + 1} and the template together spell the control token "
                    f"{rendering.text[start:stop]!r}; leave the row out"
                )
            return True
    return False


def _places(conversation: Conversation, rendering: Rendering, offset: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(contents, 3)``, as :func:`content_ends` takes them."""
    starts = [part.start for part in conversation.parts]
    rows = [
        (
            offset[place.start],
            offset[place.stop],
            starts[place.message] + len(conversation.messages[place.message].content[: place.skipped].encode()),
        )
        for place in rendering.contents
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)
