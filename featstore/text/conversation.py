"""Messages with roles: what a row of a chat data set says, checked, before any model's template sees it."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from featstore.errors import CorpusError
from featstore.text.roles import ASSISTANT, ROLES, SYSTEM, TOOL, USER, Part

#: The field of a row that holds messages.
FIELD = "messages"
#: Roles as rows name them, and what templates and stores call them.
ROLE_NAMES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "assistant": ASSISTANT,
    "tool": TOOL,
    "function": TOOL,
    "ipython": TOOL,
}


@dataclass(frozen=True)
class Message:
    """What one participant said.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: Its text; empty where an assistant only calls tools.
        rest: The message's other members as JSON values (``tool_calls``, ``tool_call_id``, ``name``); ``content``, as
            None, where the message has none.
    """

    role: str
    content: str
    rest: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        return {"role": self.role, "content": self.content, **self.rest}


@dataclass(frozen=True)
class Conversation:
    """Messages that follow each other, and the tools that were offered.

    Attributes:
        messages: At least one.
        tools: Their JSON schemas, or None.
        where: File and line, for errors.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    where: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """The messages' contents one after another."""
        return "".join(message.content for message in self.messages)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Which bytes of the text each message holds; none of an empty one, which is there as well."""
        parts, at = [], 0
        for message in self.messages:
            end = at + len(message.content.encode())
            parts.append(Part(ROLES.index(message.role), at, end))
            at = end
        return tuple(parts)

    @property
    def id(self) -> bytes:
        """SHA-256 of the conversation as JSON with sorted keys; equal conversations have equal ids."""
        whole = {"messages": [message.row() for message in self.messages], "tools": self.tools}
        return hashlib.sha256(to_json(whole, canonical=True)).digest()

    def normalised(self, form: str) -> Conversation:
        """The conversation with its contents in a Unicode form.

        Args:
            form: ``none`` or ``nfc``.
        """
        if form != "nfc":
            return self
        composed = (replace(m, content=unicodedata.normalize("NFC", m.content)) for m in self.messages)
        return replace(self, messages=tuple(composed))

    def cut(self, limit: int) -> Conversation | None:
        """The first messages that fit whole, without a system prompt at their end; None where nothing is left.

        Args:
            limit: UTF-8 bytes of contents to keep at most.
        """
        fitting = [m for m, part in zip(self.messages, self.parts, strict=True) if part.end <= limit]
        while fitting and fitting[-1].role == "system":
            fitting.pop()
        if len(fitting) == len(self.messages):
            return self
        return replace(self, messages=tuple(fitting)) if fitting else None


def to_json(value: Any, *, canonical: bool = False) -> bytes:
    """A JSON value as UTF-8 without spaces.

    Args:
        value: What ``json`` reads.
        canonical: Sort keys, so that equal values are equal texts; templates write keys in the order in which they are.

    Raises:
        ValueError: A number that is not finite, or a lone surrogate.
    """
    return json.dumps(value, ensure_ascii=False, sort_keys=canonical, separators=(",", ":"), allow_nan=False).encode()


def is_conversation(row: Mapping[str, Any], text_field: str) -> bool:
    """Whether a row holds messages rather than text.

    Args:
        row: JSON object or hub row.
        text_field: Name of the text field. Where one other than ``text`` is asked for and there, the row is text.
    """
    if FIELD not in row or text_field == FIELD:
        return FIELD in row and isinstance(row[FIELD], list)
    if text_field not in row:
        return True
    return text_field == "text" and isinstance(row[FIELD], list)


def parse_conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """Read the messages of a row.

    Args:
        row: JSON object or hub row with ``messages`` and perhaps ``tools``.
        where: File and line, for errors.

    Raises:
        CorpusError: It is no conversation; the message names the place and the message, counted from 1.
    """
    rows = row[FIELD]
    if not isinstance(rows, list) or not rows:
        what = "no messages" if rows == [] else f"messages is {_kind(rows)}, not a list"
        raise CorpusError(f"{where}: {what}; give at least one object with a role and a content")
    messages = tuple(_message(one, f"{where}, message {number}") for number, one in enumerate(rows, 1))
    return Conversation(messages, _tools(row.get("tools"), where), where)


def _message(row: Any, where: str) -> Message:
    if not isinstance(row, Mapping):
        raise CorpusError(f"{where}: {_kind(row)}, not an object with a role and a content; correct that message")
    name = row.get("role")
    if name is None:
        raise CorpusError(f"{where}: no role; give one of {', '.join(ROLE_NAMES)}")
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise CorpusError(f"{where}: unknown role {_short(name)}; give one of {', '.join(ROLE_NAMES)}")
    role = ROLES[ROLE_NAMES[name]]
    # A member without a value is how tables say that it is not there.
    rest = {key: value for key, value in row.items() if key not in ("role", "content") and value is not None}
    content = _content(row.get("content"), f"{where} ({name})")
    if content is None:
        if role != "assistant" or not rest.get("tool_calls"):
            raise CorpusError(f"{where} ({name}): no content; only an assistant that calls tools may leave it out")
        rest["content"] = None
    try:
        (content or "").encode()
        to_json(rest)
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where} ({name}) holds a lone surrogate; it is not text") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise CorpusError(f"{where} ({name}) holds what JSON does not: {error}; correct it") from error
    return Message(role, content or "", rest)


def _content(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise CorpusError(f"{where}: content is {_kind(value)}, not text; give text or a list of parts")
    texts = []
    for number, part in enumerate(value, 1):
        kind = part.get("type", "text") if isinstance(part, Mapping) else _kind(part)
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise CorpusError(f"{where}: part {number} of the content is {_short(kind)}, not text; leave that part out")
        texts.append(text)
    return "".join(texts)


def _tools(value: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    if isinstance(value, str):  # tables without nested columns hold them as JSON
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise CorpusError(
                f"{where}: tools is text that is not JSON ({error}); correct it or leave it out"
            ) from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise CorpusError(f"{where}: tools is not a list of JSON schemas; correct it or leave it out")
    try:
        to_json(value)
    except (ValueError, TypeError, RecursionError) as error:
        reason = "a lone surrogate" if isinstance(error, UnicodeEncodeError) else str(error)
        raise CorpusError(
            f"{where}: tools hold what JSON does not: {reason}; correct them or leave them out"
        ) from error
    return tuple(value)


def _kind(value: Any) -> str:
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
