"""An adapter beside a model is applied and counted as weights, or refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featstore import open_store
from featstore.errors import (
    ModelLoadError,
    StoreStateError,
    WeightsError,
)
from featstore.extraction.job import prepare
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings
from featstore.models import adapters
from featstore.models.adapters import find_adapter
from featstore.models.loading import inspect_model, load_model, weight_bytes
from featstore.models.weights import weights_fingerprint
from tests.support.checkpoints import WEIGHTS, edit, lora, spec_of, without_a_block
from tests.support.commands import call, command_environment
from tests.support.ownership import mine


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, where it can see what was kept."""
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "caches"))
    return tmp_path / "caches" / "fingerprints"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be changed."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def settings(model: Path, short_corpus: Path, tmp_path: Path) -> Settings:
    return Settings(
        model=(f"m={model}",),
        layers=("0,2",),
        dataset=f"jsonl:{short_corpus}",
        store=tmp_path / "s.zarr",
        max_tokens=6000,
        form="float32",
        device="cpu",
    )


def added(store: Path, layers: str) -> None:
    typed = Settings(store=store, layers=(layers,), device="cpu", given=frozenset({"layers"}))
    extract(prepare(typed, quiet=True), quiet=True)


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 40)[None]).logits


@pytest.fixture(scope="module")
def merged(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Logits of the tiny Llama with the LoRA added to its tensors by hand."""
    place = tmp_path_factory.mktemp("merged")
    added = lora(tiny_llama, place / "lora")
    by_hand = shutil.copytree(tiny_llama, place / "model")
    edit(by_hand, lambda tensors: {name: tensor + added.get(name, 0) for name, tensor in tensors.items()})
    return logits(load_model(spec_of(by_hand), device="cpu"))


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

WITHOUT_PEFT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "peft" else find(name, *rest)
sys.argv = ["featstore", *sys.argv[1:]]
from featstore.cli import main
main()
"""


class TestAdapters:
    @pytest.mark.parametrize("place", ["beside the model", "on its own", "with a tokenizer", "with a configuration"])
    def test_it_is_applied(
        self, place: str, model: Path, tiny_llama: Path, tmp_path: Path, merged: torch.Tensor
    ) -> None:
        own = model if place == "beside the model" else tmp_path / "own"
        lora(model, own)
        mine(model)
        # As trainers save it: with a tokenizer, and with everything but the weights.
        for name in {"with a configuration": ("config.json", *TOKENIZER), "with a tokenizer": TOKENIZER}.get(place, ()):
            shutil.copy(model / name, own)
        loaded = load_model(spec_of(own), device="cpu")
        assert not torch.allclose(merged, logits(load_model(spec_of(tiny_llama), device="cpu")), atol=1e-2)
        torch.testing.assert_close(logits(loaded), merged, atol=1e-4, rtol=1e-4)
        info = inspect_model(spec_of(own))
        assert info.adapter == {
            "type": "LORA",
            "base": str(model if own != model else own),
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
        }
        assert info.depth == 3
        assert info.peculiarities == ", with its adapter applied (LORA, r 4)"
        assert not any(parameter.requires_grad for parameter in loaded.parameters())

    def test_its_tensors_and_its_scale_count_as_weights(self, model: Path, tmp_path: Path) -> None:
        found = [weights_fingerprint(spec_of(model))]
        lora(model, model)
        found.append(weights_fingerprint(spec_of(model)))
        lora(model, model, lora_alpha=16)
        found.append(weights_fingerprint(spec_of(model)))
        lora(model, model, lora_alpha=16, base_model_name_or_path="elsewhere", inference_mode=True)
        assert weights_fingerprint(spec_of(model)) == found[-1]
        tensors = load_file(model / "adapter_model.safetensors")
        next(iter(tensors.values()))[0, 0] += 1
        save_file(tensors, model / "adapter_model.safetensors")
        found.append(weights_fingerprint(spec_of(model)))
        assert len(set(found)) == len(found)
        # Apart from its model it is the same one.
        lora(model, tmp_path / "own")
        lora(model, model)
        assert weights_fingerprint(spec_of(tmp_path / "own")) == weights_fingerprint(spec_of(model))
        assert weight_bytes(spec_of(model)) == sum(
            (model / f).stat().st_size for f in (WEIGHTS, "adapter_model.safetensors")
        )

    def test_a_store_says_so(self, settings: Settings, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lora(model, model)
        extract(prepare(settings, quiet=True))
        assert f"loading m ({model}), with its adapter applied (LORA, r 4)" in capsys.readouterr().err
        attributes = open_store(settings.store).model("m").attributes
        assert attributes["adapter"]["lora_alpha"] == 8
        assert call(capsys, "featstore", "verify", settings.store, "--reextract", 1).code == 0
        # Without the files beside it the model is another.
        (model / "adapter_config.json").unlink()
        with pytest.raises(StoreStateError, match="has other weights"):
            added(settings.store, "3")

    @pytest.mark.parametrize("place", ["beside the model", "on its own"])
    def test_without_peft_it_is_refused(self, place: str, model: Path, short_corpus: Path, tmp_path: Path) -> None:
        own = model if place == "beside the model" else tmp_path / "own"
        lora(model, own)
        mine(model)
        words = [
            "--layers",
            "0",
            "--dataset",
            f"jsonl:{short_corpus}",
            "--device",
            "cpu",
            "--store",
            tmp_path / "s.zarr",
        ]
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_PEFT, "extract", "--model", f"m={own}", *map(str, words)],
            env=command_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        [line] = done.stderr.splitlines()
        assert line.startswith(
            f"featstore: model 'm' ({own}) comes with an adapter (adapter_config.json), which only peft"
        )
        assert "pip install 'featstore[peft]'" in line
        assert not (tmp_path / "s.zarr").exists()

    def test_without_peft_other_models_load(self, model: Path, short_corpus: Path, tmp_path: Path) -> None:
        words = [
            "--layers",
            "0",
            "--dataset",
            f"jsonl:{short_corpus}",
            "--device",
            "cpu",
            "--store",
            tmp_path / "s.zarr",
        ]
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                WITHOUT_PEFT,
                "extract",
                "--model",
                f"m={model}",
                *map(str, words),
                "--max-tokens",
                "6000",
            ],
            env=command_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def test_what_the_adapter_s_file_lacks_is_refused(self, model: Path) -> None:
        lora(model, model)
        tensors = load_file(model / "adapter_model.safetensors")
        tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
        save_file(tensors, model / "adapter_model.safetensors")
        with pytest.raises(
            WeightsError, match=r"the adapter lacks 1 tensor \(model\.layers\.1\.self_attn\.q_proj\.lora_B"
        ):
            load_model(spec_of(model), device="cpu")

    def test_what_its_model_lacks_is_refused(self, model: Path) -> None:
        """transformers reports the adapter's tensors in the place of these."""
        lora(model, model)
        edit(model, without_a_block)
        with pytest.raises(WeightsError, match="the checkpoint lacks 9 tensors"):
            load_model(spec_of(model), device="cpu")

    def test_one_that_fits_no_layer_is_refused(self, model: Path) -> None:
        lora(model, model, target_modules=["query_key_value"])
        with pytest.raises(ModelLoadError, match="query_key_value"):
            load_model(spec_of(model), device="cpu")

    def test_one_that_is_switched_off_is_seen(self, model: Path) -> None:
        lora(model, model)
        loaded = load_model(spec_of(model), device="cpu")
        assert adapters.inactive(loaded) is None
        loaded.disable_adapters()
        assert adapters.inactive(loaded) == ("3 of 3 layers have it switched off (model.layers.0.self_attn.q_proj)")
        assert adapters.inactive(load_model(spec_of(self.bare(model)), device="cpu")) == (
            "no layer of the model has it"
        )

    def bare(self, model: Path) -> Path:
        (model / "adapter_config.json").unlink()
        return model

    @pytest.mark.parametrize("base", [None, "", 7])
    def test_one_that_does_not_say_for_which_model_is_refused(self, base: Any, tmp_path: Path, model: Path) -> None:
        lora(model, tmp_path / "own", base_model_name_or_path=base)
        with pytest.raises(ModelLoadError, match=r"adapter_config\.json has no base_model_name_or_path"):
            inspect_model(spec_of(tmp_path / "own"))

    def test_an_adapter_of_an_adapter_is_refused(self, tmp_path: Path, model: Path) -> None:
        lora(model, tmp_path / "one")
        lora(tmp_path / "one", tmp_path / "two")
        mine(tmp_path / "one")
        with pytest.raises(ModelLoadError, match="an adapter as well; merge that one into its model first"):
            inspect_model(spec_of(tmp_path / "two"))

    def test_a_base_that_is_gone_is_named(self, tmp_path: Path) -> None:
        lora(tmp_path / "gone", tmp_path / "own")
        mine(tmp_path / "gone")
        with pytest.raises(ModelLoadError, match="gone"):
            inspect_model(spec_of(tmp_path / "own"))

    def test_a_model_without_one_has_none(self, model: Path) -> None:
        assert find_adapter(spec_of(model)) is None
        assert inspect_model(spec_of(model)).adapter is None
        assert "adapter" not in inspect_model(spec_of(model)).describe()
