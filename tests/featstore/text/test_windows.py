"""Documents to windows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import SpecError
from featstore.text.windows import windows

SPACES = b" \t\n\r\v\f"
#: Text rich in the cases that matter: spaces, runs without any, characters of one to four bytes.
TEXTS = st.text(st.sampled_from("ab c\n\té東🙂\u0301\u00a0"), max_size=120) | st.text(
    st.characters(codec="utf-8"), max_size=60
)


class TestWindows:
    @given(TEXTS, st.integers(4, 40))
    def test_they_tile_the_document_in_whole_characters(self, text, size):
        raw = text.encode()
        cut = windows(raw, size)
        assert [start for start, _ in cut] == [0, *(end for _, end in cut)][: len(cut)]
        assert b"".join(raw[start:end] for start, end in cut) == raw
        for start, end in cut:
            assert 0 < end - start <= size
            raw[start:end].decode()

    @given(TEXTS, st.integers(4, 40))
    def test_a_cut_falls_before_the_last_whitespace_that_fits(self, text, size):
        raw = text.encode()
        for start, end in windows(raw, size)[:-1]:
            places = [at for at in range(start + 1, start + size + 1) if raw[at] in SPACES]
            if places:
                assert end == places[-1]
            else:  # the longest run of whole characters
                assert start + size - end < 4
                assert len(raw[end : start + size].decode(errors="ignore")) == 0

    def test_the_whitespace_opens_the_next_window(self):
        raw = b"one two three"
        assert [raw[a:b] for a, b in windows(raw, 8)] == [b"one two", b" three"]
        assert [raw[a:b] for a, b in windows(raw, 7)] == [b"one two", b" three"]
        assert [raw[a:b] for a, b in windows(raw, 6)] == [b"one", b" two", b" three"]

    def test_no_document_no_window(self):
        assert windows(b"", 8) == []

    def test_too_small_a_window_is_refused(self):
        with pytest.raises(SpecError, match="window of 3 bytes: at least 4"):
            windows(b"text", 3)
