"""Arbitrary Unicode under five kinds of tokenizers: what byte ends say is what the tokens' own bytes say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from featstore.demo.sample import sample_texts
from featstore.text.tokens import tokenize
from tests.support.real_tokenizers import PIECES, STAND_INS
from tests.support.same_bytes import Spelling, judge, keys_of, read, store_pairs
from tests.support.token_bytes import NOWHERE, character_ends
from tests.support.tokenizers import train_byte_level, train_unigram, train_with_start_token

#: What trips tokenizers: marks apart and out of order, syllables in parts, characters that a compatibility form takes
#: apart or joins, emoji of several code points, spaces of every width, line ends, and quoted names of tokens.
AWKWARD = [
    "e\u0301", "\u0301", "a\u0323\u0307", "a\u0307\u0323", "\u1100\u1161\u11a8", "\uac01", "\u0e01\u0e33", "\u0e33",
    "\u0eb3", "ﬁ", "½", "①", "㎏", "\u212b", "\u2126", "ｶﾞ", "ﷺ", "…", "\u0344", "\u0958", "\u09cb", "\u09c7\u09be",
    "က္မ", "\u0f73", "\u0fb2\u0f71", "\u0f77", "👩🏽‍🚀", "🏳️‍🌈", "🇩🇪", "\U0001d15e", "\u2000", "\u3000", "\xa0",
    "\u200b", "\ufeff", "\u2028", "\r\n", "\r", "\n", "\t", "  ", " ", "▁", "▁▁", "\x00", "\x7f", "\u0340",
    "\ufb1d", "\u1e9b\u0323", "<s>", "</s>", "<unk>", "<|endoftext|>", "<0x41>", "<0xE2>", "▁the", "Ā", "Ġ", "Ċ",
    "don't", "123", ",", "the ",
]  # fmt: skip
TEXTS = (
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(AWKWARD),
        min_size=1,
        max_size=8,
    )
    .map("".join)
    .filter(bool)
)


@dataclass(frozen=True)
class Kind:
    """A tokenizer, and how it spells bytes."""

    tokenizer: PreTrainedTokenizerFast
    spelling: Spelling


@cache
def kinds() -> dict[str, Kind]:
    """A tokenizer of each kind; no fixture, whose representation Hypothesis would print."""
    texts = sample_texts()
    composing = train_byte_level(texts)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    made = {
        "byte-level": (train_byte_level(texts), STAND_INS, None),
        "byte-level, NFC": (composing, STAND_INS, "NFC"),
        "byte fallback": (train_with_start_token(texts), PIECES, None),
        "Unigram, NFKC": (train_unigram(texts), PIECES, "NFKC"),
        "Unigram, unknown": (train_unigram(texts, byte_fallback=False), PIECES, "NFKC"),
    }
    for tokenizer, _, _ in made.values():
        tokenizer.split_special_tokens = True
    return {name: Kind(one[0], Spelling.of(*one)) for name, one in made.items()}


KINDS = ["byte-level", "byte-level, NFC", "byte fallback", "Unigram, NFKC", "Unigram, unknown"]


def assume_told(kind: str, *texts: str) -> None:
    """Nobody can tell a "<" without a token from one that begins the quoted name of a token."""
    assume(not (kind == "Unigram, unknown" and any("<" in normalizers.NFKC().normalize_str(text) for text in texts)))


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_every_end_is_the_one_that_the_tokens_own_bytes_give(kind: str, text: str) -> None:
    one = kinds()[kind]
    assume_told(kind, text)
    truth = read(one.tokenizer, one.spelling, [text])
    [window] = tokenize(one.tokenizer, [text])
    assert window.ids.tolist() == truth.ids[0]
    assert window.special.tolist() == truth.special[0].tolist()
    [ends] = truth.ends
    exact = window.exact & ~window.special
    assert np.array_equal(window.byte_end[exact], ends[exact])
    # What has a place at a character's end is found.
    found = character_ends(text)[np.maximum(ends, 0)] & (ends != NOWHERE) & ~window.special
    assert not (found & ~window.exact).any()


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_ends_run_forward_to_the_end_of_the_text(kind: str, text: str) -> None:
    tokenizer = kinds()[kind].tokenizer
    [window] = tokenize(tokenizer, [text])
    assert window.byte_end.dtype == np.int32
    assert (window.byte_end[window.special] == 0).all()
    ends = window.byte_end[~window.special]
    assert (np.diff(ends) >= 0).all()
    assert (ends >= 0).all()
    # A Unigram model reads a control token where its name is quoted, and those are special.
    controls = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    if tokenizer(text, add_special_tokens=False)["input_ids"][-1] not in controls:
        assert window.exact[~window.special][-1]
        assert ends[-1] == len(text.encode())


@pytest.mark.parametrize(("first", "second"), list(combinations(KINDS, 2)))
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_pairs_have_read_the_same_bytes_and_none_is_missing(first: str, second: str, texts: list[str]) -> None:
    assume_told(second, *texts)
    sides = [kinds()[first], kinds()[second]]
    truths = [read(side.tokenizer, side.spelling, texts) for side in sides]
    keys = [keys_of(tokenize(side.tokenizer, texts)) for side in sides]
    verdict = judge(*truths, store_pairs(*keys, texts))
    assert (verdict.wrong, verdict.beside, verdict.lost) == (0, 0, 0)
    inside = judge(*truths, store_pairs(*keys, texts, "byte"))
    assert (inside.wrong, inside.lost) == (0, 0)
