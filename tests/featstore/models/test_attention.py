"""Attention is a closed list at every entrance, what was chosen runs, and nothing reaches a loader of kernels."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers.integrations import hub_kernels

from featstore.errors import AttentionError, MissingPackageError, SpecError
from featstore.models.attention import ATTENTIONS, parse_attention, refuse_names
from featstore.models.loading import inspect_model, load_model
from featstore.models.opening import loading
from featstore.models.references import ModelSpec
from featstore.models.skeletons import check_running, choose_attention, running_attention
from tests.support.commands import call

#: Of the form that transformers takes for a kernel in a hub; there is none of this name.
KERNEL = "nobody/no-such-kernel"


@pytest.fixture
def copied(tiny_llama, tmp_path):
    """A copy of the tiny Llama whose ``config.json`` takes more entries; gives its reference."""

    def copy(**entries) -> ModelSpec:
        place = tmp_path / "model"
        if not place.exists():
            shutil.copytree(tiny_llama, place)
        document = json.loads((tiny_llama / "config.json").read_text("utf-8"))
        (place / "config.json").write_text(json.dumps(document | entries), encoding="utf-8")
        return ModelSpec("m", str(place))

    return copy


@pytest.fixture
def kernels_asked(monkeypatch) -> list[str]:
    """Names that reach a loader of kernels; none does."""
    asked: list[str] = []

    def load(name, *_, **__):
        asked.append(name)
        raise ImportError(name)

    for loader in ("load_and_register_attn_kernel", "get_kernel", "lazy_load_kernel"):
        monkeypatch.setattr(hub_kernels, loader, load)
    return asked


@pytest.mark.parametrize("name", ATTENTIONS)
def test_names_in_the_list_are_taken(name):
    assert parse_attention(name, "--attn") == name


@pytest.mark.parametrize("name", [KERNEL, "", "SDPA", "paged|eager", "flash_attention_4", None, 1, {"": "sdpa"}])
def test_any_other_names_the_value_the_place_and_the_list(name):
    with pytest.raises(AttentionError) as raised:
        parse_attention(name, "the card of runs/a")
    assert str(raised.value) == f"attention {name!r} in the card of runs/a: choose one of {', '.join(ATTENTIONS)}"
    assert isinstance(raised.value, SpecError)


def test_the_option_is_checked_before_anything_is_read(capsys, tmp_path):
    for command in (("extract", "--store", tmp_path / "s.zarr"), ("doctor",)):
        refused = call(capsys, "featstore", *command, "--model", "m=./nowhere", "--attn", KERNEL).refusal
        assert refused.startswith(f"featstore: attention '{KERNEL}' in --attn: choose one of auto, ")


@pytest.mark.parametrize("asked", ["auto", "sdpa"])
@pytest.mark.parametrize("entry", ["_attn_implementation", "attn_implementation"])
def test_what_a_model_asks_for_is_overridden(copied, entry, asked):
    spec = copied(**{entry: "eager"})
    assert choose_attention(spec, asked) == "sdpa"
    assert running_attention(load_model(spec, device="cpu", attention=asked)) == "sdpa"
    assert running_attention(load_model(copied(**{entry: "sdpa"}), device="cpu", attention="eager")) == "eager"


@pytest.mark.parametrize(
    "entries",
    [
        {"_attn_implementation": KERNEL},
        {"attn_implementation": KERNEL},
        {"_attn_implementation_internal": KERNEL},
        {"attn_implementation": {"": "sdpa", "text_config": KERNEL}},
        {"text_config": {"attn_implementation": KERNEL}},
        {"per_layer_config": [{"0": {"_attn_implementation": KERNEL}}]},
        {"experts_implementation": KERNEL},
        {"_experts_implementation": "sonicmoe"},
    ],
)
def test_a_config_that_names_another_is_refused_before_transformers_sees_it(copied, kernels_asked, entries):
    spec = copied(**entries)
    for ask in (inspect_model, choose_attention, lambda s: load_model(s, device="cpu", attention="sdpa")):
        with pytest.raises(AttentionError, match=r"in the config.json of model 'm' .*_implementation.*take the"):
            ask(spec)
    assert kernels_asked == []


def test_a_deep_config_does_not_exhaust_the_stack():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    refuse_names({"a": deep}, "x")


@pytest.mark.parametrize("name", [KERNEL, "paged|eager", "paged|sdpa", "flash_attention_4"])
def test_a_name_in_python_is_refused_before_transformers_sees_it(copied, kernels_asked, name):
    for ask in (choose_attention, lambda s, a: load_model(s, device="cpu", attention=a)):
        with pytest.raises(AttentionError, match="choose one of"):
            ask(copied(), name)
    assert kernels_asked == []


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_attention_without_its_package_fetches_none(copied, monkeypatch, name):
    """Where `kernels` is installed, transformers takes from a hub what is not installed."""
    fetched = []
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", lambda name, **_: fetched.append(name), raising=False)
    monkeypatch.delenv("USE_HUB_KERNELS", raising=False)
    with pytest.raises(AttentionError, match="does not have it here"):
        choose_attention(copied(), name)
    assert fetched == []
    with loading(copied()), pytest.raises(MissingPackageError, match=r"would fetch the kernel 'a/b' .*USE_HUB_KERNELS"):
        hub_kernels.get_kernel("a/b", version=1)
    monkeypatch.setenv("USE_HUB_KERNELS", "yes")
    with loading(copied()):
        hub_kernels.get_kernel("a/b", version=1)
    assert fetched == ["a/b"]


def test_another_attention_than_the_chosen_one_is_an_error(copied):
    spec = copied()
    model = load_model(spec, device="cpu", attention="eager")
    check_running(spec, model, "eager")
    check_running(spec, model, "auto")
    with pytest.raises(AttentionError, match=r"attention 'sdpa': model 'm' .* runs 'eager' instead"):
        check_running(spec, model, "sdpa")
    model.config._attn_implementation = KERNEL
    with pytest.raises(AttentionError, match=rf"attention '{KERNEL}': a part of model 'm'"):
        check_running(spec, model, "auto")


def test_a_model_that_follows_its_own_wish_is_noticed(copied, monkeypatch):
    """If the choice did not reach the model, loading would say so."""
    monkeypatch.setattr("featstore.models.loading.choose", lambda config, _: setattr(config, "attn_implementation", ""))
    monkeypatch.setattr("featstore.models.opening.choose", lambda *_: None)
    with pytest.raises(AttentionError, match="runs 'eager' instead"):
        load_model(copied(_attn_implementation="eager"), device="cpu", attention="sdpa")


def test_the_words_of_a_model_do_not_change_what_it_is(copied):
    """The hash by which stores know a configuration leaves the wish out, as it did before."""
    assert inspect_model(copied(_attn_implementation="eager")).config_hash == inspect_model(copied()).config_hash
