"""How an extraction computes: the attention that models have, device maps, and what a failed command leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import featstore
from featstore.errors import SpecError, StoreStateError
from featstore.extraction.estimate import dry_run
from featstore.extraction.job import prepare
from featstore.extraction.pilot import write_pilot
from featstore.extraction.reextract import reextract
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings
from featstore.models.devices import parse_device_map
from featstore.models.loading import load_model
from featstore.store.inspect.verify import verify_store
from tests.support.commands import Outcome, call
from tests.support.store_fixtures import tree_bytes
from tests.support.tiny_models import save_with_tokenizer

SPREAD = {"": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}


@pytest.fixture(scope="module")
def texts(short_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short documents."""
    path = tmp_path_factory.mktemp("texts") / "eight.jsonl"
    lines = short_corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:8]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def gemma2(byte_level_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without sdpa."""
    torch.manual_seed(1)
    config = Gemma2Config(
        vocab_size=len(byte_level_tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    directory = tmp_path_factory.mktemp("gemma2") / "gemma2"
    return save_with_tokenizer(Gemma2ForCausalLM(config).eval(), directory, byte_level_tokenizer)


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every model that is loaded, for its tests or its states, whether some of its weights are offloaded."""
    seen: list[bool] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        seen.append(any(p.is_meta for p in model.parameters()))
        return model

    monkeypatch.setattr("featstore.models.loading.load_model", load)
    return seen


def typed(capsys: Any, store: Path, *words: object) -> Outcome:
    return call(capsys, "featstore", "extract", "--store", store, *words)


def attention(store: Path) -> dict[str, str]:
    opened = featstore.open_store(store)
    return {name: opened.model(name).attributes["attention"] for name in opened.models}


def whole(store: Path) -> bool:
    return verify_store(store, quiet=True)["damage"] == []


# Attention -----------------------------------------------------------------------------------------------------------


def test_a_model_without_sdpa_needs_no_option(gemma2: Path, texts: Path, tmp_path: Path, capsys: Any) -> None:
    store = tmp_path / "s.zarr"
    command = ("--model", f"m={gemma2}", "--layers", "0,2", "--dataset", f"jsonl:{texts}", "--device", "cpu")
    assert typed(capsys, store, *command).code == 0
    assert attention(store) == {"m": "eager"}
    # The implementation itself means the same store, and so does the word.
    for more in (("--attn", "eager"), ("--attn", "auto"), ()):
        assert typed(capsys, store, *command, *more).code == 0
    assert typed(capsys, store, "--layers", "1", "--device", "cpu").code == 0
    assert attention(store) == {"m": "eager"}
    refused = typed(capsys, tmp_path / "t.zarr", *command, "--attn", "sdpa").refusal
    assert "does not have it here; it has eager: use --attn auto" in refused
    # It is refused before anything is written.
    assert not (tmp_path / "t.zarr").exists()


def test_every_model_runs_what_it_has(gemma2: Path, tiny_llama: Path, texts: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    models = {"llama": tiny_llama, "gemma": gemma2}
    featstore.extract(models, [0, 1], f"jsonl:{texts}", store, device="cpu", quiet=True)
    assert attention(store) == {"llama": "sdpa", "gemma": "eager"}
    featstore.extract(layers=[2], store=store, device="cpu", quiet=True)
    assert attention(store) == {"llama": "sdpa", "gemma": "eager"}
    assert whole(store)


def test_auto_on_a_store_made_with_eager_means_eager(
    tiny_llama: Path, tiny_mistral: Path, texts: Path, tmp_path: Path
) -> None:
    store, given = tmp_path / "s.zarr", {"device": "cpu", "quiet": True}
    featstore.extract({"llama": tiny_llama}, [0, 1], f"jsonl:{texts}", store, attn="eager", **given)
    featstore.extract(store=store, layers=[2], attn="auto", **given)
    featstore.extract({"mistral": tiny_mistral}, [1], store=store, **given)
    assert attention(store) == {"llama": "eager", "mistral": "eager"}
    with pytest.raises(StoreStateError, match=r"other settings \(llama.attention"):
        featstore.extract(store=store, layers=[3], attn="sdpa", **given)


def test_a_model_that_joins_takes_its_own_attention_where_it_lacks_the_others(
    tiny_llama: Path, gemma2: Path, texts: Path, tmp_path: Path
) -> None:
    store, given = tmp_path / "s.zarr", {"device": "cpu", "quiet": True}
    featstore.extract({"llama": tiny_llama}, [0, 1], f"jsonl:{texts}", store, **given)
    featstore.extract({"gemma": gemma2}, [1], store=store, **given)
    assert attention(store) == {"llama": "sdpa", "gemma": "eager"}


# Device maps ---------------------------------------------------------------------------------------------------------


def test_a_device_map_changes_no_bit(tiny_llama: Path, texts: Path, tmp_path: Path, spread: list[bool]) -> None:
    stores = {name: tmp_path / f"{name}.zarr" for name in ("plain", "spread")}
    given: dict[str, Any] = {"models": {"llama": tiny_llama}, "layers": [0, 2], "dataset": f"jsonl:{texts}"}
    # Where there is no GPU, both compute on the CPU.
    featstore.extract(**given, store=stores["plain"], device="cpu", dtype="float32", quiet=True)
    assert not any(spread)
    spread.clear()
    featstore.extract(**given, store=stores["spread"], device_map=SPREAD, dtype="float32", quiet=True)
    assert set(spread) == {True}
    assert tree_bytes(stores["plain"]) == tree_bytes(stores["spread"])
    # A map is not on record: a store goes on under another one, or none.
    spread.clear()
    featstore.extract(store=stores["plain"], layers=[3], device_map={"": "disk"}, quiet=True)
    assert set(spread) == {True}
    spread.clear()
    featstore.extract(store=stores["spread"], layers=[3], device="cpu", quiet=True)
    assert set(spread) == {False}
    assert tree_bytes(stores["plain"]) == tree_bytes(stores["spread"])


def test_rows_are_computed_again_under_a_map(tiny_store: Path, tmp_path: Path, capsys: Any, spread: list[bool]) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"llama": SPREAD, "mistral": {"": "disk"}}))
    verified = call(
        capsys, "featstore", "verify", tiny_store, "--reextract", 1, "--device-map", tmp_path / "map.json", "--json"
    ).json
    assert not verified["damage"]
    assert set(spread) == {True}
    for found in verified["reextract"]["models"].values():
        assert all(layer["identical"] == layer["rows"] > 0 for layer in found["layers"].values())
    result = reextract(tiny_store, 1, device_map=parse_device_map("auto"), quiet=True)
    assert set(result["models"]) == {"llama", "mistral"}


def test_a_dry_run_measures_the_model_under_its_map(
    tiny_llama: Path, texts: Path, tmp_path: Path, spread: list[bool]
) -> None:
    asked = settings(tmp_path / "s.zarr", tiny_llama, texts, device="auto", device_map=parse_device_map(SPREAD))
    assert dry_run(prepare(asked, quiet=True))["models"]["m"]["seconds"] > 0
    assert set(spread) == {True}


def test_one_map_of_two_families_is_refused_by_name(tiny_llama: Path, texts: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"dataset": f"jsonl:{texts}", "store": tmp_path / "s.zarr", "quiet": True}
    with pytest.raises(SpecError, match="has modules of 'm'; the models are llama"):
        featstore.extract({"llama": tiny_llama}, [0], device_map={"m": {"": "cpu"}}, **given)
    with pytest.raises(SpecError, match=r"model 'llama' \(.*\) has no module 'transformer.h.0'"):
        featstore.extract({"llama": tiny_llama}, [0], device_map={"": "cpu", "transformer.h.0": "disk"}, **given)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device-map", "none.json"), "--device-map none.json: cannot be read"),
        (("--device-map", "auto", "--device", "cpu"), "--device cpu with --device-map auto: a map says where"),
    ],
)
def test_a_wrong_map_is_one_line(
    tiny_llama: Path, texts: Path, tmp_path: Path, capsys: Any, words: tuple[str, ...], said: str
) -> None:
    command = ("--model", f"m={tiny_llama}", "--layers", "0", "--dataset", f"jsonl:{texts}")
    assert said in typed(capsys, tmp_path / "s.zarr", *command, *words).refusal
    assert not (tmp_path / "s.zarr").exists()


def test_a_map_is_for_one_process(
    tiny_llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match="--device-map spreads one process over all devices; start it without torchrun"):
        featstore.extract(
            {"m": tiny_llama}, [0], f"jsonl:{texts}", tmp_path / "s.zarr", device_map={"": "disk"}, quiet=True
        )
    assert not (tmp_path / "s.zarr").exists()


# What a failed command leaves behind ---------------------------------------------------------------------------------


def settings(store: Path, model: Path, texts: Path, **more: Any) -> Settings:
    values: dict[str, Any] = {"layers": ("0,2",), "dataset": f"jsonl:{texts}", "device": "cpu", "max_tokens": None}
    return Settings(store=store, model=(f"m={model}",), **{**values, **more})


def run(asked: Settings) -> None:
    extract(prepare(asked, quiet=True), quiet=True)


def run_until_the_states_of(name: str, asked: Settings) -> None:
    """A command that ends once the store is begun and before a model's first state, as when it is interrupted there."""

    def write(writer: Any, reader: Any, *rest: Any) -> None:
        if reader.name == name:
            raise KeyboardInterrupt
        write_pilot(writer, reader, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featstore.extraction.rows.write_pilot", write)
        with pytest.raises(KeyboardInterrupt):
            run(asked)


@pytest.mark.parametrize(
    "changed",
    [
        {"attention": "eager"},
        {"form": "float32", "layout": "archive"},
        {"layers": ("1",)},
        {"dtype": "bfloat16", "batch_tokens": 512},
        {"max_documents": 3, "window_bytes": 256},
    ],
    ids="+".join,
)
def test_a_command_that_failed_before_any_state_does_not_bind_the_next_one(
    tiny_llama: Path, texts: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    store, other = tmp_path / "s.zarr", tmp_path / "other.zarr"
    run_until_the_states_of("m", settings(store, tiny_llama, texts))
    assert (store / "zarr.json").is_file()
    run(settings(store, tiny_llama, texts, **changed))
    run(settings(other, tiny_llama, texts, **changed))
    assert whole(store)
    assert tree_bytes(store) == tree_bytes(other)


def test_a_model_that_was_never_read_may_be_left_out(tiny_llama: Path, texts: Path, tmp_path: Path) -> None:
    store, other = tmp_path / "s.zarr", tmp_path / "other.zarr"
    run_until_the_states_of("wrong", replace(settings(store, tiny_llama, texts), model=(f"wrong={tiny_llama}",)))
    assert (store / "models" / "wrong").is_dir()
    run(settings(store, tiny_llama, texts))
    run(settings(other, tiny_llama, texts))
    assert featstore.open_store(store).models == ("m",)
    assert whole(store)
    assert tree_bytes(store) == tree_bytes(other)


def test_states_that_are_there_still_bind(tiny_llama: Path, texts: Path, tmp_path: Path) -> None:
    """One model was read, the second was not: the first one's settings hold, the second one's are free."""
    store = tmp_path / "s.zarr"
    asked = replace(settings(store, tiny_llama, texts), model=(f"m={tiny_llama}", f"n={tiny_llama}"))
    run_until_the_states_of("n", asked)
    for change, named in (({"attention": "eager"}, "m.attention"), ({"sink_threshold": 7.0}, "mask")):
        with pytest.raises(StoreStateError, match=rf"other settings \({named}\)"):
            run(replace(asked, **change))
    run(asked)
    assert featstore.open_store(store).models == ("m", "n")
    assert whole(store)
