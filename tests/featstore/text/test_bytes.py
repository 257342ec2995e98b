"""The bytes of every token, read off its name and off the tokenizer's decoder."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from featstore.text.bytes import byte_of_stand_in, token_bytes


def test_the_stand_ins_are_those_of_the_library():
    decoder = decoders.ByteLevel()
    table = byte_of_stand_in()
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))
    for character, byte in table.items():
        # One byte of several is no character; padded, those above 0x7F are.
        assert decoder.decode([character]).encode() == bytes([byte]) or byte > 0x7F
    both = {byte: character for character, byte in table.items()}
    for code in ("é", "東", "🙂"):
        assert decoder.decode(["".join(both[byte] for byte in code.encode())]) == code


def test_every_token_of_both_kinds_is_known(byte_level_tokenizer, start_token_tokenizer):
    for tokenizer in (byte_level_tokenizer, start_token_tokenizer):
        found = token_bytes(tokenizer)
        assert found.told
        assert found.unknown == 0
        assert len(found.pieces) == len(found.length) == len(tokenizer)
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        assert set(np.flatnonzero(found.control).tolist()) == special
        assert [len(piece) for piece in found.pieces if piece is not None] == found.length[found.length >= 0].tolist()
    assert token_bytes(byte_level_tokenizer) is token_bytes(byte_level_tokenizer)


def test_spelling_of_a_sentencepiece_vocabulary(start_token_tokenizer):
    found = token_bytes(start_token_tokenizer)
    numbers = start_token_tokenizer.convert_tokens_to_ids(["▁", "<0xE2>", "▁the"])
    assert [found.pieces[number] for number in numbers] == [b" ", b"\xe2", b" the"]
    assert found.spaced


def test_a_token_that_its_decoder_reads_otherwise_is_not_believed():
    tokenizer = Tokenizer(BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("b", "c"), decoders.Fuse()])
    found = token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert found.pieces == (b"a", None)
    assert found.unknown == 1


def test_a_name_outside_the_alphabet_is_no_token_of_any_text():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate([*alphabet, "東"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert not found.reachable[256]
    assert found.unknown == 0


def test_added_tokens_are_spelt_as_they_stand(byte_level_tokenizer):
    import copy

    tokenizer = copy.deepcopy(byte_level_tokenizer)
    before = token_bytes(tokenizer)
    tokenizer.add_tokens(["<tool>", "<é>"])
    found = token_bytes(tokenizer)
    assert found is not before
    numbers = tokenizer.convert_tokens_to_ids(["<tool>", "<é>"])
    assert [found.pieces[number] for number in numbers] == [b"<tool>", "<é>".encode()]
    np.testing.assert_array_equal(found.control[numbers], [False, False])
