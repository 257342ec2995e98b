"""`featstore doctor` on models: every test of the instrument in words, and one line for what cannot be tested."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featstore.demo import doctor, trial
from featstore.errors import SpecError
from featstore.models.verdict import Verdict
from tests.support.architectures.building import save
from tests.support.commands import call


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def told(done: Any, name: str) -> str:
    """The lines about one check."""
    lines = done.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line[5:].startswith(f"{name}:"))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("  ")), len(lines))
    return "\n".join(lines[start:end])


def test_a_model_is_tested_and_told_in_words(
    tiny_mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call(capsys, "featstore", "doctor", "--model", f"m={tiny_mistral}", "--store", tmp_path / "s.zarr")
    assert done.code == 0
    assert told(done, "tests of m").splitlines() == [
        "ok   tests of m: its states can be stored",
        "     model: 4 blocks in model.layers, rows of width 32, float32",
        "     extraction: right, windows of any length share a pass",
        "     layer 0: depends on the token alone, and can be stored as a table",
        "     injection: right at layers 0 to 4",
        "     hide: holds at layers 0 to 4",
        "     continuing: from a cache, any number of tokens at once",
        "     padding: prompts of several lengths share a batch, padded at the left",
        "     attention: sdpa",
    ]
    assert f"loading m ({tiny_mistral})" in done.err


def test_json_has_the_verdict_and_a_second_look_runs_no_test(
    tiny_mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("featstore", "doctor", "--json", "--model", f"m={tiny_mistral}", "--store", tmp_path / "s.zarr")
    found = call(capsys, *words, "--attn", "eager").json
    verdict = Verdict.parse(found["verified"]["m"])
    assert (verdict.blocks, verdict.attention, list(verdict.layers)) == (4, "eager", ["0", "1", "2", "3", "4"])
    assert {entry.leak for entry in verdict.layers.values()} == {0.0}
    assert verdict.content() == found["verified"]["m"]
    [check] = [check for check in found["checks"] if check["name"] == "tests of m"]
    assert check["ok"]
    assert check["lines"][-1] == "attention: eager"
    for module in ("reading", "continuing", "hiding", "injecting"):
        monkeypatch.setattr(f"featstore.models.probe.prove.test_{module}", None)
    assert call(capsys, *words, "--attn", "eager").json["verified"] == found["verified"]


@pytest.mark.parametrize("words", [("--quick",), ()])
def test_no_model_is_loaded_unless_it_is_named_and_not_quick(
    tiny_mistral: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(trial, "load_model", None)
    monkeypatch.setattr("featstore.cli.DEFAULT_MODELS", (f"m={tiny_mistral}",))
    named = ("--model", f"m={tiny_mistral}") if words else ()
    done = call(capsys, "featstore", "doctor", "--json", "--store", tmp_path / "s.zarr", *named, *words)
    assert done.json["verified"] == {}
    assert [check["name"] for check in done.json["checks"]][-1] == "model m"


def test_weights_that_are_not_there_are_not_fetched(
    tiny_mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(tiny_mistral, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    done = call(capsys, "featstore", "doctor", "--model", f"m={bare}", "--store", tmp_path / "s.zarr")
    assert done.code == 0
    assert told(done, "tests of m") == (
        "ok   tests of m: not run: the weights are not on this disk, and nothing is downloaded here"
    )


def test_what_is_refused_of_a_model_is_told_and_is_no_failure(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma, lfm = save("gemma4_text", tmp_path / "gemma", tiny_llama), save("lfm2", tmp_path / "lfm", tiny_llama)
    done = call(
        capsys, "featstore", "doctor", "--model", f"g={gemma}", "--model", f"l={lfm}", "--store", tmp_path / "s.zarr"
    )
    assert done.code == 0
    assert "injection: right at layer 6; refused at layers 0 to 5: the swap test leaks 0." in told(done, "tests of g")
    assert "hide: holds at layer 6; refused at layers 0 to 5: two prompts with" in told(done, "tests of g")
    assert "injection: right at layers 0 to 4" in told(done, "tests of l")
    assert "hide: refused at layers 0 to 4: blocks 0, 1, 3 keep a recurrent or convolution" in told(done, "tests of l")


def _nan(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"].fill_(torch.nan)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _incomplete(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _truncated(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_nan, "layer 3 holds NaN or infinity on ordinary tokens; try --dtype float32"),
        (_incomplete, "the checkpoint lacks 1 tensor (model.layers.2.mlp.down_proj.weight)"),
        (_truncated, ""),
    ],
)
def test_a_model_that_cannot_be_read_is_one_line_and_a_failure(
    tiny_mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, words: str
) -> None:
    broken = shutil.copytree(tiny_mistral, tmp_path / "broken")
    damage(broken)
    done = call(capsys, "featstore", "doctor", "--model", f"m={broken}", "--store", tmp_path / "s.zarr")
    assert done.code == 1
    first, remedy = told(done, "tests of m").splitlines()
    assert first.startswith("bad  tests of m: ")
    assert words in first
    assert remedy.strip() == "-> see the finding"
    assert "Traceback" not in done.err + done.out


def test_an_unknown_reference_is_one_line_and_nothing_is_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "load_model", None)
    done = call(capsys, "featstore", "doctor", "--model", "m=./nowhere", "--store", tmp_path / "s.zarr")
    assert done.code == 1
    assert "bad  model m: model 'm': no directory './nowhere'" in done.out
    assert "tests of m" not in done.out


def test_too_little_memory_is_one_line(tiny_mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr(trial, "load_model", full)
    result = doctor.examine([f"m={tiny_mistral}"], tmp_path / "s.zarr", probe=True, quiet=True)
    assert not result["ok"]
    assert result["checks"][-1]["finding"].startswith("the memory does not hold it; use --device-map auto")


def test_wrong_options_are_refused(tiny_mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"m={tiny_mistral}"
    for words, refusal in (
        (("--device-map", tmp_path / "none.json"), "--device-map"),
        (("--model", "nonsense"), "model 'nonsense': write NAME=REF"),
        (("--dtype", "int3"), "dtype 'int3': choose one of"),
        (("--attn", "telepathy"), "attention 'telepathy'"),
    ):
        done = call(capsys, "featstore", "doctor", "--model", model, "--store", tmp_path / "s.zarr", *words)
        assert done.code == 2
        assert refusal in done.err.splitlines()[-1]
    with pytest.raises(SpecError):
        doctor.examine(["nonsense"], tmp_path)


def test_a_device_map_and_a_number_type_are_what_is_tested(
    tiny_mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = tmp_path / "map.json"
    places.write_text(json.dumps({"": "cpu", "model.layers.1": "disk"}), encoding="utf-8")
    words = ("--model", f"m={tiny_mistral}", "--store", tmp_path / "s.zarr", "--device-map", places, "--json")
    verdict = Verdict.parse(call(capsys, "featstore", "doctor", "--dtype", "bfloat16", *words).json["verified"]["m"])
    assert verdict.stream_dtype == "bfloat16"
    assert all(entry.leak == 0 for entry in verdict.layers.values())
