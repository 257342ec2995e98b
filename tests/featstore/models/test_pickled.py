"""Pickled weights are read only where that is allowed, and under no name that would hide them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from featstore.errors import PickledWeightsError
from featstore.models.loading import load_model
from featstore.models.opening import loading
from featstore.models.references import NOTHING, Allowed, ModelSpec
from tests.support.checkpoints import lora
from tests.support.commands import call
from tests.support.ownership import mine

PICKLES = Allowed(pickles=True)


@pytest.fixture
def unpickled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were unpickled; they are read all the same."""
    seen: list[str] = []
    real = torch.load

    def load(file, *args, **keywords):
        seen.append(Path(str(file)).name)
        assert keywords.get("weights_only") is True
        return real(file, *args, **keywords)

    monkeypatch.setattr(torch, "load", load)
    return seen


@pytest.fixture
def pickled(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama with pickled weights alone."""
    place = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    return place


def edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | entries), encoding="utf-8")


def refused(place: Path, unpickled: list[str], file: str, allowed: Allowed = NOTHING) -> None:
    with pytest.raises(PickledWeightsError) as raised:
        load_model(ModelSpec("m", str(place), allowed=allowed), device="cpu")
    said = str(raised.value)
    assert f"model 'm' ({place}) has only pickled weights ({file})" in said
    assert "save it again with safetensors" in said
    assert "--allow-pickle-weights (allow_pickle_weights=True in Python)" in said
    assert "\n" not in said
    assert unpickled == []


def test_they_need_a_word(pickled: Path, tiny_llama: Path, unpickled: list[str]) -> None:
    refused(pickled, unpickled, "pytorch_model.bin")
    refused(pickled, unpickled, "pytorch_model.bin", Allowed(references=True))
    model = load_model(ModelSpec("m", str(pickled), allowed=PICKLES), device="cpu")
    same = load_model(ModelSpec("m", str(tiny_llama)), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert set(unpickled) == {"pytorch_model.bin"}


def test_in_parts_they_do_too(pickled: Path, unpickled: list[str]) -> None:
    names = dict.fromkeys(torch.load(pickled / "pytorch_model.bin", weights_only=True), "pytorch_model-1.bin")
    unpickled.clear()
    (pickled / "pytorch_model.bin").rename(pickled / "pytorch_model-1.bin")
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    refused(pickled, unpickled, "pytorch_model.bin.index.json")


def test_an_index_of_safetensors_does_not_hide_them(pickled: Path, unpickled: list[str]) -> None:
    """transformers reads what such an index names by its ending, also where it was asked for safetensors alone."""
    names = dict.fromkeys(torch.load(pickled / "pytorch_model.bin", weights_only=True), "pytorch_model.bin")
    unpickled.clear()
    (pickled / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    refused(pickled, unpickled, "pytorch_model.bin")


def test_a_configuration_does_not_name_them(pickled: Path, unpickled: list[str]) -> None:
    """``transformers_weights`` takes this one name that is no safetensors file."""
    (pickled / "pytorch_model.bin").rename(pickled / "adapter_model.bin")
    edit(pickled / "config.json", transformers_weights="adapter_model.bin")
    refused(pickled, unpickled, "adapter_model.bin")


def test_an_adapter_s_need_one_too(tiny_llama: Path, tmp_path: Path, unpickled: list[str]) -> None:
    lora(tiny_llama, tmp_path / "own")
    mine(tiny_llama)
    file = tmp_path / "own" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "own" / "adapter_model.bin")
    load_model(ModelSpec("m", str(tmp_path / "own")), device="cpu")  # transformers takes the other file
    assert unpickled == []
    file.unlink()
    refused(tmp_path / "own", unpickled, "adapter_model.bin")
    load_model(ModelSpec("m", str(tmp_path / "own"), allowed=PICKLES), device="cpu")
    assert set(unpickled) == {"adapter_model.bin"}


def test_weights_that_are_not_there_are_not_called_pickled(pickled: Path) -> None:
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match="cannot be loaded: Error no file named"):
        load_model(ModelSpec("m", str(pickled)), device="cpu")


def test_the_commands_have_the_option(pickled: Path, short_corpus: Path, tmp_path: Path, capsys) -> None:
    words = ("extract", "--model", f"m={pickled}", "--layers", "0", "--device", "cpu", "--max-tokens", 3000)
    words = (*words, "--dataset", f"jsonl:{short_corpus}", "--store", tmp_path / "s.zarr")
    refusal = call(capsys, "featstore", *words)
    assert (refusal.code, refusal.out) == (2, "")
    assert "has only pickled weights" in refusal.err
    assert not (tmp_path / "s.zarr").exists()
    examined = call(capsys, "featstore", "doctor", "--model", f"m={pickled}")
    assert examined.code == 1
    assert "has only pickled weights" in examined.out
    assert call(capsys, "featstore", *words, "--allow-pickle-weights").code == 0
    again = ("verify", tmp_path / "s.zarr", "--reextract", 1)
    refusal = call(capsys, "featstore", *again)
    assert (refusal.code, refusal.out) == (2, "")
    assert "has only pickled weights" in refusal.err
    assert call(capsys, "featstore", *again, "--allow-pickle-weights").code == 0


def test_no_hub_is_asked_to_convert_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks at this switch before it starts its thread, and before it waits for a conversion."""
    from transformers.utils.import_utils import is_env_variable_true

    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    with loading(ModelSpec("m", "owner/model")):
        assert is_env_variable_true("DISABLE_SAFETENSORS_CONVERSION")
    assert not is_env_variable_true("DISABLE_SAFETENSORS_CONVERSION")


@pytest.mark.parametrize("wanted", [Allowed(), PICKLES])
def test_a_hub_s_model_is_asked_for_safetensors_alone(tiny_llama: Path, monkeypatch, wanted: Allowed) -> None:
    """A repository without them says so in transformers' words, which become one line of ours."""
    import transformers

    asked = {}

    def from_pretrained(*_, **keywords):
        asked.update(keywords)
        raise OSError(
            "owner/model does not appear to have a file named model.safetensors and thus cannot be loaded "
            "with `safetensors`. Please do not set `use_safetensors=True`."
        )

    spec = ModelSpec("m", "owner/model", allowed=wanted)
    config = transformers.AutoConfig.from_pretrained(tiny_llama)
    monkeypatch.setattr("featstore.models.loading.read_config", lambda _: config)
    monkeypatch.setattr("featstore.models.loading.asked_of", lambda *_: None)
    monkeypatch.setattr("featstore.models.loading.find_adapter", lambda _: None)
    monkeypatch.setattr("featstore.models.pickled.fetched", lambda *_: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(PickledWeightsError, match=r"has only pickled weights .its repository."):
        load_model(spec, device="cpu")
    assert asked.get("use_safetensors") is (None if wanted.pickles else True)
