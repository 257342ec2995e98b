"""A training that was interrupted, anywhere, ends with the same bits as one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import align.training.loop
from align.training.checkpoint import FILE, read_checkpoint, write_checkpoint
from featstore.errors import CorruptDataError, StoreStateError
from tests.support.looping import Outcome, Ready, command, environment, launched, ready, result, run
from tests.support.tiers import tiered

SMALL = {"rank": 4, "hidden": 32, "epochs": 3, "cka_every": 7, "checkpoint_every": 5}


class InterruptedHereError(Exception):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return ready(tmp_path_factory.mktemp("resume") / "s.zarr")


def same(one: Outcome, other: Outcome) -> None:
    assert one.told == other.told
    assert (one.trained.best_epoch, one.trained.last_epoch) == (other.trained.best_epoch, other.trained.last_epoch)
    assert one.trained.reason == other.trained.reason
    assert one.trained.aligner.options == other.trained.aligner.options
    tensors = other.trained.aligner.tensors
    assert one.trained.aligner.tensors.keys() == tensors.keys()
    for name, tensor in one.trained.aligner.tensors.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


@pytest.mark.parametrize(
    ("type_", "options"),
    tiered(
        [
            ("lora", {"loss": "mse=1,infonce=0.1"}),
            # The best epoch is not the last, and patience has begun to count.
            ("affine", {"lr": 0.5, "batch_size": 16, "patience": 3, "epochs": 4}),
        ],
        [("mlp", {}), ("affine", {"precision": "bfloat16"}), ("mlp", {"accumulate": 3, "batch_size": 50})],
    ),
)
def test_stopped_after_every_checkpoint(
    data: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_: str, options: dict[str, Any]
) -> None:
    options = SMALL | options
    whole = run(data, type_, checkpoint=tmp_path / "whole", **options)

    def write(*arguments: Any) -> None:
        write_checkpoint(*arguments)
        raise InterruptedHereError

    monkeypatch.setattr(align.training.loop, "write_checkpoint", write)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    stops = 0
    while True:
        try:
            outcome = run(data, type_, checkpoint=tmp_path / "torn", resume=True, **options)
        except InterruptedHereError:
            stops += 1
            assert stops < 100
            continue
        break
    assert stops > options["epochs"] + 2, "no checkpoint within an epoch"
    same(outcome, whole)
    # And neither does it matter whether checkpoints are written at all.
    same(run(data, type_, **options), whole)


def test_a_finished_training_is_told_again_and_not_trained_again(data: Ready, tmp_path: Path) -> None:
    whole = run(data, "lora", checkpoint=tmp_path, **SMALL)
    before = (tmp_path / FILE).read_bytes()
    same(run(data, "lora", checkpoint=tmp_path, resume=True, **SMALL), whole)
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.thorough
def test_killed_again_and_again(data: Ready, tmp_path: Path) -> None:
    options = SMALL | {"cka_every": 1, "epochs": 2, "checkpoint_every": 4, "batch_size": 64}
    launched(command(data, tmp_path / "whole", "mlp", **options))
    torn = tmp_path / "torn"
    options |= {"checkpoint": str(tmp_path / "state"), "resume": True, "pause": 0.02}
    words = command(data, torn, "mlp", **options)
    log = torn / "0.log"
    # Within the first epoch, about its end, and within the second: it has 25 steps.
    for at in (7, 27, 44):
        log.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, *words], env=environment(), stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_text().count("\n") < at:
            assert process.poll() is None, process.communicate()[1].decode()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert not (torn / "0.json").exists()
        assert [path.name for path in (tmp_path / "state").iterdir() if path.suffix != ".part"] == [FILE]
    log.unlink()
    launched(words)
    (tensors, told), (expected, whole) = result(torn), result(tmp_path / "whole")
    assert told == whole
    # Every step is told once, those before the last interruption included.
    assert [entry["step"] for entry in told if "step" in entry] == list(range(1, 51))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def test_without_resume_it_begins_anew(data: Ready, tmp_path: Path) -> None:
    run(data, "lora", checkpoint=tmp_path, **SMALL)
    other = run(data, "lora", checkpoint=tmp_path, **SMALL | {"seed": 1})
    assert len(other.epochs) == 4
    same(run(data, "lora", **SMALL | {"seed": 1}), other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.01}, "lr is 0.02 there and 0.01 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"epochs": 4}, "epochs is 3 there and 4 here"),
        ({"accumulate": 2}, "batches a step is 1 there and 2 here"),
        ({"precision": "bfloat16"}, "precision is 'float32' there and 'bfloat16' here"),
        ({"store": "other"}, "store is 'this' there and 'other' here"),
    ],
)
def test_a_state_of_another_run_is_refused(data: Ready, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    run(data, "lora", checkpoint=tmp_path, store="this", **SMALL)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(StoreStateError, match=words) as caught:
        run(data, "lora", checkpoint=tmp_path, resume=True, **{"store": "this", **SMALL, **change})
    assert "train into another directory" in str(caught.value)
    assert (tmp_path / FILE).read_bytes() == before


def test_what_does_not_change_the_result_may_change(data: Ready, tmp_path: Path) -> None:
    whole = run(data, "lora", checkpoint=tmp_path, **SMALL)
    again = {**SMALL, "checkpoint_every": 9, "tracker": "none", "batch_size": 128, "lr": 0.02}
    same(run(data, "lora", checkpoint=tmp_path, resume=True, **again), whole)


@pytest.mark.parametrize("spoil", [lambda data: data[:100], lambda data: b"", lambda data: b"{}" + data[2:]])
def test_a_damaged_state_is_one_clear_error(tmp_path: Path, spoil: Any) -> None:
    write_checkpoint(tmp_path, {"a": np.zeros(3)}, {"epoch": 1}, {"type": "lora"})
    path = tmp_path / FILE
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CorruptDataError, match="not a state of a training") as caught:
        read_checkpoint(tmp_path, {"type": "lora"})
    assert str(path) in str(caught.value)
    assert "remove it" in str(caught.value)


def test_a_file_of_somebody_else_is_no_state(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, dtype=np.float32)}, tmp_path / FILE)
    with pytest.raises(CorruptDataError, match="not a state of a training"):
        read_checkpoint(tmp_path, {})


def test_numbers_survive_to_the_last_bit(tmp_path: Path) -> None:
    progress = {"loss": 0.1 + 0.2, "tiny": 5e-324, "none": None, "endless": float("inf")}
    arrays = {"weight": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), "step": np.float32(7)}
    write_checkpoint(tmp_path, {name: np.asarray(value) for name, value in arrays.items()}, progress, {"a": 1})
    found = read_checkpoint(tmp_path, {"a": 1})
    assert found is not None
    assert found.progress == progress
    assert found.tensors["step"].shape == ()
    np.testing.assert_array_equal(found.tensors["weight"], arrays["weight"])
    assert read_checkpoint(tmp_path / "elsewhere", {"a": 1}) is None


def test_a_full_disk_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, {"a": np.zeros(3)}, {"epoch": 1}, {})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="free some space"):
        write_checkpoint(tmp_path, {"a": np.ones(3)}, {"epoch": 2}, {})
    found = read_checkpoint(tmp_path, {})
    assert found is not None
    assert found.progress == {"epoch": 1}
    assert not found.tensors["a"].any()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
