"""A model under a device map is the same model; a map that does not fit is one line."""

from __future__ import annotations

import gc
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from featstore.errors import SpecError
from featstore.models import residual as sites
from featstore.models.devices import (
    DeviceMap,
    check_models,
    input_device,
    named_values,
    parse_device_map,
    place,
    resolve_device,
    resolve_dtype,
)
from featstore.models.loading import check_place, load_model
from featstore.models.references import Allowed, ModelSpec
from featstore.models.skeletons import choose_attention
from featstore.models.stack import residual_stream
from featstore.models.weights import sampled_fingerprint
from tests.support import spread as spreads
from tests.support.ownership import mine

LAYERS = range(4)


@pytest.fixture(scope="module", params=spreads.BLOCKS)
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return spreads.save(request.param, tmp_path_factory.mktemp("spread"))


@pytest.fixture(scope="module", params=spreads.MAIN)
def main(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=spreads.SPREADS)
def pair(request: pytest.FixtureRequest, spec: ModelSpec, main: str) -> tuple[Any, Any]:
    """The model on one device, and under a map."""
    return spreads.plain(spec, main), spreads.spread(spec, request.param, main)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return spreads.save("llama", tmp_path_factory.mktemp("llama"))


def ids_of(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(4))
    return ids.to(input_device(model))


# A model under a map -------------------------------------------------------------------------------------------------


def test_some_weights_are_not_where_they_are_computed(pair: tuple[Any, Any]) -> None:
    plain, mapped = pair
    assert {p.device.type for p in plain.parameters()}.isdisjoint({"meta"})
    assert "meta" in {p.device.type for p in mapped.parameters()}
    assert not any(p.requires_grad for p in mapped.parameters())
    assert not mapped.training


def test_inputs_go_where_the_embedding_is_computed(pair: tuple[Any, Any], main: str) -> None:
    for model in pair:
        for part in (model, residual_stream(model).decoder):
            assert input_device(part).type == main


@torch.inference_mode()
def test_logits_and_captured_states_are_the_same_bits(pair: tuple[Any, Any]) -> None:
    plain, mapped = pair
    ids = ids_of(plain)
    assert torch.equal(plain(ids).logits, mapped(ids).logits)
    wanted, found = (sites.capture(residual_stream(model), ids, LAYERS) for model in pair)
    assert all(torch.equal(wanted[layer], found[layer].to(wanted[layer].device)) for layer in LAYERS)
    # And again: what a pass brings to the device, it takes away.
    assert torch.equal(plain(ids).logits, mapped(ids).logits)


@torch.inference_mode()
def test_states_put_in_are_read_and_blocks_below_them_are_skipped(pair: tuple[Any, Any]) -> None:
    plain, mapped = pair
    ids = ids_of(plain)
    states = sites.capture(residual_stream(plain), ids, LAYERS)
    clean = plain(ids).logits
    blocks = residual_stream(mapped).blocks
    forwards = [vars(block).get("forward") for block in blocks]
    for layer in LAYERS:
        outputs = []
        for model in pair:
            stream = replace(residual_stream(model), skips=frozenset(LAYERS))
            with sites.skipping_below(stream, layer), sites.at_site(stream, layer, lambda _, k=layer: states[k]):
                assert torch.equal(model(ids).logits, clean)
            other = states[layer].flip(1)
            with sites.skipping_below(stream, layer), sites.at_site(stream, layer, lambda _, new=other: new):
                outputs.append(model(ids).logits)
        assert torch.equal(*outputs)
        assert not torch.equal(outputs[0], clean)
    # The hooks of skipped blocks are back in their place.
    assert [vars(block).get("forward") for block in blocks] == forwards
    assert torch.equal(mapped(ids).logits, clean)


def test_parameters_have_their_values_wherever_they_lie(pair: tuple[Any, Any]) -> None:
    plain, mapped = pair
    wanted, found = dict(named_values(plain)), dict(named_values(mapped))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name].cpu(), found[name].cpu()) for name in wanted)
    assert sampled_fingerprint(plain) == sampled_fingerprint(mapped) is not None


def test_weights_that_have_to_be_written_again_are_removed_with_the_model(
    llama: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spreads.plain(llama, "cpu")
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    ids = ids_of(model)
    for spec, written in ((llama, 0), (ModelSpec("llama", str(tmp_path / "bin"), allowed=Allowed(pickles=True)), 1)):
        mapped = spreads.spread(spec, "blocks", "cpu")
        # Those of a safetensors file are read from it.
        assert len(list((tmp_path / "scratch").iterdir())) == written
        with torch.inference_mode():
            assert torch.equal(mapped(ids).logits, model(ids).logits)
        del mapped
        gc.collect()
        assert list((tmp_path / "scratch").iterdir()) == []


def test_made_maps_need_nothing_but_the_word(llama: ModelSpec) -> None:
    model = spreads.plain(llama, "auto")
    ids = ids_of(model)
    for word in ("auto", "balanced"):
        mapped = load_model(llama, dtype="float32", device_map=parse_device_map(word))
        with torch.inference_mode():
            assert torch.equal(mapped(ids).logits, model(ids).logits)


class _Bare(nn.Module):
    """No transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


def test_inputs_follow_the_hook_of_the_embedding() -> None:
    """Its weights may lie on the CPU, and other modules be computed on other devices."""
    model = _Bare()
    model.get_input_embeddings = lambda: model.inner  # type: ignore[assignment]
    model._hf_hook = SimpleNamespace(execution_device=0)  # type: ignore[assignment]
    assert input_device(model) == torch.device("cpu")
    for hook in (
        SimpleNamespace(execution_device=1),
        SimpleNamespace(execution_device="cuda:1"),
        SimpleNamespace(hooks=(SimpleNamespace(), SimpleNamespace(execution_device=torch.device("cuda", 1)))),
    ):
        model.inner._hf_hook = hook  # type: ignore[assignment]
        assert input_device(model) == torch.device("cuda", 1)
    del model.inner._hf_hook
    model.inner.to("meta")
    assert input_device(model) == torch.device("cuda", 0)


def test_inputs_of_any_module_have_a_device() -> None:
    assert input_device(_Bare()) == torch.device("cpu")
    assert input_device(nn.ReLU()) == torch.device("cpu")


# What is typed -------------------------------------------------------------------------------------------------------


def test_a_file_and_the_object_in_it_are_the_same_map(tmp_path: Path) -> None:
    value = {"": "cpu", "model.layers.1": "disk"}
    (tmp_path / "map.json").write_text(json.dumps(value))
    from_file, from_python = parse_device_map(str(tmp_path / "map.json")), parse_device_map(value)
    assert from_file is not None
    assert from_python is not None
    assert from_file.of("anyone") == from_python.of("anyone") == value
    assert parse_device_map(tmp_path / "map.json") == from_file
    assert parse_device_map(None) is None
    assert parse_device_map(from_file) is from_file


def test_each_model_may_have_a_map_of_its_own() -> None:
    given = parse_device_map({"a": {"": "disk"}, "b": {"": "cpu"}})
    assert given is not None
    assert given.of("a") == {"": "disk"}
    assert given.of("c") is None
    check_models(given, {"a": 0, "b": 0, "c": 0})
    check_models(None, {})
    with pytest.raises(SpecError, match="has modules of 'b'; the models are a, c"):
        check_models(given, {"a": 0, "c": 0})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds no modules"),
        ("{}", "holds no modules"),
        ('{"": "gpu"}', "'' goes to 'gpu'; write cpu, disk, or the number of a GPU"),
        ('{"": "meta"}', "goes to 'meta'"),
        ('{"": true}', "goes to True"),
        ('{"": -1}', "goes to -1"),
        ('{"": null}', "goes to None"),
        ('{"": 1.5}', "goes to 1.5"),
        ('{"": 99}', r"goes to 99; this machine has \w+ usable GPU"),
        ('{"": "cuda:99"}', r"goes to 'cuda:99'; this machine has \w+ usable GPU"),
        ('{"": "cuda:x"}', "goes to 'cuda:x'; write cpu"),
        ('{"a": {"": "cpu"}, "lm_head": "cpu"}', "'lm_head' has a device and 'a' has modules"),
        ("\udcff", "is no text"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "map.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(SpecError, match=said) as caught:
        parse_device_map(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_map_is_one_line(tmp_path: Path) -> None:
    for given, said in (
        (str(tmp_path / "none.json"), r"cannot be read \(No such file or directory\); write auto, balanced"),
        (tmp_path, "cannot be read"),
        (7, "--device-map 7: write auto, balanced, or the path"),
        ({1: "cpu"}, "1 is no name of a module"),
    ):
        with pytest.raises(SpecError, match=said):
            parse_device_map(given)


def place_of(value: Any) -> Any:
    return place("auto", parse_device_map(value), "llama")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"": "cpu", "model.layers.9": "disk"}, "has no module 'model.layers.9'; it has .*model.layers.*lm_head"),
        ({"model.layers.1": "disk"}, "gives no device to model.embed_tokens, model.layers.0, model.layers.2"),
        ({"": "cpu", "lm_head": "disk"}, "lm_head.weight goes to 'disk' and model.embed_tokens.weight to 'cpu'"),
    ],
)
def test_a_map_of_another_model_is_one_line(llama: ModelSpec, value: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        check_place(llama, place_of(value))
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match=said):
        load_model(llama, device_map=parse_device_map(value))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
def test_an_adapter_is_not_spread(llama: ModelSpec, tmp_path: Path) -> None:
    """Under accelerate's hooks it would act on other weights than its own."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(llama.ref)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    spec = ModelSpec("llama", str(tmp_path))
    mine(llama.ref)
    assert choose_attention(spec) == "sdpa"
    assert check_place(spec, place("cpu", None, "llama")) is None
    for value in ("auto", {"": "disk"}):
        for ask in (check_place, lambda spec, _, value=value: load_model(spec, device_map=parse_device_map(value))):
            with pytest.raises(SpecError, match="has an adapter, which cannot be spread; merge it"):
                ask(spec, place_of(value))


def test_a_map_names_every_module_once_it_is_filled_in(llama: ModelSpec) -> None:
    filled = check_place(llama, place_of({"": "cpu", "model.layers": "disk", "model.layers.1.mlp": "cpu"}))
    assert isinstance(filled, dict)
    assert filled["model.layers.0"] == filled["model.layers.1.self_attn"] == "disk"
    assert filled["model.layers.1.mlp"] == filled["lm_head"] == filled["model.embed_tokens"] == "cpu"
    assert "" not in filled
    assert check_place(llama, place_of("auto")) == "auto"
    assert check_place(llama, place_of(None)) is None


def test_a_device_and_a_map_exclude_each_other() -> None:
    with pytest.raises(SpecError, match="--device cpu with --device-map auto: a map says where everything goes"):
        place("cpu", DeviceMap("auto", "auto", {}), "m")
    assert place("auto", DeviceMap("f", {"": "cpu"}, {}), "m").device == torch.device("cpu")
    assert place("cpu", None, "m").device == torch.device("cpu")


def test_devices_and_dtypes_are_words() -> None:
    assert resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    with pytest.raises(SpecError, match="device 'gpu': write auto"):
        resolve_device("gpu")
    with pytest.raises(SpecError, match="dtype 'int4': choose one of auto, bfloat16"):
        resolve_dtype("int4", torch.device("cpu"))
