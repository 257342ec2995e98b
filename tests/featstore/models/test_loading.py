"""A model is loaded with the attention that it has; what it claims is there before its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BltConfig,
    Gemma2Config,
    Gemma3Config,
    GotOcr2Config,
    LlamaConfig,
    Mamba2Config,
    PretrainedConfig,
)

from featstore.demo.doctor import examine
from featstore.errors import FeatstoreError, ModelLoadError, SpecError, UnsupportedArchitectureError
from featstore.models.configuration import UNLIMITED
from featstore.models.loading import inspect_model, load_model
from featstore.models.references import ModelSpec
from featstore.models.skeletons import choose_attention, running_attention
from tests.support.tiny_models import save_with_tokenizer

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
TEXT = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 400, "sliding_window": 8}
VISION = {**SMALL, "image_size": 28, "patch_size": 14}


def saved(config: PretrainedConfig, directory: Path, tokenizer: Any) -> ModelSpec:
    torch.manual_seed(0)
    save_with_tokenizer(AutoModelForCausalLM.from_config(config), directory, tokenizer)
    return ModelSpec("m", str(directory))


def described(config: PretrainedConfig, directory: Path, tokenizer: Any) -> ModelSpec:
    """A model without its weights."""
    return ModelSpec("m", str(save_with_tokenizer(config, directory, tokenizer)))


@pytest.fixture(scope="module")
def without_sdpa(byte_level_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return saved(Gemma2Config(**TEXT), tmp_path_factory.mktemp("gemma2"), byte_level_tokenizer)


@pytest.fixture(scope="module")
def with_sdpa(byte_level_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    config = LlamaConfig(**SMALL, vocab_size=400)
    return saved(config, tmp_path_factory.mktemp("llama"), byte_level_tokenizer)


@pytest.mark.parametrize("wanted", ["auto", "eager"])
def test_a_model_without_sdpa_runs_what_it_has(without_sdpa: ModelSpec, wanted: str) -> None:
    assert choose_attention(without_sdpa, wanted) == "eager"
    model = load_model(without_sdpa, device="cpu", attention=wanted)
    assert running_attention(model) == "eager"
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_sdpa_is_taken_where_it_is(with_sdpa: ModelSpec) -> None:
    for wanted, ran in (("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        assert choose_attention(with_sdpa, wanted) == ran
        assert running_attention(load_model(with_sdpa, device="cpu", attention=wanted)) == ran
    assert running_attention(load_model(with_sdpa, device="cpu")) == "sdpa"


@pytest.mark.parametrize("wanted", ["sdpa", "flash_attention_2", "flash_attention_3"])
def test_an_attention_that_a_model_lacks_is_one_line(without_sdpa: ModelSpec, wanted: str) -> None:
    said = rf"attention '{wanted}': model 'm' \(.*\) does not have it here; it has eager: use --attn auto"
    for ask in (choose_attention, lambda spec, name: load_model(spec, device="cpu", attention=name)):
        with pytest.raises(SpecError, match=said) as caught:
            ask(without_sdpa, wanted)
        assert "\n" not in str(caught.value)


def test_an_unknown_attention_names_what_there_is(with_sdpa: ModelSpec) -> None:
    with pytest.raises(SpecError, match="choose one of auto, eager, sdpa, flash_attention_2"):
        choose_attention(with_sdpa, "sdp")


def test_text_blocks_may_have_what_another_part_lacks(byte_level_tokenizer: Any, tmp_path: Path) -> None:
    """GOT-OCR's vision tower has no sdpa, its text blocks run it; on record it is theirs."""
    vision = {**SMALL, "mlp_dim": 16, "image_size": 64, "output_channels": 16, "global_attn_indexes": [1]}
    text = {**SMALL, "model_type": "qwen2", "num_key_value_heads": 1, "vocab_size": 400}
    spec = described(GotOcr2Config(vision_config=vision, text_config=text), tmp_path, byte_level_tokenizer)
    assert choose_attention(spec) == choose_attention(spec, "sdpa") == "sdpa"
    assert choose_attention(spec, "eager") == "eager"


def test_a_wrapper_has_the_size_of_its_text_model(byte_level_tokenizer: Any, tmp_path: Path) -> None:
    spec = described(Gemma3Config(text_config=TEXT, vision_config=VISION), tmp_path, byte_level_tokenizer)
    info = inspect_model(spec)
    assert (info.depth, info.width, info.vocabulary) == (2, 16, 400)
    assert (info.blocks, info.hidden) == (2, 16)


def test_a_configuration_with_an_infinity_is_inspected(byte_level_tokenizer: Any, tmp_path: Path) -> None:
    config = Mamba2Config(hidden_size=16, num_hidden_layers=2, vocab_size=400, num_heads=4, head_dim=8)
    spec = described(config, tmp_path, byte_level_tokenizer)
    info = inspect_model(spec)
    assert (info.depth, info.context) == (2, UNLIMITED)
    assert inspect_model(spec).config_hash == info.config_hash


def test_what_a_configuration_does_not_claim_is_said_where_it_is_needed(
    byte_level_tokenizer: Any, tmp_path: Path
) -> None:
    spec = described(BltConfig(), tmp_path, byte_level_tokenizer)
    info = inspect_model(spec)
    assert info.depth is info.width is None
    assert info.describe()["depth"] is None
    for get, what in ((lambda: info.blocks, "number of blocks"), (lambda: info.hidden, "hidden width")):
        with pytest.raises(UnsupportedArchitectureError, match=rf"model 'm' \(.*\): .* a blt names no {what}"):
            get()
    [check] = [c for c in examine([f"m={tmp_path}"], tmp_path / "s.zarr")["checks"] if c["name"] == "model m"]
    assert (
        "blt, a number of blocks that its configuration does not name of unknown width, 260 token ids"
        in check["finding"]
    )


def test_a_model_that_is_not_causal_is_one_line(byte_level_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig

    spec = described(CLIPVisionConfig(**VISION), tmp_path, byte_level_tokenizer)
    with pytest.raises(ModelLoadError) as caught:
        inspect_model(spec)
    assert "\n" not in str(caught.value)


def test_wrong_words_are_no_failure_of_the_model(with_sdpa: ModelSpec) -> None:
    for given in ({"device": "gpu"}, {"dtype": "int4"}, {"device": "cuda:x"}):
        with pytest.raises(SpecError):
            load_model(with_sdpa, **given)
    with pytest.raises(FeatstoreError, match="no directory"):
        choose_attention(ModelSpec("m", "./nowhere"))
