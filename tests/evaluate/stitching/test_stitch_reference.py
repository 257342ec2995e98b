"""Stitched losses beside the plain way: one window, one condition, one whole pass, all logits in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import evaluate.stitching.conditions as passes
import evaluate.stitching.predictions as predictions
from align.maps.fitted import load_adapter
from align.runs.train import train
from align.settings import Settings
from evaluate.injection.controls import CONTROLS, token_table
from evaluate.injection.loading import load
from evaluate.injection.wire import wire
from evaluate.stitching.stitch import _Stitcher, measure
from evaluate.stitching.windows import scored_windows
from featstore.models import residual as sites
from featstore.models.injection import aligned, inject
from featstore.models.probe.prove import Needs
from featstore.models.tail import Whole
from featstore.store import open_store

TOKENS = 900


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    directory = tmp_path_factory.mktemp("reference") / "run"
    train(Settings(str(tiny_store), "affine", layers="0,2"), directory, quiet=True)
    return SimpleNamespace(adapter=load_adapter(directory), store=open_store(tiny_store))


def sums_of(run: SimpleNamespace, **options: Any) -> dict[str, Any]:
    sums: dict[str, Any] = measure(run.store, run.adapter, max_tokens=TOKENS, quiet=True, device="cpu", **options)[1]
    return sums["pairs"]


@torch.inference_mode()
def plainly(run: SimpleNamespace, keep: str) -> dict[str, Any]:
    """Nats and divergence of every layer pair, condition and document."""
    windows = scored_windows(run.store, "llama", "mistral", max_tokens=TOKENS)
    wires = [wire(run.adapter, a) for a in run.adapter.aligners.values()]
    tables = {to.aligner.pair.key: token_table(run.adapter, to.aligner) for to in wires}
    states = _Stitcher(run.store, windows, wires, tables, keep=keep, controls=CONTROLS, seed=0)
    layers = [to.aligner.pair.target_layer for to in wires]
    target = load(run.adapter, "mistral", (), device="cpu", quiet=True).tested(Needs(layers=tuple(layers), hide=True))
    found: dict[str, Any] = {}
    for at, window in enumerate(windows):
        ids = torch.from_numpy(window.target.ids.astype(np.int64))[None]
        with sites.watching(target.stream, layers) as own:
            clean = target.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        rows = [t for t in range(2, ids.shape[1]) if not window.target.special[t]]
        before = torch.tensor(rows) - 1
        for to in wires:
            key, layer = to.aligner.pair.key, to.aligner.pair.target_layer
            given = states._states(at, window, to, own[layer][0, window.places])
            for name, value in given.items():
                if isinstance(value, str):
                    continue
                injection = aligned(own[layer], [value], [window.places], layer=layer, keep=keep)
                with inject(target.stream, injection, whole=True):
                    log_q = target.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
                nats = -float(log_q[before, ids[0, rows]].sum())
                kl = float((clean.exp() * (clean - log_q))[before].sum())
                sums = found.setdefault(key, {}).setdefault(name, {}).setdefault(window.document, [0.0, 0.0])
                sums[0] += nats
                sums[1] += kl
    return found


@pytest.mark.parametrize("keep", ["own", "hide"])
def test_figures_are_those_of_the_plain_way(run: SimpleNamespace, keep: str) -> None:
    wanted, found = plainly(run, keep), sums_of(run, keep=keep)
    assert list(found) == list(wanted)
    for key, conditions in wanted.items():
        assert set(found[key]["nats"]) == {"clean", *conditions}
        tokens = np.array(found[key]["tokens"])
        for name, documents in conditions.items():
            order = [documents[number] for number in found[key]["documents"]]
            for column, figure in enumerate(("nats", "kl")):
                sums = np.array([each[column] for each in order]) / tokens
                apart = np.abs(np.array(found[key][figure][name]) / tokens - sums)
                assert (apart < 1e-5 + 1e-6 * sums).all(), (key, name, figure)


def test_batches_of_any_size_give_the_same_figures(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = sums_of(run)

    def agree() -> None:
        again = sums_of(run)
        for key, pair in usual.items():
            for figure in ("nats", "kl"):
                for name, values in pair[figure].items():
                    np.testing.assert_allclose(
                        again[key][figure][name], values, rtol=2e-6, atol=2e-3, err_msg=f"{key} {name}"
                    )
            assert again[key]["tokens"] == pair["tokens"]

    with monkeypatch.context() as one:
        one.setattr(passes, "_TOKENS", 1)
        one.setattr(predictions, "_ROWS", 7)
        one.setattr(predictions, "_CACHED", 1)
        agree()
    with monkeypatch.context() as many:
        # As on an accelerator: windows of several lengths go together.
        many.setattr(passes, "_most", lambda _: 4096)
        many.setattr("evaluate.stitching.stitch.together", lambda loaded, windows: [list(range(len(windows)))])
        agree()
    with monkeypatch.context() as whole:
        # As for a model whose decoder cannot be run by itself.
        whole.setattr("evaluate.stitching.stitch.last_part", lambda loaded, _: Whole(loaded.stream))
        agree()
