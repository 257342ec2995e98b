"""Prompts as a model reads them: what cannot be read is named by its number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from evaluate.injection.reading import spelt, tokenized
from featstore.errors import OffsetError
from tests.support.tokenizers import train_byte_level

UNSPELT = "\x06"


def test_a_prompt_that_cannot_be_spelt_is_named_by_its_number(sample_texts: list[str]) -> None:
    tokenizer = train_byte_level(sample_texts, dropped=UNSPELT)
    texts = ["One.", "Two.", f"Three{UNSPELT}.", f"Four{UNSPELT}."]
    with pytest.raises(OffsetError, match=r"model 'm': prompt 3: no token covers character 5 \('\\x06'"):
        tokenized("m", SimpleNamespace(tokenizer=tokenizer), texts, 0, remedy="")  # type: ignore[arg-type]
    assert len(spelt(tokenizer, texts[:2], "prompt")) == 2
