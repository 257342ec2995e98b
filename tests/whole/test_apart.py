"""Pairs without a planted answer: what nothing has learnt is not called a finding, what was learnt apart is not lost.

The untrained copy reads the same tokens as the trained model: whatever a method finds between the two is in tokens and
documents. SmolLM2 and the small model were trained on other text with other tokenizers and widths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import align
import featstore

DEFAULT = ("procrustes", "affine")


def train(store: Path, out: Path, *types: str) -> dict[str, Any]:
    """The metrics of default runs from the store's first model to its second, by type and layer pair."""
    return {type_: align.train(store, type=type_, out=out / type_).metrics.pairs for type_ in types}


@pytest.fixture(scope="module")
def untrained(untrained_store, tmp_path_factory) -> dict[str, Any]:
    return train(untrained_store, tmp_path_factory.mktemp("untrained-runs"), *DEFAULT)


def test_the_store_pairs_every_token_of_the_same_tokenizer(untrained_store):
    store = featstore.open_store(untrained_store)
    trained, copy = (store.rows(name, 2)[:] for name in ("small", "untrained"))
    assert trained.shape == copy.shape
    assert np.abs(np.asarray(trained, np.float32) - np.asarray(copy, np.float32)).max() > 0.1


@pytest.mark.parametrize("type_", DEFAULT)
def test_no_default_map_of_an_untrained_model_is_worse_than_its_mean(untrained, type_):
    assert len(untrained[type_]) == 2
    for key, pair in untrained[type_].items():
        assert pair.test.r2 > 0, key


@pytest.mark.parametrize("type_", DEFAULT)
def test_the_token_explains_more_of_an_untrained_model_than_any_map(untrained, type_):
    for key, pair in untrained[type_].items():
        assert pair.baselines["token"].r2 > pair.test.r2, key
        assert pair.test.partial_r2 < 0, key


def test_cka_with_an_untrained_model_is_mostly_what_shared_tokens_give(untrained_store, tmp_path):
    """At the embedding all of it; deeper a random network mixes its context too, which two models share as well.

    Documents in each other's place, which do not share their tokens, give much less: by that floor alone an untrained
    network would be a finding.
    """
    found = align.cka(untrained_store, out=tmp_path)
    documents, token = (found.permutations[name] for name in ("documents", "token"))
    for place in range(2):
        assert documents.value[place][place] > documents.p95[place][place]
        assert documents.mean[place][place] < token.mean[place][place]
        assert token.mean[place][place] > 0.5 * token.value[place][place]
    assert token.value[0][0] == pytest.approx(token.mean[0][0], abs=1e-3)


@pytest.fixture(scope="module")
def apart(apart_store, tmp_path_factory) -> dict[str, Any]:
    return train(apart_store, tmp_path_factory.mktemp("apart-runs"), *DEFAULT)


@pytest.mark.demo_pair
class TestTrainedApart:
    def test_the_models_differ_in_width_and_tokenizer(self, apart_store):
        store = featstore.open_store(apart_store)
        widths = [store.rows(name, 0).shape[1] for name in ("smollm2", "small")]
        assert widths == [576, 192]
        assert store.rows("smollm2", 0).shape[0] != store.rows("small", 0).shape[0]

    @pytest.mark.parametrize("type_", DEFAULT)
    def test_no_default_map_is_worse_than_the_mean(self, apart, type_):
        for key, pair in apart[type_].items():
            assert pair.test.r2 > 0, key

    def test_the_token_alone_explains_most(self, apart):
        for key, pair in apart["affine"].items():
            assert pair.baselines["token"].r2 > 0.5 * pair.test.r2, key
