"""Tokens of conversations: the template's own ids, and ends that are those of the contents alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from featstore.errors import OffsetError
from featstore.text.chat import render
from featstore.text.chat_tokens import content_ends, tokenize_conversations
from featstore.text.conversation import Conversation, parse_conversation
from tests.support.chats import CHATML, CHATS, TRIMMING, conversation, ids_of, say, with_template
from tests.support.chats_read import Spelt, as_it_is, read_by, same_bytes, stripped


@pytest.fixture(scope="module")
def readers(byte_level_tokenizer, start_token_tokenizer):
    """Two tokenizers, each with a template of its own and with that of the other."""
    return {
        "byte level": with_template(byte_level_tokenizer, CHATML),
        "byte level, trimming": with_template(byte_level_tokenizer, TRIMMING.replace("</s>", "<|im_end|>")),
        "start token": with_template(start_token_tokenizer, TRIMMING),
        "start token, as it is": with_template(
            start_token_tokenizer, CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
        ),
    }


KEEPS = {
    "byte level": as_it_is,
    "byte level, trimming": stripped,
    "start token": stripped,
    "start token, as it is": as_it_is,
}
READERS = tuple(KEEPS)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", CHATS)
class TestConversations:
    def test_ends_are_those_of_the_bytes_that_tokens_spell(self, name, reader, readers):
        said, tokenizer = conversation(name), readers[reader]
        [window] = tokenize_conversations(tokenizer, "m", [said])
        expected = read_by(tokenizer, said, window.ids, KEEPS[reader])
        np.testing.assert_array_equal(window.special, expected.special)
        np.testing.assert_array_equal(window.byte_end, expected.byte_end)
        # Where a template takes away what a message begins with, its tokens have not read all before their end.
        unread = np.zeros(len(window.ids), dtype=bool)
        for part, message in zip(said.parts, said.messages, strict=True):
            if message.content.index(KEEPS[reader](message.role, message.content)):
                unread |= ~window.special & (window.byte_end > part.start) & (window.byte_end <= part.end)
        assert (window.exact == ~unread).all()
        assert unread.any() == (name == "spaces" and KEEPS[reader] is stripped)

    def test_ids_are_those_of_the_template_where_nothing_is_quoted(self, name, reader, readers):
        said, tokenizer = conversation(name), readers[reader]
        [window] = tokenize_conversations(tokenizer, "m", [said])
        own = ids_of(tokenizer, [message.row() for message in said.messages], said.tools)
        quoting = {"byte level": {"quoted", "tools"}, "byte level, trimming": {"quoted"}}.get(
            reader, {"quoted", "tools"}
        )
        if reader == "start token":
            quoting = {"quoted"}  # its template tells no tools
        assert (window.ids.tolist() == own) is (name not in quoting)


@pytest.mark.parametrize("reader", READERS)
def test_quoted_control_tokens_are_text(reader, readers):
    tokenizer = readers[reader]
    said, harmless = (
        conversation("quoted"),
        parse_conversation({"messages": [say("user", "a"), say("assistant", "b")]}, ""),
    )
    [quoting], [plain] = (tokenize_conversations(tokenizer, "m", [one]) for one in (said, harmless))
    control = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    assert [i for i in quoting.ids if i in control] == [i for i in plain.ids if i in control]
    read = said.text.encode()
    assert {"<|im_end|>", "</s>"} <= {word.strip(",.") for word in read[: quoting.byte_end.max()].decode().split()}


@pytest.mark.parametrize("reader", READERS)
def test_they_are_control_tokens_where_that_is_asked_for(reader, readers):
    tokenizer, said = readers[reader], conversation("quoted")
    tokenizer.split_special_tokens = False
    try:
        [window] = tokenize_conversations(tokenizer, "m", [said])
        own = ids_of(tokenizer, [message.row() for message in said.messages])
    finally:
        tokenizer.split_special_tokens = True
    assert window.ids.tolist() == own
    controls = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    assert window.special[np.isin(window.ids, controls)].all()
    assert len(np.unique(window.byte_end[~window.special])) > 5


def test_a_quoting_stretch_begins_as_it_does_in_the_whole(start_token_tokenizer):
    """A tokenizer that puts a space before a text alone puts none after a control token."""
    backend = Tokenizer.from_str(start_token_tokenizer.backend_tokenizer.to_str())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = with_template(
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
        "{% for message in messages %}{{ message.content }}</s>{% endfor %}",
    )
    quoting, plain = (
        parse_conversation({"messages": [say("user", f"what {word}?"), say("assistant", f"the {word}.")]}, "w")
        for word in ("</s>", "else")
    )
    windows = tokenize_conversations(tokenizer, "m", [quoting, plain])
    assert [np.count_nonzero(window.special) for window in windows] == [2, 2]
    for said, window in zip((quoting, plain), windows, strict=True):
        truth = read_by(tokenizer, said, window.ids)
        np.testing.assert_array_equal(window.byte_end, truth.byte_end)
        starts = [0, int(np.flatnonzero(window.special)[0]) + 1]
        names = tokenizer.convert_ids_to_tokens(window.ids[starts].tolist())
        assert [name.startswith("▁") for name in names] == [True, False]
    assert ids_of(tokenizer, [message.row() for message in plain.messages]) == windows[1].ids.tolist()


def test_what_tools_quote_is_text(readers):
    tokenizer, said = readers["start token, as it is"], conversation("tools")
    [window] = tokenize_conversations(tokenizer, "m", [said])
    ends = tokenizer.convert_tokens_to_ids("</s>")
    assert np.count_nonzero(window.ids == ends) == len(said.messages) + 1, "one for the tools, one a message"


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("first", READERS)
@pytest.mark.parametrize("second", READERS)
def test_pairs_of_two_templates_have_read_the_same_bytes(name, first, second, readers):
    said = conversation(name)
    sides = []
    for reader in (first, second):
        [window] = tokenize_conversations(readers[reader], reader, [said])
        sides.append((window, read_by(readers[reader], said, window.ids, KEEPS[reader])))
    count, wrong, lost = same_bytes(*sides)
    assert (wrong, lost) == (0, 0)
    assert count >= sum(bool(message.content) for message in said.messages)


PIECE = st.sampled_from(
    [
        "<|im_end|>",
        "<s>",
        "</s>",
        "<|im_start|>",
        " ",
        "\n",
        "  ",
        "user",
        "a",
        "東",
        "e\u0301",
        "🙂",
        "מ",
        "▂",
        "[USER]",
    ]
)
CONTENTS = st.lists(st.lists(PIECE, max_size=6).map("".join), min_size=1, max_size=4)


@pytest.mark.parametrize("reader", READERS)
@given(contents=CONTENTS)
def test_any_contents(reader, readers, contents):
    messages = [say(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]
    said, tokenizer = parse_conversation({"messages": messages}, "w"), readers[reader]
    [window] = tokenize_conversations(tokenizer, "m", [said])
    expected = read_by(tokenizer, said, window.ids, KEEPS[reader])
    np.testing.assert_array_equal(window.special, expected.special)
    np.testing.assert_array_equal(window.byte_end, expected.byte_end)


def test_a_token_of_both_belongs_to_whom_its_last_byte_does(byte_level_tokenizer):
    """Where a template puts a line feed before a content that begins with one, both may be one token."""
    tokenizer = with_template(
        byte_level_tokenizer, "{% for message in messages %}{{ '\n' + message.content + '\n' }}{% endfor %}|"
    )
    tokenizer.add_tokens([AddedToken("\n\n", special=False)])
    said = parse_conversation({"messages": [say("user", "\nanswer\n"), say("assistant", "x")]}, "w")
    [window] = tokenize_conversations(tokenizer, "m", [said])
    assert render(tokenizer, "m", said).text == "\n\nanswer\n\n\nx\n|"
    both = tokenizer.convert_tokens_to_ids("\n\n")
    at = np.flatnonzero(window.ids == both)
    assert window.byte_end[at].tolist() == [1, 0], "one has read a byte of the content, the other of the template"
    assert window.special[at].tolist() == [False, True]


def test_a_control_token_that_a_content_completes_is_refused(byte_level_tokenizer):
    tokenizer = with_template(byte_level_tokenizer, "{% for m in messages %}<|im_{{ m.content }}{% endfor %}")
    with pytest.raises(OffsetError, match=r"line 9.* model 'm' .*message 1 and the template together spell .*end"):
        tokenize_conversations(tokenizer, "m", [parse_conversation({"messages": [say("user", "end|>")]}, "line 9")])


def test_a_control_token_takes_the_whitespace_beside_it_along(byte_level_tokenizer):
    tokenizer = with_template(byte_level_tokenizer, "{% for m in messages %}<|x|>{{ m.content }}{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|x|>", rstrip=True, special=True)]})
    said = parse_conversation({"messages": [say("user", "  one two")]}, "w")
    [window] = tokenize_conversations(tokenizer, "m", [said])
    assert window.special.tolist()[0] is True
    assert window.byte_end.max() == len("  one two")
    assert window.byte_end[~window.special].min() > 2


def test_ends_of_a_rendering_are_those_of_contents():
    places = np.array([[10, 13, 0], [20, 25, 7]])
    end = np.array([5, 10, 11, 13, 14, 20, 21, 25, 26])
    ends, inside = content_ends(end, np.ones(9, dtype=bool), places)
    assert inside.tolist() == [False, False, True, True, False, False, True, True, False]
    assert ends.tolist() == [0, 0, 1, 3, 0, 0, 8, 12, 0]
    # One that is not exact has begun to read what follows its end.
    ends, inside = content_ends(end, np.zeros(9, dtype=bool), places)
    assert inside.tolist() == [False, True, True, False, False, True, True, False, False]
    assert ends.tolist() == [0, 0, 1, 0, 0, 7, 8, 0, 0]
    none = content_ends(end, np.ones(9, dtype=bool), np.zeros((0, 3), dtype=np.int64))
    assert not none[0].any()
    assert not none[1].any()


def test_the_reconstruction_can_fail(readers):
    """What the other tests compare with sees an end that is one byte off, and a template token that counts as text."""
    said, tokenizer = conversation("turns"), readers["byte level"]
    [window] = tokenize_conversations(tokenizer, "m", [said])
    truth = read_by(tokenizer, said, window.ids)
    moved = Spelt(np.where(truth.special, 0, truth.byte_end + 1), truth.special)
    assert same_bytes((window, moved), (window, truth))[1] > 0
    assert isinstance(said, Conversation)
    assert any(a != b for a, b in pairwise(truth.byte_end.tolist()))
