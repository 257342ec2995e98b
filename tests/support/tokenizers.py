"""Three tokenizers trained here, from the committed sample: what the tiny models read with, without a download.

Two differ as the demo pair's do. One is a byte-level BPE without a start token, built like SmolLM2's; the other is a
SentencePiece-style BPE with byte fallback, "▁" for a space and a start token, laid out as transformers converts Llama's
and Mistral's. The third is a Unigram model that normalises. The vocabularies are small; everything a text can do to
offsets and special tokens is the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import PreTrainedTokenizerFast

#: Entries of each vocabulary: enough that common words are one token.
BYTE_LEVEL_VOCABULARY = 4096
START_TOKEN_VOCABULARY = 3072
UNIGRAM_VOCABULARY = 2048

#: SmolLM2's, in its order.
SMOLLM2_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
)  # fmt: skip
LLAMA_SPECIAL = ("<unk>", "<s>", "</s>")
#: Characters with a token of their own; all others are spelt in bytes.
START_TOKEN_ALPHABET = 120


def train_byte_level(texts: Iterable[str], *, dropped: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE as SmolLM2 has: digits apart and no start token.

    Args:
        texts: What it is trained on.
        dropped: Control characters without a token; SmolLM2 has six. None by default: random models write any byte,
            and a text that a tokenizer cannot spell is refused.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=BYTE_LEVEL_VOCABULARY,
        special_tokens=list(SMOLLM2_SPECIAL),
        initial_alphabet=sorted(
            # The stand-in of control character n is U+0100 + n.
            set(pre_tokenizers.ByteLevel.alphabet()) - {chr(0x100 + ord(character)) for character in dropped}
        ),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )


def train_with_start_token(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A BPE as Mistral has: "▁" before the text and for spaces, bytes for rare characters, ``<s>`` before all.

    A space is joined with the character after it before anything else is, as it nearly always is in a vocabulary of
    real size. One character stands for both while the merges are learned.
    """
    words = [word for text in texts for word in text.split()]
    # Line feeds and tabs are spelt in bytes, whatever the text holds.
    counts = Counter("".join(words))
    alphabet = sorted(sorted(counts), key=lambda character: -counts[character])[:START_TOKEN_ALPHABET]
    joined = {character: chr(0xE000 + place) for place, character in enumerate(alphabet)}
    known = (word for word in words if set(word) <= joined.keys())

    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    learned = START_TOKEN_VOCABULARY - len(LLAMA_SPECIAL) - 256 - 1
    trainer = BpeTrainer(
        vocab_size=learned, initial_alphabet=[*alphabet, *joined.values()], limit_alphabet=learned, show_progress=False
    )
    learner.train_from_iterator((joined[word[0]] + word[1:] for word in known), trainer)
    model = json.loads(learner.to_str())["model"]

    apart = str.maketrans({one: "▁" + character for character, one in joined.items()})
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [*LLAMA_SPECIAL, *bytes_, "▁", *(piece.translate(apart) for piece in pieces)]
    merges = [("▁", character) for character in alphabet]
    merges += [(first.translate(apart), second.translate(apart)) for first, second in model["merges"]]
    tokenizer = Tokenizer(
        BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=merges, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA_SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", LLAMA_SPECIAL.index("<s>"))]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def train_unigram(texts: Iterable[str], *, byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    """A Unigram model as T5 and XLM-R have: NFKC first, "▁" before the text and for spaces, ``</s>`` after it.

    Args:
        texts: What it is trained on.
        byte_fallback: Spell rare characters in bytes, or else read ``<unk>`` in their place.
    """
    learner = Tokenizer(Unigram())
    learner.normalizer = normalizers.NFKC()
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = UnigramTrainer(
        vocab_size=UNIGRAM_VOCABULARY, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    pieces = [(piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"] if piece != "<unk>"]
    # Bytes score so low that a text which quotes "<0x41>" is rarely read as one of them.
    bytes_ = [(f"<0x{byte:02X}>", -100.0) for byte in range(256 if byte_fallback else 0)]
    special = [(token, 0.0) for token in LLAMA_SPECIAL]
    tokenizer = Tokenizer(Unigram([*special, *bytes_, *pieces], unk_id=0, byte_fallback=byte_fallback))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA_SPECIAL[1:]])
    tokenizer.normalizer, tokenizer.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", LLAMA_SPECIAL.index("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
