"""How well a causal model predicts texts, comparable between tokenizers: bits per byte beside nats per token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Loss:
    """Cross-entropy over several texts.

    Attributes:
        nats_per_token: Mean over predicted tokens.
        bits_per_byte: The same loss in bits, over the UTF-8 bytes of the texts.
        tokens: Predicted tokens.
    """

    nats_per_token: float
    bits_per_byte: float
    tokens: int


def per_byte(nats_per_token: float, tokens: int, texts: Iterable[str]) -> float:
    """Bits per byte of a loss per token.

    Args:
        nats_per_token: Mean loss.
        tokens: How many tokens the texts were predicted in.
        texts: What they spell.
    """
    return nats_per_token * tokens / math.log(2) / sum(len(text.encode()) for text in texts)


def measure(directory: Path, texts: list[str], *, most: int = 1024) -> Loss:
    """Let a model on this disk predict texts, each by itself behind a token that begins a document.

    That token is the one that the tokenizer puts in front, or where it puts none its unknown token: in SmolLM2 it stood
    between documents.

    Args:
        directory: A model directory.
        texts: Each is scored as a whole.
        most: Tokens of a text beyond which it would have to be cut.

    Raises:
        ValueError: A text is longer than that.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    nats, tokens = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            if ids[:1] != [tokenizer.bos_token_id]:
                ids = [tokenizer.unk_token_id, *ids]
            if len(ids) > most:
                raise ValueError(f"a text of {len(ids)} tokens is longer than {most}; cut it")
            row = torch.tensor(ids)
            logits = model(input_ids=row[None, :-1]).logits[0]
            nats += float(functional.cross_entropy(logits, row[1:], reduction="sum"))
            tokens += len(ids) - 1
    return Loss(nats / tokens, per_byte(nats / tokens, tokens, texts), tokens)
