"""Where contents stand in a rendering, and templates after which nobody could tell."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import CorpusError, TemplateWarning
from featstore.text.chat import DATE, render
from featstore.text.conversation import parse_conversation
from tests.support.chats import CALL, CHATML, CHATS, TOOLS, TRIMMING, conversation, ids_of, say, with_template

TURNS = conversation("turns")


@pytest.fixture(scope="module")
def chat(start_token_tokenizer):
    """Makes a tokenizer that has a template."""
    return lambda template: with_template(start_token_tokenizer, template)


def each(body: str) -> str:
    """A template that writes so much of every message."""
    return "{% for message in messages %}" + body + "{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, TRIMMING], ids=["as it is", "trimmed"])
@pytest.mark.parametrize("name", CHATS)
def test_contents_stand_where_they_are_said_to(name, template, chat):
    said = conversation(name)
    found = render(chat(template), "m", said)
    placed = {place.message: place for place in found.contents}
    assert set(placed) == {number for number, message in enumerate(said.messages) if message.content}
    last = 0
    for number, place in placed.items():
        content = said.messages[number].content
        kept = content if template == CHATML else content.strip()
        assert found.text[place.start : place.stop] == kept
        assert content[place.skipped :].startswith(kept)
        assert last <= place.start
        last = place.stop
    template_alone = "".join(
        found.text[a:b]
        for a, b in zip(
            [0, *(p.stop for p in found.contents)],
            [*(p.start for p in found.contents), len(found.text)],
            strict=True,
        )
    )
    harmless = {message.content: f"{number}" * 3 for number, message in enumerate(said.messages) if message.content}
    rows = [{**m.row(), "content": harmless.get(m.content, m.content)} for m in said.messages]
    assert template_alone == _without(chat(template), rows, said.tools, harmless.values())


def _without(tokenizer, rows, tools, contents) -> str:
    """What a template writes around contents that occur nowhere else."""
    text = tokenizer.apply_chat_template(rows, tools=None if tools is None else list(tools), tokenize=False)
    for content in contents:
        assert text.count(content) == 1
        text = text.replace(content, "")
    return text


CONTENT = st.text(st.sampled_from("ab \n\t[]<>/s\u3000東\u0301"), max_size=8)


@given(st.lists(CONTENT, min_size=1, max_size=5), st.sampled_from([TRIMMING, CHATML, each("{{ message.content }}")]))
def test_any_contents_are_found(start_token_tokenizer, contents, template):
    said = parse_conversation({"messages": [say("user", content) for content in contents]}, "w")
    found = render(with_template(start_token_tokenizer, template), "m", said)
    kept = [content.strip() if template == TRIMMING else content for content in contents]
    stand = {place.message: found.text[place.start : place.stop] for place in found.contents}
    assert stand == {number: kept[number] for number, content in enumerate(contents) if content}


def test_the_answer_is_opened_where_that_is_asked_for(chat):
    closed, opened = (render(chat(CHATML), "m", TURNS, add_generation_prompt=ask) for ask in (False, True))
    assert opened.text == f"{closed.text}<|im_start|>assistant\n"
    assert opened.contents == closed.contents


class TestRefusals:
    @pytest.mark.parametrize(
        ("template", "words"),
        [
            (each("{% if not loop.last %}{{ message.content }}{% endif %}"), "message 4 (assistant): .* 'm' leaves"),
            (each("{{ message.content }}{{ message.content }}"), "message 1 (user): .* more than once"),
            (each("{{ messages[loop.revindex0].content }}"), "message 1 (user): .* another order (message 4 (assist"),
            (each("{{ message.content | upper }}"), "message 1 (user): .* changes what the message says"),
            (each("{{ message.content | replace('leads', '') }}"), "message 2 (assistant): .* changes"),
            (each("<{{ message.content }}{{ '!' if 'then' in message.content }}>"), "message 3 (user): .* changes"),
            (
                each("{{ message.content }}") + "{{ '!' if 'more' in messages[-1].content }}",
                "message 4 (assistant): .* changes",
            ),
            (each("{{ message.content | length }}{{ message.content }}"), "message 1 (user): .* changes"),
            (each("{{ message.content[:2] }}"), "message 1 (user): .* leaves the message out or changes it"),
            (each("{{ raise_exception('System role\\nnot supported') }}"), "refuses these messages: System role;"),
            (each("{{ message.content + message.nothing.more }}"), "refuses these messages: .* has no attribute"),
            (each("{% endfor %}{{ messages[0].content "), "refuses these messages"),
            (each("{{ 1 // (message.content | length - 9) }}{{ message.content }}"), "refuses these messages"),
            (
                each("{{ raise_exception('short') if message.content | length < 8 else message.content }}"),
                "short; .*depends on them",
            ),
        ],
    )
    def test_one_line_names_row_message_and_model(self, template, words, chat):
        with pytest.raises(CorpusError, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
            render(chat(template), "m", TURNS)
        assert "chats.jsonl, line 3" in str(caught.value)
        assert "model 'm'" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_without_a_template(self, chat):
        with pytest.raises(CorpusError, match=r"model 'm' has no chat template.*line 3.*chat variant"):
            render(chat(None), "m", TURNS)

    def test_named_templates_without_a_default(self, chat):
        with pytest.raises(CorpusError, match="refuses these messages"):
            render(chat({"rag": CHATML}), "m", TURNS)


def test_a_named_template_is_that_for_tools(chat):
    tokenizer = chat({"default": TRIMMING, "tool_use": CHATML})
    assert render(tokenizer, "m", conversation("tools")) == render(chat(CHATML), "m", conversation("tools"))
    assert render(tokenizer, "m", TURNS) == render(chat(TRIMMING), "m", TURNS)


def test_a_call_without_a_content_is_written_by_templates_that_know_none(chat):
    said, empty = (
        parse_conversation({"messages": [say("user", "q"), say("assistant", content, tool_calls=[CALL])]}, "w")
        for content in (None, "")
    )
    assert render(chat(TRIMMING), "m", said) == render(chat(TRIMMING), "m", empty)
    knowing = each("{% if message.content is defined %}{{ message.content }}{% else %}nothing{% endif %}")
    assert render(chat(knowing), "m", said).text == "qnothing"


def test_control_tokens_that_tools_and_calls_quote_are_told(chat):
    found = render(chat(CHATML), "m", conversation("tools"))
    assert [found.text[start:stop] for start, stop in found.quoted] == ["</s>"]
    assert found.text == chat(CHATML).apply_chat_template(
        [message.row() for message in conversation("tools").messages], tools=TOOLS, tokenize=False
    )
    assert render(chat(CHATML), "m", TURNS).quoted == ()


class TestDates:
    CLOCK = "{{ strftime_now('%d %b %Y, %Y-%m-%d %-d.%-m. %H:%M, %A') }} " + each("{{ message.content }}")

    def test_the_day_is_the_one_that_is_given(self, chat):
        assert render(chat(self.CLOCK), "m", TURNS).text.startswith("26 Jul 2024, 2024-07-26 26.7. 00:00, Friday one")
        later = render(chat(self.CLOCK), "m", TURNS, date="2031-01-05").text
        assert later.startswith("05 Jan 2031, 2031-01-05 5.1. 00:00, Sunday one")
        assert DATE == "2024-07-26", "stores record it; another one changes rows"

    @pytest.mark.parametrize("start", ["", " ", "\n", "  {% if true %}x{% endif %}\n", "{% if true %}\nx{% endif %}"])
    def test_nothing_else_changes(self, start, chat):
        plain = chat(start + "{% if strftime_now is defined %}1{% endif %}" + each("{{ message.content }}"))
        text = plain.apply_chat_template([m.row() for m in TURNS.messages], tokenize=False)
        assert render(plain, "m", TURNS).text == text


def test_support_reads_messages_as_the_library_does(chat):
    tokenizer = chat(CHATML)
    rows = [message.row() for message in TURNS.messages]
    assert tokenizer.decode(ids_of(tokenizer, rows)).replace(" ", "") == render(tokenizer, "m", TURNS).text.replace(
        " ", ""
    )


def test_tools_and_calls_that_a_template_does_not_write_are_said(chat):
    said = conversation("tools")
    with pytest.warns(TemplateWarning) as told:
        render(chat(each("{{ message.content }};")), "m", said)
    assert [str(one.message).partition(" that")[0] for one in told] == [
        "model 'm': its chat template writes nothing of the tools",
        "model 'm': its chat template writes nothing of the tool calls",
    ]


def test_a_template_that_writes_them_is_not_warned_of(chat, recwarn):
    render(chat(CHATML), "m", conversation("tools"))
    assert not [one for one in recwarn if issubclass(one.category, TemplateWarning)]
