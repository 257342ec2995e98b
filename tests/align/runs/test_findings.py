"""Every finding at its boundary: on one side it speaks, on the other it is silent; and none without its facts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from align.closed_form.scaling import Unscaled
from align.judging.sentences import sentence
from align.judging.table import CODES
from align.runs.facts import EIGENVALUE_FLOOR, Gram, Intercept, Site, Training, gram_facts
from align.runs.findings import (
    after_the_norm,
    few_documents,
    few_rows,
    findings,
    infonce_at_chance,
    lambda_at_the_end,
    loses_to_closed_form,
    low_coverage,
    near_singular,
    no_better_than_controls,
    no_intercept,
    no_scale,
    overfit,
    retrieval_at_chance,
    sinks_dominate,
    sinks_kept,
    still_improving,
    token_explains,
)
from align.solvers import lambda_grid
from featstore.errors import FitError
from featstore.extraction.attributes import SITE_CONVENTION
from tests.support.planted import plant, rotation, spectrum_rows


def below(value: float) -> float:
    return math.nextafter(value, -math.inf)


def above(value: float) -> float:
    return math.nextafter(value, math.inf)


def masks(masked: float | None, kept: float | None) -> dict[str, Any]:
    return {"masked": {"cka_debiased": masked}, "kept": {"cka_debiased": kept}}


def chance(infonce: float) -> dict[str, float]:
    return {"infonce": infonce, "infonce_chance": 4.0}


def last(convention: str | None, layer: int = 32) -> list[Site]:
    return [Site("llama", layer, 32, convention), Site("mistral", 16, 32, convention)]


OPTIMUM = {"name": "affine ridge", "r2": 0.5}
CONTROLS = {"mean": {"r2": 0.0}, "identity": None, "random_rotation": {"r2": None}, "shuffled": {"r2": 0.25}}
WEAKEST, STRONGEST = float(lambda_grid()[0]), float(lambda_grid()[-1])

#: Check, the facts just beyond the boundary, the facts on it, code, and what the message names.
BOUNDARIES: dict[str, tuple[Any, tuple[Any, ...], tuple[Any, ...], str, tuple[str, ...]]] = {
    "few rows": (few_rows, (159, 16), (160, 16), "few-rows", ("159", "160 are wanted")),
    "gram: rows": (
        near_singular,
        (Gram(16, 16, math.inf, 0.0),),
        (Gram(17, 16, 1e3, 0.0),),
        "near-singular",
        ("at most 15 of 16",),
    ),
    "gram: directions": (
        near_singular,
        (Gram(5000, 100, 1e9, above(0.01)),),
        (Gram(5000, 100, 1e9, 0.01),),
        "near-singular",
        ("1.0% of the 100", "reduced-rank"),
    ),
    "scale: too large": (
        no_scale,
        (Unscaled(below(0.8), 0.5, 0.5),),
        (Unscaled(0.8, 0.5, 0.51),),
        "no-scale",
        ("least squares gives it 0.8,", "from 0.500 to 0.500", "leave out --no-scale"),
    ),
    "scale: too small": (
        no_scale,
        (Unscaled(above(1.25), None, None),),
        (Unscaled(1.25, None, None),),
        "no-scale",
        ("1.25:",),
    ),
    "scale: R2": (
        no_scale,
        (Unscaled(1.1, 0.25, above(0.26)),),
        (Unscaled(1.1, 0.25, 0.26),),
        "no-scale",
        ("1.1", "from 0.250 to 0.260"),
    ),
    "intercept": (
        no_intercept,
        (Intercept(0.25, above(0.26)),),
        (Intercept(0.25, 0.26),),
        "no-intercept",
        ("0.250 and 0.260 with an intercept", "--type affine"),
    ),
    "intercept: nothing varies": (
        no_intercept,
        (Intercept(0.0, 1.0),),
        (Intercept(math.nan, math.nan),),
        "no-intercept",
        (),
    ),
    "coverage: source": (low_coverage, ((below(0.8), 1.0),), ((0.8, 1.0),), "coverage", ("80%",)),
    "coverage: target": (low_coverage, ((1.0, 0.5),), ((1.0, 0.8),), "coverage", ("50%",)),
    "norm: foreign": (
        after_the_norm,
        (last("hidden_states[-1]"),),
        (last("hidden_states[-1]", 31),),
        "after-final-norm",
        ("layer 32 is the last of llama", "says 'hidden_states[-1]'", "layers below it"),
    ),
    "norm: unsaid": (after_the_norm, (last(None),), (last(None, 31),), "after-final-norm", ("does not say",)),
    "norm: ours": (after_the_norm, (last(""),), (last(SITE_CONVENTION),), "after-final-norm", ()),
    "sinks kept": (sinks_kept, (True,), (False,), "sinks-kept", ("--keep-sinks",)),
    "sinks: rise": (
        sinks_dominate,
        (masks(0.5, 0.625),),
        (masks(0.0, 0.1),),
        "sink-dominated",
        ("0.500 with attention sinks masked and 0.625 with them in",),
    ),
    "sinks: fall": (sinks_dominate, (masks(above(0.1), 0.0),), (masks(0.1, 0.0),), "sink-dominated", ()),
    "infonce": (infonce_at_chance, (chance(3.6),), (chance(below(3.6)),), "infonce-at-chance", ("3.60 is near 4.00",)),
    "overfit: test": (
        overfit,
        (0.1, 0.1, -1e-9),
        (0.1, 0.0, 0.0),
        "overfit",
        ("from 0.100 on train to 0.100 on validation and -0.000 on test",),
    ),
    "overfit: validation": (overfit, (0.75, 0.625, 0.75), (0.75, 0.6875, 0.75), "overfit", ("0.625 on validation",)),
    "overfit: no test": (overfit, (0.75, 0.5, None), (None, 0.5, 0.5), "overfit", ("to 0.500 on validation;",)),
    "closed form": (
        loses_to_closed_form,
        (below(0.49), OPTIMUM),
        (0.49, OPTIMUM),
        "loses-to-closed-form",
        ("0.490 is below the affine ridge optimum 0.500", "learning rate"),
    ),
    "controls": (
        no_better_than_controls,
        (0.26, CONTROLS),
        (above(0.26), CONTROLS),
        "no-better-than-controls",
        ("shuffled, 0.250",),
    ),
    "retrieval": (retrieval_at_chance, (below(3 / 512), 1 / 512), (3 / 512, 1 / 512), "retrieval-at-chance", ()),
    "lambda: strongest": (
        lambda_at_the_end,
        (STRONGEST,),
        (below(STRONGEST),),
        "lambda-at-grid-end",
        ("strongest ridge", "lambda 10"),
    ),
    "lambda: weakest": (lambda_at_the_end, (WEAKEST,), (above(WEAKEST),), "lambda-at-grid-start", ("lambda 1e-06",)),
    "improving": (
        still_improving,
        (Training(10, 10, 10),),
        (Training(9, 10, 10),),
        "still-improving",
        ("--epochs 20", "epoch 10"),
    ),
    # Patience ended it: the best epoch may be the last one run without being the last one allowed.
    "improving: stopped": (still_improving, (Training(3, 3, 3),), (Training(3, 3, 10),), "still-improving", ()),
}


@pytest.mark.parametrize("case", BOUNDARIES)
def test_a_finding_at_its_boundary(case: str) -> None:
    check, beyond, on, code, words = BOUNDARIES[case]
    [found] = check(*beyond)
    assert found["code"] == code
    assert [word for word in words if word not in sentence(found)] == []
    assert found["limits"] == dict(CODES[code].limits)
    assert list(check(*on)) == []


NOTHING: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "no gram": (near_singular, (None,)),
    "no sites": (after_the_norm, ((),)),
    "no masks": (sinks_dominate, ({},)),
    "one mask": (sinks_dominate, ({"masked": {"cka_debiased": 0.9}, "kept": None},)),
    "an undefined cka": (sinks_dominate, (masks(0.9, None),)),
    "no contrastive loss": (infonce_at_chance, ({"mse": 1.0},)),
    "no held-out rows": (overfit, (0.9, None, None)),
    "no optimum": (loses_to_closed_form, (0.1, None)),
    "an undefined optimum": (loses_to_closed_form, (0.1, {"name": "x", "r2": None})),
    "an undefined map": (loses_to_closed_form, (None, OPTIMUM)),
    "no controls": (no_better_than_controls, (0.1, {"mean": None})),
    "nothing to control": (no_better_than_controls, (None, CONTROLS)),
    "no gallery": (retrieval_at_chance, (None, None)),
    "an undefined rank": (retrieval_at_chance, (None, 0.1)),
    "no ridge": (lambda_at_the_end, (None,)),
    "no training": (still_improving, (None,)),
    "no epochs": (still_improving, (Training(0, 0, 0),)),
}


@pytest.mark.parametrize("case", NOTHING)
def test_what_nobody_measured_is_no_finding(case: str) -> None:
    check, facts = NOTHING[case]
    assert list(check(*facts)) == []


def test_a_weak_ridge_is_a_note_and_a_strong_one_a_warning() -> None:
    assert [f["level"] for lam in (WEAKEST, STRONGEST) for f in lambda_at_the_end(lam)] == ["note", "warning"]


def test_a_control_that_leaves_no_error_cannot_be_beaten() -> None:
    assert list(no_better_than_controls(1.0, {**CONTROLS, "identity": {"r2": 1.0}})) == []
    assert list(no_better_than_controls(0.95, {**CONTROLS, "identity": {"r2": 0.95}})) != []


def test_the_controls_do_not_include_the_optimum() -> None:
    assert list(no_better_than_controls(0.5, {**CONTROLS, "closed_form": {"r2": 0.9}})) == []


class TestGram:
    def test_eigenvalues_of_a_known_spectrum(self) -> None:
        basis, values = rotation(4, 1), np.array([4.0, 1.0, 0.5, 1e-9])
        facts = gram_facts(basis @ np.diag(values) @ basis.T, 100)
        assert (facts.n, facts.width, facts.below) == (100, 4, 0.25)
        assert facts.condition == pytest.approx(4e9, rel=1e-3)
        assert gram_facts(values, 100).below == 0.25
        assert gram_facts(np.array([0.0, 1.0]), 100).condition == math.inf

    def test_the_floor(self) -> None:
        assert gram_facts([EIGENVALUE_FLOOR, 1.0], 9).below == 0.5
        assert gram_facts([above(EIGENVALUE_FLOOR), 1.0], 9).below == 0.0

    @pytest.mark.parametrize("gram", [np.zeros((0, 0)), np.zeros((2, 3)), np.full((2, 2), np.nan), np.zeros((2, 2, 2))])
    def test_what_is_no_gram_matrix_is_refused(self, gram: Any) -> None:
        with pytest.raises(FitError, match="Gram matrix of shape"):
            gram_facts(gram, 10)

    def test_rows_of_a_few_directions_are_near_singular(self, tmp_path: Any) -> None:
        from align.layers import layer_pairs
        from align.moments.scan import scan
        from align.moments.scatter import centered

        x = spectrum_rows(2000, 16, 1)
        for name, rows, fires in (("full", x, False), ("flat", x[:, :12] @ rotation(12, 3, 16), True)):
            store = plant(tmp_path / f"{name}.zarr", rows, x).store
            wanted = layer_pairs(store, "a", "b")
            [moments] = scan(store, store.pairs("a", "b").select(), wanted).values()
            facts = gram_facts(centered(moments.train).gx, moments.train.n)
            assert bool(list(near_singular(facts))) == fires
            assert (facts.below == 0.25) == fires


def test_everything_together_in_one_order() -> None:
    entry = {
        "train": {"r2": 0.9},
        "val": {"r2": 0.1},
        "test": {"r2": 0.1, "partial_r2": -0.5, "retrieval_top1": 0.0, "retrieval_chance": 0.01},
        "baselines": {**CONTROLS, "token": {"r2": 0.4}, "closed_form": OPTIMUM},
        "by_mask": masks(0.1, 0.9),
    }
    facts: dict[str, Any] = {"parts": chance(4.0), "n_train": 10, "width": 16, "coverage": (0.1, 0.1)}
    beside = {"gram": Gram(10, 16, 1.0, 0.0), "sites": last(None), "lam": 10.0, "training": Training(2, 2, 2)}
    beside["documents"] = 4
    found = findings(entry=entry, keep_sinks=True, pair="a:1->b:2", **facts, **beside)
    assert {f["where"]["pair"] for f in found} == {"a:1->b:2"}
    assert [f["code"] for f in found] == [
        "few-rows", "near-singular", "coverage", "after-final-norm", "sinks-kept", "sink-dominated",
        "infonce-at-chance", "overfit", "loses-to-closed-form", "no-better-than-controls", "token-explains",
        "retrieval-at-chance", "lambda-at-grid-end", "still-improving", "few-documents",
    ]  # fmt: skip
    # What an entry need not have, and what a run does not know, is no finding.
    small = {"train": None, "val": {}, "test": {"r2": 0.5}}
    assert findings(entry=small, parts={}, n_train=160, width=16, coverage=(1.0, 1.0), keep_sinks=False) == []


def explained(r2: float, token: float | None, partial: float | None, interval: Any = None) -> list[str]:
    block = None if token is None else {"r2": token}
    return list(map(sentence, token_explains({"r2": r2, "partial_r2": partial, "partial_r2_ci95": interval}, block)))


@pytest.mark.parametrize(
    ("r2", "token", "partial", "interval", "says"),
    [
        (0.446, 0.653, -0.6, [-0.7, -0.5], ["0.446", "0.653", "-0.600 [-0.700, -0.500]"]),
        # Above the margin, and not told from nothing.
        (0.70, 0.65, 0.14, [-0.02, 0.3], ["0.140"]),
        (0.653, 0.65, 0.009, [0.005, 0.012], ["0.009"]),
        (0.653, 0.65, 0.009, None, ["0.009"]),
        (1.0, 1.0, None, None, ["nothing is left"]),
    ],
)
def test_what_the_token_explains_is_said_with_both_figures(
    r2: float, token: float, partial: float | None, interval: Any, says: list[str]
) -> None:
    [message] = explained(r2, token, partial, interval)
    assert all(words in message for words in says)


@pytest.mark.parametrize(
    ("r2", "token", "partial", "interval"),
    [
        (0.80, 0.60, 0.5, [0.4, 0.6]),
        (0.80, 0.60, 0.5, None),
        (0.5, None, None, None),
        # Nobody summed by document, so nothing is known of what is left.
        (0.5, 0.6, None, None),
    ],
)
def test_what_is_left_beyond_the_token_is_no_finding(
    r2: float, token: float | None, partial: float | None, interval: Any
) -> None:
    assert explained(r2, token, partial, interval) == []


@pytest.mark.parametrize(
    ("documents", "words"), [(1, "1 document, and an interval takes 3"), (2, "no figure can be told"), (9, "wide")]
)
def test_few_documents_are_said_to_be_few(documents: int, words: str) -> None:
    [finding] = few_documents(documents)
    assert finding["code"] == "few-documents"
    assert words in sentence(finding)


@pytest.mark.parametrize("documents", [10, 1000, None])
def test_enough_documents_are_no_finding(documents: int | None) -> None:
    assert list(few_documents(documents)) == []
