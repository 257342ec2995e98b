"""A checkpoint may hold parts that read no text; whatever else the causal model does not know is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from featstore.errors import WeightsError
from featstore.models.loading import load_model
from featstore.models.probe.prove import prove
from featstore.models.probe.words import topics
from featstore.models.unread import beside_text, left_out
from tests.support.architectures.building import save
from tests.support.checkpoints import WEIGHTS, edit, spec_of

TEXT = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(byte_level_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama 4 with its image part, which the causal class does not have."""
    base = tmp_path_factory.mktemp("unread")
    byte_level_tokenizer.save_pretrained(base / "words")
    return save("llama4", base / "model", base / "words", with_images=True)


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(saved, tmp_path / "model")


def unexpected(path: Path) -> set[str]:
    """Names of its tensors outside the text model."""
    return {name for name in load_file(path / WEIGHTS) if not name.startswith("language_model.")}


def test_a_model_is_complete_without_the_part_for_images(saved: Path) -> None:
    loaded = load_model(spec_of(saved), device="cpu")
    tensors = load_file(saved / WEIGHTS)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, tensors[f"language_model.{name}"]), name
    words = f"{len(unexpected(saved))} tensors for images"
    assert left_out(loaded) == words
    verdict = prove(loaded).verdict
    assert verdict.for_storing().left_out == words
    assert topics(verdict)["model"].endswith(f"; loaded without its {words}")


def test_what_is_loaded_whole_is_without_nothing(tiny_llama: Path) -> None:
    loaded = load_model(spec_of(tiny_llama), device="cpu")
    assert left_out(loaded) is None
    assert prove(loaded).verdict.left_out is None
    assert beside_text(loaded.config, ["model.layers.7.norm.weight"]) is None


REFUSED = {
    "a renamed tensor of the text part": (
        lambda tensors: tensors | {TEXT.replace("q_proj", "query"): tensors.pop(TEXT)},
        r"lacks 1 tensor \(model\.layers\.1\.self_attn\.q_proj\.weight\).* holds 1 tensor \(\S+query\.weight\) that",
    ),
    "one too many in the text part": (
        lambda tensors: tensors | {TEXT.replace("q_proj", "extra"): tensors[TEXT].clone()},
        r"holds 1 tensor \(\S+extra\.weight\) that",
    ),
    "a block more than the configuration says": (
        lambda tensors: tensors | {TEXT.replace("layers.1", "layers.9"): tensors[TEXT].clone()},
        r"holds 1 tensor \(\S+layers\.9\.self_attn\.q_proj\.weight\) that",
    ),
    "a part that nobody knows": (
        lambda tensors: tensors | {"sound_model.weight": torch.ones(2)},
        r"holds 1 tensor \(sound_model\.weight\) that",
    ),
    "a misspelt tensor of the image part": (
        lambda tensors: tensors | {"vision_model.class_embeding": tensors.pop("vision_model.class_embedding")},
        r"holds 1 tensor \(vision_model\.class_embeding\) that",
    ),
    "half an image part": (
        lambda tensors: {name: t for name, t in tensors.items() if "vision_model.model" not in name},
        r"holds \d+ tensors \(\S+, vision_model\.\S+, vision_model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused_by_name(case: str, model: Path) -> None:
    change, words = REFUSED[case]
    edit(model, change)
    with pytest.raises(WeightsError, match=words) as caught:
        load_model(spec_of(model), device="cpu")
    assert "\n" not in str(caught.value)


def test_an_image_part_that_the_configuration_does_not_have_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    edit(path, lambda tensors: tensors | {"vision_model.class_embedding": torch.ones(2)})
    with pytest.raises(WeightsError, match=r"holds 1 tensor \(vision_model\.class_embedding\)"):
        load_model(spec_of(path), device="cpu")


def test_an_architecture_that_nobody_can_build_knows_nothing(saved: Path) -> None:
    names = unexpected(saved)
    config = AutoConfig.from_pretrained(saved)
    found = beside_text(config, names)
    assert found is not None
    assert (found.names, found.kinds, str(found)) == (names, ("images",), f"{len(names)} tensors for images")
    assert beside_text(config, ()) is None
    # A whole module of the text part, which a causal class could lack.
    for name in ("language_model.lm_head.weight", TEXT):
        assert beside_text(config, {*names, name}) is None
    for architectures in (["Llama4ForNothing"], ["Llama4ForCausalLM"], ["AutoConfig"], None):
        config.architectures = architectures
        assert beside_text(config, names) is None


def test_names_are_those_of_the_checkpoint_whatever_the_architecture_calls_them(
    saved: Path, byte_level_tokenizer: Any, tmp_path: Path
) -> None:
    path = save("dots3_note", tmp_path / "model", saved.parent / "words", with_images=True)
    heads = {name.partition(".")[0] for name in load_file(path / WEIGHTS)}
    assert {"audio_encoder", "vision_encoder"} <= heads
    words = left_out(load_model(spec_of(path), device="cpu"))
    others = {name for name in load_file(path / WEIGHTS) if name.startswith(("audio_", "vision_"))}
    assert words == f"{len(others)} tensors for images and sound"
    config = AutoConfig.from_pretrained(path)
    assert str(beside_text(config, others)) == words
    # The head stands beside the text part here.
    assert beside_text(config, {*others, "lm_head.weight"}) is None


def test_a_quantised_checkpoint_is_asked_without_its_packing(model: Path) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    config = AutoConfig.from_pretrained(model)
    names = unexpected(model)
    assert str(beside_text(config, names)) == f"{len(names)} tensors for images"
    assert config.quantization_config == {"quant_method": "fp8"}


def test_shards_are_looked_at_together(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    place = {}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, model / name, metadata={"format": "pt"})
        place |= dict.fromkeys(part, name)
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    assert left_out(load_model(spec_of(model), device="cpu")) == "26 tensors for images"
