"""Runs over several layers at once, and the types that are more than a matrix, through the whole of `align train`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.maps.fitted import load_adapter
from align.runs.train import train
from align.settings import Settings
from featstore.errors import AdapterError, SpecError
from tests.support.commands import command_environment, command_line, strict_json
from tests.support.planted import Planted, only, plant, rotation, spectrum_rows, trained

D, N = 20, 4000


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Source layers 1, 2, 3; target layer 1 follows source 3, target 2 needs sources 1 and 2, target 3 follows 1."""
    x = {k: spectrum_rows(N, D, k, decay=0.4) for k in (1, 2, 3)}
    noise = {k: 0.05 * np.random.default_rng(20 + k).normal(size=(N, D)) for k in (1, 2, 3)}
    y = {
        1: x[3] @ rotation(D, 11) + noise[1],
        2: (x[1] + x[2]) @ rotation(D, 12) + noise[2],
        3: x[1] @ rotation(D, 13) + noise[3],
    }
    return plant(tmp_path_factory.mktemp("several") / "s.zarr", x, y, depths=(4, 4), documents=40)


def test_a_joint_map_reads_what_no_single_layer_has(several: Planted, tmp_path: Path) -> None:
    single = trained(several, tmp_path / "single", "affine", layers="1,2")["pairs"]
    joint = trained(several, tmp_path / "joint", "affine", layers="1,2", joint=True)["pairs"]
    assert list(joint) == ["a:1+2->b:1", "a:1+2->b:2"]
    assert single["a:2->b:2"]["test"]["r2"] < 0.7
    assert joint["a:1+2->b:2"]["test"]["r2"] > 0.98
    assert joint["a:1+2->b:2"]["baselines"]["shuffled"]["r2"] < 0.05
    back = load_adapter(tmp_path / "joint").aligners["a:1+2->b:2"]
    assert back.pair.source_layers == (1, 2)
    assert back.widths == (2 * D, D)
    rows = np.concatenate([several.x[k] for k in (1, 2)], axis=1).astype(np.float32)
    error = back.apply(rows) - several.y[2]
    assert (error**2).sum() < 0.05 * ((several.y[2] - several.y[2].mean(0)) ** 2).sum()


def test_a_joint_map_can_be_trained(several: Planted, tmp_path: Path) -> None:
    entry = trained(several, tmp_path, "lora", layers="1,2", joint=True, rank=D, skip="none", epochs=6)["pairs"]
    block = entry["a:1+2->b:2"]
    assert block["test"]["r2"] > block["baselines"]["closed_form"]["r2"] - 0.01


def test_joint_both_ways(several: Planted, tmp_path: Path) -> None:
    pairs = trained(several, tmp_path, "affine", layers="1,2", joint=True, both=True)["pairs"]
    assert list(pairs) == ["a:1+2->b:1", "a:1+2->b:2", "b:1+2->a:1", "b:1+2->a:2"]


def test_the_best_partner_is_found_on_validation_and_reported_on_test(several: Planted, tmp_path: Path) -> None:
    result = trained(several, tmp_path, "procrustes", layer_map="auto", layers="1,3")
    assert list(result["pairs"]) == ["a:1->b:3", "a:3->b:1"]
    [table] = strict_json((tmp_path / "metrics.json").read_text())["layer_map"]
    assert table["source_layers"] == [1, 3]
    assert table["chosen"] == [3, 1]
    assert np.array(table["val_r2"]).shape == (2, 3)
    for entry, row in zip(result["pairs"].values(), table["val_r2"], strict=True):
        assert entry["test"]["r2"] > 0.97
        assert entry["val"]["r2"] == pytest.approx(max(row), abs=1e-4)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Three layers under one rotation, of norms tenfold apart, each with a small change of rank 2 of its own."""
    true, x, y = rotation(D, 5), {}, {}
    for k in (1, 2, 3):
        rng = np.random.default_rng(30 + k)
        x[k] = spectrum_rows(N, D, k, decay=0.2) * 10.0 ** (k - 1)
        change = rng.normal(size=(D, 2)) @ rng.normal(size=(2, D)) / D
        y[k] = x[k] @ (true + change)
        y[k] += 0.1 * y[k].std() * rng.normal(size=(N, D))
    return plant(tmp_path_factory.mktemp("alike") / "s.zarr", x, y, depths=(4, 4))


def test_a_shared_rotation_with_small_projections_nears_maps_of_their_own(alike: Planted, tmp_path: Path) -> None:
    r2 = {}
    for name, options in {
        "own": {"type_": "affine"},
        "rotation": {"type_": "procrustes", "shared": True},
        "shared": {"type_": "affine", "shared": True, "rank": 4},
        "trained": {"type_": "lora", "shared": True, "rank": 4},
    }.items():
        pairs = trained(alike, tmp_path / name, **options)["pairs"]
        r2[name] = np.array([entry["test"]["r2"] for entry in pairs.values()])
        if name == "trained":
            for entry in pairs.values():
                assert entry["baselines"]["closed_form"]["name"] == "reduced-rank 4 on a shared procrustes"
                assert entry["test"]["r2"] > entry["baselines"]["closed_form"]["r2"] - 0.01
    assert (r2["rotation"] < r2["own"] - 0.02).all()
    assert (r2["shared"] > r2["own"] - 0.01).all()
    # What it is for: one map and three small projections instead of three maps.
    card = json.loads((tmp_path / "shared" / "adapter.json").read_text())
    assert card["shared"]["shipped"] == D * D + 3 * (2 * D + 4 * 2 * D + 1)


def test_a_shared_rotation_is_one(alike: Planted, tmp_path: Path) -> None:
    trained(alike, tmp_path, "procrustes", shared=True, scale=True)
    weights = [a.tensors["weight"] / a.options["scale"] for a in load_adapter(tmp_path).aligners.values()]
    assert len(weights) == 3
    for weight in weights[1:]:
        np.testing.assert_allclose(weight, weights[0], atol=1e-6)


def test_components_are_chosen_by_validation(tmp_path: Path) -> None:
    # Few rows, and all signal in four directions: the rest of a full rotation is noise.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(260, 48)) * np.r_[np.full(4, 3.0), np.full(44, 0.7)]
    y = np.concatenate([x[:, :4] @ rotation(4, 1), 0.7 * rng.normal(size=(260, 44))], axis=1) @ rotation(48, 2)
    planted = plant(tmp_path / "s.zarr", x, y)
    full = only(trained(planted, tmp_path / "full", "procrustes"))["test"]["r2"]
    found = trained(planted, tmp_path / "auto", "procrustes", components="auto")
    fixed = only(trained(planted, tmp_path / "four", "procrustes", components="4"))["test"]["r2"]
    [aligner] = load_adapter(tmp_path / "auto").aligners.values()
    assert aligner.options["components"] in (2, 4, 8)
    assert only(found)["test"]["r2"] > full + 0.1
    assert fixed > full + 0.1
    # A rotation within some components is none of the whole space.
    assert only(found)["cka"]["invariant"] is False


def test_a_hidden_layer_finds_what_no_matrix_does(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6000, 8))
    y = np.abs(x) @ rotation(8, 1) * 2 + 0.05 * np.random.default_rng(1).normal(size=x.shape)
    planted = plant(tmp_path / "s.zarr", x, y)
    entry = only(trained(planted, tmp_path / "run", "mlp", hidden=64, epochs=15))
    assert entry["baselines"]["closed_form"]["name"] == "affine ridge"
    assert entry["baselines"]["closed_form"]["r2"] < 0.1
    assert entry["test"]["r2"] > 0.9
    back = load_adapter(tmp_path / "run").aligners["a:1->b:1"]
    assert back.kind == "mlp"
    assert back.trainable == 8 * 64 + 64 + 64 * 8 + 8


def test_a_rotation_changes_no_cka_and_says_so(several: Planted, tmp_path: Path) -> None:
    entry = trained(several, tmp_path / "p", "procrustes", layer_map="3:1")["pairs"]["a:3->b:1"]
    assert entry["cka"]["invariant"] is True
    assert entry["cka"]["before"] == pytest.approx(entry["cka"]["after"], abs=1e-5)
    other = trained(several, tmp_path / "a", "affine", layer_map="3:1")["pairs"]["a:3->b:1"]
    assert other["cka"]["invariant"] is False
    assert other["cka"]["before"] == pytest.approx(entry["cka"]["before"], abs=1e-5)


def test_every_map_has_its_document_interval(several: Planted, tmp_path: Path) -> None:
    entry = trained(several, tmp_path, "affine", layer_map="3:1")["pairs"]["a:3->b:1"]
    low, high = entry["test"]["r2_ci95"]
    assert low <= entry["test"]["r2"] <= high
    assert high - low < 0.05
    sums = strict_json((tmp_path / "documents.json").read_text())["pairs"]["a:3->b:1"]
    assert 1 - sum(sums["sse"]["map"]) / sum(sums["sst"]) == pytest.approx(entry["test"]["r2"])


def test_a_compress_run_has_its_rate_and_baselines(
    several: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It is not about what is learned.
    monkeypatch.setattr("align.compress.fit.EPOCH_STEPS", 8)
    entry = trained(several, tmp_path, "compress", layer_map="3:1", latents=40, latent_dim=8, epochs=2)["pairs"]
    block = entry["a:3->b:1"]
    assert {"pca", "strided", "closed_form", "mean", "shuffled"} <= set(block["baselines"])
    rate = block["rate_distortion"]
    assert rate["bytes_per_window"] == 40 * 8 * 2
    assert set(rate["r2"]) == {"compress", "pca", "strided"}
    assert block["test"]["n"] == block["baselines"]["closed_form"]["n"]
    assert rate["r2"]["compress"] == block["test"]["r2"]
    low, high = block["test"]["r2_ci95"]
    assert low <= block["test"]["r2"] <= high
    assert set(strict_json((tmp_path / "documents.json").read_text())["pairs"]["a:3->b:1"]["sse"]) == {
        *("map", "pca", "strided", "token"),
    }
    back = load_adapter(tmp_path).aligners["a:3->b:1"]
    assert not back.takes_rows
    with pytest.raises(AdapterError, match="reads whole windows"):
        back.apply(several.x[3][:2].astype(np.float32))


def test_a_run_in_a_directory_that_holds_none_cannot_be_resumed(several: Planted, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds no interrupted run"):
        train(Settings(str(several.path), "lora"), tmp_path, resume=True, quiet=True)


def stopped_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Interrupt a run when it has told of so many epochs, as Ctrl-C would."""
    from align.runs.rundir import RunDirectory

    told, seen = RunDirectory.epoch, []

    def epoch(self: RunDirectory, *args: Any, **kwargs: Any) -> None:
        told(self, *args, **kwargs)
        seen.append(1)
        if len(seen) == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "epoch", epoch)


def run_files(run: Path) -> dict[str, Any]:
    """Everything in a run directory but times."""
    found: dict[str, Any] = {"adapter": (run / "adapter.safetensors").read_bytes()}
    for path in (*run.glob("eval_epoch_*.json"), run / "metrics.json", run / "documents.json"):
        found[path.name] = strict_json(path.read_text())
    events = [strict_json(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for event in events:
        event.pop("seconds", None)
        event.pop("cka_seconds", None)
    return {**found, "log": events}


@pytest.mark.parametrize("epochs", [1, 2, 4, 6])
def test_a_run_that_was_stopped_ends_with_the_same_files(
    alike: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """Two layer pairs of two epochs each: stopped before, within and between them."""
    options: dict[str, Any] = {"layers": "1,2", "rank": 2, "epochs": 2, "cka_every": 10}
    trained(alike, tmp_path / "whole", "lora", **options)
    with monkeypatch.context() as patch:
        stopped_after(patch, epochs)
        with pytest.raises(KeyboardInterrupt):
            trained(alike, tmp_path / "run", "lora", **options)
    assert not (tmp_path / "run" / "metrics.json").exists()
    from align.settings import load_settings

    train(load_settings(tmp_path / "run" / "run.yaml"), tmp_path / "run", resume=True, quiet=True)
    assert run_files(tmp_path / "run") == run_files(tmp_path / "whole")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.thorough
def test_two_processes_train_one_map(alike: Planted, tmp_path: Path) -> None:
    """As a launcher starts them: both train, one writes, and the map is that of one process to rounding."""
    options = ("--type", "lora", "--layers", "1,2", "--rank", "4", "--epochs", "2", "--skip", "none")
    one = command_line("align", "train", "--store", alike.path, *options, "--accumulate", 2, "--out", tmp_path / "one")
    two = command_line("align", "train", "--store", alike.path, *options, "--device", "cpu", "--out", tmp_path / "two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *two[1:]]
    environment = command_environment(OMP_NUM_THREADS="1")
    for words in (one, [*launch, "--json"]):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert set(json.loads(done.stdout)["pairs"]) == {"a:1->b:1", "a:2->b:2"}
    for key, aligner in load_adapter(tmp_path / "two").aligners.items():
        single = load_adapter(tmp_path / "one").aligners[key].tensors["weight"]
        assert np.abs(aligner.tensors["weight"] - single).max() < 2e-3 * np.abs(single).max()
