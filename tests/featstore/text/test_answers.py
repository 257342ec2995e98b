"""What a model wrote as text, and as a part of the document that it answers."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from featstore.errors import CorpusError, SpecError
from featstore.text.answers import answered, awaiting_answer, fitting, prompt_ids, spoken
from featstore.text.conversation import Conversation, Message
from featstore.text.documents import Document, of_conversation
from featstore.text.roles import ASSISTANT, GENERATED, USER, Part


def document(text: str) -> Document:
    return Document(text, hashlib.sha256(text.encode()).digest())


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", ["byte_level_tokenizer", "start_token_tokenizer"])
def test_new_tokens_have_their_own_bytes(request: pytest.FixtureRequest, kind: str) -> None:
    tokenizer = request.getfixturevalue(kind)
    prompt, whole = "The capital of France is", "The capital of France is Paris, naïve 東京"
    before, after = ids_of(tokenizer, prompt), ids_of(tokenizer, whole)
    assert after[: len(before)] == before
    new = after[len(before) :]
    # The space before the first word is the answer's, whatever a decoder makes of a text's first token.
    assert spoken(tokenizer, new) == " Paris, naïve 東京"
    special = next(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    assert spoken(tokenizer, [special, *new, special]) == " Paris, naïve 東京"
    # The last character is cut by the last token.
    assert spoken(tokenizer, new[:-1]) in (" Paris, naïve 東", " Paris, naïve ")
    assert spoken(tokenizer, []) == ""


def test_what_is_no_utf_8_in_the_middle_shows(start_token_tokenizer: Any) -> None:
    stray = start_token_tokenizer.convert_tokens_to_ids("<0x9B>")
    word = ids_of(start_token_tokenizer, "and")
    assert spoken(start_token_tokenizer, [*word, stray, *word, stray, stray]) == " and\ufffd and"


def test_an_answer_is_a_part_after_the_prompt() -> None:
    prompt = document("Où est l’été ?")
    made = answered(prompt, " Là.", "none")
    size = len(prompt.text.encode())
    assert (made.text, made.id) == ("Où est l’été ? Là.", prompt.id)
    assert made.parts == (Part(GENERATED, size, size + 5),)
    nothing = answered(prompt, "", "nfc")
    assert (nothing.text, nothing.id, nothing.parts) == (prompt.text, prompt.id, ())


def test_an_accent_that_comes_first_goes_into_the_character_before_it() -> None:
    made = answered(document("cafe"), "\u0301 noir", "nfc")
    assert made.text == "café noir"
    assert made.parts == (Part(GENERATED, 3, len("café noir".encode())),)
    assert answered(document("cafe"), "\u0301 noir", "none").text == "cafe\u0301 noir"


def test_an_answer_to_messages_is_the_assistants() -> None:
    prompt = of_conversation(Conversation((Message("user", "Who?"),), where="row 1"), b"i" * 32)
    made = answered(prompt, " Me\u0301.\n", "nfc")
    assert (made.text, made.id) == ("Who?Mé.", prompt.id)
    assert [part.role for part in made.parts] == [USER, ASSISTANT]
    assert made.conversation is not None
    assert made.conversation.messages[-1] == Message("assistant", "Mé.")
    assert answered(prompt, " \n", "none") is prompt


def test_nobody_answers_for_the_user() -> None:
    messages = (Message("user", "Who?"), Message("assistant", "Me."))
    with pytest.raises(CorpusError, match="row 7: the last of 2 messages is of role assistant"):
        awaiting_answer(Conversation(messages, where="row 7"))
    assert awaiting_answer(Conversation(messages[:1])).messages == messages[:1]


def test_a_prompt_leaves_every_model_room(
    byte_level_tokenizer: Any, start_token_tokenizer: Any, sample_texts: list[str]
) -> None:
    tokenizers = {"a": byte_level_tokenizer, "b": start_token_tokenizer}
    limits = {"a": 80, "b": 60}
    whole = document(sample_texts[0])
    made = fitting(whole, tokenizers, limits, 10)
    assert whole.text.startswith(made.text)
    assert made.id == whole.id
    counts = {name: len(prompt_ids(tokenizer, name, made)) for name, tokenizer in tokenizers.items()}
    assert all(counts[name] <= limits[name] - 10 for name in limits)
    # The tighter model is nearly full: no more than a word is lost.
    assert any(counts[name] > limits[name] - 10 - 12 for name in limits)
    short = document("Short enough.")
    assert fitting(short, tokenizers, limits, 10) is short
    assert fitting(document("\n" * 5000 + "x"), {"a": byte_level_tokenizer}, {"a": 10**30}, 10).text.endswith("x")


@pytest.mark.parametrize("limit", [10, 5])
def test_a_context_without_room_is_refused(byte_level_tokenizer: Any, limit: int) -> None:
    with pytest.raises(SpecError, match=f"--generate 10: a context of {limit} tokens leaves model 'a' no room"):
        fitting(document("Some words."), {"a": byte_level_tokenizer}, {"a": limit}, 10)


def test_a_conversation_fits_whole_or_not_at_all(byte_level_tokenizer: Any) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(byte_level_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    prompt = of_conversation(Conversation((Message("user", "Who are you then, and who am I?"),), where="f, line 3"))
    ids = prompt_ids(tokenizer, "a", prompt)
    assert tokenizer.decode(ids) == "[Who are you then, and who am I?]A"
    assert fitting(prompt, {"a": tokenizer}, {"a": len(ids) + 4}, 4) is prompt
    with pytest.raises(CorpusError, match=f"f, line 3: {len(ids)} tokens and 5 of an answer exceed the context"):
        fitting(prompt, {"a": tokenizer}, {"a": len(ids) + 4}, 5)
