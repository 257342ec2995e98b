"""Rows with messages: what they may say, and the one line that says what is wrong."""

from __future__ import annotations

import json

import pytest

from featstore.errors import CorpusError
from featstore.text.conversation import Message, is_conversation, parse_conversation
from featstore.text.documents import documents
from featstore.text.normalisation import normalised
from featstore.text.roles import ASSISTANT, SYSTEM, TOOL, USER, Part
from tests.support.chats import CALL, CHATS, TOOLS, conversation, say

ROW = {"messages": [say("system", "é"), say("user", "東"), say("assistant", "x")]}


def parse(*messages, **rest):
    return parse_conversation({"messages": list(messages), **rest}, "chats.jsonl, line 3")


class TestRows:
    def test_contents_are_the_text_and_parts_are_in_bytes(self):
        read = parse_conversation(ROW, "w")
        assert read.text == "é東x"
        assert read.parts == (Part(SYSTEM, 0, 2), Part(USER, 2, 5), Part(ASSISTANT, 5, 6))

    def test_roles_have_one_name(self):
        read = parse(say("developer", "a"), say("function", "b", name="f"), say("ipython", "c"))
        assert [message.role for message in read.messages] == ["system", "tool", "tool"]
        assert [part.role for part in read.parts] == [SYSTEM, TOOL, TOOL]
        assert read.messages[1].row() == {"role": "tool", "content": "b", "name": "f"}

    def test_an_assistant_that_calls_may_say_nothing(self):
        absent, empty = (parse(say("user", "q"), {**message, "tool_calls": [CALL]}) for message in (
            {"role": "assistant"}, {"role": "assistant", "content": ""}
        ))  # fmt: skip
        assert absent.text == empty.text == "q"
        assert absent.messages[1] == Message("assistant", "", {"tool_calls": [CALL], "content": None})
        assert absent.messages[1].row()["content"] is None
        assert empty.messages[1].row()["content"] == ""
        assert parse(say("user", "q"), say("assistant", None, tool_calls=[CALL])) == absent

    def test_parts_of_text_are_joined(self):
        parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
        assert parse(say("user", parts)).text == "a b"

    def test_members_without_a_value_are_not_there(self):
        assert parse(say("user", "a", name=None, tool_calls=None)) == parse(say("user", "a"))

    def test_tools_may_be_json_in_text(self):
        assert parse(say("user", "a"), tools=json.dumps(TOOLS)) == parse(say("user", "a"), tools=TOOLS)
        assert parse(say("user", "a"), tools=[]).tools is parse(say("user", "a"), tools="").tools is None

    @pytest.mark.parametrize(
        ("row", "field", "found"),
        [
            ({"messages": []}, "text", True),
            ({"messages": [], "text": "a"}, "text", True),
            ({"messages": 3, "text": "a"}, "text", False),
            ({"messages": [], "body": "a"}, "body", False),
            ({"messages": [], "text": "a"}, "messages", True),
            ({"messages": "a"}, "messages", False),
            ({"text": "a"}, "text", False),
        ],
    )
    def test_which_rows_are_conversations(self, row, field, found):
        assert is_conversation(row, field) is found


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "line 3: no messages"),
        ({"messages": 3}, "line 3: messages is a number"),
        ({"messages": [say("user", "a"), "b"]}, "line 3, message 2: text, not an object"),
        ({"messages": [say("user", "a"), {"content": "b"}]}, "line 3, message 2: no role; give one of system"),
        ({"messages": [{"from": "human", "value": "b"}]}, "line 3, message 1: no role"),
        ({"messages": [say("bot", "a")]}, r"line 3, message 1: unknown role 'bot'; give one of system, developer"),
        ({"messages": [say("x" * 99, "a")]}, r"unknown role 'x{36}\.\.\.; give"),
        ({"messages": [say(["user"], "a")]}, r"unknown role \['user'\]"),
        ({"messages": [say("user", None)]}, r"line 3, message 1 \(user\): no content"),
        ({"messages": [say("assistant", None)]}, r"message 1 \(assistant\): no content; only an assistant that calls"),
        ({"messages": [say("assistant", None, tool_calls=[])]}, "no content"),
        ({"messages": [say("user", 3)]}, r"message 1 \(user\): content is a number, not text"),
        ({"messages": [say("user", {"text": "a"})]}, "content is an object"),
        ({"messages": [say("user", [{"text": "a"}, {"type": "image"}])]}, "part 2 of the content is 'im"),
        ({"messages": [say("user", ["a"])]}, "part 1 of the content is 'text', not text"),
        ({"messages": [say("user", "a\ud800")]}, r"message 1 \(user\) holds a lone surrogate"),
        ({"messages": [say("user", "a", name="\ud800")]}, r"message 1 \(user\) holds a lone surrogate"),
        ({"messages": [say("user", "a", score=float("nan"))]}, r"message 1 \(user\) holds what JSON does not"),
        ({"messages": [say("user", "a")], "tools": "no"}, "line 3: tools is text that is not JSON"),
        ({"messages": [say("user", "a")], "tools": ["no"]}, "line 3: tools is not a list of JSON schemas"),
        ({"messages": [say("user", "a")], "tools": [{"a": "\ud800"}]}, "line 3: tools hold .* a lone surrogate"),
    ],
)  # fmt: skip
def test_bad_rows(row, words):
    with pytest.raises(CorpusError, match=words) as caught:
        parse_conversation(row, "chats.jsonl, line 3")
    assert "\n" not in str(caught.value)


class TestIdentity:
    def test_equal_conversations_share_it_wherever_they_stand(self):
        first = parse_conversation(ROW, "a")
        second = parse_conversation(json.loads(json.dumps(ROW, sort_keys=True)), "b")
        assert first == second
        assert first.id == second.id

    def test_all_that_a_template_sees_decides_it(self):
        base = parse(say("user", "ab"), say("assistant", "c"))
        others = [
            parse(say("user", "a"), say("assistant", "bc")),
            parse(say("system", "ab"), say("assistant", "c")),
            parse(say("user", "ab", name="n"), say("assistant", "c")),
            parse(say("user", "ab"), say("assistant", "c"), tools=TOOLS),
            parse(say("user", "ab"), say("assistant", "c"), say("assistant", "", tool_calls=[CALL])),
            parse(say("user", "ab"), say("assistant", "c"), say("assistant", None, tool_calls=[CALL])),
        ]
        assert len({one.id for one in (base, *others)}) == len(others) + 1


class TestDocuments:
    def test_a_conversation_is_a_document(self):
        chats = [conversation(name) for name in CHATS]
        made = list(documents(chats))
        assert [one.conversation for one in made] == chats
        assert [one.text for one in made] == [chat.text for chat in chats]
        assert [one.parts for one in made] == [chat.parts for chat in chats]

    def test_those_without_text_are_skipped(self):
        empty = parse(say("user", " \n"), say("assistant", ""))
        assert list(documents([empty, conversation("plain")], max_documents=1)) == list(
            documents([conversation("plain")])
        )

    @pytest.mark.parametrize(("limit", "kept"), [(5, 0), (11, 0), (12, 2), (20, 2), (21, 3), (10**6, 3)])
    def test_the_first_messages_that_fit_are_kept_whole(self, limit, kept):
        whole = parse(say("system", "abcdef"), say("user", "ghijkl"), say("assistant", "東京東"))
        made = list(documents([whole], max_bytes=limit))
        assert [len(one.conversation.messages) for one in made] == [kept] * bool(kept)
        assert [one.id for one in made] == [whole.id] * bool(kept), "a budget moves no document to another split"

    def test_contents_are_composed(self):
        said = parse(say("user", "cafe\u0301", name="cafe\u0301"))
        [composed] = normalised([said], "nfc")
        assert composed.messages[0] == Message("user", "caf\u00e9", {"name": "cafe\u0301"})
        assert list(normalised([said], "none")) == [said]
