"""Where tokens end in texts that a tokenizer rewrites, and from offsets alone."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel
from transformers import PreTrainedTokenizerFast

from featstore.errors import OffsetError
from featstore.text.alignment import byte_offsets, check_offsets, ends_by_offsets
from featstore.text.bytes import byte_of_stand_in
from featstore.text.tokens import TokenizedWindow, ends_from, ends_in_words, prove, tokenize


@cache
def byte_by_byte(form: str | None = None) -> PreTrainedTokenizerFast:
    """Every token is one byte: each ends inside a character, or at its end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if form is not None:
        tokenizer.normalizer = getattr(normalizers, form)()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def one(tokenizer: PreTrainedTokenizerFast, text: str) -> TokenizedWindow:
    (window,) = tokenize(tokenizer, [text])
    return window


class TestNormalisers:
    def test_a_composed_character_is_read_whole_by_its_last_byte_alone(self):
        window = one(byte_by_byte("NFC"), "ae\u0301b")
        # a, the two bytes of é in place of three, b.
        assert window.byte_end.tolist() == [1, 1, 4, 5]
        assert window.exact.tolist() == [True, False, True, True]

    def test_a_character_that_becomes_two_is_read_whole_by_the_last(self):
        window = one(byte_by_byte("NFKC"), "xﬁy")
        assert window.byte_end.tolist() == [1, 1, 4, 5]
        assert window.exact.tolist() == [True, False, True, True]

    def test_what_agrees_by_chance_in_its_first_byte_is_not_believed(self):
        # U+212B becomes U+00C5 under NFC; U+0344 becomes U+0308 U+0301, which begins with the same byte.
        window = one(byte_by_byte("NFC"), "\u0344.")
        assert window.byte_end.tolist() == [0, 0, 0, 2, 3]
        assert window.exact.tolist() == [False, False, False, True, True]

    @given(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
        | st.text("aeo\u0301\u0308ﬁÅ가한\u1100\u1161 ", min_size=1)
    )
    @pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC"])
    def test_what_lies_between_exact_ends_is_what_the_tokens_spell(self, form, text):
        normalizer = getattr(normalizers, form)()
        tokenizer = byte_by_byte(form)
        window, raw = one(tokenizer, text), text.encode()
        table = byte_of_stand_in()
        start, spelt = 0, b""
        for name, end, exact in zip(
            tokenizer.convert_ids_to_tokens(window.ids.tolist()), window.byte_end.tolist(), window.exact, strict=True
        ):
            spelt += bytes([table[name]])
            # A space that stands for nothing in the text is read with what follows.
            if exact and end > start and (end == len(raw) or raw[end] & 0xC0 != 0x80):
                stretch = raw[start:end]
                assert spelt in (stretch, normalizer.normalize_str(stretch.decode()).encode())
                start, spelt = end, b""
        assert start == len(raw)


class TestUnknownBytes:
    @pytest.fixture
    def words(self) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")

    def test_offsets_are_taken_where_no_bytes_can_be_told(self, words):
        assert ends_from(words) == "offsets"
        assert ends_in_words(prove(words, "m")).startswith("byte ends from offsets")
        window = one(words, "the kitten, cat")
        assert window.byte_end.tolist() == [3, 10, 11, 15]
        assert window.exact.all()

    def test_an_unknown_token_among_known_ones_ends_where_the_next_begins(self):
        vocabulary = [("<unk>", 0.0), ("▁", -2.0), ("a", -2.0), ("▁a", -1.0), ("b", -2.0)]
        tokenizer = Tokenizer(Unigram(vocabulary, unk_id=0))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        assert ends_from(fast) == "bytes"
        assert prove(fast, "m").unknown == 1
        assert ends_in_words(prove(fast, "m")) == "byte ends from its tokens' bytes, but for 1 that cannot be told"
        window = one(fast, "ab 東a b")
        ends = dict(zip(window.byte_end.tolist(), window.exact.tolist(), strict=True))
        assert ends == {1: True, 2: True, 3: True, 6: True, 7: True, 8: True, 9: True}

    def test_a_byte_without_a_token_is_refused(self, sample_texts):
        from tests.support.tokenizers import train_byte_level

        with pytest.raises(
            OffsetError, match=r"no token covers character 4 \('\\x13', in '1914\\x131918'\).*clean the text"
        ):
            tokenize(train_byte_level(sample_texts, dropped="\x13"), ["1914\x131918"])


class TestOffsets:
    def test_a_token_that_shares_a_character_with_the_next_has_not_read_it(self):
        ends, exact = ends_by_offsets("a東b", np.array([[0, 1], [1, 2], [1, 2], [2, 3]]))
        assert ends.tolist() == [1, 1, 4, 5]
        assert exact.tolist() == [True, False, True, True]

    @pytest.mark.parametrize(
        ("bend", "message"),
        [
            (lambda i, start, end: (end, end), "no token covers character 0 \\('o'"),
            (lambda i, start, end: (start, start), "no token covers"),
            (lambda i, start, end: (0, 0) if i == 3 else (start, end), "token 3 spans characters 0..0"),
            (lambda i, start, end: (start - 1, end - 1), "token 0 spans characters -1"),
            (lambda i, start, end: (start, end + 500), "of a text of"),
            (lambda i, start, end: (end, start), "token 0 spans"),
        ],
    )
    def test_lies_are_caught_and_shown(self, bend, message):
        text, at, spans = "one two three four five six", 0, []
        for word in text.split():
            spans.append((at, at + len(word)))
            at += len(word) + 1
        with pytest.raises(OffsetError, match=message):
            ends_by_offsets(text, np.array([bend(i, *span) for i, span in enumerate(spans)]))

    def test_the_truth_passes(self):
        check_offsets("ab  c", np.array([[0, 1], [1, 2], [4, 5]]))
        check_offsets("東", np.array([[0, 1], [0, 1], [0, 1]]))
        check_offsets("", np.zeros((0, 2), dtype=np.int64))
        with pytest.raises(OffsetError, match="no token covers character 1"):
            check_offsets("abc", np.array([[0, 1], [2, 3]]))


@given(st.text(st.characters(codec="utf-8")))
def test_byte_offsets_count_utf8(text):
    assert byte_offsets(text).tolist() == [len(text[:i].encode()) for i in range(len(text) + 1)]
