"""Byte ends of trained and real tokenizers against the bytes their pieces stand for, and offsets that lie."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import OffsetError
from featstore.text.tokens import PROBE, TokenizedWindow, prove, tokenize
from featstore.text.windows import windows
from tests.support.tokenizers import train_byte_level, train_with_start_token

HARD = [
    PROBE.replace("▁", "_"),
    "plain words, and a number: 1,234.5",
    "e\u0301 ne\u0303 a\u0308",  # combining marks
    "👨\u200d👩\u200d👧 and 🇫🇷",  # joined emoji
    "नमस्ते दुनिया",
    "日本語の文章。空白なし",
    "a\r\n\tb\n\n\n  c",
    " leading", "  two leading", "trailing ", "   ", "\n", "\t",
    "\ufeffmark", "nul\x00byte", "\x7f\x80\x85", "\u2028\u2029\u3000",
    "\U0010ffff\ue000", "ﬁ ½ Ⅷ İ ß",
    "def f(x):\n\treturn x**2  # ok",
    "مرحبا بالعالم", "שלום",
    "not a <start> nor an </end>",
]  # fmt: skip

#: Characters of every length. "▁" is SentencePiece's space, so it has no byte of its own to compare with; six control
#: characters and the lead bytes of eight unassigned planes have no token in SmolLM2's vocabulary.
ALPHABET = st.characters(codec="utf-8", exclude_characters="▁\x04\x06\x13\x14\x16\x1d", exclude_categories=["Cs", "Cn"])
TEXTS = st.text(ALPHABET, min_size=1, max_size=40) | st.text(
    st.sampled_from("aé東🙂 \n\t\u0301\u200d.'1x"), min_size=1, max_size=60
)


def byte_symbols() -> dict[str, int]:
    """GPT-2's table: printable characters stand for themselves, other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(other)}


class ByteLevel:
    """What SmolLM2's pieces stand for."""

    symbols = byte_symbols()

    def bytes_of(self, piece: str) -> bytes:
        return bytes(self.symbols[c] for c in piece)

    def prefix(self, text: str) -> bytes:
        return b""


class SentencePiece:
    """What Mistral's pieces stand for."""

    def bytes_of(self, piece: str) -> bytes:
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def prefix(self, text: str) -> bytes:
        """The space put before a text that does not begin with one."""
        return b"" if text.startswith(" ") else b" "


class Tokenizers(dict):
    """By name, a tokenizer and what its pieces stand for."""

    def __repr__(self) -> str:  # hypothesis prints its arguments; a tokenizer prints its vocabulary
        return "tokenizers"


@pytest.fixture(scope="session", params=["trained", pytest.param("real", marks=pytest.mark.demo_pair)])
def tokenizers(request, byte_level_tokenizer, start_token_tokenizer):
    from transformers import AutoTokenizer

    if request.param == "trained":
        first, second = byte_level_tokenizer, start_token_tokenizer
    else:
        demo = request.getfixturevalue("demo_models")
        first, second = map(AutoTokenizer.from_pretrained, (demo.smollm2, demo.twin))
    return Tokenizers(smollm2=(first, ByteLevel()), mistral=(second, SentencePiece()))


def test_training_gives_the_same_tokenizers_again(sample_texts, byte_level_tokenizer, start_token_tokenizer):
    for train, trained in (
        (train_byte_level, byte_level_tokenizer),
        (train_with_start_token, start_token_tokenizer),
    ):
        assert train(sample_texts).backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def check_window(tokenizer, pieces, text: str) -> TokenizedWindow:
    """A window's tokens, checked piece by piece against the text's bytes."""
    (window,) = tokenize(tokenizer, [text])
    raw, names = text.encode(), tokenizer.convert_ids_to_tokens(window.ids.tolist())
    assert window.ids.dtype == window.byte_end.dtype == np.int32
    assert window.special.dtype == window.exact.dtype == bool
    assert len(window.ids) == len(window.byte_end) == len(window.special) == len(window.exact)
    assert (window.byte_end[window.special] == 0).all()
    ordinary = np.flatnonzero(~window.special)
    ends = window.byte_end[ordinary]
    assert (np.diff(ends) >= 0).all()
    assert ends[-1] == len(raw)
    read, prefix = b"", pieces.prefix(text)
    for row in ordinary:
        read += pieces.bytes_of(names[row])
        # A lone space before the text has read nothing of it.
        assert window.exact[row]
        assert read.removeprefix(prefix) == raw[: window.byte_end[row]], (names, row)
    return window


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
class TestByteEnds:
    @pytest.mark.parametrize("text", HARD)
    def test_hard_texts(self, tokenizers, name, text):
        check_window(*tokenizers[name], text)

    @given(text=TEXTS)
    def test_any_text(self, tokenizers, name, text):
        check_window(*tokenizers[name], text)

    def test_windows_of_real_text(self, tokenizers, name, sample_texts):
        for text in sample_texts[:4]:
            raw = text.encode()
            for start, end in windows(raw, 700):
                check_window(*tokenizers[name], raw[start:end].decode())

    def test_a_batch_gives_what_single_texts_give(self, tokenizers, name):
        tokenizer, _ = tokenizers[name]
        for window, text in zip(tokenize(tokenizer, HARD), HARD, strict=True):
            (alone,) = tokenize(tokenizer, [text])
            for key, value in vars(alone).items():
                np.testing.assert_array_equal(vars(window)[key], value)

    def test_the_probe_passes(self, tokenizers, name):
        assert prove(tokenizers[name][0], name).told


@pytest.mark.parametrize("kind", ["trained", pytest.param("real", marks=pytest.mark.demo_pair)])
def test_a_character_the_tokenizer_drops_is_named(request, sample_texts, start_token_tokenizer, kind):
    """SmolLM2 has no token for U+0013; the spans of what follows it in the same word are then wrong."""
    from transformers import AutoTokenizer

    if kind == "real":
        demo = request.getfixturevalue("demo_models")
        drops, spells = map(AutoTokenizer.from_pretrained, (demo.smollm2, demo.twin))
    else:
        drops, spells = train_byte_level(sample_texts, dropped="\x06\x13"), start_token_tokenizer
    for text in ("1914\x131918", "!\x13?ok"):
        with pytest.raises(OffsetError, match=r"no token covers character .*clean the text"):
            tokenize(drops, [text])
        check_window(spells, SentencePiece(), text)


class TestSpecialTokens:
    def test_the_start_token_is_marked_and_has_no_end(self, tokenizers):
        (window,) = tokenize(tokenizers["mistral"][0], ["The"])
        assert window.special.tolist() == [True, False]
        assert window.byte_end.tolist() == [0, 3]
        assert window.ids[0] == 1

    def test_a_tokenizer_without_start_token_gets_none(self, tokenizers):
        assert not tokenize(tokenizers["smollm2"][0], ["Hello"])[0].special.any()

    def test_byte_fallback_tokens_end_at_their_own_bytes(self, tokenizers):
        (window,) = tokenize(tokenizers["mistral"][0], ["The🇫"])
        assert window.byte_end.tolist() == [0, 3, 4, 5, 6, 7]

    def test_a_space_put_before_the_text_has_read_nothing_of_it(self, start_token_tokenizer):
        (window,) = tokenize(start_token_tokenizer, ["🇫"])
        assert start_token_tokenizer.convert_ids_to_tokens(window.ids.tolist())[:2] == ["<s>", "▁"]
        assert window.byte_end.tolist() == [0, 0, 1, 2, 3, 4]
        assert window.special.tolist() == [True, False, False, False, False, False]


class TestQuotedControlTokens:
    @pytest.fixture
    def quoting(self, start_token_tokenizer):
        yield start_token_tokenizer
        start_token_tokenizer.split_special_tokens = False

    def test_they_are_text(self, quoting):
        quoting.split_special_tokens = True
        text = "<s>so</s> it ends"
        (window,) = tokenize(quoting, [text])
        assert window.special.tolist() == [True] + [False] * (len(window.ids) - 1)
        assert not np.isin(window.ids[1:], [0, 1, 2]).any()
        assert window.byte_end[-1] == len(text)

    def test_or_kept_and_then_special_and_the_text_after_them_keeps_its_ends(self, quoting):
        quoting.split_special_tokens = False
        text = "it ends</s> it begins"
        (window,) = tokenize(quoting, [text])
        kept = window.ids == 2
        assert kept.sum() == 1
        assert window.special[kept].all()
        assert not window.byte_end[kept].any()
        assert window.byte_end[~window.special][-1] == len(text)
        assert len("it ends</s>") not in window.byte_end

    def test_there_is_no_second_start_token(self, quoting):
        quoting.split_special_tokens = False
        (window,) = tokenize(quoting, ["<s>once"])
        assert (window.ids == 1).sum() == 1
        assert window.special.tolist()[0]
        assert window.byte_end[~window.special][-1] == len("<s>once")
