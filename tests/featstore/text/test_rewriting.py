"""Where the bytes of rewritten texts lie in the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, normalizers

from featstore.text.rewriting import NOWHERE, places

NFC, NFKC, NFD = (getattr(normalizers, form)().normalize_str for form in ("NFC", "NFKC", "NFD"))


def test_what_is_not_rewritten_is_read_byte_by_byte() -> None:
    rewritten, place = places(str, "aé東")
    assert rewritten == "aé東".encode()
    assert place.tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("rewrite", "text", "rewritten", "place"),
    [
        (NFC, "ae\u0301b", "a\u00e9b", [0, 1, NOWHERE, 4, 5]),
        (NFKC, "xﬁy", "xfiy", [0, 1, NOWHERE, 4, 5]),
        # The consonant before it is read as it stands.
        (NFKC, "\u0e01\u0e33", "\u0e01\u0e4d\u0e32", [0, 1, 2, 3, *[NOWHERE] * 5, 6]),
        # The line feed is a character of its own, whatever grapheme it is part of.
        (NFC, "e\u0301\r\n", "\u00e9\r\n", [0, NOWHERE, 3, 4, 5]),
        (normalizers.Lowercase().normalize_str, "ÀB", "àb", [0, NOWHERE, 2, 3]),
        (normalizers.Replace(Regex(" {2,}"), " ").normalize_str, "a   b c", "a b c", [0, 1, 4, 5, 6, 7]),
        # What is taken away has not been read at the place where it was.
        (normalizers.Strip().normalize_str, " a ", "a", [0, 2]),
        (str, "", "", [0]),
    ],
)
def test_a_stretch_that_is_rewritten_as_a_whole_has_no_inside(rewrite, text, rewritten, place) -> None:
    found = places(rewrite, text)
    assert found[0] == rewritten.encode()
    assert found[1].tolist() == place


@pytest.mark.parametrize("rewrite", [NFC, NFKC, NFD])
@given(text=st.text(max_size=40) | st.text("ae\u0301\u0323ﬁ\u0e01\u0e33\u1100\u1161\u11a8가 \r\n▁½", max_size=40))
def test_both_sides_of_a_place_are_rewritten_apart(rewrite, text: str) -> None:
    rewritten, place = places(rewrite, text)
    content = text.encode()
    assert len(place) == len(rewritten) + 1
    assert place[-1] == len(content)
    known = place[place != NOWHERE].tolist()
    assert known == sorted(set(known))
    for position, end in enumerate(place.tolist()):
        if end == NOWHERE or (end < len(content) and content[end] & 0xC0 == 0x80):
            continue
        assert rewrite(content[:end].decode()).encode() == rewritten[:position]
        assert rewrite(content[end:].decode()).encode() == rewritten[position:]
