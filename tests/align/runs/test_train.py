"""A run directory: what is in it, that it can be made again, and that training reaches what can be solved for."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import align.training.loop
from align.judging.sentences import sentence
from align.maps.fitted import load_adapter
from align.maps.registry import map_types
from align.runs.train import default_directory, describe, train
from align.settings import LoopSettings, Settings, check, load_settings
from featstore.errors import FitError, SpecError
from featstore.store import Store, StoredModel, open_store
from tests.support.commands import call, strict_json
from tests.support.planted import TEST, VAL, Planted, leaky, only, plant, rotation, spectrum_rows, trained
from tests.support.tiers import tiered

KEY = "a:1->b:1"
BASELINES = {"mean", "identity", "random_rotation", "shuffled", "token", "closed_form"}
FIGURES = {
    *("r2", "r2_median_dim", "r2_without_top_dims", "mse", "cosine", "cosine_centered", "cka_debiased"),
    "cka_debiased_rows",
    *("retrieval_top1", "retrieval_top5", "retrieval_mrr", "retrieval_median_rank", "retrieval_chance"),
    *("retrieval_ceiling", "retrieval_gallery", "retrieval_same_token_top1", "retrieval_same_token_chance"),
    *("retrieval_same_token_ceiling", "retrieval_same_token_gallery", "retrieval_same_token_tokens", "n"),
}


def low_rank_change(n: int, d: int, rank: int, *, decay: float, everywhere: bool = True, seed: int = 0) -> Any:
    """Rows and targets: a rotation, a low-rank change to it, and noise of a tenth of the target's variance.

    The inputs' standard deviations fall as ``k ** -decay``. The change acts in all directions alike, or
    (``everywhere`` false) on whitened inputs, so that directions of little variance matter as much as the others.
    """
    rng = np.random.default_rng(seed)
    x = spectrum_rows(n, d, seed + 1, decay=decay)
    x *= np.sqrt(x.size / (x**2).sum())
    change = rng.normal(size=(d, rank)) @ rng.normal(size=(rank, d))
    if not everywhere:
        centred = x - x.mean(0)
        values, vectors = np.linalg.eigh(centred.T @ centred / n)
        change = (vectors * values**-0.5) @ vectors.T @ change
    extra = x @ change
    y = x @ rotation(d, 2) + extra * (0.6 * np.sqrt(extra.size / (extra**2).sum()))
    return x, y + rng.normal(size=y.shape) * np.sqrt((y**2).sum() / y.size / 10)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("train") / "s.zarr", *low_rank_change(3000, 24, 4, decay=0.5))


@pytest.fixture(scope="module")
def lora(small: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run in both directions."""
    out = tmp_path_factory.mktemp("train") / "lora"
    trained(small, out, "lora", rank=4, epochs=3, both=True)
    return out


def metrics_of(run: Path) -> dict[str, Any]:
    result = strict_json((run / "metrics.json").read_text())
    assert isinstance(result, dict)
    return result


# What a run directory holds.


def test_a_run_directory_holds_what_its_description_says(lora: Path) -> None:
    names = {path.name for path in lora.iterdir()}
    epochs = {f"eval_epoch_{n}.json" for n in range(4)}
    assert names == {
        "adapter.json",
        "adapter.safetensors",
        "documents.json",
        "log.jsonl",
        "loss.png",
        "metrics.json",
        "run.yaml",
        "tensorboard",
        "tokens.safetensors",
        *epochs,
    }
    [events] = (lora / "tensorboard").glob("events.out.tfevents.*")
    assert events.stat().st_size > 1000
    assert (lora / "loss.png").stat().st_size > 1000


def test_metrics_have_every_block_with_every_figure(lora: Path) -> None:
    metrics = metrics_of(lora)
    assert metrics["type"] == "lora"
    assert set(metrics["pairs"]) == {KEY, "b:1->a:1"}
    for entry in metrics["pairs"].values():
        assert set(entry["baselines"]) == BASELINES
        for block in (entry["train"], entry["val"], entry["test"], *entry["baselines"].values()):
            assert set(block) >= FIGURES
        assert entry["baselines"]["closed_form"]["name"] == "reduced-rank 4 on procrustes"
        assert set(entry["by_mask"]) == {"masked", "kept"}
        assert isinstance(entry["warnings"], list)


@pytest.mark.parametrize("n", range(4))
def test_every_epoch_leaves_its_figures(lora: Path, n: int) -> None:
    record = strict_json((lora / f"eval_epoch_{n}.json").read_text())
    assert {"epoch", "val_loss", "cka", "cosine_sim", "generations"} <= set(record)
    assert record["epoch"] == n
    assert record["generations"] == []
    assert set(record["pairs"]) == {KEY, "b:1->a:1"}
    pairs = record["pairs"].values()
    for name in ("val_loss", "cka", "cosine_sim"):
        assert record[name] == pytest.approx(np.mean([pair[name] for pair in pairs]))
    for pair in pairs:
        assert pair["val_loss"] == pytest.approx(1 - pair["val"]["r2"], abs=1e-12)
        assert (pair["train_loss"] is None) == (n == 0)


def test_a_closed_form_run_has_epoch_zero_only(small: Planted, tmp_path: Path) -> None:
    trained(small, tmp_path, "affine")
    assert [path.name for path in tmp_path.glob("eval_epoch_*")] == ["eval_epoch_0.json"]
    record = strict_json((tmp_path / "eval_epoch_0.json").read_text())
    assert {"epoch", "val_loss", "cka", "cosine_sim", "generations"} <= set(record)
    assert record["train_loss"] is None
    assert not (tmp_path / "loss.png").exists()
    assert metrics_of(tmp_path)["pairs"][KEY]["reasons"]["baselines.closed_form"] == "this is a closed form"


def test_the_log_is_one_json_object_a_line(lora: Path) -> None:
    events = [strict_json(line) for line in (lora / "log.jsonl").read_text().splitlines()]
    for key in (KEY, "b:1->a:1"):
        own = [event for event in events if event["pair"] == key]
        assert [e["epoch"] for e in own if e["event"] == "epoch"] == [0, 1, 2, 3]
        for event in own[:-1]:
            assert {"event", "pair", "epoch", "train_loss", "val_loss", "lr", "seconds"} <= set(event)
        assert own[-1]["event"] == "stop"
        assert own[-1]["reason"] == "ran all 3 epochs"
        # What is kept is the best epoch, by the loss in the log.
        losses = {e["epoch"]: e["val_loss"] for e in own[:-1]}
        assert own[-1]["best_epoch"] == min(losses, key=lambda n: losses[n])
        assert {"event", "pair", "epoch", "best_epoch", "reason"} <= set(own[-1])


def test_the_card_names_models_store_and_mask(lora: Path, small: Planted) -> None:
    card = load_adapter(lora).card
    assert card["type"] == "lora"
    assert card["store"] == {"path": str(small.path), "fingerprint": small.store.fingerprint}
    assert set(card["models"]) == {"a", "b"}
    assert set(card["models"]["a"]["median_norm"]) == {"1"}
    assert card["mask"] == {"sink_threshold": 5.0, "keep_sinks": False}
    assert card["coverage"] == {"a": 1.0, "b": 1.0}
    assert card["provenance"]["seed"] == 0
    assert "numpy" in card["provenance"]["versions"]
    entry = card["pairs"][0]
    assert entry["options"]["rank"] == 4
    assert entry["options"]["skip"] == "procrustes"
    assert entry["parameters"]["trainable"] == 4 * (24 + 24)


def test_the_card_copies_what_the_store_knows_of_the_weights(
    small: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(store: Store, name: str) -> StoredModel:
        held = known(store, name)
        return replace(held, attributes={**held.attributes, "weights_fingerprint": name * 64})

    known = Store.model
    monkeypatch.setattr(Store, "model", model)
    trained(small, tmp_path, "procrustes")
    models = load_adapter(tmp_path).card["models"]
    assert {name: entry["weights_fingerprint"] for name, entry in models.items()} == {"a": "a" * 64, "b": "b" * 64}


#: Fits a map in an interpreter of its own and prints whether that took torch.
WITHOUT_TORCH = """
import sys
from pathlib import Path
from align.cli import main
sys.argv = ["align", "train", *sys.argv[1:]]
main()
print("torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("type_", "used"),
    [
        *(
            pytest.param(type_.name, False, marks=[] if type_.name == "procrustes" else [pytest.mark.thorough])
            for type_ in map_types()
            if type_.closed
        ),
        pytest.param("lora", True, marks=pytest.mark.thorough),
    ],
)
def test_a_closed_form_needs_no_torch(small: Planted, tmp_path: Path, type_: str, used: bool) -> None:
    words = [
        "--store",
        str(small.path),
        "--type",
        type_,
        "--rank",
        "2",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter.json").is_file()
    assert done.stderr.split()[-1] == str(used)


def test_the_lora_factors_make_up_the_weight(lora: Path) -> None:
    tensors = load_adapter(lora).aligners[KEY].tensors
    product = tensors["skip"].astype(np.float64) + tensors["lora_A"].astype(np.float64) @ tensors["lora_B"]
    np.testing.assert_allclose(tensors["weight"], product, atol=1e-6)


def test_the_figures_are_those_of_the_saved_map(lora: Path, small: Planted) -> None:
    aligner = load_adapter(lora).aligners[KEY]
    test = small.split == TEST
    x, y = (side[1][test].astype(np.float32) for side in (small.x, small.y))
    error = ((y - aligner.apply(x)).astype(np.float64) ** 2).sum()
    total = ((y - aligner.tensors["control_mean"]).astype(np.float64) ** 2).sum()
    assert metrics_of(lora)["pairs"][KEY]["test"]["r2"] == pytest.approx(1 - error / total, abs=1e-6)


def test_people_get_a_table(small: Planted, tmp_path: Path) -> None:
    result = trained(small, tmp_path, "lora", rank=2, epochs=1, lr=1e-6)
    text = describe(result)
    assert KEY in text
    assert "is the optimum of reduced-rank 2 on procrustes" in text
    assert "warning: test R2" in text
    assert str(tmp_path) in text


# That it can be made again.


def comparable(run: Path) -> dict[str, Any]:
    """Everything that must not differ between two runs of the same settings."""
    return {"metrics": metrics_of(run), "tensors": (run / "adapter.safetensors").read_bytes()}


def test_the_same_seed_gives_the_same_run(small: Planted, lora: Path, tmp_path: Path) -> None:
    trained(small, tmp_path / "again", "lora", rank=4, epochs=3, both=True)
    assert comparable(tmp_path / "again") == comparable(lora)
    trained(small, tmp_path / "other", "lora", rank=4, epochs=3, both=True, seed=1)
    other = load_adapter(tmp_path / "other").aligners[KEY].tensors["lora_A"]
    assert np.abs(other - load_adapter(lora).aligners[KEY].tensors["lora_A"]).max() > 0.01


def test_run_yaml_makes_the_same_run(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(capsys, "align", "train", "--config", lora / "run.yaml", "--out", tmp_path / "again", "--json").json
    assert comparable(tmp_path / "again") == comparable(lora)
    assert {**result, "run": None} == {**metrics_of(lora), "run": None}


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings = Settings(
        "s.zarr",
        "lora",
        "b",
        "a",
        layers="1",
        max_rows=100,
        loop=LoopSettings(rank=3, alpha=6.0, skip="ridge", lr=1e-3, min_delta=0.0, precondition=False, seed=7),
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asdict(settings)))
    assert load_settings(tmp_path / "run.yaml") == settings


def test_numbers_that_yaml_reads_as_text_are_numbers(lora: Path, tmp_path: Path) -> None:
    # YAML 1.1: 1e-2 without a dot is a string, and 1 an integer.
    text = (
        (lora / "run.yaml").read_text().replace("lr: null", "lr: 1e-2").replace("temperature: 0.07", "temperature: 1")
    )
    (tmp_path / "run.yaml").write_text(text)
    loop = load_settings(tmp_path / "run.yaml").loop
    assert (loop.lr, loop.temperature) == (0.01, 1.0)
    assert isinstance(loop.temperature, float)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "",
        lambda _: "[1, 2]",
        lambda _: "type: [",
        lambda text: text.replace("loop:", "lop:"),
        lambda text: text.replace("  lr: null", "  lrr: 0.02"),
        lambda text: text.replace("lr: null", "lr: fast"),
        lambda text: text.replace("epochs: 3", "epochs: 3.5"),
        lambda text: text.replace("both: true", "both: 2"),
        lambda text: text.replace("type: lora", "type: null"),
        lambda text: text.replace("  lr: null", "  lr: .nan"),
        lambda text: text.replace("  lr: null", f"  lr: {'7' * 5000}"),
        lambda text: text.replace("  seed: 0", f"  seed: {2**64}"),
        lambda text: text.replace("type: lora", r'type: "a\0b"'),
        lambda text: text.replace("type: lora", f"type: {'[' * 3000}"),
        lambda text: text.replace("loop:", "loop: 3\nlop:"),
    ],
)
def test_a_spoiled_run_yaml_is_one_clear_error(lora: Path, tmp_path: Path, change: Any) -> None:
    text = (lora / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(change(text))
    with pytest.raises(SpecError, match=r"run\.yaml is not a run\.yaml of this program"):
        load_settings(tmp_path / "run.yaml")
    with pytest.raises(SpecError):
        load_settings(tmp_path / "none.yaml")


def test_a_config_is_not_mixed_with_other_flags(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (("--lr", "0.1"), ("--batch-size", "64"), ("--type", "affine"), ("--both",)):
        line = call(capsys, "align", "train", "--config", lora / "run.yaml", *flags, "--out", tmp_path / "x").refusal
        assert flags[0] in line
    assert not (tmp_path / "x").exists()


def test_a_directory_that_holds_a_run_is_left_alone(small: Planted, lora: Path, tmp_path: Path) -> None:
    before = comparable(lora)
    with pytest.raises(SpecError, match="already holds a run; choose another directory or remove it"):
        trained(small, lora, "affine")
    assert comparable(lora) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="is a file; choose another directory"):
        trained(small, tmp_path / "file", "affine")


def test_what_an_interrupted_run_left_is_not_mixed_in(small: Planted, tmp_path: Path) -> None:
    (tmp_path / "eval_epoch_7.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text('{"event": "epoch", "pair": "old"}\n')
    trained(small, tmp_path, "affine")
    assert [path.name for path in tmp_path.glob("eval_epoch_*")] == ["eval_epoch_0.json"]
    assert "old" not in (tmp_path / "log.jsonl").read_text()


def test_the_default_directory_is_the_first_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lora-a-b", "lora-a-b-2", "lora-a-b-3"):
        path = default_directory(Settings("s", "lora"), "a", "b")
        assert path == Path("runs") / name
        path.mkdir(parents=True)


# That training reaches what can be solved for.


@pytest.mark.parametrize(
    ("n", "d", "rank", "decay", "everywhere"),
    [
        (6000, 64, 8, 0.0, True),
        (6000, 64, 8, 1.0, False),
        (6000, 64, 8, 2.0, True),
        (6000, 64, 8, 2.0, False),
        pytest.param(9000, 256, 16, 0.0, True, marks=pytest.mark.thorough),
        pytest.param(9000, 256, 16, 1.0, False, marks=pytest.mark.thorough),
        # Few rows are few steps.
        (1250, 64, 8, 1.0, True),
    ],
)
def test_lora_reaches_its_closed_form_optimum(
    tmp_path: Path, n: int, d: int, rank: int, decay: float, everywhere: bool
) -> None:
    planted = plant(tmp_path / "s.zarr", *low_rank_change(n, d, rank, decay=decay, everywhere=everywhere))
    entry = only(trained(planted, tmp_path / "lora", "lora", rank=rank))
    r2, best = entry["test"]["r2"], entry["baselines"]["closed_form"]["r2"]
    skip = only(trained(planted, tmp_path / "skip", "procrustes"))["test"]["r2"]
    assert best > skip + 0.001
    assert r2 > best - 0.005
    assert "loses-to-closed-form" not in {warning["code"] for warning in entry["warnings"]}


@pytest.mark.parametrize(("n", "d"), tiered([(1250, 64)], [(6000, 64), (3000, 256)]))
def test_lora_is_never_worse_than_its_skip(tmp_path: Path, n: int, d: int) -> None:
    # A rotation and noise: nothing to add, much to overfit.
    x = spectrum_rows(n, d, 1, decay=1.0)
    y = x @ rotation(d, 2)
    y += np.random.default_rng(3).normal(size=y.shape) * y.std() / 2
    planted = plant(tmp_path / "s.zarr", x, y)
    skip = only(trained(planted, tmp_path / "skip", "procrustes"))["test"]["r2"]
    assert only(trained(planted, tmp_path / "lora", "lora"))["test"]["r2"] > skip - 0.005


@pytest.mark.parametrize("skip", tiered(["ridge"], ["none", "identity"]))
def test_lora_adds_to_any_skip(tmp_path: Path, skip: str) -> None:
    planted = plant(tmp_path / "s.zarr", *low_rank_change(5000, 32, 6, decay=0.5))
    entry = only(trained(planted, tmp_path / "run", "lora", rank=6, skip=skip))
    assert entry["baselines"]["closed_form"]["name"] == f"reduced-rank 6 on {skip}"
    assert entry["test"]["r2"] > entry["baselines"]["closed_form"]["r2"] - 0.01


def test_lora_between_widths(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = spectrum_rows(5000, 32, 1, decay=0.5)
    y = x @ (rotation(32, 2, 48) + rng.normal(size=(32, 4)) @ rng.normal(size=(4, 48)) / 12)
    planted = plant(tmp_path / "s.zarr", x, y + 0.05 * rng.normal(size=y.shape))
    result = trained(planted, tmp_path / "run", "lora", rank=8, both=True)
    for key, entry in result["pairs"].items():
        assert entry["test"]["r2"] > entry["baselines"]["closed_form"]["r2"] - 0.01, key
        assert entry["baselines"]["identity"] is None
        assert set(entry["baselines"]) == BASELINES


@pytest.mark.parametrize("type_", ["affine", "linear"])
def test_adamw_comes_near_ridge(tmp_path: Path, type_: str) -> None:
    x = spectrum_rows(6000, 48, 1, decay=1.0, mean=0.3)
    rng = np.random.default_rng(4)
    y = x @ rng.normal(size=(48, 48)) / 5 + (1.0 if type_ == "affine" else 0.0)
    planted = plant(tmp_path / "s.zarr", x, y + 0.2 * y.std() * rng.normal(size=y.shape))
    entry = only(trained(planted, tmp_path / "run", type_, solver="adamw"))
    assert entry["baselines"]["closed_form"]["name"] == f"{type_} ridge"
    assert entry["baselines"]["closed_form"]["r2"] > 0.8
    assert entry["test"]["r2"] > entry["baselines"]["closed_form"]["r2"] - 0.01
    tensors = load_adapter(tmp_path / "run").aligners[KEY].tensors
    assert tensors["mean_source"].any() == (type_ == "affine")


def test_whitening_is_what_makes_small_directions_learn(tmp_path: Path) -> None:
    planted = plant(tmp_path / "s.zarr", *low_rank_change(6000, 64, 8, decay=2.0, everywhere=False))
    entry = only(trained(planted, tmp_path / "raw", "lora", rank=8, precondition=False))
    assert entry["test"]["r2"] < entry["baselines"]["closed_form"]["r2"] - 0.02
    [warning] = [w for w in entry["warnings"] if w["code"] == "loses-to-closed-form"]
    assert "below the reduced-rank 8 on procrustes optimum" in sentence(warning)


def test_the_average_of_the_weights_is_better_than_their_last_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Large steps over small batches: within one epoch nothing settles but the average.
    planted = plant(tmp_path / "s.zarr", *low_rank_change(4000, 32, 4, decay=0.5))
    r2 = {}
    # A large constant makes the average follow the last step alone.
    for name, constant in (("average", 8), ("last", 10**9)):
        monkeypatch.setattr(align.training.loop, "_AVERAGING", constant)
        run = trained(planted, tmp_path / name, "affine", solver="adamw", lr=0.05, batch_size=16, epochs=10, patience=1)
        events = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        r2[name] = 1 - next(e["val_loss"] for e in events if e["event"] == "epoch" and e["epoch"] == 1)
        assert only(run)["test"]["r2"] > 0
    assert r2["average"] > r2["last"] + 0.02


def test_alpha_rescales_and_does_not_move_the_optimum(small: Planted, tmp_path: Path) -> None:
    entry = only(trained(small, tmp_path / "run", "lora", rank=4, alpha=8.0))
    assert entry["test"]["r2"] > entry["baselines"]["closed_form"]["r2"] - 0.005
    aligner = load_adapter(tmp_path / "run").aligners[KEY]
    assert aligner.options["alpha"] == 8.0
    product = aligner.tensors["lora_A"].astype(np.float64) @ aligner.tensors["lora_B"]
    np.testing.assert_allclose(aligner.tensors["weight"], aligner.tensors["skip"] + 2 * product, atol=1e-5)


def test_every_component_of_the_loss_is_logged(small: Planted, tmp_path: Path) -> None:
    trained(small, tmp_path, "lora", rank=4, epochs=2, loss="mse=1,cosine=0.5,infonce=0.1")
    record = strict_json((tmp_path / "eval_epoch_2.json").read_text())["pairs"][KEY]
    parts = record["train_parts"]
    assert set(parts) == {"mse", "cosine", "infonce", "infonce_top1", "infonce_chance"}
    # 2400 pairs in batches of 128, the last of 96.
    assert parts["infonce_chance"] == pytest.approx((2304 * np.log(128) + 96 * np.log(96)) / 2400)
    total = parts["mse"] + 0.5 * parts["cosine"] + 0.1 * parts["infonce"]
    assert record["train_loss"] == pytest.approx(total, rel=1e-4)
    # The validation loss keeps its weights whatever is trained on.
    assert record["val_loss"] == pytest.approx(1 - record["val"]["r2"], abs=1e-12)


def test_contrastive_training_finds_partners(small: Planted, tmp_path: Path) -> None:
    entry = only(trained(small, tmp_path, "lora", rank=4, loss="mse=0,infonce=1"))
    assert entry["test"]["retrieval_top1"] > 0.9
    assert "infonce-at-chance" not in {warning["code"] for warning in entry["warnings"]}


def test_a_contrastive_loss_at_chance_is_named_as_such(tmp_path: Path) -> None:
    # "Stable" at the logarithm of the batch size is not stable but chance.
    planted = plant(tmp_path / "s.zarr", spectrum_rows(1000, 16, 1), spectrum_rows(1000, 16, 2))
    options = {"rank": 2, "epochs": 1, "batch_size": 20, "lr": 1e-4, "skip": "identity"}
    entry = only(trained(planted, tmp_path / "run", "lora", loss="mse=0,infonce=1", temperature=1.0, **options))
    [warning] = [w for w in entry["warnings"] if w["code"] == "infonce-at-chance"]
    assert "is near 3.00, the logarithm of the batch size" in sentence(warning)


# When training stops.


@pytest.mark.parametrize(
    ("r2", "stop", "best"),
    [
        # Two epochs without improvement.
        ([0.5, 0.6, 0.7, 0.6, 0.65, 0.9], 4, 2),
        # From the first epoch on nothing helps: the map before training is kept.
        ([0.5, 0.4, 0.45, 0.9], 2, 0),
        # Slow progress that adds up to min_delta goes on; then it does not add up any more.
        ([0.5, 0.5006, 0.5012, 0.5013, 0.5014, 0.9], 4, 4),
        # A gain below min_delta is still the better map.
        ([0.5, 0.5004, 0.5003, 0.9], 2, 1),
        # Improvement starts patience anew.
        ([0.5, 0.4, 0.6, 0.5, 0.7, 0.6, 0.8], 6, 6),
    ],
)
def test_patience(
    small: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, r2: list[float], stop: int, best: int
) -> None:
    script = iter(r2)
    monkeypatch.setattr(align.training.loop, "score_all", lambda *_, **__: {"map": ({"r2": next(script)}, {})})
    trained(small, tmp_path, "lora", rank=2, epochs=6)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == list(range(stop + 1))
    assert events[-1]["best_epoch"] == best
    if stop < 6:
        assert events[-1]["reason"].startswith(f"stopped at epoch {stop}: no improvement of 0.001 in 2 epochs")
    else:
        assert events[-1]["reason"] == "ran all 6 epochs"


def test_the_best_epoch_is_what_is_saved(tmp_path: Path) -> None:
    # 200 rows, every element of a map free: it overfits within few epochs, and validation says when.
    x = spectrum_rows(250, 40, 1)
    y = x @ rotation(40, 2) + 3 * np.random.default_rng(3).normal(size=x.shape)
    planted = plant(tmp_path / "s.zarr", x, y)
    entry = only(
        trained(planted, tmp_path / "run", "affine", solver="adamw", epochs=30, patience=30, lr=0.01, batch_size=16)
    )
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [e["val_loss"] for e in events if e["event"] == "epoch"]
    assert len(losses) == 31
    assert 0 < int(np.argmin(losses)) < 30
    assert losses[-1] > min(losses) + 0.01
    assert events[-1]["best_epoch"] == int(np.argmin(losses))
    assert entry["val"]["r2"] == pytest.approx(1 - min(losses), abs=1e-9)


@pytest.mark.parametrize("batch_size", [16, 5000])
def test_a_loss_that_explodes_is_one_clear_error(small: Planted, tmp_path: Path, batch_size: int) -> None:
    words = r"^a:1->b:1: the loss became (inf|nan) at epoch [12], step \d+; the last good epoch was [01]: use a smaller"
    with pytest.raises(FitError, match=words) as caught:
        trained(small, tmp_path, "lora", rank=4, lr=1e30, batch_size=batch_size)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "adapter.json").exists()
    assert not (tmp_path / "metrics.json").exists()


def test_an_undefined_validation_is_one_clear_error(
    small: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = iter([({"r2": 0.5}, {}), ({"r2": None}, {"r2": "a predicted state is not finite"})])
    monkeypatch.setattr(align.training.loop, "score_all", lambda *_, **__: {"map": next(script)})
    with pytest.raises(FitError, match=r"undefined at epoch 1 \(a predicted state is not finite\); use a smaller --lr"):
        trained(small, tmp_path, "lora", rank=2)


def test_no_epoch_and_no_choice_sees_a_test_row(tmp_path: Path) -> None:
    clean, spoiled = leaky(tmp_path, "clean"), leaky(tmp_path, "spoiled", split=TEST)
    for store in (clean, spoiled):
        trained(store, tmp_path / store.path.stem, "lora", rank=4, epochs=3)
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("clean", "spoiled")]
    assert files[0] == files[1]
    first, second = (only(metrics_of(tmp_path / name)) for name in ("clean", "spoiled"))
    assert first["val"] == second["val"]
    assert first["test"]["r2"] > second["test"]["r2"] + 0.5


def test_spoiled_validation_stops_training_at_once(tmp_path: Path) -> None:
    spoiled = leaky(tmp_path, "spoiled", split=VAL)
    trained(spoiled, tmp_path / "run", "lora", rank=4, precondition=False)
    [stop] = [e for e in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()) if "reason" in e]
    assert stop["best_epoch"] <= 1


# What cannot be meant.


def test_settings_that_cannot_be_meant_are_refused() -> None:
    base = Settings("s", "lora")
    for change, words in (
        ({"type": "gan"}, "type 'gan': choose one of procrustes, linear, affine, reduced-rank, lora, mlp, compress"),
        ({"solver": "sgd"}, "solver 'sgd': choose closed or adamw"),
        ({"solver": "closed"}, "its closed form is --type reduced-rank"),
        ({"type": "procrustes", "solver": "adamw"}, "has a closed form only"),
        ({"loop": LoopSettings(loss="mae=1")}, "--loss 'mae=1'"),
        ({"loop": LoopSettings(epochs=0)}, "--epochs 0"),
        ({"loop": LoopSettings(batch_size=0)}, "--batch-size 0"),
        ({"loop": LoopSettings(patience=0)}, "--patience 0"),
        ({"loop": LoopSettings(lr=0.0)}, r"--lr 0\.0"),
        ({"loop": LoopSettings(lr=float("nan"))}, "--lr nan"),
        ({"loop": LoopSettings(min_delta=-1.0)}, "--min-delta -1"),
        ({"loop": LoopSettings(seed=-1)}, "--seed -1"),
        ({"loop": LoopSettings(accumulate=0)}, "--accumulate 0"),
        ({"loop": LoopSettings(clip=0.0)}, r"--clip 0\.0"),
        ({"loop": LoopSettings(checkpoint_every=0)}, "--checkpoint-every 0"),
        ({"loop": LoopSettings(cka_every=-1)}, "--cka-every -1"),
        ({"loop": LoopSettings(precision="int4")}, "--precision 'int4': choose one of auto, float32, bfloat16"),
        ({"loop": LoopSettings(tracker="paper")}, "--tracker 'paper': choose one of tensorboard, wandb, none"),
        ({"loop": LoopSettings(latents=0)}, "--latents 0"),
        ({"type": "mlp", "solver": "closed"}, "has no closed form; leave out --solver closed"),
        ({"joint": True, "shared": True}, "give one of them"),
        ({"joint": True, "layer_map": "auto"}, "leave out --layer-map"),
        ({"type": "compress", "loop": LoopSettings(accumulate=2)}, "--accumulate 2: a compress map"),
        ({"type": "compress", "loop": LoopSettings(loss="mse=1,cosine=1")}, "trained on mse in float32"),
        ({"type": "compress", "joint": True}, "a compress map reads one layer"),
        ({"type": "mlp", "shared": True}, "choose one of procrustes, affine, lora"),
        ({"type": "affine", "solver": "adamw", "shared": True}, "use --type lora"),
        ({"shared": True, "loop": LoopSettings(skip="identity")}, "procrustes or ridge, not --skip identity"),
        ({"components": "4"}, "is for --type procrustes"),
        ({"type": "procrustes", "components": "few"}, "--components 'few': write a number"),
        ({"type": "procrustes", "components": "0"}, "--components '0'"),
        ({"type": "affine", "eval_models": True}, "--eval-models is for training by gradient"),
        ({"type": "compress", "eval_models": True}, "cannot be injected token by token"),
    ):
        with pytest.raises(SpecError, match=words):
            check(replace(base, **change))  # type: ignore[arg-type]
    check(base)


def test_a_bad_loss_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--loss"):
        train(
            Settings(str(tmp_path / "no-store"), "lora", loop=LoopSettings(loss="bogus")), tmp_path / "run", quiet=True
        )
    assert not (tmp_path / "run").exists()


def test_a_card_says_of_the_models_what_the_store_says(tiny_store: Path, small: Planted, tmp_path: Path) -> None:
    store = open_store(tiny_store)
    train(Settings(str(tiny_store), "procrustes", layers="2"), tmp_path / "run", quiet=True)
    card = strict_json((tmp_path / "run" / "adapter.json").read_text())
    for name in ("llama", "mistral"):
        verified = card["models"][name]["verified"]
        assert verified == store.model(name).attributes["verified"]
        assert verified["reading"]["causal"] is True
    # A store from before there were verdicts.
    train(Settings(str(small.path), "procrustes"), tmp_path / "old", quiet=True)
    assert "verified" not in strict_json((tmp_path / "old" / "adapter.json").read_text())["models"]["a"]
