"""The commands as users meet them: help at once, one JSON object, one clear line when something is wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer

from featstore.runtime.console import run_app
from featstore.store import open_store
from tests.support.commands import call, command_environment, command_line, strict_json
from tests.support.planted import plant, trained

Capture = pytest.CaptureFixture[str]

COMMANDS = {
    "featstore": ("extract", "info", "inspect", "verify", "convert", "pair", "moments", "doctor", "calibrate", "demo"),
    "align": ("train", "sweep", "cka", "compare"),
    "evaluate": ("stitch", "generate", "communicate", "report", "reproduce"),
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

    for command, subcommands in COMMANDS.items():
        app = importlib.import_module(f"{command}.cli").app
        assert set(typer.main.get_command(app).commands) == set(subcommands)  # type: ignore[attr-defined]


def test_modules_run_as_commands(run_cli: Callable[..., subprocess.CompletedProcess[str]], tiny_store: Path) -> None:
    done = run_cli("featstore", "info", tiny_store, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert set(strict_json(done.stdout)["models"]) == {"llama", "mistral"}
    assert done.stderr == ""
    wrong = run_cli("align", "train", "--store", tiny_store, "--type", "gan")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("align: type 'gan'")
    assert wrong.stderr.count("\n") == 1


# One JSON object.


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run between the tiny models."""
    from align.runs.train import train
    from align.settings import Settings

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
    "unknown type": ("align train --store STORE --type gan", ("type 'gan'", "procrustes")),
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
    "estimator": ("align cka --store STORE --estimator hsic", ("'hsic'", "debiased, debiased-rows, biased")),
    "one model": ("align cka --store STORE --models llama", ("'llama'", "two names")),
    "cka layers": ("align cka --store STORE --layers 1", ("layer 1 of 'llama'", "it holds 0, 2, 3")),
    "scheduler": ("align cka --store STORE --scheduler tcp://127.0.0.1:1", ("tcp://127.0.0.1:1", "no Dask")),
    "compare nothing": ("align compare EMPTY", ("EMPTY", "align train")),
    "stitch nothing": ("evaluate stitch --store STORE --adapter EMPTY", ("EMPTY", "align train")),
    "generate nothing": ("evaluate generate --adapter EMPTY", ("EMPTY", "align train")),
    "report nothing": ("evaluate report EMPTY", ("EMPTY",)),
    "split": ("evaluate stitch --store STORE --adapter RUN --split dev", ("'dev'", "train, val, test")),
    "budget": ("evaluate stitch --store STORE --adapter RUN --max-tokens 0", ("'0'", "200k")),
    "layer number": ("evaluate stitch --store STORE --adapter RUN --layers two", ("layer 'two'", "0,8,16")),
    "layer out of the model": ("evaluate stitch --store STORE --adapter RUN --layers 9", ("layer 9", "0..3")),
    "generate layers": ("evaluate generate --adapter RUN --layers 0", ("--layers 0", "layers 2")),
    "stitch a file": ("evaluate stitch --store STORE --adapter FILE", ("FILE", "align train")),
    "stitch nowhere": ("evaluate stitch --store STORE --adapter NOTHING", ("NOTHING", "align train")),
    "damaged card": ("evaluate stitch --store STORE --adapter DAMAGED", ("DAMAGED", "damaged", "train it again")),
    "unknown override": ("evaluate stitch --store STORE --adapter RUN --model x=y", ("--model x=", "llama, mistral")),
    "stitch device": ("evaluate stitch --store STORE --adapter RUN --device tpu9", ("'tpu9'", "auto, cpu, cuda")),
    "stitch dtype": ("evaluate stitch --store STORE --adapter RUN --dtype int4", ("'int4'", "auto, bfloat16")),
    "foreign store": ("evaluate stitch --store OTHER --adapter RUN", ("fingerprint", "named in its card")),
    "run's layers": ("evaluate stitch --store STORE --adapter RUN --layers 0", ("--layers 0", "layers 2")),
    "no prompts": ("evaluate generate --adapter RUN --prompts BLANK", ("BLANK", "write one a line")),
    "missing prompts": ("evaluate generate --adapter RUN --prompts NOTHING", ("NOTHING", "UTF-8")),
    "window": ("featstore inspect STORE --window 9999", ("9999",)),
    # Words that do not parse.
    "no subcommand": ("featstore bogus", ("no such command 'bogus'", "see `featstore --help`")),
    "no subcommand of align": ("align bogus", ("no such command 'bogus'", "see `align --help`")),
    "no subcommand of evaluate": ("evaluate bogus", ("no such command 'bogus'", "see `evaluate --help`")),
    "flag of the tool": ("featstore --nope", ("no such option: --nope", "see `featstore --help`")),
    "flag": ("featstore extract --lay 0", ("no such option: --lay", "--layers", "see `featstore extract --help`")),
    "flag of align": ("align train --nope", ("no such option: --nope", "see `align train --help`")),
    "flag of evaluate": ("evaluate generate --nope", ("no such option: --nope", "see `evaluate generate --help`")),
    "missing argument": ("featstore info", ("missing argument 'store'", "see `featstore info --help`")),
    "missing flag": ("align cka", ("missing option '--store'", "see `align cka --help`")),
    "missing runs": ("evaluate report", ("missing argument 'directories'", "see `evaluate report --help`")),
    "missing value": ("featstore extract --max-documents", ("'--max-documents'", "see `featstore extract --help`")),
    "not a number": ("featstore extract --max-documents x", ("'x'", "'--max-documents'", "featstore extract --help`")),
    "not a number for align": ("align train --rank x", ("'x'", "'--rank'", "integer", "see `align train --help`")),
    "number out of range": ("evaluate stitch --store STORE --adapter RUN --seed -1", ("'-1'", "'--seed'", "--help`")),
    "one word too many": ("featstore info STORE more", ("(more)", "see `featstore info --help`")),
    # Places that cannot take a result or hold no store.
    "train into a file": ("align train --store STORE --out FILE", ("--out", "FILE", "is a file")),
    "train below a file": ("align train --store STORE --out FILE/a/b", ("--out", "FILE", "lies below a file")),
    "cka into a file": ("align cka --store STORE --out FILE", ("--out", "FILE", "is a file")),
    "extract below a file": ("featstore extract --store FILE/x", ("--store", "FILE", "is a file")),
    "calibrate into a file": ("featstore calibrate --out FILE", ("--out", "FILE", "is a file")),
    "demo into a file": ("featstore demo --out FILE", ("--out", "FILE", "is a file")),
    "memory that is none": ("featstore moments STORE --memory lots", ("'lots'", "500M")),
    "memory for rows that is none": ("align train --store STORE --memory x", ("'x'", "500M")),
    "moments of nothing": ("featstore moments NOTHING", ("no store at",)),
    "cka below a file": ("align cka --store STORE --out FILE/a/b", ("--out", "FILE", "lies below a file")),
    "stitch into a file": ("evaluate stitch --store STORE --adapter RUN --out FILE", ("--out", "FILE", "is a file")),
    "stitch below a file": ("evaluate stitch --store STORE --adapter RUN --out FILE/a", ("FILE/a lies below a file",)),
    "generate into a file": ("evaluate generate --adapter RUN --out FILE", ("--out", "FILE", "is a file")),
    "generate below a file": ("evaluate generate --adapter RUN --out FILE/a", ("--out", "FILE", "lies below a file")),
    "report below a file": ("evaluate report RUN --out FILE/r.html", ("--out", "FILE/r.html", "lies below a file")),
    "report into a directory": ("evaluate report RUN --out EMPTY", ("EMPTY", "is a directory", "report.html")),
    "resume without a place": ("align train --resume", ("--resume needs --out", "interrupted run")),
    "resume of nothing": ("align train --resume --out EMPTY", ("EMPTY", "holds no interrupted run")),
    "resume of a whole run": ("align train --resume --out RUN", ("RUN", "there is nothing to resume")),
    "joint of one": ("align train --store STORE --joint --layers 2", ("--joint needs at least two source layers", "2")),
    "shared mlp": ("align train --store STORE --type mlp --shared", ("--shared", "'mlp'", "procrustes, affine, lora")),
    "components": ("align train --store STORE --components many", ("--components 'many'", "auto")),
    "components above width": ("align train --store STORE --components 99", ("99",)),
    "precision": ("align train --store STORE --type lora --precision fp4", ("'fp4'", "bfloat16")),
    "tracker": ("align train --store STORE --type lora --tracker paper", ("'paper'", "tensorboard, wandb, none")),
    "tracker not there": ("align train --store STORE --type lora --rank 4 --tracker wandb", ("wandb", "pip install")),
    "latent width": (
        "align train --store STORE --type compress --latent-dim 99 --tracker none",
        ("99",),
    ),
    "models of a closed form": ("align train --store STORE --eval-models", ("--eval-models", "evaluate stitch")),
    "sweep of an unknown type": ("align sweep --store STORE --types gan", ("--types 'gan'", "procrustes")),
    "sweep of ranks of nothing": ("align sweep --store STORE --types affine --ranks 4", ("--ranks 4", "leave it out")),
    "sweep of no numbers": ("align sweep --store STORE --types lora --ranks x", ("--ranks 'x'", "whole numbers")),
    "sweep of a format": ("align sweep --store STORE --types affine --formats int3", ("int3",)),
    "a file as store of cka": ("align cka --store FILE", ("FILE", "not a feature store")),
    "a file as store of stitch": ("evaluate stitch --store FILE --adapter RUN", ("FILE", "not a feature store")),
    "a file as store of info": ("featstore info FILE", ("FILE", "not a feature store")),
    "a store below a file": ("align train --store FILE/s.zarr", ("FILE/s.zarr", "featstore extract")),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tiny_store: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What the capital words of the refusals stand for."""
    base = tmp_path_factory.mktemp("places")
    (base / "EMPTY").mkdir()
    (base / "FILE").write_text("hello")
    (base / "BLANK").write_text("\n")
    (base / "DAMAGED").mkdir()
    (base / "DAMAGED" / "adapter.json").write_text('{"format": 1, "pairs": [')
    rows = np.random.default_rng(0).normal(size=(50, 4))
    return SimpleNamespace(
        STORE=tiny_store,
        RUN=run,
        EMPTY=base / "EMPTY",
        FILE=base / "FILE",
        BLANK=base / "BLANK",
        NOTHING=base / "NOTHING",
        DAMAGED=base / "DAMAGED",
        OTHER=plant(base / "o.zarr", rows, rows, documents=10).path,
    )


@pytest.mark.parametrize("case", REFUSALS)
def test_a_wrong_word_is_one_line_with_the_value_and_the_remedy(
    places: SimpleNamespace, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    line, expected = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("align.execution.cluster.SCHEDULER_SECONDS", 0.5)

    def meant(word: str) -> str:
        """The word with a leading capital one replaced by its place."""
        first, slash, rest = word.partition("/")
        return f"{getattr(places, first, first)}{slash}{rest}"

    words = [meant(word) for word in line.split()]
    refusal = call(capsys, *words).refusal
    assert refusal.startswith(f"{words[0]}: ")
    for part in expected:
        assert meant(part) in refusal
    # Nothing was begun.
    assert list(tmp_path.iterdir()) == []
    assert places.FILE.read_text() == "hello"
    assert list(places.EMPTY.iterdir()) == []


def test_a_place_without_permission_is_refused_before_any_work(
    places: SimpleNamespace, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, so the answer of the system is made up.
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK and path == tmp_path)
    )
    out = tmp_path / "a" / "b"
    refusal = call(capsys, "align", "cka", "--store", places.STORE, "--out", out).refusal
    assert f"--out {out}: no permission to write in {tmp_path}" in refusal
    assert not out.parent.exists()


@pytest.mark.parametrize(("command", "words"), [(name, words) for name in COMMANDS for words in ((), ("--help",))])
def test_a_tool_without_a_command_shows_its_help(command: str, words: tuple[str, ...], capsys: Capture) -> None:
    shown = call(capsys, command, *words)
    assert f"Usage: {command} [OPTIONS] COMMAND" in shown.out
    assert shown.err == ""
    # Asking for help is no mistake, saying nothing is one.
    assert shown.code == (0 if words else 2)


def test_a_reader_that_goes_away_is_no_error(tiny_store: Path) -> None:
    for words in (("featstore", "info", str(tiny_store), "--json"), ("align", "train", "--help")):
        read, write = os.pipe()
        os.close(read)
        try:
            done = subprocess.run(
                command_line(*words), env=command_environment(), stdout=write, stderr=subprocess.PIPE, text=True
            )
        finally:
            os.close(write)
        assert (done.returncode, done.stderr) == (0, ""), words


@pytest.mark.parametrize(("stop", "code"), [(typer.Exit(1), 1), (SystemExit(3), 3), (typer.Abort(), 130), (None, 0)])
def test_a_command_decides_its_exit_code(
    stop: BaseException | None, code: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        if stop is not None:
            raise stop

    monkeypatch.setattr(sys, "argv", ["tool"])
    try:
        run_app(app, "tool")
        found = 0
    except SystemExit as end:
        found = int(end.code or 0)
    assert found == code
    assert capsys.readouterr().err == ("tool: interrupted; what was committed so far is kept\n" if code == 130 else "")


def test_ctrl_c_is_one_line_and_130(tiny_store: Path, tmp_path: Path) -> None:
    log = tmp_path / "run" / "log.jsonl"
    forever = ("--epochs", "100000", "--patience", "100000")
    words = ("--type", "lora", "--rank", "4", *forever, "--out", log.parent, "--json")
    running = subprocess.Popen(
        command_line("align", "train", "--store", tiny_store, *words),
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not log.exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "align: interrupted; what was committed so far is kept"
    assert "Traceback" not in err


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
        patch.setattr("align.runs.train.scan", interrupt)
        stopped = call(capsys, *words)
    assert stopped.code == 130
    assert "interrupted" in stopped.err
    assert call(capsys, *words, "--json").json["type"] == "procrustes"
    assert trained(planted, tmp_path / "again", "procrustes")["pairs"]
