"""Documents to train, validation and test."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import CorpusError
from featstore.text.splits import TEST, TRAIN, VALIDATION, split_of


def digest_at(u: float, salt: int = 0) -> bytes:
    """A document id whose u is the given number."""
    return int(u * 2**64).to_bytes(8, "big") + hashlib.sha256(bytes([salt])).digest()[8:]


class TestSplits:
    def test_the_hash_alone_decides(self):
        ids = [hashlib.sha256(str(i).encode()).digest() for i in range(2000)]
        split = split_of(ids)
        u = np.array([int.from_bytes(i[:8], "big") / 2**64 for i in ids])
        np.testing.assert_array_equal(split, np.where(u < 0.1, TEST, np.where(u < 0.2, VALIDATION, TRAIN)))
        np.testing.assert_array_equal(split_of(ids[:1000]), split[:1000])
        np.testing.assert_array_equal(split_of(ids[::-1]), split[::-1])

    def test_a_known_hash_keeps_its_split(self):
        """Frozen: another rule would move documents of existing stores between training and test."""
        texts = [f"document {i}" for i in range(20)]
        split = split_of([hashlib.sha256(t.encode()).digest() for t in texts])
        # None lies below 0.1, so number 0 (at 0.1012) serves as test; 7 is at 0.203, 9 at 0.198.
        assert "".join(map(str, split)) == "20000100110010000000"

    @pytest.mark.parametrize(
        ("u", "expected"),
        [
            ([0.5, 0.3, 0.9], [VALIDATION, TEST, TRAIN]),  # all train: the lowest goes to test, the next to validation
            ([0.01, 0.02, 0.03], [TEST, TRAIN, VALIDATION]),
            ([0.01, 0.05, 0.09], [TEST, TRAIN, VALIDATION]),  # nearest to 0.1..0.2 first, then nearest to 0.2..1
            ([0.11, 0.15, 0.19], [TEST, VALIDATION, TRAIN]),
            ([0.05, 0.15, 0.5], [TEST, VALIDATION, TRAIN]),
            ([0.05, 0.3, 0.5, 0.25], [TEST, TRAIN, TRAIN, VALIDATION]),
            ([0.15, 0.3, 0.5, 0.25], [VALIDATION, TRAIN, TRAIN, TEST]),
        ],
    )
    def test_an_empty_split_takes_the_nearest_document(self, u, expected):
        assert split_of([digest_at(x) for x in u]).tolist() == expected

    @given(st.lists(st.floats(0, 0.999), min_size=3, max_size=12, unique=True))
    def test_no_split_is_ever_empty(self, u):
        ids = [digest_at(x, salt) for salt, x in enumerate(u)]
        assert set(split_of(ids).tolist()) == {TRAIN, VALIDATION, TEST}

    def test_equal_texts_share_a_split(self):
        ids = [digest_at(u) for u in (0.3, 0.3, 0.3, 0.4, 0.5, 0.4)]
        split = split_of(ids)
        assert len(set(split[[0, 1, 2]])) == 1
        assert split[3] == split[5]
        assert set(split.tolist()) == {TRAIN, VALIDATION, TEST}

    @pytest.mark.parametrize("ids", [[], [b"a" * 32], [b"a" * 32, b"b" * 32], [b"a" * 32] * 5 + [b"b" * 32]])
    def test_under_three_different_documents_is_an_error(self, ids):
        with pytest.raises(CorpusError, match=f"{len(set(ids))} different document"):
            split_of(ids)
