"""Runs on stores whose answer is known: the token alone, the token and its context, the position, nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.layers import LayerPair
from align.tokens.table import fit_table
from tests.support.commands import strict_json
from tests.support.planted import Planted, only, plant, trained

N, DOCUMENTS, D = 6000, 60, 12
VOCABULARY = 80


class World:
    """A text of tokens by a power law, what each is alone, and a context that no token tells."""

    def __init__(self, seed: int = 0, *, n: int = N, vocabulary: int = VOCABULARY) -> None:
        rng = np.random.default_rng(seed)
        chance = np.arange(1, vocabulary + 1) ** -1.0
        self.tokens = rng.choice(vocabulary, size=n, p=chance / chance.sum())
        self.embedding = rng.normal(size=(vocabulary, D))
        self.targets = rng.normal(size=(vocabulary, D))
        self.context = rng.normal(size=(n, D))
        self.noise = rng.normal(size=(n, D))
        self.mixing = rng.normal(size=(D, D)) / np.sqrt(D)
        self.x = np.hstack([self.embedding[self.tokens], self.context])
        self.zero = np.hstack([self.embedding[self.tokens], np.zeros((n, D))])


def codes(entry: dict[str, Any]) -> set[str]:
    return {warning["code"] for warning in entry["warnings"]}


def run(planted: Planted, out: Path, type_: str = "affine", **options: Any) -> dict[str, Any]:
    return only(trained(planted, out, type_, layer_map="1:1", **options))


def test_the_token_alone_leaves_nothing_to_a_map(tmp_path: Path) -> None:
    """y = G[token] + noise: no map from states that hold token and context is above the table."""
    world = World()
    y = world.targets[world.tokens] + 0.5 * world.noise
    planted = plant(tmp_path / "s.zarr", {0: world.zero, 1: world.x}, y, documents=DOCUMENTS, tokens=world.tokens)
    for type_ in ("affine", "linear", "procrustes", "reduced-rank"):
        entry = run(planted, tmp_path / type_, type_, **({"rank": 4} if type_ == "reduced-rank" else {}))
        token = entry["baselines"]["token"]
        assert token["r2"] == pytest.approx(1 / 1.25, abs=0.02)
        assert token["partial_r2"] == 0
        assert token["partial_r2_ci95"] == [0, 0]
        assert entry["test"]["partial_r2"] <= 0
        assert "token-explains" in codes(entry)
        same, chance = (entry["test"][f"retrieval_same_token_{name}"] for name in ("top1", "chance"))
        assert same == pytest.approx(chance, abs=0.06)
        assert token["retrieval_same_token_top1"] == pytest.approx(token["retrieval_same_token_chance"], abs=1e-12)


def test_where_the_token_leaves_no_error_nothing_is_left(tmp_path: Path) -> None:
    world = World()
    y = world.targets[world.tokens]
    planted = plant(tmp_path / "s.zarr", {0: world.zero, 1: world.x}, y, documents=DOCUMENTS, tokens=world.tokens)
    entry = run(planted, tmp_path / "run")
    assert entry["baselines"]["token"]["r2"] == pytest.approx(1, abs=1e-9)
    assert entry["test"]["partial_r2"] is None
    assert "leaves no error" in entry["reasons"]["test.partial_r2"]
    assert "token-explains" in codes(entry)


def test_what_the_context_adds_is_told_from_the_token(tmp_path: Path) -> None:
    """y = G[token] + 0.8 H context + 0.5 noise, and states from which an affine map reads both.

    What the token leaves is 0.64 + 0.25 a dimension, of which 0.64 can be explained.
    """
    world = World()
    mixing = np.linalg.qr(world.mixing)[0]
    y = world.targets[world.tokens] + 0.8 * world.context @ mixing + 0.5 * world.noise
    x = np.hstack([world.targets[world.tokens], world.context])
    planted = plant(tmp_path / "s.zarr", {0: world.zero, 1: x}, y, documents=DOCUMENTS, tokens=world.tokens)
    entry = run(planted, tmp_path / "run")
    test, token = entry["test"], entry["baselines"]["token"]
    assert test["partial_r2"] == pytest.approx(0.64 / 0.89, abs=0.02)
    low, high = test["partial_r2_ci95"]
    assert 0.6 < low < test["partial_r2"] < high < 0.8
    assert "token-explains" not in codes(entry)
    assert token["r2"] == pytest.approx(1 / 1.89, abs=0.03)
    assert test["retrieval_same_token_top1"] > 3 * test["retrieval_same_token_chance"]
    assert token["retrieval_same_token_top1"] == pytest.approx(token["retrieval_same_token_chance"], abs=1e-12)
    # The table is the plain one, near enough: of y, 0.89 is not the token's.
    assert entry["baselines"]["mean"]["partial_r2"] == pytest.approx(-1 / 0.89, abs=0.1)


def test_what_only_the_position_decides_is_not_the_tokens(tmp_path: Path) -> None:
    world = World(1)
    place = np.arange(N) % (N // DOCUMENTS) / (N // DOCUMENTS)
    waves = np.sin(np.outer(place, np.arange(1, D + 1)) * 2 * np.pi)
    y = waves @ world.mixing + 0.1 * world.noise
    planted = plant(
        tmp_path / "s.zarr", {0: world.zero, 1: np.hstack([waves, world.context])}, y,
        documents=DOCUMENTS, tokens=world.tokens,
    )  # fmt: skip
    entry = run(planted, tmp_path / "run")
    assert entry["baselines"]["token"]["r2"] == pytest.approx(0, abs=0.01)
    assert entry["token"]["k"] >= 256
    assert entry["test"]["partial_r2"] == pytest.approx(entry["test"]["r2"], abs=0.01)
    assert "token-explains" not in codes(entry)


def test_unseen_tokens_are_predicted_from_layer_0(tmp_path: Path) -> None:
    """Half of the test tokens never occur in train, and a linear map of the embedding tells what they are."""
    world = World(2)
    document = np.arange(N) * DOCUMENTS // N
    splits = np.array([0] * 40 + [1] * 10 + [2] * 10)
    test = splits[document] == 2
    tokens = np.where(test & (world.tokens % 2 == 0), world.tokens + VOCABULARY, world.tokens)
    val = splits[document] == 1
    tokens = np.where(val & (world.tokens % 4 == 0), world.tokens + VOCABULARY, tokens)
    embedding = np.random.default_rng(5).normal(size=(2 * VOCABULARY, D))
    y = embedding[tokens] @ world.mixing + 0.1 * world.noise
    zero = np.hstack([embedding[tokens], np.zeros((N, D))])
    planted = plant(
        tmp_path / "s.zarr", {0: zero, 1: world.x}, y, documents=DOCUMENTS, tokens=tokens, splits=splits.tolist()
    )
    known = run(planted, tmp_path / "known")
    assert known["token"]["test_rows_in_table"] < 0.8 * known["token"]["test_rows"]
    assert known["baselines"]["token"]["r2"] > 0.97
    none = plant(tmp_path / "n.zarr", {1: world.x}, y, documents=DOCUMENTS, tokens=tokens, splits=splits.tolist())
    mean = only(trained(none, tmp_path / "none", "affine"))
    assert mean["token"]["backoff"] == "train mean"
    assert "holds no layer 0" in mean["token"]["why"]
    assert mean["token"]["ridge"] is None
    assert 0.2 < mean["baselines"]["token"]["r2"] < 0.8


def test_layer_0_may_depend_on_the_position(tmp_path: Path) -> None:
    """As GPT-2's does: the position adds to each row what averages out over a token's rows."""
    world = World(3)
    wide = world.zero.copy()
    wide[:, D:] = 3.0 * world.context
    y = world.embedding[world.tokens] @ world.mixing + 0.1 * world.noise
    planted = plant(tmp_path / "s.zarr", {0: wide, 1: world.x}, y, documents=DOCUMENTS, tokens=world.tokens)
    entry = run(planted, tmp_path / "run")
    assert entry["token"]["backoff"] == "layer 0"
    assert entry["baselines"]["token"]["r2"] > 0.97


def test_directions_have_tables_of_their_own_and_targets_share_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.tokens import table as tables
    from align.tokens.files import load_tables

    world = World(4)
    y = world.targets[world.tokens] + 0.5 * world.context + 0.2 * world.noise
    planted = plant(
        tmp_path / "s.zarr", {0: world.zero, 1: world.x, 2: world.x + 1}, {1: y, 2: 2 * y + 1},
        documents=DOCUMENTS, tokens=world.tokens,
    )  # fmt: skip
    fitted = []
    fit = tables.fit_table
    monkeypatch.setattr(tables, "fit_table", lambda *a, **k: (fitted.append((a[1].source, a[2])), fit(*a, **k))[1])
    result = trained(planted, tmp_path / "run", "affine", layers="1,2", both=True)
    assert sorted(fitted) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert len(result["pairs"]) == 4
    file = load_tables(tmp_path / "run")
    assert set(file.pairs) == set(result["pairs"])
    assert file.store == planted.store.fingerprint
    # Scales and shifts of the target are scales and shifts of the prediction.
    one, two = file.table("a:1->b:1"), file.table("a:2->b:2")
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_allclose(two.states, 2 * one.states + 1, rtol=1e-4, atol=1e-4)
    back = result["pairs"]["b:1->a:1"]
    assert back["token"]["backoff"] == "train mean"
    assert back["baselines"]["token"]["r2"] == pytest.approx(0.5, abs=0.05)


def test_a_run_records_how_the_token_was_fitted_and_sums_its_errors(tmp_path: Path) -> None:
    world = World(5)
    y = world.targets[world.tokens] + 0.5 * world.context + 0.2 * world.noise
    planted = plant(tmp_path / "s.zarr", {0: world.zero, 1: world.x}, y, documents=DOCUMENTS, tokens=world.tokens)
    entry = run(planted, tmp_path / "run")
    written = strict_json((tmp_path / "run" / "documents.json").read_text())["pairs"]["a:1->b:1"]
    sse = {name: np.array(values) for name, values in written["sse"].items()}
    assert entry["test"]["partial_r2"] == pytest.approx(1 - sse["map"].sum() / sse["token"].sum(), rel=1e-9)
    assert entry["baselines"]["token"]["r2"] == pytest.approx(1 - sse["token"].sum() / sum(written["sst"]), rel=1e-6)
    # The prediction itself, row by row.
    split, train = planted.split, planted.split == 0
    table, k = np.zeros((VOCABULARY, D)), entry["token"]["k"]
    from align.tokens.files import load_tables

    predicted = load_tables(tmp_path / "run").table("a:1->b:1").predict(world.tokens[split == 2])
    n = np.bincount(world.tokens[train], minlength=VOCABULARY)
    np.add.at(table, world.tokens[train], y[train].astype(np.float32))
    means = table / n[:, None]
    x = world.zero.astype(np.float32)
    centred = x[train] - x[train].mean(axis=0)
    gram = centred.T @ centred
    ridge = entry["token"]["ridge"] * np.trace(gram) / len(gram) * np.eye(len(gram))
    weight = np.linalg.solve(gram + ridge, centred.T @ (y[train] - y[train].mean(axis=0)))
    prior = y[train].mean(axis=0) + (x - x[train].mean(axis=0)) @ weight
    share = (n / (n + k))[world.tokens][:, None]
    expected = prior + share * (means[world.tokens] - prior)
    np.testing.assert_allclose(predicted, expected[split == 2], atol=2e-4)
    assert entry["baselines"]["token"]["mse"] == pytest.approx(((y - expected)[split == 2] ** 2).mean(), rel=1e-4)


@pytest.mark.parametrize("entries", [0, 30, 1000])
def test_a_table_within_little_memory_predicts_the_rest_from_layer_0(tmp_path: Path, entries: int) -> None:
    world = World(7)
    y = 0.5 * world.targets[world.tokens] + world.embedding[world.tokens] @ world.mixing + 0.2 * world.noise
    store = plant(tmp_path / "s.zarr", {0: world.zero, 1: world.x}, y, documents=DOCUMENTS, tokens=world.tokens).store
    pairs = store.pairs("a", "b").select()
    full = fit_table(store, pairs, 1)
    small = fit_table(store, pairs, 1, memory=entries * 8 * D)
    assert small.facts["train_rows"] == full.facts["train_rows_in_table"] == full.facts["train_rows"]
    if entries == 1000:
        assert small.facts == full.facts
        np.testing.assert_array_equal(small.states, full.states)
        return
    # An entry is a sum over train and one over validation rows.
    assert small.facts["tokens"] == entries // 2
    frequent = np.argsort(-np.bincount(world.tokens[np.isin(np.arange(N), pairs.row_source[pairs.split == 0])]))
    rare = np.sort(frequent[entries // 2 :])
    weight = np.linalg.lstsq(world.zero[:, :D], y, rcond=None)[0]
    assert np.corrcoef(small.predict(rare).ravel(), (world.embedding[rare] @ weight).ravel())[0, 1] > 0.98


def test_predictions_beyond_what_is_kept_are_those_of_layer_0_or_in_a_file_the_mean(tmp_path: Path) -> None:
    from align.tokens.files import load_tables, save_tables

    world = World(8)
    y = world.targets[world.tokens] + 0.5 * world.noise
    store = plant(tmp_path / "s.zarr", {0: world.zero, 1: world.x}, y, documents=DOCUMENTS, tokens=world.tokens).store
    pairs = store.pairs("a", "b").select()
    full, few = (fit_table(store, pairs, 1, keep=keep) for keep in (1 << 30, 10 * 4 * D))
    scored = world.tokens[store.corpus.window_split[store.tokens("a").window] != 0]
    np.testing.assert_array_equal(full.ids, np.unique(scored))
    assert len(few.ids) == 10
    np.testing.assert_array_equal(few.states, full.predict(few.ids))
    counts = np.bincount(scored, minlength=VOCABULARY)
    others = np.setdiff1d(full.ids, few.ids)
    assert counts[few.ids].min() >= counts[others].max()
    assert few.others is not None
    np.testing.assert_allclose(few.predict(others), few.others(others), rtol=1e-6)
    save_tables(tmp_path, {"a->b:1": few}, [LayerPair("a", (1,), "b", 1)], store="x")
    np.testing.assert_array_equal(load_tables(tmp_path).table("a:1->b:1").predict(others), [few.mean] * len(others))


def test_a_compressed_run_has_the_token_at_its_own_positions(tmp_path: Path) -> None:
    world = World(9, n=2400)
    y = world.targets[world.tokens] + 0.5 * world.noise
    planted = plant(tmp_path / "s.zarr", {0: world.zero, 1: world.x}, y, documents=DOCUMENTS, tokens=world.tokens)
    entry = run(planted, tmp_path / "run", "compress", latents=4, latent_dim=8, epochs=1)
    token = entry["baselines"]["token"]
    assert token["n"] == entry["test"]["n"]
    assert token["r2"] == pytest.approx(0.8, abs=0.05)
    assert token["all_positions"] is None
    assert "paired positions alone" in entry["reasons"]["baselines.token.all_positions"]
    assert entry["test"]["partial_r2"] < 0
    assert entry["baselines"]["pca"]["partial_r2"] < 0
    assert "token-explains" in codes(entry)
    assert set(entry["rate_distortion"]["r2"]) == {"compress", "pca", "strided"}
    sums = strict_json((tmp_path / "run" / "documents.json").read_text())["pairs"]["a:1->b:1"]
    assert 1 - sum(sums["sse"]["token"]) / sum(sums["sst"]) == pytest.approx(token["r2"], abs=1e-6)
    # The same table scored row by row.
    plain = run(planted, tmp_path / "affine")
    assert plain["token"] == entry["token"]
    assert plain["baselines"]["token"]["r2"] == pytest.approx(token["r2"], abs=1e-9)


def test_the_summary_leads_with_what_is_left_beyond_the_token(tmp_path: Path) -> None:
    from align.notebook.run import Run
    from align.runs.train import describe

    world = World(10, n=3000)
    y = world.targets[world.tokens] + 0.5 * world.noise
    planted = plant(tmp_path / "s.zarr", {0: world.zero, 1: world.x}, y, tokens=world.tokens)
    result = trained(planted, tmp_path / "run", "affine", layer_map="0:1,1:1")
    entry = result["pairs"]["a:1->b:1"]
    head, *_ = describe(result).splitlines()
    assert head.split()[:2] == ["pair", "beyond"]
    test, token = entry["test"], entry["baselines"]["token"]
    line = next(line for line in describe(result).splitlines() if line.startswith("a:1->b:1"))
    assert line.split()[1:4] == [f"{test['partial_r2']:.3f}", f"{test['r2']:.3f}", f"{token['r2']:.3f}"]
    # Two test documents, said once for both layer pairs.
    assert describe(result).count("2 documents, and an interval takes 3") == 1
    assert "token" not in line.rsplit("   ", 1)[1], "the token is no control"
    shown = str(Run(tmp_path / "run")._sheet())
    assert "beyond the token" in shown
    assert f"{test['partial_r2']:.3f}" in shown
    assert f"{test['partial_r2']:.3f}" in repr(Run(tmp_path / "run"))


def test_runs_are_the_same_to_the_byte(tmp_path: Path) -> None:
    world = World(6, n=2000)
    planted = plant(tmp_path / "s.zarr", {0: world.zero, 1: world.x}, world.noise, tokens=world.tokens)
    for name in ("one", "two"):
        run(planted, tmp_path / name)
    for file in ("tokens.safetensors", "metrics.json", "documents.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
