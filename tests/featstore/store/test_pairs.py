"""Pairing against a slow reference that follows the definition word by word."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore import open_store
from featstore.errors import PairingError, SpecError
from featstore.store.read.pairs import Pairs, check_policy, ends_a_word, last_at_each_end, match, match_ends
from featstore.store.write.index import add_pairs
from tests.support.store_fixtures import Recipe, write_store

# One model's tokens of some windows: for each window its tokens as (byte end, special).
WINDOW = st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=10).map(
    lambda tokens: sorted(tokens, key=lambda token: token[0])
)


def table(windows):
    """The arrays of a token table; specials keep their place and get byte end 0, as the tokeniser writes them."""
    window = [w for w, tokens in enumerate(windows) for _ in tokens]
    end = [0 if special else e for tokens in windows for e, special in tokens]
    special = [s for tokens in windows for _, s in tokens]
    exact = np.ones(len(window), bool)
    return np.array(window, np.int32), np.array(end, np.int32), np.array(special, bool), exact


def reference(windows_a, windows_b):
    """Pairs of rows: the last ordinary token of either model at each byte end both have in a window."""
    result, row_a, row_b = [], 0, 0
    for tokens_a, tokens_b in zip(windows_a, windows_b, strict=True):
        for end in range(1, 13):
            at_a = [row_a + i for i, (e, special) in enumerate(tokens_a) if e == end and not special]
            at_b = [row_b + i for i, (e, special) in enumerate(tokens_b) if e == end and not special]
            if at_a and at_b:
                result.append((at_a[-1], at_b[-1]))
        row_a, row_b = row_a + len(tokens_a), row_b + len(tokens_b)
    return result


def pair_rows(windows_a, windows_b):
    _, row_a, row_b = match(*last_at_each_end(*table(windows_a)), *last_at_each_end(*table(windows_b)))
    return list(zip(row_a.tolist(), row_b.tolist(), strict=True))


TWO_MODELS = st.integers(0, 5).flatmap(
    lambda n: st.tuples(st.lists(WINDOW, min_size=n, max_size=n), st.lists(WINDOW, min_size=n, max_size=n))
)


class TestEqualByteEnds:
    @given(TWO_MODELS)
    def test_the_same_pairs_as_the_reference(self, models):
        assert pair_rows(*models) == reference(*models)

    @given(TWO_MODELS)
    def test_swapping_the_models_swaps_the_pairs(self, models):
        assert pair_rows(*models[::-1]) == [(b, a) for a, b in pair_rows(*models)]

    @given(TWO_MODELS)
    def test_rows_run_forward_and_no_row_is_used_twice(self, models):
        pairs = np.array(pair_rows(*models)).reshape(-1, 2)
        assert (np.diff(pairs, axis=0) > 0).all()

    def test_the_last_of_several_tokens_at_an_end_pairs(self):
        """Byte fallback: only the last of a character's tokens has read it whole."""
        fallback = [[(1, False), (5, False), (5, False), (5, False), (6, False)]]
        whole = [[(1, False), (5, False), (6, False)]]
        assert pair_rows(fallback, whole) == [(0, 0), (3, 1), (4, 2)]
        assert pair_rows(fallback, fallback) == [(0, 0), (3, 3), (4, 4)]

    def test_special_tokens_never_pair(self):
        with_start = [[(0, True), (3, False), (0, True)]]
        assert pair_rows(with_start, with_start) == [(1, 1)]
        assert pair_rows([[(0, True)]], [[(0, True)]]) == []
        assert pair_rows([[(0, False)]], [[(0, True)]]) == []

    def test_windows_never_mix(self):
        a = [[(3, False)], [(5, False)], []]
        b = [[(5, False)], [(3, False)], [(3, False), (5, False)]]
        assert pair_rows(a, b) == []

    def test_ends_beyond_31_bits_of_window_and_end_do_not_collide(self):
        window = np.array([0, 1, 2**31 - 1], np.int32)
        end = np.array([2**31 - 1, 1, 2**31 - 1], np.int32)
        keys, rows = last_at_each_end(window, end, np.zeros(3, bool), np.ones(3, bool))
        assert (np.diff(keys) > 0).all()
        assert rows.tolist() == [0, 1, 2]
        assert (keys >> 32).tolist() == window.tolist()
        assert (keys & 0xFFFFFFFF).tolist() == end.tolist()

    def test_no_tokens_no_pairs(self):
        assert pair_rows([], []) == []
        assert pair_rows([[]], [[(1, False)]]) == []


class TestInsideCharacters:
    #: "é" (2 bytes) and "東" (3 bytes) between letters, in one window after another.
    TEXT = np.frombuffer("aéb東".encode(), np.uint8)

    @pytest.mark.parametrize(
        ("policy", "ends"), [("end", [1, 3, 4, 7]), ("word", [7]), ("byte", [1, 2, 3, 4, 5, 6, 7])]
    )
    def test_they_pair_where_that_is_asked_for(self, policy, ends):
        every = [[(end, False) for end in range(1, 8)]]
        side = last_at_each_end(*table(every))
        keys, row_a, row_b = match_ends(side, side, policy, np.array([0]), np.array([7]), self.TEXT)
        assert (keys & 0xFFFFFFFF).tolist() == ends
        assert row_a.tolist() == row_b.tolist() == [end - 1 for end in ends]

    def test_a_token_that_has_read_something_more_never_pairs(self):
        window, end, special, exact = table([[(1, False), (3, False), (4, False)]])
        exact[1] = False
        _, rows = last_at_each_end(window, end, special, exact)
        assert rows.tolist() == [0, 2]

    def test_nor_does_one_that_has_read_nothing(self):
        assert pair_rows([[(0, False), (1, False)]], [[(0, False), (1, False)]]) == [(1, 1)]

    def test_the_index_of_a_store_leaves_them_out_unless_asked(self, tiny_store, tmp_path):
        path = shutil.copytree(tiny_store, tmp_path / "s.zarr")
        added = add_pairs(path, "byte")["pairs"]["llama__mistral"]["pairs"]
        store = open_store(path)
        end, byte = (set(store.pairs("llama", "mistral", policy).row_source.tolist()) for policy in ("end", "byte"))
        tokens, corpus = store.tokens("llama"), store.corpus
        inside = {
            row
            for row in byte
            if corpus.text[min(corpus.window_offset[tokens.window[row]] + tokens.byte_end[row], len(corpus.text) - 1)]
            & 0xC0
            == 0x80
        }
        assert inside
        assert byte == end | inside
        assert added == len(end) + len(inside)


class TestWordPolicy:
    @given(
        st.lists(st.text(st.sampled_from("ab \n\t.é\u3000\u00a0。"), min_size=1, max_size=8), min_size=1, max_size=5),
        st.data(),
    )
    def test_an_end_counts_where_whitespace_or_the_windows_end_follows(self, texts, data):
        raw = [text.encode() for text in texts]
        keys = [
            (w, end)
            for w, part in enumerate(raw)
            for end in data.draw(st.sets(st.integers(0, len(part)), max_size=6).map(sorted))
        ]
        offset = np.concatenate(([0], np.cumsum([len(part) for part in raw])))
        found = ends_a_word(
            np.array([w << 32 | end for w, end in keys], dtype=np.int64),
            offset[:-1],
            offset[1:],
            np.frombuffer(b"".join(raw), np.uint8),
        )

        def follows_space(part: bytes, end: int) -> bool:
            if part[end] & 0xC0 == 0x80:
                return False
            return part[end:].decode()[0].isspace()

        expected = [end == len(raw[w]) or follows_space(raw[w], end) for w, end in keys]
        assert found.tolist() == expected

    def test_in_a_store_it_keeps_the_ends_of_words(self, tmp_path):
        path = write_store(tmp_path / "s.zarr")
        added = add_pairs(path, "word")
        store = open_store(path)
        end, word = store.pairs("a", "b"), store.pairs("a", "b", "word")
        corpus, tokens = store.corpus, store.tokens("a")
        expected = []
        for row_a, row_b in zip(end.row_source.tolist(), end.row_target.tolist(), strict=True):
            text = corpus.window_text(int(tokens.window[row_a])).encode()
            at = int(tokens.byte_end[row_a])
            if at == len(text) or text[at : at + 1].isspace():
                expected.append((row_a, row_b))
        assert list(zip(word.row_source.tolist(), word.row_target.tolist(), strict=True)) == expected
        assert 0 < len(word) < len(end)
        assert added == {"pairs": {"a__b": {"pairs": len(word)}}}

    def test_without_its_index_the_error_names_the_command(self, tmp_path):
        path = write_store(tmp_path / "s.zarr")
        with pytest.raises(PairingError, match=r"has no 'word' pairs of a and b.*featstore pair .*--policy word"):
            open_store(path).pairs("b", "a", "word")

    def test_an_unknown_policy_is_quoted(self):
        assert check_policy("end") == "end"
        with pytest.raises(SpecError, match="pair policy 'start': choose one of end, word, byte"):
            check_policy("start")


class TestInAStore:
    def test_text_before_a_pair_is_the_same_for_both_models(self, tiny_store):
        store = open_store(tiny_store)
        pairs = store.pairs("llama", "mistral")
        a, b = store.tokens("llama"), store.tokens("mistral")
        np.testing.assert_array_equal(a.window[pairs.row_source], b.window[pairs.row_target])
        np.testing.assert_array_equal(a.byte_end[pairs.row_source], b.byte_end[pairs.row_target])
        assert not a.special[pairs.row_source].any()
        assert not b.special[pairs.row_target].any()

    def test_all_of_them_by_the_reference(self, tiny_store):
        store = open_store(tiny_store)
        tables = [store.tokens(name) for name in store.models]
        last = [
            {
                (w, e): row
                for row, (w, e, s, x) in enumerate(zip(t.window, t.byte_end, t.special, t.exact, strict=True))
                if x and e and not s
            }
            for t in tables
        ]
        texts = [store.corpus.window_text(w).encode() + b" " for w in range(len(store.corpus.window_document))]
        expected = sorted(
            (row, last[1][window, end])
            for (window, end), row in last[0].items()
            if (window, end) in last[1] and texts[window][end] & 0xC0 != 0x80
        )
        pairs = store.pairs("llama", "mistral")
        assert list(zip(pairs.row_source, pairs.row_target, strict=True)) == expected
        ordinary = [int((~t.special).sum()) for t in tables]
        assert pairs.coverage == (len(expected) / ordinary[0], len(expected) / ordinary[1])
        assert min(pairs.coverage) > 0.8

    def test_the_other_direction_is_the_same_pairs_swapped(self, tiny_store):
        store = open_store(tiny_store)
        there, back = store.pairs("llama", "mistral"), store.pairs("mistral", "llama")
        assert (back.source, back.target) == ("mistral", "llama")
        np.testing.assert_array_equal(there.row_source, back.row_target)
        np.testing.assert_array_equal(there.row_target, back.row_source)
        np.testing.assert_array_equal(there.sink, back.sink)
        assert there.coverage == back.coverage[::-1]

    def test_a_model_with_itself_pairs_every_ordinary_token(self, tiny_store):
        store = open_store(tiny_store)
        pairs = store.pairs("mistral", "mistral")
        special = store.tokens("mistral").special
        assert special.any()
        np.testing.assert_array_equal(pairs.row_source, np.flatnonzero(~special))
        np.testing.assert_array_equal(pairs.row_source, pairs.row_target)
        assert pairs.coverage == (1.0, 1.0)

    def test_split_document_and_sink_belong_to_the_pair(self, tiny_store):
        store = open_store(tiny_store)
        pairs = store.pairs("llama", "mistral")
        a, b, corpus = store.tokens("llama"), store.tokens("mistral"), store.corpus
        for i in range(0, len(pairs), 37):
            row_a, row_b = int(pairs.row_source[i]), int(pairs.row_target[i])
            document = int(corpus.window_document[a.window[row_a]])
            assert pairs.document[i] == document
            assert pairs.split[i] == corpus.document_split[document]
            assert pairs.sink[i] == (a.sink[row_a] or b.sink[row_b])
            assert pairs.token[i] == a.id[row_a]
        assert 0 < pairs.sink.sum() < len(pairs) / 10


class TestSelect:
    PAIRS = Pairs(
        "a",
        "b",
        np.arange(6),
        np.arange(6) + 10,
        np.array([0, 0, 1, 1, 2, 2], np.uint8),
        np.array([0, 0, 1, 1, 2, 2], np.int32),
        np.array([True, False] * 3),
        np.array([2, 3, 3, 2, 2, 3], np.uint8),
        np.arange(6, dtype=np.int32) + 100,
        (1.0, 0.5),
    )

    @pytest.mark.parametrize(
        ("split", "keep_sinks", "rows"),
        [
            (None, True, [0, 1, 2, 3, 4, 5]),
            (None, False, [1, 3, 5]),
            (0, False, [1]),
            (1, True, [2, 3]),
            (2, False, [5]),
        ],
    )
    def test_by_split_and_mask(self, split, keep_sinks, rows):
        chosen = self.PAIRS.select(split, keep_sinks=keep_sinks)
        assert chosen.row_source.tolist() == rows
        assert chosen.row_target.tolist() == [r + 10 for r in rows]
        assert len(chosen) == len(chosen.split) == len(chosen.document) == len(chosen.sink) == len(rows)
        assert len(chosen.role) == len(rows)
        assert chosen.coverage == (1.0, 0.5)
        assert len(self.PAIRS) == 6

    @pytest.mark.parametrize(
        ("roles", "split", "keep_sinks", "rows"),
        [
            ("assistant", None, True, [1, 2, 5]),
            ("assistant", None, False, [1, 5]),
            (["user"], 2, True, [4]),
            ("user", 2, False, []),
            ("user, assistant", None, True, [0, 1, 2, 3, 4, 5]),
            ("assistant,tool", 1, True, [2]),
            (None, 0, True, [0, 1]),
            ("all", 0, True, [0, 1]),
        ],
    )
    def test_by_role(self, roles, split, keep_sinks, rows):
        assert self.PAIRS.select(split, keep_sinks=keep_sinks, roles=roles).row_source.tolist() == rows

    def test_roles_that_are_not_there_say_which_are(self):
        words = (
            r"no pairs of a and b have the role tool; they have user \(3\), assistant \(3\): choose --roles among these"
        )
        with pytest.raises(PairingError, match=words):
            self.PAIRS.select(roles="tool")
        with pytest.raises(PairingError, match="have the role any of text, tool; they have user"):
            self.PAIRS.select(roles="tool,text")
        # Nothing can be said of no pairs at all.
        assert len(self.PAIRS.where(np.zeros(6, bool)).select(roles="tool")) == 0

    @pytest.mark.parametrize("roles", ["narrator", "", [], "assistant,", 3, ["assistant", "all"]])
    def test_what_is_no_role_is_refused(self, roles):
        with pytest.raises(SpecError, match=r"--roles .*: choose among text, system, user, .* or all"):
            self.PAIRS.select(roles=roles)

    def test_a_store_says_who_wrote_a_pair(self, tmp_path):
        store = open_store(write_store(tmp_path / "s.zarr", Recipe(roles=(1, 2, 3))))
        for source, target in (("a", "b"), ("b", "a"), ("b", "b")):
            pairs = store.pairs(source, target)
            assert np.array_equal(pairs.role, store.tokens(source).role[pairs.row_source])
            assert np.array_equal(pairs.role, store.tokens(target).role[pairs.row_target])
            assert set(pairs.role.tolist()) == {1, 2, 3}
        plain = open_store(write_store(tmp_path / "plain.zarr")).pairs("a", "b")
        assert len(plain.select(roles="text", keep_sinks=True)) == len(plain)

    def test_too_few_pairs_say_how_many_and_what_for(self):
        assert self.PAIRS.need(6, "validation") is self.PAIRS
        with pytest.raises(PairingError, match="6 pairs of a and b for validation, at least 7 are needed"):
            self.PAIRS.need(7, "validation")


def test_another_index_leaves_the_fingerprint(tiny_store, tmp_path):
    """An adapter fitted before `featstore pair` still belongs to the store after it."""
    copy = tmp_path / "copy.zarr"
    shutil.copytree(tiny_store, copy)
    before = open_store(copy).fingerprint
    added = add_pairs(copy, "word")
    after = open_store(copy)
    assert after.fingerprint == before
    assert 0 < added["pairs"]["llama__mistral"]["pairs"] < len(after.pairs("llama", "mistral"))
