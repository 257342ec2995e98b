"""The chat templates that models are published with: ids, ends and pairs of contents, and messages they do not keep."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from featstore.errors import CorpusError
from featstore.text.chat import render
from featstore.text.chat_tokens import tokenize_conversations
from featstore.text.conversation import Conversation, parse_conversation
from featstore.text.tokens import TokenizedWindow
from tests.support.chats import CALL, CHATS, PUBLISHED, TOOLS, conversation, ids_of, load_chat, say
from tests.support.chats_read import Keeps, Spelt, as_it_is, read_by, same_bytes, stripped
from tests.support.registries import UnreachableError

pytestmark = pytest.mark.registries


def but_for_system(role: str, content: str) -> str:
    """A template that trims what is said in turns."""
    return content if role == "system" else content.strip()


def but_for_first_lines(role: str, content: str) -> str:
    """A template that takes line feeds before the last answer away."""
    return content.lstrip("\n") if role == "assistant" else content


#: What each template trims, read off its source.
KEEPS: Mapping[str, Keeps] = {
    "llama3_1": stripped,
    "gemma3": but_for_system,
    "command_r_plus": but_for_system,
    "qwen3": but_for_first_lines,
    **dict.fromkeys(("mistral_nemo", "deepseek_v3", "smollm2"), as_it_is),
}
#: Conversations that a template does not keep, and what is said of it.
REFUSED = {
    ("gemma3", "tools"): "line 10: the chat template of model 'gemma3' refuses these messages: Conversation roles must",
    ("command_r_plus", "tools"): "line 10: the chat template of model 'command_r_plus' refuses these messages: 'dict",
    ("mistral_nemo", "system"): r"line 2, message 1 \(system\): the chat template of model 'mistral_nemo' leaves",
}
#: Conversations whose control tokens some model has: of those alone other ids than the template's come.
QUOTING = {"quoted", "tools"}


@cache
def tokenizer_of(name: str) -> Any:
    try:
        return load_chat(name)
    except UnreachableError as error:
        return str(error)


@pytest.fixture(params=PUBLISHED)
def family(request) -> str:
    return available(request.param)


def available(name: str) -> str:
    if isinstance(tokenizer_of(name), str):
        pytest.skip(f"{name}: {tokenizer_of(name)}")
    return name


def composed(chat: str) -> Conversation:
    """As a store has it: two of the families compose characters."""
    return conversation(chat).normalised("nfc")


@cache
def reading(name: str, chat: str) -> tuple[TokenizedWindow, Spelt] | None:
    """What a family reads of a conversation, and the truth; None where its template does not keep it."""
    if (name, chat) in REFUSED:
        return None
    said, tokenizer = composed(chat), tokenizer_of(name)
    [window] = tokenize_conversations(tokenizer, name, [said])
    return window, read_by(tokenizer, said, window.ids, KEEPS[name])


@pytest.mark.parametrize("chat", CHATS)
class TestOfOne:
    def test_ends_are_those_of_the_bytes_that_tokens_spell(self, chat, family):
        found = reading(family, chat)
        if found is None:
            with pytest.raises(CorpusError, match=REFUSED[family, chat]):
                render(tokenizer_of(family), family, conversation(chat))
            return
        window, truth = found
        np.testing.assert_array_equal(window.special, truth.special)
        np.testing.assert_array_equal(window.byte_end, truth.byte_end)
        # Where a template takes away what a message begins with, its tokens have not read all before their end.
        said, unread = composed(chat), np.zeros(len(window.ids), dtype=bool)
        for part, message in zip(said.parts, said.messages, strict=True):
            if message.content.index(KEEPS[family](message.role, message.content)):
                unread |= ~window.special & (window.byte_end > part.start) & (window.byte_end <= part.end)
        assert (window.exact == ~unread).all()

    def test_ids_are_those_of_the_template(self, chat, family):
        found, said, tokenizer = reading(family, chat), composed(chat), tokenizer_of(family)
        if found is None:
            return
        if chat in QUOTING:
            # What the same template makes of the conversation without the quotes, between its control tokens.
            controls = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
            shapes = []
            for one in (said, _without_quotes(said)):
                [window] = tokenize_conversations(tokenizer, family, [one])
                shapes.append(window.ids[np.isin(window.ids, controls)].tolist())
            assert shapes[0] == shapes[1]
        else:
            own = ids_of(tokenizer, [message.row() for message in said.messages], said.tools)
            assert found[0].ids.tolist() == own

    def test_no_second_start_token(self, chat, family):
        found, tokenizer = reading(family, chat), tokenizer_of(family)
        if found is not None and tokenizer.bos_token_id is not None and family != "smollm2":
            assert found[0].ids[0] == tokenizer.bos_token_id
            assert np.count_nonzero(found[0].ids == tokenizer.bos_token_id) == 1


def _without_quotes(said: Conversation) -> Conversation:
    def harmless(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("<", "(").replace("[", "(")
        if isinstance(value, dict):
            return {key: harmless(member) for key, member in value.items()}
        return [harmless(member) for member in value] if isinstance(value, list | tuple) else value

    rows = [message.row() for message in said.messages]
    return parse_conversation({"messages": harmless(rows), "tools": harmless(said.tools)}, "w")


@pytest.mark.parametrize(("first", "second"), list(combinations(PUBLISHED, 2)))
def test_pairs_have_read_the_same_bytes(first, second):
    available(first), available(second)
    total = 0
    for chat in CHATS:
        sides = reading(first, chat), reading(second, chat)
        if sides[0] is not None and sides[1] is not None:
            count, wrong, lost = same_bytes(sides[0], sides[1])
            assert (wrong, lost) == (0, 0), chat
            total += count
    assert total > 60


class TestWhatIsNotKept:
    """Each would have states of different text than was given, and nothing would say so."""

    @staticmethod
    def refusal(name: str, *messages: dict[str, Any], **rest: Any) -> str:
        available(name)
        said = parse_conversation({"messages": list(messages), **rest}, "chats.jsonl, line 7")
        with pytest.raises(CorpusError, match="line 7") as caught:
            render(tokenizer_of(name), name, said)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_system_prompt_before_the_last_question(self):
        turns = [say("system", "Be brief."), say("user", "a?"), say("assistant", "b."), say("user", "c?")]
        assert "message 1 (system)" in self.refusal("mistral_nemo", *turns)
        assert "another order (message 2 (user) comes before" in self.refusal("mistral_nemo", *turns)

    def test_what_is_said_beside_a_call(self):
        turns = [say("user", "a?"), say("assistant", "I look.", tool_calls=[CALL])]
        assert "message 2 (assistant)" in self.refusal("mistral_nemo", *turns, tools=TOOLS)

    def test_a_thought_that_is_taken_out(self):
        turns = [say("user", "a?"), say("assistant", "<think>\nhm\n</think>\n\nb."), say("user", "c?")]
        assert "message 2 (assistant): the chat template of model 'qwen3' changes" in self.refusal("qwen3", *turns)

    def test_a_second_system_prompt(self):
        turns = [say("user", "a?"), say("system", "Be brief."), say("assistant", "b.")]
        assert "message 1 (user)" in self.refusal("deepseek_v3", *turns)
        assert "another order" in self.refusal("deepseek_v3", *turns)


def test_rows_do_not_depend_on_the_day(family, monkeypatch):
    said = conversation("turns")
    before = render(tokenizer_of(family), family, said)
    from transformers.utils import chat_template_utils

    class Later(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2033, 3, 3, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert render(tokenizer_of(family), family, said) == before
