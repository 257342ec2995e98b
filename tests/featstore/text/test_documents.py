"""Texts to documents with their ids."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import CorpusError, SpecError
from featstore.text.documents import documents
from featstore.text.splits import split_of

#: Unicode's, and the zero-width space.
SPACE = regex.compile(r"[\p{White_Space}\u200b]")
#: Text rich in the cases that matter: spaces, runs without any, characters of one to four bytes.
TEXTS = st.text(st.sampled_from("ab c\n\té東🙂\u0301\u00a0"), max_size=120) | st.text(
    st.characters(codec="utf-8"), max_size=60
)


class TestDocuments:
    def test_empty_texts_are_skipped_and_ids_are_hashes(self):
        made = list(documents(["", " \n\t", "a", "b"]))
        assert [d.text for d in made] == ["a", "b"]
        assert made[0].id == hashlib.sha256(b"a").digest()

    def test_the_limit_counts_documents_not_texts(self):
        assert [d.text for d in documents(["", "a", " ", "b", "c"], max_documents=2)] == ["a", "b"]

    @given(TEXTS, st.integers(4, 40))
    def test_a_byte_budget_cuts_back_to_a_boundary_and_keeps_the_id(self, text, limit):
        made = list(documents([text], max_bytes=limit))
        if not made:
            assert not text.encode()[: limit + 1].decode(errors="ignore").strip() or SPACE.match(text)
            return
        raw, kept = text.encode(), made[0].text.encode()
        assert raw.startswith(kept)
        assert len(kept) <= limit
        assert made[0].id == hashlib.sha256(raw).digest()
        after = text[len(made[0].text) :]
        clusters = regex.findall(r"\X", text)
        # Else it is the last cluster, or the last character of a longer one.
        longest = max(len(cluster.encode()) for cluster in clusters)
        assert not after or SPACE.match(after) or limit - len(kept) < max(longest, 4)
        assert not (made[0].text.endswith("\r") and after.startswith("\n"))
        assert made[0].text.strip()

    def test_a_budget_under_one_character_is_refused(self):
        with pytest.raises(SpecError, match="3 bytes of a document"):
            list(documents(["東京"], max_bytes=3))

    def test_a_lone_surrogate_is_named(self):
        with pytest.raises(CorpusError, match="document 1 holds a lone surrogate at character 2"):
            list(documents(["fine", "ab\ud800"]))


def test_the_sample_has_documents_in_every_split(sample_texts):
    made = list(documents(sample_texts, max_bytes=900))
    assert len(made) == len(sample_texts) >= 60
    assert np.bincount(split_of([d.id for d in made])).min() >= 3
