"""The commands as users meet them: help at once, one JSON object, one clear line when something is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import call, strict_json
from conftest import command_environment
from planted import plant, trained

from featstore.store import open_store

Capture = pytest.CaptureFixture[str]

COMMANDS = {
    "featstore": ("extract", "info", "inspect", "verify", "pair", "doctor", "calibrate", "demo"),
    "align": ("train", "cka", "compare"),
    "evaluate": ("stitch", "generate", "report"),
}

#: Prints the help of a command and of all its subcommands, and fails if that took a heavy library.
HELP = """
import importlib, sys
name, *subcommands = sys.argv[1:]
main = importlib.import_module(f"{name}.cli").main
for words in ([], *([s] for s in subcommands)):
    sys.argv = [name, *words, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
heavy = {"torch", "transformers", "datasets", "dask", "distributed", "matplotlib", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_a_heavy_library(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, command, *COMMANDS[command]],
        env=command_environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("Usage: ") == 1 + len(COMMANDS[command])
    for subcommand in COMMANDS[command]:
        assert f"Usage: {command} {subcommand} " in done.stdout
    if command == "featstore":
        # Square brackets are markup to what prints the help.
        assert "hub id[@revision]" in done.stdout
        assert "hf:REPO[/CONFIG][:SPLIT]" in done.stdout


def test_the_list_of_commands_is_whole() -> None:
    import importlib

    import typer

    for command, subcommands in COMMANDS.items():
        app = importlib.import_module(f"{command}.cli").app
        assert set(typer.main.get_command(app).commands) == set(subcommands)  # type: ignore[attr-defined]


def test_modules_run_as_commands(run_cli: Callable[..., subprocess.CompletedProcess[str]], tiny_store: Path) -> None:
    done = run_cli("featstore", "info", tiny_store, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert set(strict_json(done.stdout)["models"]) == {"llama", "mistral"}
    assert done.stderr == ""
    wrong = run_cli("align", "train", "--store", tiny_store, "--type", "mlp")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("align: type 'mlp'")
    assert wrong.stderr.count("\n") == 1


# One JSON object.


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run between the tiny models."""
    from align.train import Settings, train

    out = tmp_path_factory.mktemp("cli") / "run"
    train(Settings(str(tiny_store), layers="2"), out, quiet=True)
    return out


def test_store_commands_print_one_object(tiny_store: Path, capsys: Capture) -> None:
    info = call(capsys, "featstore", "info", tiny_store, "--json").json
    assert info["pairs"]["llama__mistral"]["pairs"] == len(open_store(tiny_store).pairs("llama", "mistral"))
    shown = call(capsys, "featstore", "inspect", tiny_store, "--window", "1", "--rows", "5", "--json").json
    assert shown["window"] == 1
    verified = call(capsys, "featstore", "verify", tiny_store, "--json").json
    assert verified["damage"] == []


def test_pair_prints_one_object(tiny_store: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = shutil.copytree(tiny_store, tmp_path / "copy.zarr")
    made = call(capsys, "featstore", "pair", copy, "--policy", "word", "--json").json
    assert 0 < made["pairs"]["llama__mistral"]["pairs"] < len(open_store(copy).pairs("llama", "mistral"))


def test_a_dry_run_prints_one_object_and_writes_nothing(
    tiny_llama: Path, short_corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ("--model", f"llama={tiny_llama}", "--layers", "0,3", "--dataset", f"jsonl:{short_corpus}")
    store = tmp_path / "s.zarr"
    shown = call(capsys, "featstore", "extract", *words, "--store", store, "--dry-run", "--json").json
    assert shown["models"]["llama"]["layers"] == [0, 3]
    assert not store.exists()


def test_train_prints_one_object_that_is_its_metrics(tiny_store: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    shown = call(capsys, "align", "train", "--store", tiny_store, "--type", "affine", "--out", out, "--json").json
    assert shown.pop("run") == str(out)
    assert shown == strict_json((out / "metrics.json").read_text())
    lora = ("--type", "lora", "--rank", "4", "--epochs", "1", "--layers", "2", "--source", "mistral")
    shown = call(capsys, "align", "train", "--store", tiny_store, *lora, "--out", tmp_path / "lora", "--json").json
    assert list(shown["pairs"]) == ["mistral:2->llama:2"]


def test_the_default_directory_and_the_next_step_are_named(
    tiny_store: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(capsys, "align", "train", "--store", tiny_store, "--layers", "2")
    assert done.code == 0
    assert "run: runs/procrustes-llama-mistral" in done.out
    assert f"next: evaluate stitch --store {tiny_store} --adapter runs/procrustes-llama-mistral" in done.err
    assert (tmp_path / "runs" / "procrustes-llama-mistral" / "adapter.json").is_file()


def test_similarity_comparison_and_report_print_one_object(
    tiny_store: Path, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    cka = call(capsys, "align", "cka", "--store", tiny_store, "--out", tmp_path / "cka", "--json").json
    assert np.array(cka["cross"]).shape == (3, 3)
    assert len(call(capsys, "align", "compare", run, "--json").json["rows"]) == 1
    page = tmp_path / "report.html"
    assert call(capsys, "evaluate", "report", run, tmp_path / "cka", "--out", page, "--json").json
    assert page.read_text().startswith("<!doctype html>")


def test_stitch_and_generate_print_one_object(tiny_store: Path, run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = ("--out", tmp_path, "--json")
    stitched = call(
        capsys, "evaluate", "stitch", "--store", tiny_store, "--adapter", run, "--max-tokens", "100", *out
    ).json
    assert list(stitched["pairs"]) == ["llama:2->mistral:2"]
    prompts = tmp_path / "p.txt"
    prompts.write_text("Hello\n")
    text = call(
        capsys, "evaluate", "generate", "--adapter", run, "--prompts", prompts, "--max-new-tokens", "2", *out
    ).json
    assert len(text["entries"]) == 1


# One clear line.

REFUSALS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown type": ("align train --store STORE --type mlp", ("type 'mlp'", "procrustes")),
    "unknown solver": ("align train --store STORE --solver sgd", ("solver 'sgd'", "adamw")),
    "unknown source": ("align train --store STORE --source gemma", ("'gemma'", "it holds llama, mistral")),
    "unknown target": ("align train --store STORE --target gemma", ("'gemma'", "it holds llama, mistral")),
    "layer not stored": ("align train --store STORE --layers 1", ("layer 1 of 'llama'", "it holds 0, 2, 3")),
    "layer out of range": ("align train --store STORE --layers 9", ("layer 9", "0..3", "0%,25%,50%")),
    "layer map": ("align train --store STORE --layer-map 2-2", ("'2-2'", "16:20,24:24")),
    "layer map layer": ("align train --store STORE --layer-map 2:3", ("layer 3 of 'mistral'", "0, 2, 4")),
    "missing store": ("align train --store NOTHING", ("NOTHING", "featstore extract")),
    "missing store for cka": ("align cka --store NOTHING", ("NOTHING", "featstore extract")),
    "missing store for info": ("featstore info NOTHING", ("NOTHING", "featstore extract")),
    "missing store for stitch": ("evaluate stitch --store NOTHING --adapter RUN", ("NOTHING", "featstore extract")),
    "not a store": ("align train --store EMPTY", ("EMPTY", "not a feature store")),
    "not a store for cka": ("align cka --store EMPTY", ("EMPTY", "not a feature store")),
    "a file as store": ("align train --store FILE", ("FILE", "not a feature store")),
    "no store": ("align train --type lora", ("--store is missing", "featstore extract")),
    "rank above width": ("align train --store STORE --type lora --rank 33", ("rank 33", "use 1 to 32")),
    "rank in closed form": ("align train --store STORE --type reduced-rank --rank 33", ("rank 33", "use 1 to 32")),
    "identity": (
        "align train --store STORE --type lora --rank 4 --skip identity",
        ("'identity'", "48 and 32", "--skip procrustes"),
    ),
    "skip": ("align train --store STORE --type lora --skip mean", ("'mean'", "procrustes, ridge, identity, none")),
    "loss name": ("align train --store STORE --type lora --loss mae=1", ("'mae=1'", "mse, cosine, infonce")),
    "loss weight": ("align train --store STORE --type lora --loss mse=x", ("'x'", "not a number")),
    "learning rate": ("align train --store STORE --type lora --lr nan", ("--lr nan", "positive")),
    "epochs": ("align train --store STORE --type lora --epochs 0", ("--epochs 0", "at least 1")),
    "rows": ("align train --store STORE --max-rows 3", ("--max-rows 3", "at least 8")),
    "device": ("align train --store STORE --type lora --device tpu9", ("'tpu9'", "auto, cpu, cuda")),
    "policy": ("align train --store STORE --policy start", ("'start'", "end, word")),
    "policy not indexed": ("align train --store STORE --policy word", ("'word'", "featstore pair")),
    "config": ("align train --config FILE", ("FILE", "run.yaml")),
    "used directory": ("align train --store STORE --out RUN", ("RUN", "already holds a run")),
    "estimator": ("align cka --store STORE --estimator hsic", ("'hsic'", "debiased, biased")),
    "one model": ("align cka --store STORE --models llama", ("'llama'", "two names")),
    "cka layers": ("align cka --store STORE --layers 1", ("layer 1 of 'llama'", "it holds 0, 2, 3")),
    "scheduler": ("align cka --store STORE --scheduler tcp://127.0.0.1:1", ("tcp://127.0.0.1:1", "no Dask")),
    "compare nothing": ("align compare EMPTY", ("EMPTY", "align train")),
    "stitch nothing": ("evaluate stitch --store STORE --adapter EMPTY", ("EMPTY", "align train")),
    "generate nothing": ("evaluate generate --adapter EMPTY", ("EMPTY", "align train")),
    "report nothing": ("evaluate report EMPTY", ("EMPTY",)),
    "split": ("evaluate stitch --store STORE --adapter RUN --split dev", ("'dev'", "train, val, test")),
    "budget": ("evaluate stitch --store STORE --adapter RUN --max-tokens 0", ("'0'", "200k")),
    "foreign store": ("evaluate stitch --store OTHER --adapter RUN", ("fingerprint", "named in its card")),
    "run's layers": ("evaluate stitch --store STORE --adapter RUN --layers 0", ("--layers 0", "layers 2")),
    "no prompts": ("evaluate generate --adapter RUN --prompts BLANK", ("BLANK", "write one a line")),
    "missing prompts": ("evaluate generate --adapter RUN --prompts NOTHING", ("NOTHING", "UTF-8")),
    "window": ("featstore inspect STORE --window 9999", ("9999",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tiny_store: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What the capital words of the refusals stand for."""
    base = tmp_path_factory.mktemp("places")
    (base / "EMPTY").mkdir()
    (base / "FILE").write_text("hello")
    (base / "BLANK").write_text("\n")
    rows = np.random.default_rng(0).normal(size=(50, 4))
    return SimpleNamespace(
        STORE=tiny_store,
        RUN=run,
        EMPTY=base / "EMPTY",
        FILE=base / "FILE",
        BLANK=base / "BLANK",
        NOTHING=base / "NOTHING",
        OTHER=plant(base / "o.zarr", rows, rows, documents=10).path,
    )


@pytest.mark.parametrize("case", REFUSALS)
def test_a_wrong_word_is_one_line_with_the_value_and_the_remedy(
    places: SimpleNamespace, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    line, expected = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("align.cli.SCHEDULER_SECONDS", 0.5)
    words = [str(getattr(places, word, word)) for word in line.split()]
    refusal = call(capsys, *words).refusal
    assert refusal.startswith(f"{words[0]}: ")
    for part in expected:
        assert str(getattr(places, part, part)) in refusal
    # Nothing was begun.
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_store_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    rows = np.random.default_rng(0).normal(size=(300, 4))
    planted = plant(tmp_path / "s.zarr", rows, rows, documents=10)
    path = planted.path / "models" / "a" / "resid" / "1" / "c" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    refusal = call(capsys, "align", "train", "--store", planted.path, "--out", tmp_path / "run").refusal
    assert "checksum mismatch" in refusal
    assert "featstore verify" in refusal
    assert not (tmp_path / "run" / "metrics.json").exists()
    damaged = call(capsys, "featstore", "verify", planted.path, "--json")
    assert damaged.code == 1


def test_an_interrupted_run_can_be_begun_again(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).normal(size=(300, 4))
    planted = plant(tmp_path / "s.zarr", rows, rows, documents=10)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    words = ("align", "train", "--store", planted.path, "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("align.train.scan", interrupt)
        stopped = call(capsys, *words)
    assert stopped.code == 130
    assert "interrupted" in stopped.err
    assert call(capsys, *words, "--json").json["type"] == "procrustes"
    assert trained(planted, tmp_path / "again", "procrustes")["pairs"]
