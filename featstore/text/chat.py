"""A conversation as a model's own chat template writes it, and where in it each message's content stands.

A template is a program, and where it puts a content cannot be read off it. So it runs twice: over the messages, and
over the same messages with every content replaced by a private marker. Cut at the markers, the second rendering is what
the template adds. If these pieces and the contents, as they are or trimmed, make up the first rendering, then every
content stands where its marker stood; if they do not, the conversation is refused, since nobody could tell what its
states have read (decision 0027).
"""

from __future__ import annotations

import datetime as dt
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featstore.errors import CorpusError, TemplateWarning
from featstore.text.conversation import Conversation, to_json

#: The day that templates are told it is: rows must not depend on when they are computed. Llama 3.1's own default.
DATE = "2024-07-26"
#: Private-use characters around the number of a message, and around a control token that a tool or a call quotes.
_OPEN, _CLOSE, _QUOTE, _UNQUOTE = map(chr, range(0x10DC00, 0x10DC04))
_DIGITS = 0x10DD00
_MARKER = re.compile(f"{_OPEN}([{chr(_DIGITS)}-{chr(_DIGITS + 9)}]+){_CLOSE}")
_REMEDY = "leave the row out, or extract it with models whose templates keep every message"


@dataclass(frozen=True)
class Placed:
    """Where a message's content stands in a rendering.

    Attributes:
        message: Number of the message, from 0.
        start: First character within the rendering.
        stop: Character after the last.
        skipped: Characters at the beginning of the content that the template trimmed.
    """

    message: int
    start: int
    stop: int
    skipped: int


@dataclass(frozen=True)
class Rendering:
    """What a model reads of a conversation.

    Attributes:
        text: As its template writes it.
        contents: Where the contents stand, in order; a content that is empty stands nowhere.
        quoted: Character ranges of control tokens that a tool or a tool call quotes.
    """

    text: str
    contents: tuple[Placed, ...]
    quoted: tuple[tuple[int, int], ...] = ()


def render(
    tokenizer: Any, name: str, conversation: Conversation, *, add_generation_prompt: bool = False, date: str = DATE
) -> Rendering:
    """Write a conversation through a model's template, and prove where its contents stand.

    Args:
        tokenizer: Of transformers, with a chat template.
        name: The model's name, for messages.
        conversation: What to write.
        add_generation_prompt: Whether the template opens an answer at the end.
        date: The day, as ``YYYY-MM-DD``, that the template is told.

    Raises:
        CorpusError: There is no template; it fails; or it drops, repeats, reorders or changes a message. The message
            names row, message and model.
    """
    write = _Writer(tokenizer, name, conversation, add_generation_prompt, date)
    rows, tools = [message.row() for message in conversation.messages], conversation.tools
    contents = {number: m.content for number, m in enumerate(conversation.messages) if m.content}
    try:
        text = write(rows, tools)
    except CorpusError:
        # Without a content is how transformers hands on null; templates that know of no such message get an empty one.
        if all(row["content"] is not None for row in rows):
            raise
        rows = [{**row, "content": row["content"] or ""} for row in rows]
        text = write(rows, tools)
    _warn_of_what_is_left_out(write, text, rows, tools)
    controls = _quoted_controls(tokenizer, conversation)
    marked_rows = [
        {
            **_guarded(row, controls),
            **({"content": _marker(number)} if number in contents else {"content": row["content"]}),
        }
        for number, row in enumerate(rows)
    ]
    try:
        marked = write(marked_rows, None if tools is None else _guarded(tools, controls))
    except CorpusError as error:
        raise CorpusError(f"{error} (it fails where contents are others, so it depends on them)") from error
    pieces, order = _cut(marked)
    _refuse_another_order(write, conversation, list(contents), order)
    plain = [piece.replace(_QUOTE, "").replace(_UNQUOTE, "") for piece in pieces]
    placed, failed = _fit(text, plain, [contents[number] for number in order])
    if placed is None:
        number = order[min(failed, len(order) - 1)] if order else 0
        raise write.refusal(
            number, "changes what the message says, or writes something else around it because of what it says"
        )
    stands = tuple(Placed(number, *place) for number, place in zip(order, placed, strict=True))
    return Rendering(text, stands, _quoted(pieces, stands))


def _warn_of_what_is_left_out(
    write: _Writer, text: str, rows: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> None:
    """Say of tools and calls that the template does not write: the model's states have not read them."""
    others: list[tuple[str, Sequence[Mapping[str, Any]], Sequence[Any] | None]] = []
    if tools is not None:
        others.append(("tools", list(rows), None))
    if any("tool_calls" in row for row in rows):
        without = [{key: value for key, value in row.items() if key != "tool_calls"} for row in rows]
        others.append(("tool calls", without, tools))
    for what, kept, named in others:
        try:
            same = write(kept, named) == text
        except CorpusError:
            continue  # it asks for them, so it reads them
        if same:
            warnings.warn(
                f"model {write.name!r}: its chat template writes nothing of the {what} that conversations name; "
                "its states have not read them",
                TemplateWarning,
                stacklevel=2,
            )


class _Writer:
    """Applies a tokenizer's template to one conversation."""

    def __init__(self, tokenizer: Any, name: str, conversation: Conversation, prompt: bool, date: str) -> None:
        self._tokenizer, self.name, self._conversation, self._prompt = tokenizer, name, conversation, prompt
        self._template = self._find(date)

    def _find(self, date: str) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise CorpusError(
                f"model {self.name!r} has no chat template, so it cannot read messages ({self._conversation.where}); "
                "use the model's chat variant, or give its text with --text-field"
            )
        tools = self._conversation.tools
        try:
            template = str(self._tokenizer.get_chat_template(None, None if tools is None else list(tools)))
        except ValueError as error:
            raise self._failure(error) from error
        return _clock(date) + template if "strftime_now" in template else template

    def __call__(self, rows: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(row) for row in rows],
                    tools=None if tools is None else list(tools),
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=self._prompt,
                )
            )
        except Exception as error:  # a template may raise anything
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> CorpusError:
        reason = (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
        return CorpusError(
            f"{self._conversation.where}: the chat template of model {self.name!r} refuses these messages: {reason}; "
            "leave such rows out, or extract them with models whose templates take them"
        )

    def refusal(self, number: int, what: str) -> CorpusError:
        """That the template does something to a message, in one line."""
        role = self._conversation.messages[number].role
        return CorpusError(
            f"{self._conversation.where}, message {number + 1} ({role}): the chat template of model {self.name!r} "
            f"{what}, so what its states have read cannot be told; {_REMEDY}"
        )


def _clock(date: str) -> str:
    """A template's beginning that makes ``strftime_now`` tell a certain day, at midnight.

    A macro, since transformers lets no function into a template. The line feed at its end belongs to the block.
    """
    day = dt.date.fromisoformat(date)
    codes = {code: day.strftime(code) for code in (f"%{flag}{letter}" for flag in ("-", "") for letter in _LETTERS)}
    calls = "".join(f".replace({code!r}, {value!r})" for code, value in codes.items())
    return "{% macro strftime_now(format) %}{{ format" + calls + " }}{% endmacro %}\n"


_LETTERS = "aAbBcdDeFgGHIjmMnpSuUVwWxXyY"


def _marker(number: int) -> str:
    return _OPEN + "".join(chr(_DIGITS + int(digit)) for digit in str(number)) + _CLOSE


def _cut(marked: str) -> tuple[list[str], list[int]]:
    """What stands between the markers, and their numbers."""
    parts = _MARKER.split(marked)
    return parts[::2], [int("".join(str(ord(digit) - _DIGITS) for digit in digits)) for digits in parts[1::2]]


def _refuse_another_order(
    write: _Writer, conversation: Conversation, wanted: Sequence[int], order: Sequence[int]
) -> None:
    if list(order) == list(wanted):
        return
    for number in wanted:
        if number not in order:
            raise write.refusal(number, "leaves the message out or changes it")
        if order.count(number) > 1:
            raise write.refusal(number, "writes the message more than once")
    at = next(place for place, (there, here) in enumerate(zip(order, wanted, strict=True)) if there != here)
    moved = wanted[at]
    before = conversation.messages[order[at]].role
    raise write.refusal(
        moved, f"puts the messages in another order (message {order[at] + 1} ({before}) comes before this one)"
    )


def _fit(text: str, pieces: Sequence[str], contents: Sequence[str]) -> tuple[list[tuple[int, int, int]] | None, int]:
    """Lay pieces and contents along a text; contents may be trimmed.

    Returns:
        ``(start, stop, skipped)`` of every content, or None; and how many contents could be laid at most.
    """
    if not text.startswith(pieces[0]):
        return None, 0
    furthest, hopeless = 0, set[tuple[int, int]]()
    path: list[tuple[int, int, int]] = []

    def lay(number: int, at: int) -> bool:
        nonlocal furthest
        furthest = max(furthest, number)
        if number == len(contents):
            return at == len(text)
        if (number, at) in hopeless:
            return False
        for skipped, kept in _trimmed(contents[number]):
            stop = at + len(kept)
            if text.startswith(kept, at) and text.startswith(pieces[number + 1], stop):
                path.append((at, stop, skipped))
                if lay(number + 1, stop + len(pieces[number + 1])):
                    return True
                path.pop()
        hopeless.add((number, at))
        return False

    return (path, len(contents)) if lay(0, len(pieces[0])) else (None, furthest)


def _trimmed(content: str) -> dict[tuple[int, str], None]:
    """A content as it is, and as templates trim it: what is skipped at its beginning, and what is left."""
    made: dict[tuple[int, str], None] = {(0, content): None}
    for what in (None, "\n"):
        left = content.lstrip(what)
        for kept, of in ((left.rstrip(what), left), (left, left), (content.rstrip(what), content)):
            made[len(content) - len(of), kept] = None
    return made


# Control tokens that tools quote ------------------------------------------------------------------------------------


def _quoted_controls(tokenizer: Any, conversation: Conversation) -> re.Pattern[str] | None:
    """The control tokens that stand in tools or tool calls, where there are any; nearly always there are none."""
    whole = [conversation.tools, [message.rest for message in conversation.messages]]
    if conversation.tools is None and not any(message.rest for message in conversation.messages):
        return None
    written = to_json(whole).decode()
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = sorted((name for name in names if name in written), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None


def _guarded(value: Any, controls: re.Pattern[str] | None) -> Any:
    """A JSON value whose texts have guards around control tokens."""
    if controls is None:
        return value
    if isinstance(value, str):
        return controls.sub(f"{_QUOTE}\\g<0>{_UNQUOTE}", value)
    if isinstance(value, Mapping):
        return {key: _guarded(member, controls) for key, member in value.items()}
    return [_guarded(member, controls) for member in value] if isinstance(value, list | tuple) else value


def _quoted(pieces: Sequence[str], stands: Sequence[Placed]) -> tuple[tuple[int, int], ...]:
    """Where guards stood, in characters of the rendering."""
    found = []
    for piece, start in zip(pieces, [0, *(place.stop for place in stands)], strict=True):
        at, opened = start, start
        for character in piece:
            if character == _QUOTE:
                opened = at
            elif character == _UNQUOTE:
                found.append((opened, at))
            else:
                at += 1
    return tuple(found)
