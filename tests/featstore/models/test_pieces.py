"""A SentencePiece model alone gives SentencePiece's ids, or a line that says why not."""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoConfig, AutoTokenizer

from featstore.errors import ModelLoadError
from featstore.models.loading import inspect_model
from featstore.models.pieces import backend_of, read_pieces, refuse_other_ids
from featstore.models.references import ModelSpec
from tests.support.tiers import tiered


def train(texts: list[str], path: Path, **options: Any) -> Path:
    """A small SentencePiece model of the committed sample."""
    lines = [line for text in texts for line in text.splitlines() if line.strip()][:1200]
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        minloglevel=2,
        **{
            "vocab_size": 1000,
            "model_type": "bpe",
            "byte_fallback": True,
            "character_coverage": 0.99,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity",
            **options,
        },
    )
    path.write_bytes(written.getvalue())
    return path


def beside(kind: str, pieces: Path, folder: Path, settings: str | None = None) -> ModelSpec:
    """A folder of a type of model with a SentencePiece model alone."""
    folder.mkdir()
    AutoConfig.for_model(kind).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(settings)
    return ModelSpec("m", str(folder))


@pytest.fixture(scope="module")
def pieces(sample_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(sample_texts, tmp_path_factory.mktemp("pieces") / "tokenizer.model")


KINDS = list(product(("bpe", "unigram"), (True, False), (False, True), ("identity", "nmt_nfkc"), (True, False)))
HARD = [
    " The",
    "  two  spaces ",
    "\n\n a",
    "▁ and ▁▁",
    "</s>",
    "a</s> <s>b",
    "ကမ္ဘာ नमस्ते 🙂",
    "caf\u0065\u0301",
    "",
    " ",
]


@pytest.mark.parametrize("settings", [None, '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}'])
@pytest.mark.parametrize("kind", ["mistral", "llama", "gemma"])
def test_the_ids_are_sentencepieces_beside_any_type_of_model(
    kind: str, settings: str | None, pieces: Path, sample_texts: list[str], tmp_path: Path
) -> None:
    spec = beside(kind, pieces, tmp_path / "m", settings)
    truth, info = SentencePieceProcessor(model_file=str(pieces)), inspect_model(spec)
    texts = HARD + [text[:500] for text in sample_texts[:40]]
    for text in texts:
        assert info.tokenizer(text, add_special_tokens=False)["input_ids"] == truth.encode(text), text
    assert info.tokenizer.convert_ids_to_tokens(truth.encode(" The"))[0].startswith("▁")
    start = [] if settings is None else [truth.bos_id()]
    assert info.tokenizer("<s>a")["input_ids"] == start + truth.encode("<s>a")
    assert info.start_token == ({"id": 1, "text": "<s>"} if settings else None)
    # This is what the automatic loader does instead; its hash is not that of the mended one.
    loaded = AutoTokenizer.from_pretrained(spec.ref)
    assert [t for t in texts if loaded(t, add_special_tokens=False)["input_ids"] != truth.encode(t)]
    assert loaded.backend_tokenizer.to_str() != info.tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    ("kind", "prefix", "extra", "rule", "fallback"),
    tiered(KINDS[::5], [kind for i, kind in enumerate(KINDS) if i % 5]),
)
def test_every_normaliser_of_the_file_is_followed(
    kind: str, prefix: bool, extra: bool, rule: str, fallback: bool, sample_texts: list[str], tmp_path: Path
) -> None:
    path = train(
        sample_texts,
        tmp_path / "tokenizer.model",
        model_type=kind,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=extra,
        normalization_rule_name=rule,
        byte_fallback=fallback,
        user_defined_symbols=["<h1>", "[REF]", *(["\t"] if rule == "identity" else [])],
    )
    proto = read_pieces(path)
    backend = backend_of(proto)
    refuse_other_ids(backend, path, proto)
    backend.encode_special_tokens = True
    truth = SentencePieceProcessor(model_file=str(path))
    lines = [line for text in sample_texts[:60] for line in text.splitlines()]
    for line in [*lines, " [REF]a\tb<h1> c", "x  \r\n ▁"]:
        assert backend.encode(line).ids == truth.encode(line), line


def test_a_file_that_cannot_be_followed_is_refused_in_one_line(sample_texts: list[str], tmp_path: Path) -> None:
    path = train(sample_texts, tmp_path / "suffix.model", treat_whitespace_as_suffix=True)
    spec = beside("llama", path, tmp_path / "m")
    with pytest.raises(ModelLoadError, match=r"^model 'm' .*'The capital.* gives .*; save a tokenizer\.json") as caught:
        inspect_model(spec)
    assert "\n" not in str(caught.value)
    path = train(sample_texts, tmp_path / "char.model", model_type="char", vocab_size=100, byte_fallback=False)
    with pytest.raises(ModelLoadError, match="neither BPE nor Unigram; save a tokenizer"):
        inspect_model(beside("llama", path, tmp_path / "c"))


def test_a_piece_that_the_normaliser_would_change_is_refused(sample_texts: list[str], tmp_path: Path) -> None:
    # SentencePiece spares its user's pieces; a backend either finds them before it normalises, or normalises them too.
    changed = {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["\t"]}
    path = train(sample_texts, tmp_path / "tokenizer.model", **changed)
    with pytest.raises(ModelLoadError, match=r" gives .*; save a tokenizer\.json"):
        inspect_model(beside("llama", path, tmp_path / "m"))


def test_the_proof_sees_a_missing_space(pieces: Path) -> None:
    proto = read_pieces(pieces)
    backend = backend_of(proto)
    backend.normalizer = None
    with pytest.raises(ModelLoadError, match="cannot be read as SentencePiece reads it"):
        refuse_other_ids(backend, pieces, proto)


def test_what_is_no_sentencepiece_model_is_left_to_transformers(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"IQ== 0\nIg== 1\n")  # as tiktoken writes them
    assert read_pieces(path) is None


@pytest.mark.demo_pair
def test_mistrals_own_file(tmp_path: Path, demo_models: Any, sample_texts: list[str]) -> None:
    from featstore.demo.assets import PIECES

    [path] = [p for p in (demo_models.smollm2.parent / "assets").iterdir() if p.name == Path(PIECES.member).name]
    truth, info = SentencePieceProcessor(model_file=str(path)), inspect_model(beside("mistral", path, tmp_path / "m"))
    for text in HARD + sample_texts[:50] + ["quoted [INST] and [REFERENCE_DOC_3]x"]:
        assert info.tokenizer(text, add_special_tokens=False)["input_ids"] == truth.encode(text), text
