"""What a checkpoint lacks is named; edited weights are another model; token ids and packed weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from featstore import open_store
from featstore.errors import (
    StoreStateError,
    VocabularyError,
    WeightsError,
)
from featstore.extraction.job import prepare
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings
from featstore.models.fingerprint import Weights
from featstore.models.loading import inspect_model, load_model, refuse_unknown_ids
from featstore.models.weights import (
    check_ids,
    quantization_of,
    refuse_incomplete,
    weights_fingerprint,
    weights_of,
)
from tests.support.checkpoints import WEIGHTS, edit, silence_a_head, spec_of
from tests.support.commands import call
from tests.support.store_fixtures import tree_bytes


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


class TestStores:
    def test_both_fingerprints_are_recorded(self, settings: Settings, model: Path) -> None:
        extract(prepare(settings, quiet=True), quiet=True)
        attributes = open_store(settings.store).model("m").attributes
        known = weights_of(spec_of(model), load_model(spec_of(model), device="cpu"))
        assert Weights.recorded(attributes) == known
        assert known.whole is not None
        assert known.sample is not None
        added(settings.store, "3")
        assert Weights.recorded(open_store(settings.store).model("m").attributes) == known

    def test_a_layer_of_edited_weights_is_refused_and_nothing_is_written(
        self, settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        extract(prepare(settings, quiet=True), quiet=True)
        before = tree_bytes(settings.store)
        edit(model, silence_a_head)
        with pytest.MonkeyPatch.context() as patch:
            # It is refused before the wait for the weights.
            patch.setattr("featstore.models.loading.load_model", None)
            with pytest.raises(
                StoreStateError, match=r"model 'm' \(.*\) has other weights than those that .* was made with"
            ):
                added(settings.store, "3")
        assert tree_bytes(settings.store) == before

    def test_verify_hashes_again_whatever_was_kept(
        self, settings: Settings, model: Path, capsys: pytest.CaptureFixture[str], caches: Path
    ) -> None:
        extract(prepare(settings, quiet=True), quiet=True)
        assert call(capsys, "featstore", "verify", settings.store, "--reextract", 1).code == 0
        recorded = open_store(settings.store).model("m").attributes["weights_fingerprint"]
        edit(model, silence_a_head)
        weights_fingerprint(spec_of(model))
        [file] = caches.iterdir()
        # A cache that has not noticed.
        file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": recorded}))
        assert weights_fingerprint(spec_of(model)) == recorded
        outcome = call(capsys, "featstore", "verify", settings.store, "--reextract", 1)
        assert outcome.code == 1
        assert "has other weights than the model that this store was made with" in outcome.out + outcome.err

    def test_a_store_from_before_is_compared_by_its_sample(self, settings: Settings, model: Path) -> None:
        extract(prepare(settings, quiet=True), quiet=True)
        for file in (settings.store / "manifest" / "models" / "m").glob("pilot-*.json"):
            entry = json.loads(file.read_text())
            sample = entry.pop("weights_sample")
            file.write_text(json.dumps(entry | {"weights": sample}))
        added(settings.store, "3")
        attributes = open_store(settings.store).model("m").attributes
        assert attributes["weights_fingerprint"] == weights_fingerprint(spec_of(model))

        def scale(tensors):
            tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5

        for file in (settings.store / "manifest" / "models" / "m").glob("pilot-*.json"):
            entry = json.loads(file.read_text())
            file.write_text(json.dumps(entry | {"weights": sample}))
        edit(model, scale)
        with pytest.raises(StoreStateError, match="has other weights"):
            added(settings.store, "1")


MISSING = {
    "a prefix": (
        lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
        {},
        (
            r"lacks 30 tensors \(lm_head\.weight, model\.embed_tokens\.weight, \S+, \.\.\.\) of Llama.* random; "
            r".* holds 29 .* does not know\. The names in the checkpoint begin with '_orig_mod\.'"
        ),
    ),
    "a block": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name},
        {},
        r"lacks 9 tensors \(model\.layers\.1\.input_layernorm\.weight, .* random\. Use the whole checkpoint",
    ),
    "blocks that were never there": (
        lambda tensors: tensors,
        {"num_hidden_layers": 5},
        r"lacks 18 tensors \(model\.layers\.3\..*config\.json",
    ),
    "more blocks": (
        lambda tensors: tensors,
        {"num_hidden_layers": 2},
        r"holds 9 tensors \(model\.layers\.2\..* does not know",
    ),
    "a head of another task": (
        lambda tensors: tensors | {"score.weight": torch.ones(2, 48)},
        {},
        r"holds 1 tensor \(score\.weight\) that LlamaForCausalLM does not know\. .*take these tensors out",
    ),
    "another shape": (
        lambda tensors: tensors,
        {"intermediate_size": 96},
        r"down_proj\.weight has shape 48 x 80 in the checkpoint and 48 x 96 in LlamaForCausalLM \(9 tensors differ",
    ),
    "a head that is not tied": (
        lambda tensors: tensors,
        {"tie_word_embeddings": False},
        r"lacks 1 tensor \(lm_head\.weight\)",
    ),
}


class TestWhatIsLoaded:
    @pytest.mark.parametrize("case", MISSING)
    def test_what_does_not_match_is_refused_by_name(self, case: str, model: Path) -> None:
        change, config, words = MISSING[case]
        edit(model, change, **config)
        with pytest.raises(WeightsError, match=words) as caught:
            load_model(spec_of(model), device="cpu")
        assert str(caught.value).startswith(f"model 'm' ({model}): ")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("has", "words"),
        [
            ("module.a.w", "The names in the checkpoint begin with 'module.'"),
            ("w", "The names in the checkpoint lack 'a.' at their beginning"),
            ("b.w", "Use the whole checkpoint"),
        ],
    )
    def test_a_prefix_is_told(self, has: str, words: str) -> None:
        found = {
            "missing_keys": {"a.w", "a.v"},
            "unexpected_keys": {has, has.replace("w", "v")},
            "mismatched_keys": set(),
        }
        with pytest.raises(WeightsError) as caught:
            refuse_incomplete("model 'm' (x)", torch.nn.Linear(1, 1), found)
        assert words in str(caught.value)
        refuse_incomplete("model 'm' (x)", torch.nn.Linear(1, 1), dict.fromkeys(found, ()))
        refuse_incomplete("model 'm' (x)", torch.nn.Linear(1, 1), {})

    def test_what_is_only_tied_is_not_missing(self, tiny_llama: Path) -> None:
        assert "lm_head.weight" not in load_file(tiny_llama / WEIGHTS)
        model = load_model(spec_of(tiny_llama), device="cpu")
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_the_command_says_it_in_one_line(
        self, model: Path, short_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        edit(model, MISSING["a prefix"][0])
        words = (
            "--layers",
            "0",
            "--dataset",
            f"jsonl:{short_corpus}",
            "--device",
            "cpu",
            "--store",
            tmp_path / "s.zarr",
        )
        outcome = call(capsys, "featstore", "extract", "--model", f"m={model}", *words)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.splitlines()[-1].startswith("featstore: model 'm'")
        assert "LOAD REPORT" not in outcome.err


class TestTokenIds:
    def test_ids_within_the_embedding_pass(self) -> None:
        check_ids("m", np.array([0, 9]), 10, None)
        check_ids("m", np.zeros(0, np.int32), 0, None)

    def test_the_message_names_token_id_rows_and_remedy(self) -> None:
        tokenizer = SimpleNamespace(convert_ids_to_tokens={10: "<a>", 11: "<b>"}.get)
        words = r"^model 'm': token '<a>' has id 10, the embedding has 10 rows \(ids 0 to 9\) \(2 such tokens .*resize"
        with pytest.raises(VocabularyError, match=words):
            check_ids("m", np.array([[11, 3], [10, 10]]), 10, tokenizer)

    def write(self, path: Path, text: str) -> None:
        path.write_text("".join(json.dumps({"text": f"{number}: {text}"}) + "\n" for number in range(9)))

    def grown(self, path: Path) -> Path:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens(["<speaker1>"])
        tokenizer.save_pretrained(path)
        return path

    def test_extract_refuses_before_anything_is_written(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.grown(model)
        self.write(tmp_path / "t.jsonl", "<speaker1> good day, and what a day it is.")
        words = ("--layers", "0", "--dataset", f"jsonl:{tmp_path / 't.jsonl'}", "--store", tmp_path / "s.zarr")
        line = call(capsys, "featstore", "extract", "--model", f"m={model}", *words, "--device", "cpu").refusal
        assert "token '<speaker1>' has id 4096, the embedding has 4096 rows (ids 0 to 4095)" in line
        assert "resize_token_embeddings" in line
        assert not (tmp_path / "s.zarr").exists()
        # The corrected command: text without the token.
        self.write(tmp_path / "t.jsonl", "Good day, and what a day it is.")
        assert call(capsys, "featstore", "extract", "--model", f"m={model}", *words, "--device", "cpu").code == 0

    def test_prompts_are_refused_as_well(self, model: Path) -> None:
        from evaluate.injection.reading import tokenized

        info = inspect_model(spec_of(self.grown(model)))
        assert tokenized("m", info, ["Good day"], 0, remedy="")
        with pytest.raises(VocabularyError, match="<speaker1>"):
            tokenized("m", info, ["Good day", "<speaker1> too"], 0, remedy="")

    def test_an_embedding_may_have_more_rows_than_the_configuration_has_ids(self, tmp_path: Path) -> None:
        """FSMT and others add rows of their own; here the configuration is told to say less than the model has."""
        from transformers import AutoConfig

        info = SimpleNamespace(
            spec=spec_of(tmp_path / "none"), vocabulary=5, tokenizer=SimpleNamespace(convert_ids_to_tokens=str)
        )
        with pytest.raises(VocabularyError, match="the embedding has 5 rows"):
            refuse_unknown_ids(info, np.array([7]))
        AutoConfig.for_model(
            "llama", vocab_size=12, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
        ).save_pretrained(tmp_path)
        info.spec = spec_of(tmp_path)
        refuse_unknown_ids(info, np.array([7, 11]))
        with pytest.raises(VocabularyError, match="token '12' has id 12, the embedding has 12 rows"):
            refuse_unknown_ids(info, np.array([12]))


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny Llama with its linear layers packed in 8 bits by the compressed-tensors library, and its logits."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    place = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("packed") / "model")
    model = load_model(spec_of(tiny_llama), device="cpu")
    channels = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
    config = QuantizationConfig(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=channels)},
        ignore=["lm_head"],
        quant_method="compressed-tensors",
        format="pack-quantized",
        quantization_status=QuantizationStatus.FROZEN,
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.data.abs().amax(1, keepdim=True) / 127
    expected = logits(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(place)
    compressor.update_config(place)
    return SimpleNamespace(path=place, logits=expected)


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 40)[None]).logits


class TestQuantised:
    def test_packed_weights_are_loaded_as_they_are(self, packed: SimpleNamespace, tiny_llama: Path) -> None:
        assert any(name.endswith("weight_packed") for name in load_file(packed.path / WEIGHTS))
        model = load_model(spec_of(packed.path), device="cpu")
        torch.testing.assert_close(logits(model), packed.logits)
        plain = logits(load_model(spec_of(tiny_llama), device="cpu"))
        assert (logits(model) - plain).abs().max() > 1e-3

    def test_a_store_and_the_terminal_say_so(
        self, packed: SimpleNamespace, settings: Settings, capsys: pytest.CaptureFixture[str]
    ) -> None:
        extract(prepare(replace(settings, model=(f"m={packed.path}",)), quiet=True))
        assert f"loading m ({packed.path}), a quantised checkpoint (compressed-tensors)" in capsys.readouterr().err
        attributes = open_store(settings.store).model("m").attributes
        assert attributes["quantization"] == {"method": "compressed-tensors"}
        assert attributes["weights_fingerprint"] == weights_fingerprint(spec_of(packed.path))
        assert call(capsys, "featstore", "verify", settings.store, "--reextract", 1).code == 0

    @pytest.mark.parametrize(
        ("entry", "expected"),
        [
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"method": "bitsandbytes", "bits": 4}),
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"method": "bitsandbytes", "bits": 8}),
            ({"quant_method": "gptq", "bits": 3}, {"method": "gptq", "bits": 3}),
            ({"quant_method": "fp8", "dequantize": True}, {"method": "fp8", "dequantized": True}),
            (None, None),
        ],
    )
    def test_what_a_configuration_says(self, entry: Any, expected: Any) -> None:
        from transformers import LlamaConfig

        config = LlamaConfig()
        if entry is not None:
            config.quantization_config = entry
        assert quantization_of(config, "m") == expected
        assert quantization_of(None, "m.gguf") == {"method": "gguf", "dequantized": True}
