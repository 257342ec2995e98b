"""Every causal type of the installed transformers is built tiny, or cannot be for the reason that is given."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.architectures import building
from tests.support.architectures.building import NotBuiltError, build, causal_types, save, variants
from tests.support.architectures.configuration import Sizes, configuration
from tests.support.architectures.kinds import Kind, kind_of, some_ids
from tests.support.architectures.settings import Refusal, settings
from tests.support.tiers import tiered

TYPES = [listed.name for listed in causal_types()]
#: Those on which the real commands run from end to end.
END_TO_END = (
    "gpt2", "gpt_neox", "gemma2", "gemma3", "gpt_oss", "qwen3_5", "llama4", "deepseek_v3", "deepseek_v4",
    "granitemoehybrid", "mamba2", "lfm2", "phi3@longrope", "bloom", "opt",
)  # fmt: skip


@pytest.mark.parametrize("name", [*TYPES, *variants()])
def test_a_type_is_built_or_refused_for_the_reason_that_is_true(name):
    try:
        model = build(name)
    except NotBuiltError as error:
        # The reason is only given where what transformers raised is what the reason explains.
        if not error.looked_at:
            raise
        return
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    for path, parameter in model.named_parameters():
        assert not parameter.requires_grad
        assert torch.isfinite(parameter).all(), path
        assert parameter.numel() == 1 or len(parameter.unique()) > 1, f"{path} is not drawn"


def test_the_settings_name_no_type_that_transformers_does_not_have():
    known = settings()
    named = {*known.types, *known.unbuildable, *(name.partition("@")[0] for name in known.variants)}
    assert named <= set(TYPES)


def test_a_type_that_the_settings_do_not_have_and_the_defaults_do_not_fit_was_looked_at_by_nobody(monkeypatch):
    known = settings()
    without = {name: own for name, own in known.types.items() if name != "dbrx"}
    monkeypatch.setattr(building, "settings", lambda: known)
    monkeypatch.setattr(
        "tests.support.architectures.configuration.settings", lambda: dataclasses.replace(known, types=without)
    )
    with pytest.raises(NotBuiltError, match="nobody looked at 'dbrx' yet") as caught:
        build("dbrx")
    assert not caught.value.looked_at


def test_a_reason_that_is_not_true_is_not_given(monkeypatch):
    false = {"gemma4_assistant": Refusal(error="ImportError: .*timm", because="needs timm")}
    monkeypatch.setattr(building, "settings", lambda: dataclasses.replace(settings(), unbuildable=false))
    with pytest.raises(NotBuiltError, match="set of layer types producing a cache") as caught:
        build("gemma4_assistant")
    assert not caught.value.looked_at


def test_a_seed_is_the_whole_model():
    weights = []
    for seed in (0, 0, 1):
        torch.rand(3)  # what was drawn before does not matter
        weights.append(build("qwen3_5_text", seed=seed).state_dict())
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_building_leaves_the_random_numbers_and_the_switches_of_torch_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    build("llama")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.are_deterministic_algorithms_enabled() == before[1]


@pytest.mark.parametrize(
    ("name", "kinds"), [("granitemoehybrid", 2), ("gemma3_text", 2), ("qwen3_next", 2), ("deepseek_v4", 3)]
)
def test_a_tiny_model_has_every_kind_of_block(name, kinds):
    assert len(set(configuration(name).layer_types)) == kinds


def test_sdpa_is_used_where_it_is_and_the_types_own_choice_elsewhere():
    assert building.attention(build("llama")) == "sdpa"
    assert building.attention(build("gemma2")) == "eager"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", Kind.DECODER),
        ("gpt2", Kind.DECODER),
        ("bert", Kind.NOT_CAUSAL),
        ("big_bird", Kind.NOT_CAUSAL),
        ("llama@bidirectional", Kind.NOT_CAUSAL),
        ("bart", Kind.ENCODER_DECODER),
        ("whisper", Kind.ENCODER_DECODER),
    ],
)
def test_whether_a_type_is_a_decoder_is_measured(name, kind):
    assert kind_of(build(name)) == kind


@pytest.fixture(scope="module")
def words(byte_level_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", tiered(END_TO_END, [name for name in TYPES if name not in END_TO_END]))
def test_a_saved_model_is_the_same_when_it_is_loaded(name, words, byte_level_tokenizer, tmp_path):
    special = {f"{role}_token_id": getattr(byte_level_tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    try:
        model = build(name, Sizes(len(byte_level_tokenizer), 1024, special))
    except NotBuiltError:
        pytest.skip("cannot be built")
    save(name, tmp_path, words)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    if name == "youtu":
        # transformers sets the embedding of the padding token to zero whenever it loads the type; its head is tied.
        model.get_input_embeddings().weight[special["pad_token_id"]] = 0
    ids = some_ids(3)
    with torch.inference_mode():
        logits, expected = (one(input_ids=ids, use_cache=False).logits for one in (loaded.eval(), model))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", ["gemma3", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp"])
def test_a_checkpoint_with_images_is_read_by_the_causal_class(name, words, byte_level_tokenizer, tmp_path):
    special = {f"{role}_token_id": getattr(byte_level_tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    whole = build(name, Sizes(len(byte_level_tokenizer), 1024, special), with_images=True)
    assert any("vis" in path for path, _ in whole.named_parameters())
    save(name, tmp_path, words, with_images=True)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    ids = some_ids(3)
    with torch.inference_mode():
        logits, expected = (one(input_ids=ids, use_cache=False).logits for one in (loaded.eval(), whole))
    assert torch.equal(logits, expected)
