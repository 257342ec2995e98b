"""Unicode normalisation: which tokenizers do it, and texts that are brought into a form."""

from __future__ import annotations

import hashlib
import unicodedata
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers import normalizers as steps

from featstore.errors import SpecError
from featstore.text.documents import documents
from featstore.text.normalisation import check_choice, normalised, normalises


def with_steps(*chosen: steps.Normalizer | None) -> SimpleNamespace:
    """A transformers tokenizer as far as its steps go; none for a single None."""
    backend = Tokenizer(models.BPE())
    if chosen != (None,):
        backend.normalizer = chosen[0] if len(chosen) == 1 else steps.Sequence(list(chosen))
    return SimpleNamespace(backend_tokenizer=backend)


class TestTokenizers:
    @pytest.mark.parametrize(
        "chosen",
        [
            (steps.NFC(),),
            (steps.NFKC(),),
            (steps.NFD(), steps.StripAccents()),
            (steps.Replace(" ", "▁"), steps.Sequence([steps.Lowercase(), steps.NFKD()])),
            (steps.BertNormalizer(),),
            (steps.BertNormalizer(lowercase=False, strip_accents=True),),
        ],
    )
    def test_unicode_forms_are_found_however_deep(self, chosen):
        assert normalises(with_steps(*chosen))

    @pytest.mark.parametrize(
        "chosen",
        [
            (None,),
            (steps.Replace(" ", "▁"), steps.Prepend("▁")),
            (steps.Lowercase(), steps.Strip(), steps.Nmt()),
            (steps.BertNormalizer(lowercase=False),),
            (steps.BertNormalizer(strip_accents=False),),
            (steps.Sequence([]),),
        ],
    )
    def test_other_steps_are_none(self, chosen):
        assert not normalises(with_steps(*chosen))

    def test_a_table_of_sentencepiece_counts(self, byte_level_tokenizer):
        """The library builds one from a real table alone; what it writes of one is what is read."""
        written = SimpleNamespace(__getstate__=lambda: b'{"type":"Precompiled","precompiled_charsmap":"AAAA"}')
        assert normalises(SimpleNamespace(backend_tokenizer=SimpleNamespace(normalizer=written)))

    def test_real_tokenizers(self, byte_level_tokenizer, start_token_tokenizer):
        assert not normalises(byte_level_tokenizer)
        assert not normalises(start_token_tokenizer)
        assert not normalises(object())


class TestTexts:
    @given(st.lists(st.text(max_size=20)))
    def test_nfc_composes_and_none_leaves_as_it_is(self, texts):
        assert list(normalised(texts, "none")) == texts
        assert list(normalised(texts, "nfc")) == [unicodedata.normalize("NFC", text) for text in texts]

    def test_the_id_is_that_of_what_was_read(self):
        written, read = "cafe\u0301 au lait", "caf\u00e9 au lait"
        [as_it_is], [composed] = (list(documents(normalised([written], form), max_bytes=8)) for form in ("none", "nfc"))
        assert as_it_is.id == hashlib.sha256(written.encode()).digest()
        assert composed.id == hashlib.sha256(read.encode()).digest()
        assert (as_it_is.text, composed.text) == ("cafe\u0301", "caf\u00e9 au")

    def test_line_ends_stay(self):
        assert list(normalised(["a\r\nb\rc\n"], "nfc")) == ["a\r\nb\rc\n"]

    @pytest.mark.parametrize("text", ["NFC", "nfkc", "", "yes"])
    def test_another_form_is_quoted(self, text):
        with pytest.raises(SpecError, match=f"--normalise {text!r}: choose auto, none or nfc"):
            check_choice(text)
