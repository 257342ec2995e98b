"""Debiased CKA over documents: a generic least-squares reference, rows that share topics, planted signals, features."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from align.metrics import debiased_cka, debiased_ckas, similarity
from align.metrics.scorer import score
from featstore.errors import FitError
from tests.support.residuals import cosine_of_kernels, unequal_documents, with_topics, without_row_effects

forms = pytest.mark.parametrize("few", [0, 1024], ids=["features", "grams"])


def paired(seed: int, labels: Any, dx: int = 6, dy: int = 5) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(labels), dx)) + 3 + rng.standard_normal((int(labels.max()) + 1, dx))[labels]
    return x, x @ rng.standard_normal((dx, dy)) / 2 + rng.standard_normal((len(labels), dy)) - 1


class TestReference:
    @forms
    @pytest.mark.parametrize("sizes", [(5, 5), (3, 9), (12, 2, 2, 1), (1, 7, 2, 12, 3), (1,) * 20, (20, 1, 1, 30, 18)])
    def test_generic_least_squares(self, few: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(similarity, "FEW_ROWS", few)
        # Rows of a document need not follow each other.
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
        x, y = paired(1, labels)
        expected = cosine_of_kernels(*(z @ z.T for z in (x - x.mean(0), y - y.mean(0))), labels)
        value, reason = debiased_cka(x, y, labels)
        assert reason is None
        assert value == pytest.approx(expected, abs=1e-10)
        assert debiased_cka(y + 7, -3 * x, [f"document {k}" for k in labels])[0] == pytest.approx(value, abs=1e-10)

    @forms
    def test_a_row_each_is_what_it_was(self, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(similarity, "FEW_ROWS", few)
        x, y = paired(2, np.arange(60))
        usual, by_document = debiased_ckas(x, y, [None, np.arange(60)[::-1]])
        assert by_document[0] == pytest.approx(usual[0], abs=1e-12)

    @pytest.mark.parametrize("n", [1500, 4500])
    def test_float32_rows(self, n: int) -> None:
        rng = np.random.default_rng(n)
        labels = unequal_documents(rng, 40, median=n / 30)[:n]
        x, y = paired(3, labels, 24, 30)
        exact = debiased_cka(x, y, labels)[0]
        narrow = debiased_cka(x.astype(np.float32), y.astype(np.float32), labels)[0]
        assert narrow == pytest.approx(exact, abs=1e-6)

    @pytest.mark.parametrize("long", [0, 2, 80], ids=["alike", "few long", "many long"])
    def test_float32_rows_of_more_dimensions(self, long: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(similarity, "FEW_ROWS", 64)
        labels = np.arange(300) // 12
        x, y = paired(6, labels, 320, 320)
        for rows in (x, y):
            rows[:long] *= 100
        x, y = x.astype(np.float32), y.astype(np.float32)
        exact = debiased_cka(x.astype(np.float64), y.astype(np.float64), labels)[0]
        assert debiased_cka(x, y, labels)[0] == pytest.approx(exact, abs=2e-6)

    def test_long_rows_are_multiplied_in_float64(self) -> None:
        rows = np.random.default_rng(7).standard_normal((600, 700)).astype(np.float32)
        rows[[3, 77]] *= 1000
        gram, exact = similarity._gram(rows), rows.astype(np.float64) @ rows.T.astype(np.float64)
        np.testing.assert_allclose(gram[[3, 77]], exact[[3, 77]], rtol=1e-12, atol=1e-7)
        np.testing.assert_array_equal(gram, gram.T)
        others = np.delete(np.arange(600), [3, 77])
        assert np.abs(gram - exact)[np.ix_(others, others)].max() < 1e-3

    def test_reasons(self) -> None:
        x, y = paired(4, np.arange(20))
        flat = np.ones((20, 3))
        for value, reason, wanted in (
            (*debiased_cka(x, y, np.zeros(20)), "all 20 are of one"),
            (*debiased_cka(x[:5], y[:5], [0, 1, 1, 1, 1]), "5 rows of 2 documents"),
            (*debiased_cka(x[:3], y[:3], [0, 1, 2]), "at least 4 rows, not 3"),
            (*debiased_cka(x, flat, np.arange(20) // 4), "second set of states does not vary"),
            # What varies within documents alone leaves nothing between them.
            (*debiased_cka(np.eye(20), y, np.arange(20) // 4), "self-HSIC of the first"),
        ):
            assert math.isnan(value)
            assert wanted in (reason or "")
        with pytest.raises(FitError, match="19 document labels for 20 rows"):
            debiased_cka(x, y, np.arange(19))

    def test_blocks_of_scores_have_both_figures(self) -> None:
        labels = np.arange(400) // 20
        x, y = paired(5, labels, 8, 8)
        figures, reasons = score(y, x, np.zeros(8), documents=labels)
        assert not {"cka_debiased", "cka_debiased_rows"} & reasons.keys()
        assert figures["cka_debiased"] == pytest.approx(debiased_cka(y, x, labels)[0], abs=1e-12)
        assert figures["cka_debiased_rows"] == pytest.approx(debiased_cka(y, x)[0], abs=1e-12)
        figures, reasons = score(y, x, np.zeros(8), documents=np.zeros(400))
        assert figures["cka_debiased"] is None
        assert "all 400 are of one" in reasons["cka_debiased"]
        assert figures["cka_debiased_rows"] is not None
        with pytest.raises(FitError, match="document labels"):
            score(y, x, np.zeros(8), documents=labels[:, None])


class TestDocuments:
    @pytest.mark.parametrize(("documents", "draws", "rows_alone"), [(6, 300, 0.10), (12, 150, 0.06), (30, 60, 0.02)])
    def test_what_shares_its_topics_alone_has_none_in_common(
        self, documents: int, draws: int, rows_alone: float
    ) -> None:
        rng = np.random.default_rng(200 + documents)
        found = []
        for _ in range(draws):
            labels = unequal_documents(rng, documents, median=15)
            x, y = (with_topics(rng, labels, 32, 0.3) for _ in range(2))
            found.append([value for value, _ in debiased_ckas(x, y, [labels, None])])
        over_documents, over_rows = np.array(found).T
        assert abs(over_documents.mean()) < 2 * over_documents.std() / math.sqrt(draws)
        assert over_rows.mean() > rows_alone, "every row its own document: few documents raise it"

    def test_a_planted_signal_does_not_depend_on_the_number_of_documents(self) -> None:
        means = []
        for documents, draws in ((6, 200), (25, 40), (100, 8)):
            rng = np.random.default_rng(documents)
            values = []
            for _ in range(draws):
                labels = unequal_documents(rng, documents)
                common = with_topics(rng, labels, 16, 0.3)
                x, y = (common + 0.7 * with_topics(rng, labels, 16, 0.3) for _ in range(2))
                values.append(debiased_cka(x, y, labels)[0])
            means.append(np.mean(values))
        population = 1 / 1.49**2
        assert np.ptp(means) < 0.02, means
        assert means[-1] == pytest.approx(population, abs=0.02)


class TestFeatures:
    @forms
    @pytest.mark.parametrize("sizes", [(1,) * 14, (6, 5), (1, 7, 2, 6)])
    def test_self_terms_are_over_pairs_of_different_features(
        self, few: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(similarity, "FEW_ROWS", few)
        labels = np.repeat(np.arange(len(sizes)), sizes)
        # Many features in common, so that the sums over different ones are positive.
        rng = np.random.default_rng(0)
        factor = rng.standard_normal((len(labels), 2))
        x, y = (factor @ rng.standard_normal((2, d)) + 0.1 * rng.standard_normal((len(labels), d)) for d in (5, 4))
        selves = []
        for z in (x, y):
            kernels = [without_row_effects(np.outer(z[:, a], z[:, a]), labels) for a in range(z.shape[1])]
            d = len(kernels)
            selves.append(sum(np.sum(k * m) for k in kernels for m in kernels if k is not m) / (d * (d - 1)))
        cross = np.sum(without_row_effects(x @ x.T, labels) * without_row_effects(y @ y.T, labels)) / 20
        value, reason = debiased_cka(x, y, labels, correct_features=True)
        assert reason is None
        assert value == pytest.approx(cross / math.sqrt(selves[0] * selves[1]), abs=1e-9)

    def test_few_features_of_wide_representations(self) -> None:
        """Both populations are 8 shared factors seen through many features each, one side with factors of its own."""
        rng = np.random.default_rng(1)
        corrected, plain = [], []
        for _ in range(25):
            labels = unequal_documents(rng, 20, median=25)
            shared, own = with_topics(rng, labels, 8, 0.3), with_topics(rng, labels, 8, 0.3)
            x = shared @ rng.standard_normal((8, 60)) + 3 * rng.standard_normal((len(labels), 60))
            y = np.concatenate([shared, own], axis=1) @ rng.standard_normal((16, 50))
            corrected.append(debiased_cka(x, y, labels, correct_features=True)[0])
            plain.append(debiased_cka(x, y, labels)[0])
        # Features beyond number: noise of each feature's own averages out of the kernel, K = shared shared'.
        population = 1 / math.sqrt(2)
        assert np.mean(corrected) == pytest.approx(population, abs=0.04)
        assert np.mean(plain) < population - 0.25

    def test_what_cannot_be_corrected(self) -> None:
        x, y = paired(6, np.arange(30))
        value, reason = debiased_cka(x[:, :1], y, correct_features=True)
        assert math.isnan(value)
        assert "1 feature" in (reason or "")
        rng = np.random.default_rng(2)
        # Features that have nothing in common: at least one side's sum over different ones is below 0 in most draws.
        reasons = [debiased_cka(*rng.standard_normal((2, 30, 3)), correct_features=True)[1] for _ in range(20)]
        assert any("over pairs of different features" in (reason or "") for reason in reasons)
