"""Published ranks and pieces to a ``tokenizer.json``, by transformers' own converters where it has one."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from tests.support.registries import CACHE

if TYPE_CHECKING:
    from tests.support.real_tokenizers import Family

#: Raised when the same file would give another tokenizer.
RECIPE = 1

_LLAMA_SPECIAL = ("<unk>", "<s>", "</s>")
_LLAMA_CONFIG = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
_LLAMA_CONFIG |= dict(zip(("unk_token", "bos_token", "eos_token"), _LLAMA_SPECIAL, strict=True))


def converted(name: str, family: Family, source: Path) -> Path:
    """A ``tokenizer.json`` of a family that is published as something else; made once.

    Args:
        name: Of the family, and so of the directory in the cache.
        family: What the file is.
        source: The file.
    """
    kept, note = CACHE / name / "tokenizer.json", CACHE / name / "converted"
    if not (kept.is_file() and note.is_file() and note.read_text() == _note(family, kept)):
        with tempfile.TemporaryDirectory(dir=CACHE / name) as aside:
            made = Path(aside) / "tokenizer.json"
            _convert(family, source, Path(aside)).save(str(made))
            made.replace(kept)
        note.write_text(_note(family, kept))
    return kept


def _note(family: Family, path: Path) -> str:
    return f"{RECIPE} {family.sha256} {sha256(path.read_bytes()).hexdigest()}"


def _convert(family: Family, source: Path, aside: Path) -> Tokenizer:
    if family.kind == "sentencepiece":
        (aside / "tokenizer.model").write_bytes(source.read_bytes())
        (aside / "tokenizer_config.json").write_text(json.dumps(_LLAMA_CONFIG))
        return LlamaTokenizer.from_pretrained(aside).backend_tokenizer
    if family.kind == "javascript":
        return _with_start_token(_of_javascript(source), family.start)
    return _with_start_token(_of_ranks(family, source), family.start)


def _with_start_token(backend: Tokenizer, start: str) -> Tokenizer:
    backend.add_special_tokens([AddedToken(start, normalized=False, special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B:1", special_tokens=[(start, backend.token_to_id(start))]
    )
    return backend


# Ranks ---------------------------------------------------------------------------------------------------------------


def read_ranks(family: Family, source: Path) -> dict[int, bytes]:
    """Bytes by token id, straight from the file.

    Args:
        family: Of kind ``ranks`` or ``tekken``.
        source: Its file.
    """
    content = source.read_bytes()
    if family.kind == "ranks":
        pairs = (line.split() for line in content.splitlines() if line)
        return {int(rank): base64.b64decode(token) for token, rank in pairs}
    tekken = json.loads(content)
    # Control tokens have the first ids.
    controls = tekken["config"]["default_num_special_tokens"]
    tokens = tekken["vocab"][: tekken["config"]["default_vocab_size"] - controls]
    return {controls + token["rank"]: base64.b64decode(token["token_bytes"]) for token in tokens}


def _of_ranks(family: Family, source: Path) -> Tokenizer:
    tokens = read_ranks(family, source)
    first = min(tokens)

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:
            return {token: i - first for i, token in tokens.items()}

    pattern = json.loads(source.read_bytes())["config"]["pattern"] if family.kind == "tekken" else family.pattern
    backend = Converter(str(source), pattern=pattern).converted()
    if first:
        model = json.loads(backend.to_str())["model"]
        controls = ["<unk>", *(f"<SPECIAL_{i}>" for i in range(1, first))]
        controls[1] = family.start
        vocabulary = {token: i for i, token in enumerate(controls)}
        vocabulary |= {token: i + first for token, i in model["vocab"].items()}
        backend.model = BPE(vocabulary, [tuple(pair) for pair in model["merges"]], ignore_merges=True)
    return backend


# Llama 2's pieces ----------------------------------------------------------------------------------------------------


def _of_javascript(source: Path) -> Tokenizer:
    """Llama 2 as transformers converted it for years: "▁" is a prefix of every text."""
    text = source.read_text(encoding="utf-8")
    # The two longest strings of the file, its merges as pairs of 16-bit numbers and its pieces a line each.
    merges, pieces = sorted(re.findall(r"[A-Za-z0-9+/=]{10000,}", text), key=_is_text)
    vocabulary = base64.b64decode(pieces).decode().split("\n")
    pairs = np.frombuffer(base64.b64decode(merges), dtype="<u2").reshape(-1, 2).tolist()
    backend = Tokenizer(
        BPE(
            {piece: i for i, piece in enumerate(vocabulary)},
            [(vocabulary[first], vocabulary[second]) for first, second in pairs],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _LLAMA_SPECIAL])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _is_text(encoded: str) -> bool:
    return base64.b64decode(encoded[:400]).startswith(b"<unk>")
