"""The small model's tokenizer, a byte-level BPE trained on its own text, and texts as windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

#: Stands before every document and ends a generated one.
BOUNDARY = "<|endoftext|>"


def train_tokenizer(texts: Sequence[str], pieces: int) -> Tokenizer:
    """Train a byte-level BPE; digits stand alone, and every byte has a piece.

    Args:
        texts: What to count pairs in.
        pieces: Size of the vocabulary, the boundary token included; it is token 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", pair=f"{BOUNDARY} $A {BOUNDARY} $B", special_tokens=[(BOUNDARY, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, into: Path) -> None:
    """Write the tokenizer as transformers reads it."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOUNDARY, eos_token=BOUNDARY)
    fast.save_pretrained(into)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tensor]:
    """Tokens of each text, the boundary first: (tokens,) int64 each."""
    return [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]


def batches(documents: Sequence[Tensor], *, windows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches: the documents in a new order each time, one behind the other, cut into windows.

    Args:
        documents: Tokens of each, (tokens,) int64.
        windows: Windows a batch.
        length: Tokens that a window predicts.
        seed: Fixes every order.

    Yields:
        (windows, length + 1) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    size = windows * (length + 1)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        left = torch.cat([left, *(documents[place] for place in order)])
        whole = len(left) // size
        yield from left[: whole * size].view(whole, windows, length + 1)
        left = left[whole * size :]
