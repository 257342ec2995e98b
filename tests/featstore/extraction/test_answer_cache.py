"""Answers that are kept: what was written stays, what was torn is as if it were not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore.extraction.answer_cache import AnswerCache, prompt_key


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnswerCache:
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "cache"))
    return AnswerCache("key")


def test_what_is_put_is_there_for_the_next_command(cache: AnswerCache) -> None:
    cache.put({prompt_key("a"): " naïve\n東京\u2028", prompt_key("b"): ""})
    cache.put({prompt_key("c"): "C"})
    again = AnswerCache("key")
    assert [again.get(prompt_key(name)) for name in "abcd"] == [" naïve\n東京\u2028", "", "C", None]
    assert AnswerCache("other").get(prompt_key("a")) is None
    assert len(cache.path.read_bytes().splitlines()) == 3


def test_a_line_that_was_being_written_is_not_there_and_spoils_none(cache: AnswerCache) -> None:
    cache.put({"a": "A", "b": "B"})
    cache.path.write_bytes(cache.path.read_bytes()[:-4])
    torn = AnswerCache("key")
    assert (torn.get("a"), torn.get("b")) == ("A", None)
    torn.put({"c": "C"})
    assert [AnswerCache("key").get(name) for name in "abc"] == ["A", None, "C"]


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[]", b"3", b'{"prompt": 1, "answer": "x"}', b'{"prompt": "x"}', b"{" * 5000]
)
def test_whatever_else_is_in_the_file_is_passed_over(cache: AnswerCache, line: bytes) -> None:
    cache.put({"a": "A"})
    cache.path.write_bytes(line + b"\n" + cache.path.read_bytes())
    assert AnswerCache("key").get("a") == "A"


def test_another_process_is_read_again(cache: AnswerCache) -> None:
    other = AnswerCache("key")
    cache.put({"a": "A"})
    assert other.get("a") is None
    other.read()
    assert other.get("a") == "A"


def test_where_nothing_can_be_written_answers_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "file"))
    held = AnswerCache("key")
    held.put({"a": "A"})
    assert held.get("a") == "A"
